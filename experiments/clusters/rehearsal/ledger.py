"""What the shared folder says of a study's trials: who has them, what was charged, how they ended."""

import json
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from dpsink.privacy.budget import charged_steps
from dpsink.privacy.storage import Entry, FolderStorage, read_entries
from dpsink.records import latest_state
from tune.folder import StudyFolder


@dataclass(frozen=True)
class Standing:
    """How a study stands.

    Attributes:
        ended: trials with an end, by how they ended.
        unfinished: trials that were started and have none.
        charged: steps charged to all trials, in their own ledgers.
        attempts: openings of all those ledgers.
        epsilon: what the study's ledger says that was spent.
    """

    ended: dict[str, int]
    unfinished: int
    charged: int
    attempts: int
    epsilon: float

    def text(self) -> str:
        """In a cell of a table."""
        ends = ", ".join(f"{number} {state}" for state, number in self.ended.items()) or "none ended"
        return f"{ends}, {self.unfinished} running; {self.charged} steps charged, {self.attempts} attempts"


class Trials:
    """The trials of a study folder.

    Args:
        path: the folder; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.folder = StudyFolder(path)

    def ledger(self, name: str) -> Path:
        """Folder of a trial's ledger."""
        return self.folder.run(name) / "ledger"

    def objects(self, name: str, attempt: int | None = None) -> set[str]:
        """Names of what a trial's ledger holds: all, or what an attempt has written."""
        names = {path.name for path in self.ledger(name).glob("0*.json")}
        return {one for one in names if attempt is None or one.startswith(f"{attempt:06d}")}

    def entries(self) -> dict[str, str]:
        """The entries of all ledgers, the study's own too: each one's place and its digest."""
        folders = [self.folder.ledger, *map(self.ledger, self.names())]
        paths = [path for folder in folders for path in folder.rglob("*.json") if not path.name.startswith(".")]
        return {str(path.relative_to(self.folder.path)): sha256(path.read_bytes()).hexdigest() for path in paths}

    def attempts(self, name: str) -> int:
        """How often a trial's ledger was opened."""
        return len({one[:6] for one in self.objects(name)})

    def running_on(self, host: str) -> str | None:
        """The unfinished trial that a host was the last to open."""
        for name in self.names():
            locks = sorted(self.ledger(name).glob("lock-*"), key=lambda path: path.stat().st_mtime)
            if locks and locks[-1].name == f"lock-{host}" and self.folder.end_of(name) is None:
                return name
        return None

    def charged(self, name: str) -> int:
        """Steps charged to a trial."""
        return charged_steps(self.ledger(name)) if self.objects(name) else 0

    def share(self, name: str) -> float:
        """The part of its budget that a trial was charged, in [0, 1]."""
        return self.charged(name) / self.folder.read_trial(name).steps

    def on_record(self, name: str) -> int:
        """Steps that a trial's entries add up to: more than were charged, if they exceed its budget."""
        return sum(map(_steps, read_entries(FolderStorage(self.ledger(name))).values()))

    def steps_of(self, name: str, objects: set[str]) -> dict[str, int]:
        """Some entries of a trial's ledger, and the steps that each reserves."""
        entries = read_entries(FolderStorage(self.ledger(name)))
        return {one: _steps(entries[one]) for one in sorted(objects)}

    def saved(self, name: str) -> tuple[int, int] | None:
        """The attempt that wrote a trial's checkpoint, and its step; None before the first."""
        found = latest_state(self.folder.run(name))
        if found is None:
            return None
        entries = read_entries(FolderStorage(self.ledger(name))).items()
        seen = [one for one, entry in entries if entry.checksum in found[1].witness["heads"]]
        return int(max(seen)[:6]), found[1].step

    def names(self) -> list[str]:
        """All trials that were started."""
        return [record.name for record in self.folder.trials()]

    def standing(self) -> Standing:
        """How the study stands."""
        names = self.names()
        ends = Counter(end.state for name in names if (end := self.folder.end_of(name)))
        return Standing(
            ended=dict(ends),
            unfinished=len(names) - ends.total(),
            charged=sum(map(self.charged, names)),
            attempts=sum(map(self.attempts, names)),
            epsilon=self.folder.statement().get("spent", 0.0),
        )

    def problems(self) -> list[str]:
        """What of a finished study is not as it should be."""
        found = [f"{name} has not completed" for name in self.names() if not self._completed(name)]
        for name in self.names():
            record, reported = self.folder.read_trial(name), self.folder.reports(name)[-1]
            reserved = self.on_record(name)
            if not reported.step <= reported.charged == min(record.steps, reserved):
                found.append(
                    f"{name}: {reported.step} steps ran, {reported.charged} were reported, {reserved} reserved"
                )
        return found

    def document(self) -> dict[str, dict[str, int]]:
        """Of each trial: how often it was opened, the steps that it may take, those that its entries add up to, those
        charged to it, and of these what was lost to faults."""
        return {
            name: {
                "attempts": self.attempts(name),
                "budget": self.folder.read_trial(name).steps,
                "on record": self.on_record(name),
                "charged": self.charged(name),
                "lost": self.charged(name) - self.folder.reports(name)[-1].step,
            }
            for name in self.names()
        }

    def _completed(self, name: str) -> bool:
        end = self.folder.end_of(name)
        return end is not None and end.state == "completed"


def _steps(entry: Entry) -> int:
    """That an entry reserves; less than none if it gives back."""
    return entry.data.get("reserved", 0) - entry.data.get("given_back", 0)


def mlflow_runs(database: Path) -> dict[str, int]:
    """Number of runs in MLflow's database, by their status."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return dict(connection.execute("select status, count(*) from runs group by status"))


def as_json(standing: Standing) -> dict[str, object]:
    """A standing as plain values."""
    return json.loads(json.dumps(asdict(standing)))
