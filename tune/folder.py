"""The study folder: the durable record of a study, from which everything else can be rebuilt.

STUDY/study.yaml              the study file as it was given
STUDY/study.json              `StudyRecord`
STUDY/statement.json          the ledger's present statement
STUDY/floor.json             FID and KID of real images against real ones, once a run was judged
STUDY/orders.json             what the driver wants of the trials' processes
STUDY/outcome.json            how the last session ended; absent while one runs, and after a kill
STUDY/ledger/                 the study's privacy ledger
STUDY/witness.json            what the ledger has held
STUDY/search/                 the searcher's memory
STUDY/trials/NAME/trial.json  `TrialRecord`, written before the trial starts
STUDY/trials/NAME/run/        the trial's run folder (`dpsink.checkpoint`)
STUDY/trials/NAME/end.json    `TrialEnd`, written by the driver when the trial has ended
STUDY/trials/NAME/test.json   metrics on the test split, of chosen trials only

Under `release_best` the trials, the searcher's memory and the witness lie in STUDY/sealed, which its owner alone can
look into, until `tune.sealing` has taken the winner out of it and written STUDY/selection.json.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dpsink.config import Model, Strict, TrialConfig
from dpsink.errors import InputError
from dpsink.records import STATEMENT, Report, latest_checkpoint, latest_state, read_json, write_atomically
from tune import schema

WITNESS = "witness.json"
SELECTION = "selection.json"
OUTCOME = "outcome.json"
ORDERS = "orders.json"
FLOOR = "floor.json"


class Earlier(Strict):
    """The study whose best configurations another one repeats, as it was when that one began."""

    study_id: str
    name: str
    epsilon: float | None = Field(description="of all that it publishes; infinite without privacy, None for no claim")
    delta: float
    spent: float


class StudyRecord(Strict):
    """Facts of a study that do not change while it runs."""

    study_id: str
    name: str
    experiment: str
    tracking_uri: str
    created: str
    version: str
    target_epsilon: float
    delta: float
    data_name: str
    data_fingerprint: str
    extractor: str = Field(description="with the number of images, e.g. classifier@180")
    objectives: tuple[str, ...]
    searched: tuple[str, ...] = Field(description="paths of the search space")
    seeds: int = Field(default=1, description="trials of each configuration")
    trials: int | None = Field(default=None, description="that are planned, baselines included; None if secret")
    repeats: Earlier | None = None


class TrialRecord(Strict):
    """One trial as it was decided; written before it starts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of its folder, too")
    role: Literal["baseline", "search"]
    config_id: str
    config: TrialConfig
    params: dict[str, Any] = Field(default_factory=dict, description="searched path to chosen value")
    number: int | None = Field(default=None, description="the searcher's own number of the configuration")
    configuration: str | None = Field(default=None, description="what it is called, where it has several seeds")
    steps: int
    sample_rate: float
    noise_multiplier: float
    score_noise: float = 0.0
    score_releases: int = Field(default=0, description="scores on private validation records, at most")

    @property
    def label(self) -> str:
        """What its configuration is called."""
        return self.configuration or self.name


class TrialEnd(Strict):
    """How a trial ended, in the driver's words."""

    state: schema.State
    error: str | None = None


class SessionEnd(Strict):
    """How a session of a study ended, in the driver's words."""

    finished: bool
    problem: str = ""
    ended_early: str | None = None


class StudyFolder:
    """Reads and writes a study folder; every write is atomic.

    A trial's record never changes, so it is read once; all else is read when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, TrialRecord] = {}

    @property
    def exists(self) -> bool:
        return (self.path / "study.json").exists()

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def search(self) -> Path:
        return self.path / "search"

    @property
    def sealed(self) -> "StudyFolder":
        """The part whose content stays secret, in the form of a study folder: trials, search, witness."""
        return StudyFolder(self.path / "sealed")

    def trial(self, name: str) -> Path:
        """Folder of a trial."""
        return self.path / "trials" / name

    def run(self, name: str) -> Path:
        """Run folder of a trial, for `dpsink.training.train`."""
        return self.trial(name) / "run"

    def write_study(self, record: StudyRecord, source: str) -> None:
        """Creates the folder with the study file's text and its record."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "study.yaml", source)
            write_atomically(self.path / "study.json", record.model_dump_json(indent=1))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}); set another storage") from None

    def read_study(self) -> StudyRecord:
        """The study's record."""
        return _read(StudyRecord, self.path / "study.json")

    def add_trial(self, record: TrialRecord) -> None:
        """Records a trial before it starts."""
        folder = self.trial(record.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "trial.json", record.model_dump_json(indent=1))
        self._records[record.name] = record

    def trials(self) -> list[TrialRecord]:
        """All recorded trials, in the order of their names."""
        place = self.path / "trials"
        names = sorted(os.listdir(place)) if place.exists() else []
        return [self.read_trial(name) for name in names if self._recorded(name)]

    def read_trial(self, name: str) -> TrialRecord:
        """One trial's record."""
        if name not in self._records:
            path = self.trial(name) / "trial.json"
            record = _read(TrialRecord, path)
            if record.name != name:
                raise InputError(f"{path}: is of the trial '{record.name}'; it was copied or edited")
            self._records[name] = record
        return self._records[name]

    def _recorded(self, name: str) -> bool:
        """Whether a folder among the trials is one: a driver may have died between making and filling it."""
        return name in self._records or (self.trial(name) / "trial.json").exists()

    def end_trial(self, name: str, end: TrialEnd) -> None:
        """Records how a trial ended."""
        write_atomically(self.trial(name) / "end.json", end.model_dump_json(indent=1))

    def forget_end(self, name: str) -> None:
        """Makes a failed trial unfinished again."""
        (self.trial(name) / "end.json").unlink(missing_ok=True)

    def end_of(self, name: str) -> TrialEnd | None:
        """How a trial ended; None while it has not."""
        path = self.trial(name) / "end.json"
        return _read(TrialEnd, path) if path.exists() else None

    def ended_at(self, name: str) -> float | None:
        """When a trial's end was recorded, in seconds since the epoch; None while it was not."""
        with suppress(FileNotFoundError):
            return (self.trial(name) / "end.json").stat().st_mtime
        return None

    def reports(self, name: str) -> list[Report]:
        """All reports of a trial, from its last checkpoint."""
        latest = latest_state(self.run(name))
        return list(latest[1].reports) if latest else []

    def grid(self, name: str) -> Path | None:
        """The PNG of a trial's last samples."""
        checkpoint = latest_checkpoint(self.run(name))
        return checkpoint / schema.GRID_ARTIFACT if checkpoint else None

    def write_test(self, name: str, metrics: dict[str, float]) -> None:
        """Records a chosen trial's metrics on the test split, under their bare names."""
        write_atomically(self.trial(name) / "test.json", json.dumps(metrics, indent=1))

    def test_metrics(self, name: str) -> dict[str, float]:
        """Metrics on the test split, empty unless the trial was chosen."""
        path = self.trial(name) / "test.json"
        return read_json(path) if path.exists() else {}

    def write_floor(self, floor: dict[str, Any]) -> None:
        """Records what real images score against real ones: `fid`, `kid`, and which images they are, `of`."""
        write_atomically(self.path / FLOOR, json.dumps(floor, indent=1))

    def floor(self) -> dict[str, Any]:
        """The floor of FID and KID, empty before a run was judged."""
        path = self.path / FLOOR
        return read_json(path) if path.exists() else {}

    def write_witness(self, witness: dict[str, Any]) -> None:
        """Keeps, outside the ledger, what the ledger has held: a ledger that vanished is found out by it."""
        write_atomically(self.path / WITNESS, json.dumps(witness))

    def witness(self) -> dict[str, Any] | None:
        """What the ledger has held, None before the first trial."""
        path = self.path / WITNESS
        return read_json(path) if path.exists() else None

    def write_selection(self, winner: str | None) -> None:
        """Records that a selection has ended, and its winner if there is one."""
        write_atomically(self.path / SELECTION, json.dumps({"winner": winner}))

    @property
    def selected(self) -> bool:
        """Whether a selection has ended; there is no way back."""
        return (self.path / SELECTION).exists()

    def order(self, *, stop: bool) -> None:
        """Tells the processes of all trials to stop, or not to. The file is replaced, never removed: that a file is
        missing is something that a network file system may go on believing for half a minute."""
        write_atomically(self.path / ORDERS, json.dumps({"stop": stop}))

    def ordered_to_stop(self) -> bool:
        """What the driver wants."""
        path = self.path / ORDERS
        return path.exists() and read_json(path).get("stop") is True

    def write_outcome(self, outcome: "SessionEnd | None") -> None:
        """Records how a session ended; None as long as it has not."""
        if outcome is None:
            (self.path / OUTCOME).unlink(missing_ok=True)
        else:
            write_atomically(self.path / OUTCOME, outcome.model_dump_json(indent=1))

    def outcome(self) -> "SessionEnd | None":
        """How the last session ended, as far as it could tell."""
        path = self.path / OUTCOME
        return _read(SessionEnd, path) if path.exists() else None

    def write_statement(self, statement: dict[str, Any]) -> None:
        """Records the ledger's present statement."""
        write_atomically(self.path / STATEMENT, json.dumps(statement, indent=1, default=str))

    def copy_statement(self, name: str) -> None:
        """Puts the study's statement beside a trial's generator, or where that will be."""
        self.run(name).mkdir(parents=True, exist_ok=True)
        write_atomically(self.run(name) / STATEMENT, (self.path / STATEMENT).read_text(encoding="utf-8"))

    def statement(self) -> dict[str, Any]:
        """The ledger's last written statement, empty before the first."""
        path = self.path / STATEMENT
        return read_json(path) if path.exists() else {}


def _read(model: type[Model], path: Path) -> Model:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder of a study") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
