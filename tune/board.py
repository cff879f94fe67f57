"""What a person sees of a running study: a live table on a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpsink import console
from tune import schema
from tune.folder import TrialRecord

STATE_STYLES = {"running": "cyan", "completed": "green", "failed": "red", "diverged": "red"}


@dataclass
class Row:
    """The board's line for one trial."""

    record: TrialRecord
    state: str = "pending"
    values: dict[str, float] = field(default_factory=dict)


class Board:
    """Live table of a study's trials; a context manager."""

    def __init__(self, title: str, total: int, objective: str) -> None:
        self.title, self.total, self.objective = title, total, objective
        self.rows: dict[str, Row] = {}
        self.started = time.monotonic()
        self.ended_before = 0
        self.ledger_text = ""
        self._live = Live(
            get_renderable=self.render, console=console.err, refresh_per_second=2,
            vertical_overflow="visible",
        )  # fmt: skip
        self._terminal = console.err.is_terminal

    def __enter__(self) -> "Board":
        if self._terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def show(self, record: TrialRecord, state: str, values: dict[str, Any] | None = None) -> None:
        """Brings a trial's line up to date; off a terminal, prints it when its state or step changed."""
        row = self.rows.setdefault(record.name, Row(record))
        row.state = state
        row.values |= {name: float(value) for name, value in (values or {}).items() if _is_number(value)}
        if not self._terminal:
            console.err.print(self._line(row), markup=False, soft_wrap=True)

    def restore(self, record: TrialRecord, state: str, values: dict[str, float]) -> None:
        """Puts a trial of an earlier session on the board without a word."""
        self.rows[record.name] = Row(record, state, dict(values))
        self.ended_before += 1

    def render(self) -> Group:
        """The table, and a line with the count, the best so far, the ledger and the ETA."""
        made = console.table("trial", "σ", "C", "blur", "B", "n", "lr", "ε", "FID", "acc", "state")
        for row in self.rows.values():
            _add_row(made, row)
        return Group(Text(self.title, style="bold"), made, Text(self._summary()))

    def _summary(self) -> str:
        ended = sum(row.state in schema.ENDED for row in self.rows.values())
        parts = [f"{ended}/{self.total} trials"]
        if best := self._best():
            parts.append(f"best {best.record.name} ({self.objective} {best.values[self.objective]:.3g})")
        if self.ledger_text:
            parts.append(self.ledger_text)
        here = ended - self.ended_before
        if here and ended < self.total:
            seconds = (time.monotonic() - self.started) / here * (self.total - ended)
            parts.append(f"ETA {seconds / 60:.1f} min")
        return "  ·  ".join(parts)

    def _best(self) -> Row | None:
        rows = [
            row for row in self.rows.values()
            if self.objective in row.values and row.record.role == schema.ROLE_SEARCH
        ]  # fmt: skip
        sign = -1 if schema.mode_of(self.objective) == "min" else 1
        return max(rows, key=lambda row: sign * row.values[self.objective], default=None)

    def _line(self, row: Row) -> str:
        shown = ("epsilon", "fid", "accuracy", "variety")
        values = "  ".join(f"{name} {console.metric_text(row.values[name])}" for name in shown if name in row.values)
        return f"{row.record.name:<24} {row.state:<10} {values}".rstrip()


def _add_row(made: Table, row: Row) -> None:
    config, record, values = row.record.config, row.record, row.values
    made.add_row(
        record.name.removeprefix("baseline-")[:12],
        f"{record.noise_multiplier:.3g}",
        f"{config.privacy.clip_norm:.3g}",
        f"{config.sinkhorn.blur:.2g}",
        f"{record.sample_rate * 100:.1f}%",
        str(config.sinkhorn.gen_batch_size),
        f"{config.optimizer.lr:.1g}",
        console.metric_text(values.get("epsilon")),
        console.metric_text(values.get("fid")),
        console.metric_text(values.get("accuracy")),
        Text(row.state, style=STATE_STYLES.get(row.state, "")),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
