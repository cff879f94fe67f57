"""Pictures of a study, for people."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from analysis.runs import Row
from dpsink.console import metric_text

if TYPE_CHECKING:  # its import takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # panels in a row
PANEL = (3.2, 4.1)  # inches
LINES = (  # what stands under a panel: metric and its name, two to a line
    (("fid", "FID"), ("variety", "variety")),
    (("accuracy_logreg", "logreg"), ("accuracy_cnn", "CNN")),
)


@dataclass(frozen=True)
class Panel:
    """One run of a comparison.

    Attributes:
        title: for example `best by FID`.
        run: its row.
        grid: its samples; None if MLflow has none.
    """

    title: str
    run: Row
    grid: Path | None


def comparison(panels: Sequence[Panel], *, title: str) -> "Figure":
    """Runs side by side: samples, and under them what they cost and what they are worth."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.6)
    figure = Figure(size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _draw(axis: "Axes", panel: Panel) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(textwrap.fill(panel.title, 34), fontsize=10, fontweight="bold")
    axis.set_xlabel(_caption(panel.run), fontsize=9, linespacing=1.5)
    if panel.grid is None:
        axis.text(0.5, 0.5, "no samples", ha="center", transform=axis.transAxes, color="grey")
        return
    with Image.open(panel.grid) as picture:
        axis.imshow(picture.convert("RGB"), interpolation="none")


def _caption(run: Row) -> str:
    lines = [f"{run['trial']} · ε = {_number(run, 'epsilon')}"]
    for line in LINES:
        lines.append(" · ".join(f"{label} {_number(run, metric)}" for metric, label in line))
    return "\n".join(lines)


def _number(run: Row, metric: str) -> str:
    return metric_text(run.get(metric))
