"""How a study stands, from its folder alone: while it runs, after a kill, at its end. Imports nothing that is slow."""

import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from dpsink.config import read_yaml
from dpsink.errors import InputError
from tune import schema
from tune.board import Board, Row, ledger_line
from tune.folder import StudyFolder, TrialEnd, TrialRecord
from tune.lock import Holder, holder

STORAGE = "studies"  # where studies lie unless their file says something else
FAILURES = 3  # the last ones, told with their reason


def find_folder(study: str) -> StudyFolder:
    """The folder of a study, given as its YAML file, its folder, or its name in `studies`.

    Raises:
        InputError: there is no such study.
    """
    path = Path(study)
    if path.suffix in (".yaml", ".yml"):
        tree = read_yaml(path)
        path = Path(str(tree.get("storage") or STORAGE)) / str(tree.get("name"))
    elif not (path / "study.json").exists():
        path = Path(STORAGE) / study
    folder = StudyFolder(path.absolute())
    if not folder.exists:
        raise InputError(f"study {study}: nothing has been run in {folder.path}; give a study's file, folder or name")
    return folder


@dataclass
class Status:
    """A study at one moment.

    Attributes:
        holder: who runs it, if anybody does.
        rows: its trials with their states and last values; empty while they are secret.
        errors: of the failed trials, the latest last.
        sealed: whether the trials are secret.
        finished: whether nothing is left to run.
        problem: why the last session ended before the study did; empty where it could not tell.
        before: trials that had ended when the present session began.
    """

    folder: StudyFolder
    holder: Holder | None
    sealed: bool
    finished: bool
    problem: str
    ended_early: str | None
    statement: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    before: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state."""
        return dict(Counter(row.state for row in self.rows.values()))

    @property
    def headline(self) -> str:
        """What is going on, in one line."""
        name = f"study {self.folder.path.name}"
        if self.holder:
            return f"{name} is being run by process {self.holder.pid} for {_duration(time.time() - self.holder.since)}"
        if self.finished:
            return f"{name} is finished" + (f", early: {self.ended_early}" if self.ended_early else "")
        return f"{name} is not running: {self.problem or 'its process was killed'}"

    @property
    def next_step(self) -> str:
        """What to type."""
        place = shlex.quote(_shown_path(self.folder.path))
        if self.holder:
            return f"dpsink-tune ui {place}" if not self.sealed else f"dpsink-tune status {place}"
        if self.finished:
            return f"dpsink-analysis best {place}"
        return "the `dpsink-tune sweep` command that started it goes on with it"

    def board(self) -> Board:
        """The table of the trials, as the sweep's own terminal shows it."""
        record = self.folder.read_study()
        board = Board(self.headline, record.trials or len(self.rows), record.objectives[0], record.seeds)
        board.rows, board.ledger_text = self.rows, self._ledger_text
        ended = sum(row.state in schema.ENDED for row in self.rows.values())
        board.ended_before = self.before if self.holder else ended
        board.started -= time.time() - self.holder.since if self.holder else 0
        return board

    @property
    def _ledger_text(self) -> str:
        if not self.statement:
            return ""
        cap, spent = (_number(self.statement[key]) for key in ("study_epsilon", "spent"))
        return f"study ε ≤ {cap:.4g}" if self.sealed and cap else ledger_line(cap, spent or 0.0)


class Reader:
    """Reads a study's folder again and again; what a trial said when it ended is read once."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder = folder
        self._ended: dict[str, tuple[float, TrialEnd, Row]] = {}  # by trial: when, how, and its row

    def read(self) -> Status:
        """The study now."""
        folder, held = self.folder, holder(self.folder)
        sealed = _is_sealed(folder) and not folder.selected
        outcome = folder.outcome()
        status = Status(
            folder=folder,
            holder=held,
            sealed=sealed,
            finished=folder.selected or (outcome is not None and outcome.finished),
            problem=outcome.problem if outcome else "",
            ended_early=outcome.ended_early if outcome else None,
            statement=folder.statement(),
        )
        if not sealed:
            self._add_trials(status)
        return status

    def _add_trials(self, status: Status) -> None:
        ends: list[tuple[float, str, str]] = []
        for record in self.folder.trials():
            status.rows[record.name] = self._row(record, running=status.holder is not None)
            if record.name not in self._ended:
                continue
            when, end, _ = self._ended[record.name]
            status.before += status.holder is not None and when < status.holder.since
            if end.state == "failed":
                ends.append((when, record.name, end.error or "no reason was told"))
        status.errors = {name: error for _, name, error in sorted(ends)}

    def _row(self, record: TrialRecord, *, running: bool) -> Row:
        when = self.folder.ended_at(record.name)
        if when is None:
            self._ended.pop(record.name, None)  # a failed trial that runs again
            return Row(record, self._open_state(record, running), self._values(record))
        if record.name not in self._ended or self._ended[record.name][0] != when:
            end = self.folder.end_of(record.name) or TrialEnd(state="interrupted")
            self._ended[record.name] = when, end, Row(record, end.state, self._values(record))
        return self._ended[record.name][2]

    def _open_state(self, record: TrialRecord, running: bool) -> schema.State:
        begun = (self.folder.run(record.name) / "config.yaml").exists()
        return ("running" if begun else "pending") if running else ("interrupted" if begun else "pending")

    def _values(self, record: TrialRecord) -> dict[str, float]:
        reports = self.folder.reports(record.name)
        return {**reports[-1].metrics, "epsilon": reports[-1].epsilon} if reports else {}


def picture(status: Status) -> Group:
    """A status for people."""
    record = status.folder.read_study()
    lines = [
        *_failure_lines(status),
        f"folder:  {status.folder.path}",
        f"runs:    {schema.shown_uri(record.tracking_uri)}",
    ]
    lines.append(f"next:    {status.next_step}")
    below = Text("\n".join(lines), overflow="fold")
    if status.sealed:
        sealed = "sealed until its winner is known"
        return Group(Text(status.headline, style="bold"), Text(sealed), Text(status._ledger_text), below)
    states = ", ".join(f"{count} {state}" for state, count in sorted(status.counts.items()))
    return Group(status.board().render(), Text(states or "no trial has started"), below)


def document(status: Status) -> dict[str, Any]:
    """A status as one JSON-able document; without a word about trials that are secret."""
    record = status.folder.read_study()
    told = {
        "study": record.name,
        "running": status.holder.pid if status.holder else None,
        "finished": status.finished,
        "problem": status.problem,
        "sealed": status.sealed,
        "study_epsilon": status.statement.get("study_epsilon"),
        "folder": str(status.folder.path),
        "tracking_uri": schema.shown_uri(record.tracking_uri),
        "next": status.next_step,
    }
    if status.sealed:
        return told
    board = status.board()
    best = board.best()
    return told | {
        "ended_early": status.ended_early,
        "spent": status.statement.get("spent"),
        "planned": record.trials,
        "counts": status.counts,
        "trials": {name: {"state": row.state, **row.values} for name, row in status.rows.items()},
        "objective": board.objective,
        "best": best[0] if best else None,
        "seconds_left": board.seconds_left,
        "failed": status.errors,
    }


def _failure_lines(status: Status) -> list[str]:
    latest = list(status.errors.items())[-FAILURES:]
    more = len(status.errors) - len(latest)
    head = [f"and {more} more failed before:"] if more else []
    return head + [f"failed:  {name}: {error}" for name, error in latest]


def _is_sealed(folder: StudyFolder) -> bool:
    ledger = read_yaml(folder.path / "study.yaml").get("ledger") or {}
    return ledger.get("policy") == "release_best"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)  # infinity is written as a word


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _shown_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
