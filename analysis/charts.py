"""Pictures of a study's numbers: what can be had together, what made the difference, what held."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.effects import MATTERS, UNCLEAR
from analysis.fronts import pareto_in_words
from analysis.rules import called
from analysis.runs import Row, rows_of

if TYPE_CHECKING:  # its import takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK, MIDDLE, LIGHT, ACCENT = "0.15", "0.45", "0.75", "#b3261e"
LOG_FROM = 20  # largest over smallest value from which an axis is logarithmic


def pareto_figure(found: pd.DataFrame, control: Row | None = None) -> "Figure":
    """The configurations in the first two metrics, coloured by the third; those on the front stand out.

    Args:
        found: from `pareto`.
        control: the class-mean control, to be shown with them.
    """
    figure, axes = _sheet((7.4, 5.2))
    x, y, *colour = found.attrs["metrics"]
    front, others = (pd.DataFrame(found[found["on_front"] == side]) for side in (True, False))
    axes.scatter(others[x], others[y], s=14, color=LIGHT, label="dominated", zorder=2)
    shade: dict[str, Any] = {"c": front[colour[0]], "cmap": "viridis"} if colour else {"color": DARK}
    points = axes.scatter(
        front[x], front[y], s=44, edgecolors="black", linewidths=0.7, label=_front_called(front, x), zorder=3, **shade
    )
    if colour:
        figure.colorbar(points, ax=axes).ax.set_title(called(colour[0]), fontsize=10)
    if control is not None and np.isfinite([control[x], control[y]]).all():
        axes.scatter([control[x]], [control[y]], marker="X", s=70, color=ACCENT, label="class-mean control", zorder=4)
    for metric, scale in ((x, axes.set_xscale), (y, axes.set_yscale)):
        low, high = np.quantile(found[metric], (0, 1))
        if low > 0 and high > LOG_FROM * low:
            scale("log")
    axes.set(xlabel=called(x), ylabel=called(y))
    return _finished(figure, pareto_in_words(found))


def importance_figure(found: pd.DataFrame) -> "Figure":
    """What share of a metric's variation each parameter explains, with 5 % to 95 % of the resamples.

    Args:
        found: from `importance`.
    """
    figure, axes = _sheet((7.4, 1.6 + 0.42 * len(found)))
    rows = rows_of(found)
    shades = {MATTERS: DARK, UNCLEAR: MIDDLE}
    for name, offset, marker in (("fanova", -0.13, "o"), ("ped_anova", 0.13, "D")):
        for place, row in enumerate(rows):
            color = shades.get(row["verdict"], LIGHT)
            low, middle, high = row[f"{name}_low"], row[name], row[f"{name}_high"]
            axes.plot([low, high], [place + offset] * 2, color=color, linewidth=1.6)
            axes.plot([middle], [place + offset], marker, color=color, markersize=6)
    for marker, label in (("o", "fANOVA"), ("D", "PED-ANOVA")):
        axes.plot([], [], marker, color=DARK, label=label)
    axes.set_yticks(range(len(rows)), [f"{row['parameter']}\n{row['verdict']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"share of the variation of {called(found.attrs['metric'])}")
    return _finished(figure, found.attrs["note"] or f"{found.attrs['configurations']} configurations")


def verdict_figure(found: pd.DataFrame) -> "Figure":
    """What each generator was selected by, and what it is worth to fresh samples on test.

    Below it what its configuration is worth when it is trained again, where it was.

    Args:
        found: from `evaluate_top`.
    """
    figure, axes = _sheet((7.4, 2.2 + 0.4 * len(found)))
    rows = rows_of(found)
    for place, row in enumerate(rows):
        axes.plot([row["judged_low"], row["judged_high"]], [place] * 2, color=DARK, linewidth=2)
    places = range(len(rows))
    axes.plot(found["judged"], places, "o", color=DARK, markersize=7, label="judged on test, 95 % interval")
    axes.plot(found["selected"], places, "D", color=ACCENT, markerfacecolor="none", label="selected on validation")
    _retrained(axes, rows)
    axes.set_yticks(places, [f"{row['rank']}. {row['trial']}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(found.attrs["value"])
    return _finished(figure, " ".join(found.attrs["words"][2:3]))


def _retrained(axes: "Axes", rows: Sequence[Row]) -> None:
    """A line lower, so that it does not cover what was judged."""
    again = [(place + 0.25, row) for place, row in enumerate(rows) if row.get("trainings")]
    for height, row in again:
        axes.plot([row["retrained_low"], row["retrained_high"]], [height] * 2, color=MIDDLE, linewidth=2)
    if again:
        means = [row["retrained"] for _, row in again]
        axes.plot(means, [height for height, _ in again], "s", color=MIDDLE, label="trained again, mean and interval")


def _sheet(size: tuple[float, float]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    return figure, axes


def _finished(figure: "Figure", text: str) -> "Figure":
    """What it shows above, and the legend below, where it covers nothing."""
    figure.suptitle(textwrap.fill(text.strip(), 100), fontsize=9, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _front_called(front: pd.DataFrame, x: str) -> str:
    """The front and the trials at its ends; names beside crowded points would cover them."""
    first, last = front.loc[front[x].idxmin()], front.loc[front[x].idxmax()]
    return f"front, from {first['trial']} to {last['trial']}" if len(front) > 1 else f"front: {first['trial']}"
