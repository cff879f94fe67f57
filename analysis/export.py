"""Takes a chosen run out of its study: a folder that stands alone, with its privacy card.

    config.yaml                     the trial
    model.safetensors, state.json   the generator, for `dpsink.checkpoint.load_generator`
    samples.png                     what it makes
    card.json                       its privacy, its metrics, where it comes from
    statement.json                  the study's privacy statement, which covers the selection

Nothing in it came from outside the privacy budget: the optimiser's state stays where it is.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis.runs import Row, Runs, metrics_of
from analysis.store import fetch_artifact
from dpsink.checkpoint import load_generator
from dpsink.config import config_sha256, dump_config
from dpsink.errors import InputError
from dpsink.records import CheckpointState, latest_checkpoint, read_json, read_state
from tune import schema

CARD = "card.json"
FROM_CHECKPOINT = ("model.safetensors", "state.json", schema.GRID_ARTIFACT)


def export_run(runs: Runs, run: Row, out: Path, *, selected_by: str, force: bool = False) -> Path:
    """Exports one run as a folder, whole or not at all.

    Args:
        run: a row of `runs.accepted`.
        out: the folder to make.
        selected_by: what the run was chosen for; stands in its card.
        force: replace an earlier export.

    Raises:
        InputError: `out` exists, the run's files are not here, or are of another trial.
    """
    check_target(out, force=force)
    checkpoint, study = checkpoint_of(run), runs.study_of(run)
    with drafted(out) as draft:
        draft.mkdir()
        for name in FROM_CHECKPOINT:
            shutil.copyfile(checkpoint / name, draft / name)
        _, description = load_generator(draft)  # what leaves the house is known to work
        (draft / schema.CONFIG_ARTIFACT).write_text(dump_config(description.config), encoding="utf-8")
        statement = fetch_artifact(runs.tracking_uri, study.run_id, schema.STATEMENT_ARTIFACT, draft)
        card = _card(runs, run, description) | {"selected_by": selected_by}
        if statement:  # picking this run was a release too: the study's statement takes the place of the trial's
            card["statement"] = read_json(statement)
        (draft / CARD).write_text(json.dumps(card, indent=1, default=str) + "\n", encoding="utf-8")
    return out


def default_folder(runs: Runs) -> Path:
    """exports/STUDY; a name that MLflow gives is no path."""
    return Path("exports") / re.sub(r"[^\w.+-]|^\.+", "_", runs.name)


def check_target(out: Path, *, force: bool) -> None:
    """Refuses to overwrite, unless it is told to; and what is no export, always."""
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out}: exists; choose another place, or --force to replace it")
    if out.is_dir() and not (out / CARD).exists():
        raise InputError(f"{out}: is no export (it has no {CARD}) and is not replaced; choose another --out")


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `out` at the end, or goes away after an error."""
    draft, old = (out.with_name(f".{out.stem}.{kind}-{os.getpid()}{out.suffix}") for kind in ("draft", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if out.is_dir():  # a folder that holds files cannot be replaced in one step
            out.rename(old)
        draft.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        for leftover in (draft, old):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def _card(runs: Runs, run: Row, description: CheckpointState) -> dict[str, Any]:
    from dpsink.judging import privacy_card

    return {
        **privacy_card(Path(run["folder"]), description),
        "study": run["study"],
        "study_id": runs.study_of(run).study_id,
        "trial": run["trial"],
        "run_id": run["run_id"],
        "metrics": metrics_of(run),
    }
