"""What studies promise: their ledgers' statements, from wherever they are at hand, and what covers a choice among all.

Whoever picks a generator by the results of several studies has released what all of them gave. By basic composition
(Dwork and Roth 2014, Theorem 3.16) their ε add up, and so do their δ.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from analysis.runs import Runs, StudyFacts, file_of
from analysis.store import fetch_artifact
from dpsink.records import STATEMENT, read_json
from tune import schema

Statement = Mapping[str, Any]
TOGETHER = "basic composition of the studies' own claims, which stand under `studies`"
LISTS = ("accountants", "assumptions", "not_covered")


def statement_of(runs: Runs, study: StudyFacts) -> Statement:
    """A study's statement: MLflow's file; else the study folder's; else the single values that its run is tagged with.

    Returns:
        Empty if there is none anywhere.

    Raises:
        InputError: it cannot be read.
    """
    with TemporaryDirectory() as scratch:
        path = fetch_artifact(runs.tracking_uri, study.run_id, schema.STATEMENT_ARTIFACT, Path(scratch))
        path = path or file_of(study, STATEMENT)
        return read_json(path) if path else study.statement


def covering(runs: Runs) -> Statement:
    """The statement of all that a choice among the runs has looked at: the study's, or the composition of several.

    Returns:
        Empty if a single study has none. Of several: `study_epsilon` is None, no claim, where one has none.

    Raises:
        InputError: one cannot be read.
    """
    told = {study.name: statement_of(runs, study) for study in runs.studies}
    return _composed(runs, told) if len(told) > 1 else told[runs.name]


def together(runs: Runs, told: Mapping[str, Statement]) -> tuple[float, float] | None:
    """ε and δ of several studies together, by basic composition; None where one of them claims nothing.

    Args:
        told: name of a study to its statement.
    """
    counted = _counted(runs, told)
    if any(one.get(name) is None for one in counted for name in ("study_epsilon", "study_delta")):
        return None
    epsilon, delta = (math.fsum(float(one[name]) for one in counted) for name in ("study_epsilon", "study_delta"))
    return epsilon, delta


def uncovered(study: str) -> str:
    """What a card says where there is no statement."""
    return f"the selection among the trials of study {study}: no statement of the study was found"


def _counted(runs: Runs, told: Mapping[str, Statement]) -> list[Statement]:
    """Those that add up: a study that repeats another one here has that one's claim in its own."""
    repeated = {study.repeats for study in runs.studies}
    return [told[study.name] for study in runs.studies if study.study_id not in repeated]


def _composed(runs: Runs, told: Mapping[str, Statement]) -> dict[str, Any]:
    """In the form of a study's own statement."""
    promise, each, counted = together(runs, told), told.values(), _counted(runs, told)
    read = all("spent" in one for one in counted)
    missing = [uncovered(name) for name, one in told.items() if not one]
    lists = {name: list(dict.fromkeys(text for one in each for text in one.get(name, ()))) for name in LISTS}
    return {
        "policy": _joined(one.get("policy") for one in each),
        "trial_epsilon": _plain(max(study.target_epsilon for study in runs.studies)),
        "trial_delta": runs.study.delta,
        "study_epsilon": _plain(promise[0]) if promise else None,
        "study_delta": promise[1] if promise else None,
        "guarantee": TOGETHER,
        "spent": _plain(math.fsum(float(one["spent"]) for one in counted)) if read else None,
        **lists,
        "not_covered": [*missing, *lists["not_covered"]],
        "non_private": any(one.get("non_private") for one in each),
        "adjacency": _joined(one.get("adjacency") for one in each),
        "studies": dict(told),
    }


def _joined(texts: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(str(text) for text in texts if text))


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
