"""What a run folder tells in JSON: reports, how far a trial is, which checkpoint counts. Reading it takes no torch."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dpsink.config import Strict, TrialConfig
from dpsink.disk import sync
from dpsink.errors import InputError

PREFIX = "checkpoint-"
STATEMENT = "statement.json"


class Report(Strict):
    """What a trial tells at an evaluation point: functions of the private generator and of public data only.

    `budget_fraction` is charged steps over the steps allowed, the time axis that trials have in common.
    """

    step: int
    charged: int
    epsilon: float
    budget_fraction: float
    steps_per_second: float
    status: str
    metrics: dict[str, float] = Field(default_factory=dict)


class CheckpointState(Strict):
    """The JSON part of a checkpoint."""

    format: Literal[2] = 2
    config: TrialConfig
    plan: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int = Field(ge=1)
    data_fingerprint: str
    step: int = Field(ge=0)
    seconds: float = 0.0
    witness: dict[str, Any] = Field(default_factory=dict, description="the ledger as this checkpoint saw it")
    score_witness: dict[str, Any] | None = Field(default=None, description="the same of the scores' ledger")
    reports: tuple[Report, ...] = ()


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, None before the first."""
    return max(checkpoints(run), default=None)


def latest_state(run: Path) -> tuple[Path, CheckpointState] | None:
    """The newest complete checkpoint of a run with its JSON part, also while the run replaces it by the next.

    Raises:
        InputError: as `read_state`.
    """
    while checkpoint := latest_checkpoint(run):
        try:
            return checkpoint, read_state(checkpoint)
        except InputError:
            if latest_checkpoint(run) == checkpoint:
                raise
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """The JSON part of a checkpoint.

    Raises:
        InputError: missing, unreadable, or of another format.
    """
    path = checkpoint / "state.json"
    try:
        return CheckpointState.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{checkpoint}: holds no checkpoint (no state.json); give the folder of a run") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{path}: not a checkpoint of this version: {message}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """All complete checkpoint folders of a run, by step."""
    return sorted(path for path in run.glob(f"{PREFIX}*") if path.is_dir())


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file whole, durably."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that this package wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, not a {type(content).__name__}; it was edited")
    return content
