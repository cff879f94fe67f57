"""One session of a study: the searcher, the board and the tracker around Ray."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from dpsink.privacy.accounts import StudyAccounts
from dpsink.privacy.ledger import PrivacyStatement
from dpsink.privacy.storage import FencedError
from tune.board import Board, ledger_line
from tune.choice import chosen_trials, judge_once
from tune.folder import SessionEnd, StudyFolder
from tune.preflight import StudyPlan
from tune.room import Blocked, told_when_full
from tune.search import StudySearcher
from tune.study import Study
from tune.tracking import MLflowTracker
from tune.versions import deciding_versions

log = logging.getLogger("dpsink")

SESSIONS = 3  # how often Ray may fall over as a whole before a person is asked
READING_SHARE = 0.01  # of the session's time, at most, that goes into reading what was spent
LOOK_SECONDS = 5.0  # between two looks whether another driver has taken the study over
SETTLED = 1.0  # seconds after a trial's end by which its slot has the next one
PATIENCE = 30.0  # seconds that MLflow may take without progress at the end of a study
HURRY = 3.0  # seconds that it may take while a person waits for the study to stop


class Session:
    """A session of a study that shows everything; `tune.sealing` has the one that does not.

    Args:
        study: the checked study.
        folder: its folder, written already.
        plan: of the preflight.
        accounts: open.
        data_root: absolute.

    Attributes:
        finished: whether the study has ended.
        problem: why not, where it has not: for a person, in few words.
        interrupted: whether that was a person or the system.
    """

    def __init__(
        self, study: Study, folder: StudyFolder, plan: StudyPlan, accounts: StudyAccounts, data_root: Path
    ) -> None:
        self.study, self.folder, self.plan, self.accounts, self.data_root = study, folder, plan, accounts, data_root
        self.finished = self.interrupted = False
        self._next_reading = self._next_look = 0.0
        self._unread = False  # whether a trial has ended since the last reading
        self.problem = "it has not ended"
        self.work = self._make_work()  # where trials are recorded and run
        self.board: Any = self._make_board()
        self.work.write_witness(accounts.witness())
        self.folder.write_outcome(None)
        self.write_statement()
        self.searcher = self._make_searcher()
        self._restore_board()
        self.tracker = MLflowTracker(folder.read_study().tracking_uri, folder)

    def run(self) -> None:
        """Runs the trials, and concludes the study when none is left."""
        try:
            with told_when_full(self.folder.path):
                self._run_trials()
                if not self.interrupted and not self.searcher.unfinished:
                    self._conclude()
                    self.finished = True
        except Blocked as full:
            self.problem = str(full)
        except FencedError:
            self.problem = "another sweep, on another machine, has taken the study over"
        except KeyboardInterrupt:  # while Ray starts, or the best are judged: elsewhere signals are a flag
            self.interrupted, self.problem = True, "stopped"
        except Exception as error:
            self.problem = f"an error: {' '.join(str(error).split()) or type(error).__name__}"
            raise

    def close(self) -> dict[str, Any]:
        """Writes the statement and closes the books, however it ended, unless they are another driver's by now."""
        if self.accounts.fenced:
            self.tracker.abandon()
            return self.folder.statement()
        try:
            with told_when_full(self.folder.path):
                self._write_end()
        except Blocked as full:
            self.problem = str(full)
        self.tracker.poke()
        state = "completed" if self.finished else "interrupted"
        self.tracker.close(study=state, patience=PATIENCE, limit=HURRY if self.interrupted else math.inf)
        return self.folder.statement()

    def _write_end(self) -> None:
        self.write_statement()
        for trial in self.folder.trials() if self.finished else ():
            self.folder.copy_statement(trial.name)
        self._write_outcome()

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        """A trial reported."""
        self.board.show(self.folder.read_trial(name), "running", values)
        self.tracker.poke(name)

    def recovered(self, name: str, error: str) -> None:
        """A trial's process died, and the trial goes on."""
        log.warning("%s goes on from its checkpoint: %s", name, error)

    def failed(self, name: str, error: str) -> None:
        """A trial's process failed for good."""
        self.searcher.finish(name, failed=True, error=error)

    def spared(self, name: str, error: str) -> None:
        """A trial was given up for what is no fault of its own: it has not ended."""
        log.warning("%s is to be run again, its machine gave it up: %s", name, error)

    def changed(self, name: str) -> None:
        """A trial is about to start, or has ended."""
        self.work.write_witness(self.accounts.witness())
        end = self.folder.end_of(name)
        if end and not self._unread:
            self._unread, self._next_reading = True, max(self._next_reading, time.monotonic() + SETTLED)
        if not end:  # the claim is the same at the study's end, when the reading in it is brought up to date
            self.folder.copy_statement(name)
        self.board.show(self.folder.read_trial(name), end.state if end else "running", self._values(name))
        self.tracker.poke(name)

    def waiting(self) -> None:
        """Leaves the study to a driver that has replaced this one; tells what was spent while nothing waits for it."""
        self._leave_if_replaced()
        if not self._unread or (started := time.monotonic()) < self._next_reading:
            return
        self.write_statement()  # reading it may take seconds
        self._unread, now = False, time.monotonic()
        self._next_reading = now + (now - started) / READING_SHARE

    def _leave_if_replaced(self) -> None:
        """Raises FencedError, which ends the session: its trials would keep the other driver's from going on."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        self.accounts.refuse_if_fenced()

    def write_statement(self) -> None:
        """Records what may be said about the study's privacy by now; before the end nobody is kept waiting for it."""
        statement = self.accounts.statement(self.plan.target_epsilon, exact=self.finished)
        if earlier := self.folder.read_study().repeats:
            statement = statement.after(earlier.name, earlier.epsilon, earlier.delta, earlier.spent)
        self._show_spent(statement)
        self.folder.write_statement(statement.to_dict())

    def _conclude(self) -> None:
        chosen = chosen_trials(self.folder, self.study.objectives)
        if waiting := sum(not self.folder.test_metrics(record.name) for record in chosen):
            log.info("judging %d trials on the test split", waiting)
        for record in chosen:
            judge_once(self.study, self.folder, record, self.data_root)
            self.tracker.poke(record.name)

    def _run_trials(self) -> None:
        """Lets Ray work until no trial is left, taking up again what a crash of Ray left unfinished."""
        with self.board:
            for session in range(SESSIONS):
                if session:
                    log.warning("the study is not finished; starting Ray again")
                    self.searcher = self._make_searcher()
                if self.searcher.remaining == 0 or self._fit():
                    return

    def _fit(self) -> bool:
        """One run of Ray Tune; False if it fell over before the study was finished."""
        from tune.cluster import Crashed, Interrupted, run_on_ray

        try:
            run_on_ray(self.study, self.work, self.searcher, self)
        except Interrupted:
            self.interrupted, self.problem = True, "stopped"
        except Crashed as error:
            self._crashed(str(error))
        return self.interrupted or not self.searcher.unfinished

    def _crashed(self, error: str) -> None:
        self.problem = f"Ray fell over ({error})"
        log.warning(self.problem)

    def _make_work(self) -> StudyFolder:
        return self.folder

    def _make_searcher(self) -> StudySearcher:
        worker = {
            "data_root": str(self.data_root),
            "fingerprint": self.plan.data.fingerprint,
            "versions": deciding_versions(),
            "threads": 1,
        }
        records = len(self.plan.data.train)
        return StudySearcher(self.study, self.work, self.accounts, records, worker, self.changed)

    def _make_board(self) -> Any:
        return Board(f"study {self.study.name}", self.study.trials, self.study.objective, self.study.seeds)

    def _restore_board(self) -> None:
        for record in self.folder.trials():
            if end := self.folder.end_of(record.name):
                self.board.restore(record, end.state, self._values(record.name))

    def _write_outcome(self) -> None:
        problem = "" if self.finished else self.problem
        self.folder.write_outcome(
            SessionEnd(finished=self.finished, problem=problem, ended_early=self.searcher.refused)
        )

    def _values(self, name: str) -> dict[str, float]:
        """What a trial told last."""
        reports = self.folder.reports(name)
        return {**reports[-1].metrics, "epsilon": reports[-1].epsilon} if reports else {}

    def _show_spent(self, statement: PrivacyStatement) -> None:
        self.board.ledger_text = ledger_line(statement.study_epsilon, statement.spent)
