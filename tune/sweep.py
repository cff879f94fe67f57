"""Runs a study: preflight, ledger, Ray Tune, and the last word on the chosen runs. Resumes by itself."""

import fcntl
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpsink.config import dump_config
from dpsink.data import default_root
from dpsink.errors import InputError
from dpsink.judging import judge
from dpsink.privacy.ledger import StudyLedger, planned_epsilon
from dpsink.training import use_threads
from tune import schema
from tune.board import Board
from tune.folder import StudyFolder, StudyRecord, TrialEnd, TrialRecord
from tune.preflight import StudyPlan, check_storage, check_study
from tune.search import StudySearcher
from tune.study import Study
from tune.tracking import MLflowTracker, check_tracking

log = logging.getLogger("dpsink")

CHOSEN_BY = ("fid", "accuracy")  # what analysis selects by, besides the study's own objective
SESSIONS = 3  # how often Ray may fall over as a whole before a person is asked


@dataclass(frozen=True)
class Outcome:
    """How a study stands after a session."""

    folder: StudyFolder
    record: StudyRecord
    finished: bool
    interrupted: bool  # by a person or the system; otherwise an unfinished study fell over
    best: TrialRecord | None
    statement: dict[str, Any]
    ended_early: str | None  # why no further trial started, where there were more to come
    seconds: float


def run_study(study: Study, *, data_root: Path | None = None, retry_failed: bool = False) -> Outcome:
    """Runs a study to its end, or from where it was left.

    Raises:
        InputError: anything the preflight finds, a study folder of other settings, a second sweep at once.
    """
    started = time.monotonic()
    folder = StudyFolder(study.storage.absolute() / study.name)
    plan = check_study(study, data_root)
    if not folder.exists:
        planned_epsilon(plan.costs, plan.delta, **_ledger_policy(study, plan))
    check_storage(folder.path)
    check_tracking(folder.read_study().tracking_uri if folder.exists else tracking_uri(study))
    # Until here nothing is written: a study that is refused leaves nothing behind.
    with only_one(folder):
        record = _open_study(study, folder, plan)
        if retry_failed:
            _forget_failures(folder)
        with open_ledger(study, folder, plan) as ledger:
            session = _Session(study, folder, plan, ledger, (data_root or default_root()).absolute())
            try:
                session.run()
            finally:
                statement = session.close()
    return Outcome(
        folder=folder,
        record=record,
        finished=session.finished,
        interrupted=session.interrupted,
        best=select_best(folder, study.objective),
        statement=statement,
        ended_early=session.searcher.refused,
        seconds=time.monotonic() - started,
    )


def open_ledger(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyLedger:
    """The study's privacy account, created with its promise before the first trial."""
    return StudyLedger.open(
        folder.ledger, delta=plan.delta, planned=plan.costs, witness=folder.witness(), **_ledger_policy(study, plan)
    )


def _ledger_policy(study: Study, plan: StudyPlan) -> dict[str, Any]:
    return {
        "policy": study.ledger.policy,
        "study_epsilon": study.ledger.study_epsilon if plan.private else math.inf,
        "adaptive": any(path in COSTLY for path in study.space),
    }


# Searched paths that decide what a trial costs; with none of them the list of costs is fixed in advance.
COSTLY = frozenset({"privacy.noise_multiplier", "privacy.batch_size", "privacy.steps", "privacy.step_limit"})


def select_best(folder: StudyFolder, metric: str) -> TrialRecord | None:
    """The completed searched trial that is best by a validation metric; ties go to the lower ε, then to the name.

    The same order as `dpsink-analysis best`, so that both name the same run.
    """
    sign = 1 if schema.mode_of(metric) == "min" else -1
    ranked = [
        ((sign * reports[-1].metrics[metric], reports[-1].epsilon, record.name), record)
        for record in folder.trials()
        if record.role == schema.ROLE_SEARCH
        and (end := folder.end_of(record.name)) is not None
        and end.state == "completed"
        and (reports := folder.reports(record.name))
        and metric in reports[-1].metrics
    ]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


class _Session:
    """One session of a study: the searcher, the board and the tracker around Ray."""

    def __init__(
        self, study: Study, folder: StudyFolder, plan: StudyPlan, ledger: StudyLedger, data_root: Path
    ) -> None:
        self.study, self.folder, self.plan, self.ledger, self.data_root = study, folder, plan, ledger, data_root
        total = len(study.baselines) + study.algorithm.trials
        self.board = Board(f"study {study.name}", total, study.objective)
        self.finished = self.interrupted = False
        self._write_statement()
        worker = {"data_root": str(data_root), "threads": 1}
        self.searcher = StudySearcher(study, folder, ledger, len(plan.data.train), worker, self._changed)
        self._restore_board()
        self.tracker = MLflowTracker(folder.read_study().tracking_uri, folder)

    def run(self) -> None:
        """Runs the trials, and judges the chosen ones when no trial is left."""
        self._run_trials()
        if not self.interrupted and not self.searcher.unfinished:
            self._judge_chosen()
            self.finished = True

    def _run_trials(self) -> None:
        """Lets Ray work until no trial is left, taking up again what a crash of Ray left unfinished."""
        with self.board:
            for session in range(SESSIONS):
                if session:
                    log.warning("the study is not finished; starting Ray again")
                    self.searcher = StudySearcher(
                        self.study, self.folder, self.ledger, len(self.plan.data.train), self.searcher.worker,
                        self._changed,
                    )  # fmt: skip
                if self.searcher.remaining == 0 or self._fit():
                    return

    def close(self) -> dict[str, Any]:
        """Writes the statement and closes the books, however the session ended."""
        statement = self._write_statement()
        self.tracker.poke()
        self.tracker.close(study="completed" if self.finished else "interrupted")
        return statement

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        """A trial reported."""
        self.board.show(self.folder.read_trial(name), "running", values)
        self.tracker.poke(name)

    def failed(self, name: str, error: str) -> None:
        """A trial's process failed for good."""
        self.folder.end_trial(name, TrialEnd(state="failed", error=error))
        self._changed(name)

    def _fit(self) -> bool:
        """One run of Ray Tune; False if it fell over before the study was finished."""
        from tune.cluster import Crashed, Interrupted, run_on_ray

        try:
            run_on_ray(self.study, self.folder, self.searcher, self)
        except Interrupted:
            self.interrupted = True
        except Crashed as error:
            log.warning("Ray fell over: %s", error)
        return self.interrupted or not self.searcher.unfinished

    def _changed(self, name: str) -> None:
        self.folder.write_witness(self.ledger.witness())
        end = self.folder.end_of(name)
        reports = self.folder.reports(name)
        values = {**reports[-1].metrics, "epsilon": reports[-1].epsilon} if reports else {}
        if end:  # not at each start as well: composing costs that are fixed takes a second
            self._show_spent(self.ledger.spent())
        self.board.show(self.folder.read_trial(name), end.state if end else "running", values)
        self.tracker.poke(name)

    def _restore_board(self) -> None:
        for record in self.folder.trials():
            end = self.folder.end_of(record.name)
            if end is not None:
                reports = self.folder.reports(record.name)
                values = {**reports[-1].metrics, "epsilon": reports[-1].epsilon} if reports else {}
                self.board.restore(record, end.state, values)

    def _judge_chosen(self) -> None:
        """The test split's only use: the runs that are best by something, and the baselines, each once."""
        use_threads(1)  # a second one waits more than it works on images this small
        best = [select_best(self.folder, metric) for metric in (self.study.objective, *CHOSEN_BY)]
        for record in self.folder.trials():
            chosen = record.role == schema.ROLE_BASELINE or record in best
            end = self.folder.end_of(record.name)
            if chosen and end and end.state == "completed" and not self.folder.test_metrics(record.name):
                answer = judge(
                    self.folder.run(record.name), samples=self.study.test_samples, data_root=self.data_root,
                    extractor=record.config.evaluation.extractor,
                )  # fmt: skip
                self.folder.write_test(record.name, answer["metrics"])
                self.tracker.poke(record.name)

    def _write_statement(self) -> dict[str, Any]:
        self.folder.write_witness(self.ledger.witness())
        statement = self.ledger.statement(self.plan.target_epsilon)
        self._show_spent(statement.spent)
        self.folder.write_statement(statement.to_dict())
        return statement.to_dict()

    def _show_spent(self, spent: float) -> None:
        self.board.ledger_text = f"study ε ≤ {_shown(self.ledger.cap)}, spent {_shown(spent)}"


def _shown(epsilon: float | None) -> str:
    return "–" if epsilon is None else f"{epsilon:.4g}"


@contextmanager
def only_one(folder: StudyFolder) -> Iterator[None]:
    """Refuses a second sweep on the same study."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"study {folder.path.name} is already being run by process {file.read().strip() or '?'}; wait for "
                "it, or give the study another name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _open_study(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyRecord:
    text = dump_config(study)
    if folder.exists:
        return _check_same_study(study, folder, plan)
    record = StudyRecord(
        study_id=uuid.uuid4().hex,
        name=study.name,
        experiment=study.tracking.experiment,
        tracking_uri=tracking_uri(study),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        version=version("dpsink"),
        target_epsilon=plan.target_epsilon,
        delta=plan.delta,
        data_name=plan.data.name,
        data_fingerprint=plan.data.fingerprint,
        extractor=plan.extractor,
        objectives=(study.objective,),
        searched=tuple(study.space),
    )
    folder.write_study(record, text)
    return record


def tracking_uri(study: Study) -> str:
    """Where the study is tracked: its file, else MLflow's environment variable, else sqlite in its storage."""
    default = f"sqlite:///{study.storage.absolute()}/mlflow.db"
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def _check_same_study(study: Study, folder: StudyFolder, plan: StudyPlan) -> StudyRecord:
    record = folder.read_study()
    if record.data_fingerprint != plan.data.fingerprint:
        raise InputError(f"study {study.name}: the data are not those it was started on; give it another name")
    if (folder.path / "study.yaml").read_text(encoding="utf-8") != dump_config(study):
        raise InputError(
            f"study {study.name}: its settings differ from {folder.path / 'study.yaml'}, with which it was "
            "started; give it another name, or the old settings"
        )
    return record


def _forget_failures(folder: StudyFolder) -> None:
    for record in folder.trials():
        end = folder.end_of(record.name)
        if end is not None and end.state == "failed":
            folder.forget_end(record.name)
