"""What the commands print and write of tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rules import called
from analysis.runs import Row, Runs, rows_of
from analysis.selection import SE, SHOWN
from analysis.statements import together
from dpsink import console
from dpsink.disk import check_target, drafted
from tune import schema

REJECTED = ["trial", "role", "reason", "detail"]
MOST_REJECTED = 20  # lines; what is more is counted


def write_csv(table: pd.DataFrame, path: Path, *, force: bool) -> None:
    """A table as CSV, whole or not at all.

    Raises:
        InputError: it exists, or cannot be written.
    """
    check_target(path, force=force)
    with drafted(path) as draft:
        table.to_csv(draft, index=False)


def print_rejected(runs: Runs) -> None:
    """How many runs were accepted, and why the others were not."""
    console.out.print(f"{runs.name}: {len(runs.accepted)} of {len(runs.table)} runs accepted", markup=False)
    if runs.rejected.empty:
        return
    console.out.print(f"set apart: {runs.rejected_counts}", markup=False, soft_wrap=True)
    shown = console.table(*REJECTED)
    for row in rows_of(runs.rejected.head(MOST_REJECTED)):
        shown.add_row(*(str(row[name]) for name in REJECTED))
    console.out.print(shown)
    if len(runs.rejected) > MOST_REJECTED:
        console.out.print(f"… and {len(runs.rejected) - MOST_REJECTED} more: --csv or --json has all", markup=False)


def print_configurations(table: pd.DataFrame, metrics: Sequence[str], title: str, lead: str) -> None:
    """Configurations, one a line: means over their seeds, with standard errors where there are several."""
    names = [name for name in dict.fromkeys((*metrics, *SHOWN)) if name in table and bool(table[name].notna().any())]
    names = [schema.EPSILON, *(name for name in names if name != schema.EPSILON)]
    shown = console.table("" if lead == "on_front" else lead, "trial", "seeds", *map(called, names), title=title)
    for row in rows_of(table):
        mark = "●" if row[lead] is True else str(row[lead])
        shown.add_row(mark, row["trial"], str(row["seeds"]), *(with_error(row, name) for name in names))
    console.out.print(shown)


def with_error(row: Row, metric: str) -> str:
    """`0.861 ±0.004`: a mean and its standard error, where there is one."""
    error = row.get(metric + SE, math.nan)
    return console.metric_text(row[metric]) + (f" ±{error:.2g}" if not math.isnan(error) else "")


def guarantee(runs: Runs) -> str:
    """The promises: of each trial, of all that each study makes, with the selection, and of all studies together."""
    lines = [_promise(runs, index) for index in range(len(runs.studies))]
    if len(lines) == 1:
        return lines[0]
    promise = together(runs, {study.name: study.statement for study in runs.studies})
    if promise is None:
        return "\n".join([*lines, "no claim for the studies together"])
    return "\n".join([*lines, f"together, by basic composition: ε ≤ {rounded_up(promise[0])}, δ ≤ {promise[1]:g}"])


def _promise(runs: Runs, index: int) -> str:
    facts, statement = runs.studies[index], runs.studies[index].statement
    whole = statement.get("study_epsilon")
    claim = "no claim for the whole study" if whole is None else f"whole study ε ≤ {rounded_up(whole)}"
    policy = f" ({statement['policy']})" if "policy" in statement else ""
    if not statement:
        claim = "without a statement: the selection among its trials is not covered"
    name = f"{facts.name}: " if len(runs.studies) > 1 else ""
    trial, delta = f"{name}each trial ε ≤ {facts.target_epsilon:g}", float(statement.get("study_delta") or facts.delta)
    if delta == facts.delta:
        return f"{trial}, {claim}{policy}, δ = {delta:g}"
    return f"{trial} at δ = {facts.delta:g}, {claim}{policy} at δ = {delta:g}"  # it repeats a study, and contains its δ


def floor_in_words(runs: Runs) -> str:
    """What real images score against real ones, beside which every FID and KID is to be read."""
    if not (floor := runs.study.floor):
        return "floor of FID: not measured, no run of the study was judged on test"
    return f"floor: {console.floor_text(floor)}"


def rounded_up(epsilon: float | str) -> str:
    """An ε for people, never below what it is."""
    from dpsink.privacy.plan import NON_PRIVATE

    value = float(epsilon)
    return f"{math.ceil(value * 1000) / 1000:g}" if math.isfinite(value) else NON_PRIVATE


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table for JSON: missing values are null."""
    return [{name: plain(value) for name, value in row.items()} for row in rows_of(table)]


def plain(value: Any) -> Any:
    """A cell for JSON; NaN is null, and numpy's numbers are Python's."""
    value = value.item() if hasattr(value, "item") else value
    return None if value != value else value
