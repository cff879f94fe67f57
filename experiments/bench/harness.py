"""Functions timed in turns, and the table and the JSON that results go to."""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

SHORTEST_BLOCK = 0.02  # seconds; calls shorter than that are timed several at once
MOST_CALLS = 200  # of one block


@dataclass(frozen=True)
class Effort:
    """How often a measurement is repeated: `rounds`, but after `seconds` no more than `fewest`."""

    rounds: int = 15
    seconds: float = 8.0
    fewest: int = 5


QUICK = Effort(rounds=1, seconds=0, fewest=1)


@dataclass(frozen=True)
class Row:
    """One line of a table; without values it was not measured."""

    kind: str
    what: str
    values: dict[str, float | str]


@dataclass(frozen=True)
class Measurement:
    """Something to measure; `run` gives its rows."""

    kind: str
    what: str
    run: Callable[[], list[Row]]
    possible: bool = True  # on this machine

    def rows(self) -> list[Row]:
        """The measured rows, or one that says that there are none."""
        return self.run() if self.possible else [Row(self.kind, self.what, {})]


def in_turns(
    functions: Sequence[Callable[[], object]], effort: Effort, synchronise: Callable[[], object]
) -> np.ndarray:
    """Milliseconds a call, (functions, rounds). The functions alternate, so that a slow minute meets all of them.

    Args:
        synchronise: waits for the device.
    """
    calls = [_calls_of_a_block(function, synchronise) if effort.rounds > 1 else 1 for function in functions]
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while _another_round(len(rounds), effort, time.perf_counter() - started):
        order = list(range(len(functions)))[:: 1 if len(rounds) % 2 else -1]  # nobody is always the first
        taken = {k: _block(functions[k], calls[k], synchronise) for k in order}
        rounds.append([taken[k] for k in range(len(functions))])
    return np.array(rounds).T


def _another_round(done: int, effort: Effort, seconds: float) -> bool:
    return done < effort.rounds and (done < effort.fewest or seconds < effort.seconds)


def _calls_of_a_block(function: Callable[[], object], synchronise: Callable[[], object]) -> int:
    """Chosen on the second call, since the first sets things up; long ones are spared it."""
    once = _block(function, 1, synchronise) / 1000
    if once < 10 * SHORTEST_BLOCK:
        once = _block(function, 1, synchronise) / 1000
    return min(MOST_CALLS, max(1, round(SHORTEST_BLOCK / max(once, 1e-6))))


def _block(function: Callable[[], object], calls: int, synchronise: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise()
    return (time.perf_counter() - started) * 1000 / calls


def versus(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    effort: Effort,
    *,
    names: tuple[str, str] = ("ours", "plain"),
    synchronise: Callable[[], object] = lambda: None,
) -> dict[str, float | str]:
    """Medians of two functions, how many times faster the first is, and the quartiles of that over the rounds."""
    mine, other = in_turns([ours, theirs], effort, synchronise)
    low, high = np.quantile(other / mine, [0.25, 0.75])
    middle = np.median(mine), np.median(other)
    return {
        f"{names[0]} ms": float(middle[0]),
        f"{names[1]} ms": float(middle[1]),
        "ratio": float(middle[1] / middle[0]),
        "q1": float(low),
        "q3": float(high),
        "rounds": len(mine),
    }


def medians(
    functions: Mapping[str, Callable[[], object]], effort: Effort, synchronise: Callable[[], object] = lambda: None
) -> dict[str, float | str]:
    """Median milliseconds a call of each function, timed in turns."""
    taken = np.median(in_turns(list(functions.values()), effort, synchronise), axis=1)
    return {f"{name} ms": float(ms) for name, ms in zip(functions, taken, strict=True)}


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit values ≈ a · sizes^b."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(measurements: Iterable[Measurement]) -> list[Row]:
    """Runs measurements one by one, telling on standard error which and for how long still."""
    waiting, rows = list(measurements), []
    started = time.perf_counter()
    for done, one in enumerate(waiting):
        elapsed = time.perf_counter() - started
        left = f"about {elapsed / done * (len(waiting) - done):.0f} s left" if done else "starting"
        print(f"[{done + 1}/{len(waiting)}] {one.kind}: {one.what} ({left})", file=sys.stderr, flush=True)
        rows.extend(one.rows())
    print(f"{len(waiting)} measurements in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return rows


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Prints a table for each kind of row, and writes everything as JSON."""
    for kind in dict.fromkeys(row.kind for row in rows):
        print("\n".join(_table(kind, [row for row in rows if row.kind == kind])), end="\n\n")
    if path is not None:
        path.write_text(
            json.dumps({**machine(), "rows": [_as_json(row) for row in rows]}, indent=1, ensure_ascii=False)
        )


def machine() -> dict[str, str | int]:
    """When and where: what a result is worthless without."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {_processor()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _as_json(row: Row) -> dict[str, object]:
    return {**asdict(row), "measured": bool(row.values)}


def _table(kind: str, rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row.values)) or [""]
    cells = [[kind, *columns], *([row.what, *_cells(row, columns)] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    if not row.values:
        return ["not measured", *[""] * (len(columns) - 1)]
    return [_cell(row.values.get(column, "")) for column in columns]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
