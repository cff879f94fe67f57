"""Which run is best. Ties go to the run that spent less ε, then to the first by name."""

from collections.abc import Sequence

from analysis.runs import Row, Runs, metrics_of, rows_of
from dpsink.config import nearest
from dpsink.errors import InputError
from tune import schema

FROM_FEATURES = frozenset({"fid", "kid", "precision", "recall"})  # mean nothing across extractors


def select_best(runs: Runs, by: str = "fid", *, role: str = schema.ROLE_SEARCH) -> Row:
    """The best accepted run by a metric.

    Args:
        by: a quality metric, `test_` ones included; FID and KID are minimised, the others maximised.
        role: `search`, or `baseline`: the two are never ranked together, a baseline was not selected.

    Raises:
        InputError: an unknown metric, or no run of that role has it.
    """
    candidates = rows_of(runs.accepted, role)
    if not candidates:
        told = f" ({runs.rejected_counts})" if len(runs.rejected) else ""
        raise InputError(f"study '{runs.study.name}' has no accepted run of role {role}{told}; let it go on")
    return rank(candidates, by)[0]


def rank(runs: Sequence[Row], by: str) -> list[Row]:
    """The runs that have the metric, best first.

    Raises:
        InputError: an unknown metric, none has it, or their extractors differ.
    """
    known = {name for run in runs for name in metrics_of(run)}
    if by not in known:
        raise InputError(f"no run has the metric '{by}'{nearest(by, known)}")
    having = [run for run in runs if by in metrics_of(run)]
    if by.removeprefix(schema.TEST_PREFIX) in FROM_FEATURES and len({run["fid_extractor"] for run in having}) > 1:
        raise InputError(f"'{by}' of runs with different FID extractors cannot be ranked; rank by accuracy")
    sign = 1 if schema.mode_of(by) == "min" else -1
    return sorted(having, key=lambda run: (sign * run[by], run[schema.EPSILON], run["trial"]))


def baselines(runs: Runs) -> list[Row]:
    """The accepted baselines, by name."""
    return rows_of(runs.accepted, schema.ROLE_BASELINE)
