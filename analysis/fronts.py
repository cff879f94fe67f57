"""Configurations that none beats in everything, and how much of the space they take."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.conditions import meeting
from analysis.rules import called, check_selects, losses_of
from analysis.runs import Runs
from analysis.selection import configurations, left_out_in_words
from dpsink.config import nearest
from dpsink.errors import InputError
from tune import schema

METRICS = ("fid", "accuracy", schema.EPSILON)
Losses = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (points, metrics), each to be minimised


def pareto(
    runs: Runs,
    metrics: Sequence[str] = METRICS,
    *,
    reference: Mapping[str, float] | None = None,
    epsilon: float | None = None,
    where: Sequence[str] = (),
) -> pd.DataFrame:
    """The searched configurations, those on the Pareto front first.

    Args:
        metrics: two or three quality metrics, or `epsilon`; FID, KID and ε are minimised, the others maximised.
        reference: metric to the value beyond which a point counts nothing. By default the worst value that a
            configuration has; name it to compare the hypervolumes of studies.
        epsilon, where: as for `best`.

    Returns:
        As `configurations`, with `on_front` as its first column. `attrs` hold `metrics`; `reference`; `hypervolume`,
        of what the front dominates up to the reference, in the metrics' own units; and `share`, that volume over the
        box between the reference and the best value of each metric: 1 if one configuration is best in everything; and
        `note`, how many have not all of the metrics.

    Raises:
        InputError: an unknown metric or one on test, fewer than two or more than three, nothing to compare.
    """
    _check(metrics)
    all_of_them = meeting(configurations(runs), where, epsilon)
    found = all_of_them.dropna(subset=list(metrics))
    if found.empty:
        raise InputError(f"no configuration has all of {', '.join(metrics)}")
    losses = np.stack([losses_of(found, metric) for metric in metrics], axis=1)
    worst = _reference(metrics, losses, reference or {})
    found.insert(0, "on_front", non_dominated(losses))
    volume = hypervolume(losses, worst)
    box = float(np.prod(np.maximum(worst - losses.min(axis=0), 0)))
    signs = [losses_of(pd.DataFrame({metric: [1.0]}), metric)[0] for metric in metrics]
    sorted_by = ["on_front", metrics[0]]
    made = found.sort_values(sorted_by, ascending=[False, signs[0] > 0], kind="stable").reset_index(drop=True)
    made.attrs = {
        "metrics": tuple(metrics),
        "reference": {metric: float(sign * limit) for metric, sign, limit in zip(metrics, signs, worst, strict=True)},
        "hypervolume": volume,
        "share": volume / box if box else float("nan"),
        "note": left_out_in_words(len(all_of_them) - len(found), len(all_of_them), metrics),
    }
    return made


def non_dominated(losses: Losses) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Which points no other point beats: as good in everything, better in something. Equal points stay together."""
    kept = np.zeros(len(losses), dtype=bool)
    front: list[int] = []
    for index in np.lexsort(losses.T[::-1]):  # who dominates a point comes before it
        others = losses[front]
        beaten = (others <= losses[index]).all(axis=1) & (others < losses[index]).any(axis=1)
        if not beaten.any():
            front.append(int(index))
    kept[front] = True
    return kept


def hypervolume(losses: Losses, reference: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    """Volume of what the points dominate, up to the reference, by slices along the last metric; exact."""
    inside = losses[(losses < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if losses.shape[1] == 1:
        return float(reference[0] - inside.min())
    inside = inside[non_dominated(inside)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    edges = [*inside[:, -1], reference[-1]]
    return sum(
        (edges[count] - edges[count - 1]) * hypervolume(inside[:count, :-1], reference[:-1])
        for count in range(1, len(edges))
    )


def pareto_in_words(found: pd.DataFrame) -> str:
    """How large the front is, and what its hypervolume was measured against."""
    told = found.attrs
    reference = ", ".join(f"{called(metric)} {value:.4g}" for metric, value in told["reference"].items())
    share = "" if math.isnan(told["share"]) else f": {told['share']:.0%} of the box to the best of each"
    return (
        f"{found['on_front'].tolist().count(True)} of {len(found)} configurations are on the front; hypervolume "
        f"{told['hypervolume']:.4g} up to {reference}{share}{told['note'] and '; '}{told['note']}"
    )


def _check(metrics: Sequence[str]) -> None:
    known = (schema.EPSILON, *schema.QUALITY)
    for metric in metrics:
        check_selects(metric)
        if metric not in known:
            raise InputError(f"no metric '{metric}'{nearest(metric, known)}")
    if not 2 <= len(set(metrics)) == len(metrics) <= 3:
        raise InputError(f"metrics {', '.join(metrics)}: give two or three different ones")


def _reference(metrics: Sequence[str], losses: Losses, given: Mapping[str, float]) -> Any:
    """As losses; what is not given is the worst that was found."""
    for metric in given:
        if metric not in metrics:
            raise InputError(f"reference '{metric}' is none of the metrics compared: {', '.join(metrics)}")
    worst = losses.max(axis=0)
    for column, metric in enumerate(metrics):
        if metric in given:
            worst[column] = losses_of(pd.DataFrame({metric: [given[metric]]}), metric)[0]
    return worst
