"""Runs side by side, as pictures of what they make."""

import math
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from analysis.runs import Row, Runs
from analysis.store import fetch_artifact
from dpsink.console import metric_text
from dpsink.errors import InputError
from tune import schema

if TYPE_CHECKING:  # its import takes a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # panels in a row
PANEL = (3.2, 4.1)  # inches
MOST_PIXELS = 4_000_000  # of a run's samples
LINES = (  # what stands under a panel: metric and its name, two to a line
    (("fid", "FID"), ("accuracy", "accuracy")),
    (("accuracy_logreg", "logreg"), ("accuracy_cnn", "CNN")),
    (("variety", "variety"), ("recall", "recall")),
)


def comparison_figure(runs: Runs, panels: Mapping[str, Row], *, title: str) -> "Figure":
    """Samples of runs, and under them what they cost and what they are worth on validation.

    Args:
        panels: for example `best by FID` to its row of `runs.accepted`.
        title: stands above all.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (PANEL[0] * columns, PANEL[1] * rows + 0.6)
    figure = Figure(size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, run) in zip(axes, panels.items(), strict=False):
        _draw(axis, name, run, grid_of(runs, run))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def grid_of(runs: Runs, run: Row) -> "Image.Image | None":
    """The samples that MLflow shows of a run; None if it has none.

    Raises:
        InputError: what it shows is no PNG, is far larger than samples are, or cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_artifact(runs.tracking_uri, run["run_id"], schema.GRID_ARTIFACT, Path(folder))
        return _open_png(path, run) if path else None


def _open_png(path: Path, run: Row) -> "Image.Image":
    """Whoever writes to MLflow decides what lies there: nothing but the pixels of a PNG is taken."""
    what = f"{schema.GRID_ARTIFACT} of trial {run['trial']}"
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise InputError(f"{what} has {picture.width} × {picture.height} pixels, too many for samples")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # all that Pillow says of broken files
        raise InputError(f"{what} is no PNG that can be read") from None


def _draw(axis: "Axes", name: str, run: Row, grid: "Image.Image | None") -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(textwrap.fill(name, 34), fontsize=10, fontweight="bold")
    axis.set_xlabel(_caption(run), fontsize=9, linespacing=1.5)
    if grid is None:
        axis.text(0.5, 0.5, "no samples", ha="center", transform=axis.transAxes, color="grey")
    else:
        axis.imshow(grid, interpolation="none")


def _caption(run: Row) -> str:
    lines = [f"{run['trial']} · ε = {_number(run, 'epsilon')}"]
    for line in LINES:
        lines.append(" · ".join(f"{label} {_number(run, metric)}" for metric, label in line))
    return "\n".join(lines)


def _number(run: Row, metric: str) -> str:
    return metric_text(run.get(metric))
