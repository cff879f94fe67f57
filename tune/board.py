"""What a person sees of a running study: a live table on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpsink import console
from tune import schema
from tune.folder import TrialRecord

SHORT = {"stopped_early": "stopped", "interrupted": "halted"}  # of states, where a line is full
STATE_STYLES = {"running": "cyan", "completed": "green", "failed": "red", "diverged": "red"}


class _Shown:
    """A live picture on a terminal while the context lasts; nothing elsewhere."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.ledger_text = ""
        self._live = Live(
            get_renderable=self.render, console=console.err, refresh_per_second=2,
            vertical_overflow="visible",
        )  # fmt: skip
        self._terminal = console.err.is_terminal

    def __enter__(self) -> Self:
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def render(self) -> Group:
        """What the terminal shows now."""
        raise NotImplementedError


class SealedBoard(_Shown):
    """Of a study whose trials are secret: that it runs, and for how long. Not how many, how good, or how far."""

    def __init__(self, title: str) -> None:
        self.title = title
        super().__init__()

    def __enter__(self) -> Self:
        if not self._terminal:
            console.err.print(f"{self.title} is running; it is sealed until its winner is known", markup=False)
        return super().__enter__()

    def render(self) -> Group:
        """The title, the time since the start, and the ledger."""
        minutes = (time.monotonic() - self.started) / 60
        running = f"running for {minutes:.1f} min; sealed until its winner is known"
        return Group(Text(self.title, style="bold"), Text(running), Text(self.ledger_text))


@dataclass
class Row:
    """The board's line for one trial."""

    record: TrialRecord
    state: str = "pending"
    values: dict[str, float] = field(default_factory=dict)
    told: str = ""  # the last line printed, off a terminal


class Board(_Shown):
    """Live table of a study's trials; a context manager.

    Args:
        total: trials that are planned.
        objective: the metric that ranks.
        seeds: trials of each configuration.
    """

    def __init__(self, title: str, total: int, objective: str, seeds: int = 1) -> None:
        self.title, self.total, self.objective, self.seeds = title, total, objective, seeds
        self.rows: dict[str, Row] = {}
        self.ended_before = 0
        super().__init__()  # last: it draws already

    def show(self, record: TrialRecord, state: str, values: dict[str, Any] | None = None) -> None:
        """Brings a trial's line up to date; off a terminal, prints it when it has changed."""
        row = self.rows.setdefault(record.name, Row(record))
        row.state = state
        row.values |= {name: float(value) for name, value in (values or {}).items() if _is_number(value)}
        if not self._terminal and row.told != (line := self._line(row)):
            row.told = line
            console.err.print(line, markup=False, soft_wrap=True)

    def restore(self, record: TrialRecord, state: str, values: dict[str, float]) -> None:
        """Puts a trial of an earlier session on the board without a word."""
        self.rows[record.name] = Row(record, state, dict(values))
        self.ended_before += 1

    def render(self) -> Group:
        """The latest trials that fit the window; the count, the best so far and the ETA; the ledger."""
        metric = self._shown_metric
        header = "acc" if metric == "accuracy" else metric.removeprefix("accuracy_")
        made = console.table("trial", "σ", "C", "blur", "B", "n", "lr", "ε", "FID", header, "var/rec", "state")
        made.padding = (0, 0, 0, 1)
        made.columns[-1].no_wrap = True
        for row in self._shown_rows(max(6, console.err.height - 6)):
            _add_row(made, row, metric)
        return Group(Text(self.title, style="bold"), made, Text(self._summary()), Text(self.ledger_text))

    @property
    def seconds_left(self) -> float | None:
        """What the trials still to come take, at the pace of this session; None before its first end."""
        ended = sum(row.state in schema.ENDED for row in self.rows.values())
        here = ended - self.ended_before
        if not here or ended >= self.total:
            return None
        return (time.monotonic() - self.started) / here * (self.total - ended)

    def _shown_rows(self, room: int) -> list[Row]:
        """The latest, among them, up to half of the room, those that have not ended."""
        rows = list(self.rows.values())
        active = {id(row) for row in [row for row in rows if row.state not in schema.ENDED][-room // 2 :]}
        ended = {id(row) for row in [row for row in rows if id(row) not in active][len(active) - room :]}
        return [row for row in rows if id(row) in active | ended]

    @property
    def _shown_metric(self) -> str:
        """What is shown beside FID: what the study optimises."""
        return "accuracy" if self.objective == "fid" else self.objective

    def _summary(self) -> str:
        ended = sum(row.state in schema.ENDED for row in self.rows.values())
        parts = [f"{ended}/{self.total} trials"]
        if best := self.best():
            parts.append(f"best {best[0]} ({self.objective} {best[1]:.3g})")
        if (seconds := self.seconds_left) is not None:
            parts.append(f"ETA {seconds / 60:.1f} min")
        return "  ·  ".join(parts)

    def best(self) -> tuple[str, float] | None:
        """The searched configuration that is best so far, and its mean, of those whose every seed has ended."""
        values: dict[str, list[float]] = {}
        for row in self.rows.values():
            if row.record.role == schema.ROLE_SEARCH and row.state in schema.FINAL and self.objective in row.values:
                values.setdefault(row.record.label, []).append(row.values[self.objective])
        means = [(name, sum(of) / len(of)) for name, of in values.items() if len(of) == self.seeds]
        sign = -1 if schema.mode_of(self.objective) == "min" else 1
        return max(means, key=lambda mean: sign * mean[1], default=None)

    def _line(self, row: Row) -> str:
        shown = ("epsilon", "fid", self._shown_metric, "variety", "recall")
        values = "  ".join(f"{name} {console.metric_text(row.values[name])}" for name in shown if name in row.values)
        return f"{row.record.name:<24} {row.state:<10} {values}".rstrip()


def ledger_line(cap: float | None, spent: float) -> str:
    """What a study may cost, and what it has."""
    return f"study ε ≤ {_four_digits(cap)}, spent {_four_digits(spent)}"


def _add_row(made: Table, row: Row, metric: str) -> None:
    config, record, values = row.record.config, row.record, row.values
    made.add_row(
        record.name.removeprefix("baseline-")[:12],
        f"{record.noise_multiplier:.3g}",
        f"{config.privacy.clip_norm:.3g}",
        f"{config.sinkhorn.blur:.2g}",
        "all" if record.sample_rate == 1 else str(config.privacy.batch_size),
        str(config.sinkhorn.gen_batch_size),
        f"{config.optimizer.lr:.2g}",
        *(_four_digits(values.get(name)) for name in ("epsilon", "fid", metric)),
        "/".join(_three_places(values[name]) for name in ("variety", "recall") if name in values) or "–",
        Text(SHORT.get(row.state, row.state), style=STATE_STYLES.get(row.state, "")),
    )


def _four_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _three_places(value: float) -> str:
    """.31, or 1.0."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0") else f"{value:.1f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
