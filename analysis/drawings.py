"""Plots as shapes for a page: coordinates, and what each shape is; colours are the style sheet's, by light and dark.

Units are those of an SVG of `WIDTH`, which is a phone's: text stays legible where the picture is as wide as a page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from analysis.charts import LOG_FROM
from analysis.effects import Dimension
from analysis.fronts import pareto_in_words
from analysis.rules import called
from analysis.runs import Row, rows_of
from analysis.selection import SHOWN
from dpsink.console import metric_text
from tune import schema

WIDTH, HEIGHT = 360, 262
LEFT, RIGHT, TOP, BOTTOM = 58, 352, 8, 222  # of the axes
SHADES = 5  # of ε
ROW = 46  # height of an axis of parallel coordinates
MOST_LINES = 120  # more cannot be told apart
TOP_PART = 0.25


@dataclass(frozen=True)
class Line:
    """A polyline; `kind` is a class of the style sheet, `title` is told on hover."""

    points: tuple[tuple[float, float], ...]
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """A point; of the kind `control` it is a cross."""

    x: float
    y: float
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """Words at a place; `anchor` as in SVG; `turned` runs upwards."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    turned: bool = False


@dataclass
class Picture:
    """A plot.

    Attributes:
        title, words: its name, and what it shows, for those who do not see it too.
        legend: kind of a line or mark, and what it stands for.
    """

    title: str
    words: str
    height: int = HEIGHT
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """Values to [0, 1] and back to their names."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Iterable[float]) -> "Scale":
        """Over finite values with a margin; logarithmic where they span much."""
        found = list(values)
        low, high = min(found), max(found)
        log = low > 0 and high > LOG_FROM * low
        if log:
            margin = (high / low) ** 0.06
            return cls(low / margin, high * margin, log)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - margin, high + margin, log)

    def place(self, value: float) -> float:
        """Where a value stands."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values within."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        decades = math.log10(self.high / self.low) if self.log else 0
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
        locator = LogLocator(subs=subs) if self.log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        return [float(tick) for tick in locator.tick_values(self.low, self.high) if self.low <= tick <= self.high]


def pareto_picture(found: pd.DataFrame, control: Row | None) -> Picture:
    """The configurations in the first two metrics of `pareto`, shaded by ε; those on the front stand out.

    Args:
        found: from `pareto`.
        control: the class-mean control, to be shown with them.
    """
    x, y, *_ = found.attrs["metrics"]
    shown = [*rows_of(found), *([control] if control and _finite(control, x, y) else [])]
    across, up = (Scale.of(row[name] for row in shown) for name in (x, y))
    picture = _framed(f"{called(y)} against {called(x)}", pareto_in_words(found), across, up, _wanted(x), _wanted(y))
    spent = [float(row[schema.EPSILON]) for row in rows_of(found)]
    low, high = min(spent), max(spent)
    for row in sorted(rows_of(found), key=lambda row: row["on_front"]):
        kind = _shade(row[schema.EPSILON], low, high) if row["on_front"] else "dominated"
        picture.marks.append(Mark(*_at(across, up, row[x], row[y]), kind, _told(row)))
    picture.legend = [(_shade(low, low, high), f"on the front, ε {low:.3g}")]
    if high > low:
        picture.legend.append((_shade(high, low, high), f"ε {high:.3g}"))
    picture.legend.append(("dominated", "dominated"))
    if len(shown) > len(found) and control:
        picture.marks.append(Mark(*_at(across, up, control[x], control[y]), "control", f"control {_told(control)}"))
        picture.legend.append(("control", "class-mean control"))
    return picture


def _shade(epsilon: float, low: float, high: float) -> str:
    part = (epsilon - low) / (high - low) if high > low else 1.0
    return f"front e{min(SHADES - 1, int(part * SHADES))}"


def curve_picture(metric: str, curves: Mapping[str, Mapping[float, float]], control: Row | None) -> Picture:
    """A metric over the ε charged so far, one line for each run.

    Args:
        curves: `best`, `median` or `worst` and a name, to ε and the metric's value there; ε finite, by step.
        control: the class-mean control, a point at its own ε.
    """
    with_control = control is not None and _finite(control, schema.EPSILON, metric)
    ends = [(control[schema.EPSILON], control[metric])] if control is not None and with_control else []
    points = [pair for curve in curves.values() for pair in curve.items()] + ends
    across, up = (Scale.of(values) for values in zip(*points, strict=True))
    picture = _framed(f"{called(metric)} over ε", f"{called(metric)} on validation as ε is spent", across, up,
                      "ε charged", called(metric))  # fmt: skip
    for name, curve in curves.items():
        kind = name.partition(" ")[0].rstrip(":")
        places = tuple(_at(across, up, *pair) for pair in curve.items())
        picture.lines.append(Line(places, f"curve {kind}", name))
        for place, (epsilon, value) in zip(places, curve.items(), strict=True):
            told = f"{name}, ε {epsilon:.3g}: {called(metric)} {metric_text(value)}"
            picture.marks.append(Mark(*place, f"dot {kind}", told))
        picture.legend.append((f"curve {kind}", name))
    if control is not None and with_control:
        picture.marks.append(Mark(*_at(across, up, *ends[0]), "control", f"control {_told(control)}"))
        picture.legend.append(("control", "class-mean control"))
    return picture


def parallel_picture(ranked: pd.DataFrame, searched: Sequence[Dimension], metrics: Sequence[str]) -> Picture:
    """Each configuration a line from its settings down to what it reached; further right is better.

    Args:
        ranked: configurations, best first.
        searched: of the same configurations, in the same order.
        metrics: quality metrics that all of them have.
    """
    rows, count = rows_of(ranked), len(ranked)
    scales = {metric: Scale.of(row[metric] for row in rows) for metric in metrics}
    columns = [[float(one.positions[index]) / _most(one) for index in range(count)] for one in searched]
    columns += [[_goodness(metric, scales[metric], row[metric]) for row in rows] for metric in metrics]
    axes = [TOP + 18 + ROW * index for index in range(len(columns))]
    words = f"{count} configurations, {len(searched)} settings above and what they reached below; right is better"
    picture = Picture("parallel coordinates", words, height=axes[-1] + 26)
    for index in reversed(_drawn(count)):
        kind = "first" if index == 0 else "top" if index < max(2, TOP_PART * count) else "rest"
        points = tuple((_across(column[index]), float(y)) for column, y in zip(columns, axes, strict=True))
        picture.lines.append(Line(points, f"way {kind}", f"number {index + 1}, {_told(rows[index])}"))
    for one, y in zip(searched, axes, strict=False):
        _add_axis(picture, y, one.path, _ends(one))
    for metric, y in zip(metrics, axes[len(searched) :], strict=True):
        low, high = scales[metric].low, scales[metric].high
        ends = (high, low) if schema.mode_of(metric) == "min" else (low, high)
        _add_axis(picture, y, called(metric), list(zip((0.0, 1.0), map(metric_text, ends), strict=True)))
    picture.legend = [("way first", "the best"), ("way top", "the best quarter"), ("way rest", "the others")]
    return picture


def _most(dimension: Dimension) -> float:
    """Of its positions: 1 of a number, of a choice the number of the last."""
    return float(max(1, len(dimension.choices) - 1)) if dimension.choices is not None else 1.0


def _goodness(metric: str, scale: Scale, value: float) -> float:
    return 1 - scale.place(value) if schema.mode_of(metric) == "min" else scale.place(value)


def _drawn(count: int) -> list[int]:
    """Which lines are drawn where there are too many: the best, and every so many of the others."""
    if count <= MOST_LINES:
        return list(range(count))
    half = MOST_LINES // 2
    return [*range(half), *range(half, count, math.ceil((count - half) / half))]


def _ends(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.choices is None:
        return [(0.0, dimension.value(0)), (1.0, dimension.value(1))]
    return [(index / _most(dimension), choice) for index, choice in enumerate(dimension.choices)]


def _add_axis(picture: Picture, y: float, name: str, ends: Sequence[tuple[float, str]]) -> None:
    picture.lines.append(Line(((_across(0), y), (_across(1), y)), "axis"))
    picture.texts.append(Text(_across(0), y - 6, name, "start"))
    for place, text in ends:
        anchor = "start" if place == 0 else "end" if place == 1 else "middle"
        picture.texts.append(Text(_across(place), y + 13, text, anchor))


def _across(part: float) -> float:
    return round(8 + part * (WIDTH - 16), 1)


def _framed(title: str, words: str, across: Scale, up: Scale, x: str, y: str) -> Picture:
    """A picture with axes, and nothing in them."""
    picture = Picture(title, words)
    for tick in across.ticks():
        place, _ = _at(across, up, tick, up.low)
        picture.lines.append(Line(((place, TOP), (place, BOTTOM)), "grid"))
        picture.texts.append(Text(place, BOTTOM + 14, metric_text(tick)))
    for tick in up.ticks():
        _, place = _at(across, up, across.low, tick)
        picture.lines.append(Line(((LEFT, place), (RIGHT, place)), "grid"))
        picture.texts.append(Text(LEFT - 5, place + 4, metric_text(tick), "end"))
    picture.texts += [Text((LEFT + RIGHT) / 2, HEIGHT - 8, x), Text(11, (TOP + BOTTOM) / 2, y, turned=True)]
    return picture


def _at(across: Scale, up: Scale, x: float, y: float) -> tuple[float, float]:
    return round(LEFT + across.place(x) * (RIGHT - LEFT), 1), round(BOTTOM - up.place(y) * (BOTTOM - TOP), 1)


def _wanted(metric: str) -> str:
    less = metric == schema.EPSILON or schema.mode_of(metric) == "min"
    return f"{called(metric)} ({'less' if less else 'more'} is better)"


def _finite(row: Row, *names: str) -> bool:
    return all(math.isfinite(row[name]) for name in names)


def _told(row: Row) -> str:
    """A run in a line: no accuracy without its variety."""
    names = (schema.EPSILON, *SHOWN)
    return ", ".join([str(row["trial"]), *(f"{called(name)} {metric_text(row[name])}" for name in names)])
