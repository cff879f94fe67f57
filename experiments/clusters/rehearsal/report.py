"""What a rehearsal measured, as JSON and as a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.clusters.rehearsal.faults import Fault
from experiments.clusters.rehearsal.ledger import Standing


def table(faults: list[Fault], end: Standing) -> str:
    """The faults as a Markdown table."""
    rows = [("fault", "what happened", "trials and ledger before", "and after")]
    for fault in faults:
        rows.append((fault.name, _happened(fault), fault.before.text(), fault.after.text() if fault.after else ""))
    rows.append(("the end", f"ε spent {end.epsilon:.2f}", "", end.text()))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * 4 + "|", *lines[1:]])


def rows(measured: list[dict[str, Any]], leave_out: Sequence[str] = ()) -> str:
    """What was measured as a Markdown table, a row each."""
    shown = [{key: value for key, value in one.items() if key not in leave_out} for one in measured]
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (shown[0], *(one.values() for one in shown))]
    return "\n".join([lines[0], "|---" * len(shown[0]) + "|", *lines[1:]])


def write(out: Path, name: str, document: dict[str, Any]) -> None:
    """Writes all of it as `NAME.json`, and its table as `NAME.md`."""
    (out / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(document["table"] + "\n", encoding="utf-8")


def plain(fault: Fault) -> dict[str, Any]:
    """A fault as plain values."""
    return asdict(fault)


def _happened(fault: Fault) -> str:
    parts = [f"{what} after {seconds:g} s" for what, seconds in fault.seconds.items()]
    written = fault.facts.get("written by it afterwards")
    if written is not None:
        parts.append("wrote nothing more" if not written else f"wrote {', '.join(written)}")
    return ", ".join(parts)
