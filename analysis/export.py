"""Takes a chosen run out of its study: a folder that stands alone, with its privacy card.

    config.yaml                     the trial
    model.safetensors, state.json   the generator, for `dpsink.checkpoint.load_generator`
    samples.png                     what it makes
    card.json                       its privacy, its metrics, where it comes from
    statement.json                  the study's privacy statement, which covers the selection; that of all studies, if
                                    it was chosen among several
    requirements.txt                the packages that it was made with

Nothing in it came from outside the privacy budget: the optimiser's state stays where it is.
"""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from analysis.runs import Row, Runs, metrics_of
from analysis.statements import Statement, covering, uncovered
from dpsink.checkpoint import load_generator
from dpsink.config import config_sha256, dump_config
from dpsink.disk import CARD, check_target, drafted
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.records import STATEMENT, CheckpointState, latest_checkpoint, read_state
from tune import schema

REQUIREMENTS = "requirements.txt"
FROM_CHECKPOINT = ("model.safetensors", "state.json", schema.GRID_ARTIFACT)
FILES = (*FROM_CHECKPOINT, schema.CONFIG_ARTIFACT, CARD, REQUIREMENTS)  # what every export has
PACKAGES = ("dpsink", "torch", "torchvision", "safetensors", "numpy", "mlflow")


def export_run(runs: Runs, run: Row, out: Path, *, selected_by: str, force: bool = False) -> Path:
    """Exports one run as a folder, whole or not at all.

    Args:
        run: a row of `runs.accepted`; of the others only one that is NON-PRIVATE, which its card says.
        out: the folder to make.
        selected_by: what the run was chosen for; stands in its card.
        force: replace an earlier export.

    Raises:
        InputError: `out` exists, the run may not be taken, its files are not here, or are of another trial.
    """
    check_target(out, force=force)
    check_run(run)
    checkpoint = checkpoint_of(run)
    with drafted(out) as draft:
        draft.mkdir()
        for name in FROM_CHECKPOINT:
            _copy(checkpoint / name, draft / name)
        check_picture(draft / schema.GRID_ARTIFACT)
        _, description = load_generator(draft)  # what leaves the house is known to work
        (draft / schema.CONFIG_ARTIFACT).write_text(dump_config(description.config), encoding="utf-8")
        (draft / REQUIREMENTS).write_text(_requirements(), encoding="utf-8")
        card = _card(runs, run, description, selected_by)
        # Picking this run was a release too: what covers it takes the place of the trial's own.
        card["statement"] = covering(runs) or _own(run, card["statement"])
        _write(draft / STATEMENT, card["statement"])
        _write(draft / CARD, card)
    return out


def _copy(source: Path, target: Path) -> None:
    """A file of the run's own: a link could lead to anything that this user can read, and it would be shipped."""
    if source.is_symlink():
        raise InputError(f"{source}: is a link; a checkpoint holds files of its own: restore it from a backup")
    shutil.copyfile(source, target)


def check_picture(path: Path) -> None:
    """Makes sure that a grid of samples is a picture, and nothing else under its name.

    Raises:
        InputError: it is no PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: is no PNG ({' '.join(str(error).split())})") from None


def default_folder(runs: Runs) -> Path:
    """exports/STUDY."""
    return Path("exports") / as_file_name(runs.name)


def as_file_name(name: str) -> str:
    """A name that MLflow gives is no path."""
    return re.sub(r"[^\w.+-]|^\.+", "_", name)


def check_run(run: Row) -> None:
    """A run that may not be compared may not be shipped either; one without privacy may, under that label.

    Raises:
        InputError: so it is.
    """
    reason = run.get("reason")
    if isinstance(reason, str) and reason != NON_PRIVATE:
        raise InputError(f"trial {run['trial']} is set apart ({reason}) and is not exported; choose another")


def checkpoint_of(run: Row) -> Path:
    """The last checkpoint of a run.

    Raises:
        InputError: it is not here, or is of another trial.
    """
    folder = Path(run["folder"])
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"files of trial {run['trial']} are not at {folder}; run this where the study's storage is")
    if config_sha256(read_state(checkpoint).config) != run["config_sha256"]:
        raise InputError(f"{checkpoint}: holds another trial than {run['trial']}; was its storage moved?")
    return checkpoint


def _requirements() -> str:
    """The packages that make images of the folder, as they are here; a build's own suffix is no version to ask for."""
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in PACKAGES)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def _own(run: Row, told: Statement) -> Statement:
    """The study's statement as the run's folder has it; else the trial's own, which says that it speaks of no more."""
    if (Path(run["folder"]) / STATEMENT).exists():
        return told
    alone = {"study_epsilon": None, "study_delta": None, "guarantee": "of this trial alone, had nothing been selected"}
    return {**told, **alone, "not_covered": [uncovered(run["study"]), *told["not_covered"]]}


def _card(runs: Runs, run: Row, description: CheckpointState, selected_by: str) -> dict[str, Any]:
    from dpsink.judging import privacy_card

    return {
        **privacy_card(Path(run["folder"]), description),
        "study": run["study"],
        "study_id": runs.study_of(run).study_id,
        "trial": run["trial"],
        "run_id": run["run_id"],
        "metrics": metrics_of(run),
        "selected_by": selected_by,
    }
