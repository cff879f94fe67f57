"""Studies of which only the winner is published (`ledger.policy: release_best`, Papernot & Steinke 2022).

The guarantee holds only while the number of trials, every loser and the winner's place among them stay secret. So all
that is written about trials lies in STUDY/sealed, nothing about a single one is shown, and at the end `Unsealing`
takes the winner out and destroys the rest. What remains secret for ever is the study's ledger.
"""

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsink.disk import sync
from dpsink.privacy.ledger import PrivacyStatement
from tune.board import SealedBoard
from tune.choice import judge_once, select_best
from tune.cluster import TooLarge
from tune.folder import StudyFolder, TrialEnd
from tune.schema import WINNER
from tune.session import Session

ERROR_LOG = "error.log"


class SealedSession(Session):
    """A session that says of its trials only that it runs."""

    def run(self) -> None:
        """Runs the trials and unseals the winner; the words of an error may tell of trials, and are sealed too."""
        try:
            with _own_cache(self.work.path / "cache"):
                super().run()
        except TooLarge:
            raise
        except Exception:
            log = self.work.path / ERROR_LOG
            log.write_text(traceback.format_exc(), encoding="utf-8")
            self.problem = f"an error, kept in {log}, which is as secret as the trials"
        if self.searcher.refused:
            self.problem = self.searcher.refused

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        """A trial reported: nobody is told."""

    def recovered(self, name: str, error: str) -> None:
        """A trial goes on: nobody is told."""

    def spared(self, name: str, error: str) -> None:
        """A trial is to be run again: nobody is told."""

    def changed(self, name: str) -> None:
        """A trial is about to start, or has ended: the witness is told."""
        self.work.write_witness(self.accounts.witness())

    def _conclude(self) -> None:
        Unsealing(self.folder, self.study.objective, self._judge, self._tell).run()
        if self.folder.trials():
            self.tracker.poke(WINNER)

    def _judge(self, drawn: StudyFolder) -> None:
        judge_once(self.study, drawn, drawn.read_trial(WINNER), self.data_root)
        self.folder.write_floor(drawn.floor())  # of public images: it tells of no trial

    def _write_outcome(self) -> None:
        """That a selection has ended is on record; of a session of it nothing is."""

    def _tell(self) -> None:
        self.write_statement()
        if self.folder.trial(WINNER).exists():
            self.folder.copy_statement(WINNER)

    def _crashed(self, error: str) -> None:
        """Ray's words would name trials."""

    def _make_work(self) -> StudyFolder:
        """A folder for the owner's eyes only; so is the study's own, where the size of the ledger's would tell."""
        sealed = self.folder.sealed
        self.folder.path.chmod(0o700)
        sealed.path.mkdir(mode=0o700, exist_ok=True)
        return sealed

    def _make_board(self) -> SealedBoard:
        return SealedBoard(f"study {self.study.name}")

    def _restore_board(self) -> None:
        """A sealed board shows no trial."""

    def _show_spent(self, statement: PrivacyStatement) -> None:
        self.board.ledger_text = f"study ε ≤ {self.accounts.cap:.4g}"


class Unsealing:
    """The last steps of a sealed study. Each can be repeated: a kill at any instant leaves the same winner, once.

    Until `conclude` the sealed part is whole, so that everything can be done again. From then on nothing is run or
    chosen any more, and what is left of the sealed part only waits for its end.

    Args:
        folder: of the study.
        objective: the metric by which the winner wins.
        judge: measures the winner on the test split, given a folder in which it is a trial.
        tell: writes the study's statement, beside the winner too.
    """

    def __init__(
        self,
        folder: StudyFolder,
        objective: str,
        judge: Callable[[StudyFolder], None],
        tell: Callable[[], Any],
    ) -> None:
        self.folder, self.objective, self.judge, self.tell = folder, objective, judge, tell
        self.drawn = StudyFolder(folder.sealed.path / "drawn")

    def run(self) -> None:
        """All steps in turn."""
        if not self.folder.trial(WINNER).exists():
            self.draw_out()
            self.publish()
        self.conclude()
        destroy_sealed(self.folder)

    def draw_out(self) -> None:
        """Copies the winner, as a trial without a number, and judges it. No winner: every trial counts as the worst.

        Equal scores go to the lower ε, then to the first name: trials are exchangeable, so that is as good as chance.
        """
        best = select_best(self.folder.sealed, self.objective)
        if best is None:
            return
        shutil.rmtree(self.drawn.path, ignore_errors=True)
        _copy_untimed(self.folder.sealed.run(best.name), self.drawn.run(WINNER))
        self.drawn.add_trial(best.model_copy(update={"name": WINNER, "number": None}))
        self.drawn.end_trial(WINNER, TrialEnd(state="completed"))
        self.judge(self.drawn)

    def publish(self) -> None:
        """Moves the winner to its place, whole."""
        if self.drawn.trial(WINNER).exists():
            self.folder.trial(WINNER).parent.mkdir(exist_ok=True)
            self.drawn.trial(WINNER).rename(self.folder.trial(WINNER))
            sync(self.folder.trial(WINNER).parent)

    def conclude(self) -> None:
        """Writes the statement, and that the selection has ended."""
        self.tell()
        self.folder.write_selection(WINNER if self.folder.trial(WINNER).exists() else None)


def destroy_sealed(folder: StudyFolder) -> None:
    """Deletes all that is left of the losers, and of the winner's life among them."""
    if folder.sealed.path.exists():
        shutil.rmtree(folder.sealed.path)


@contextmanager
def _own_cache(place: Path) -> Iterator[None]:
    """Keeps what this process and its workers compute about each proposal out of the person's cache, where it stays."""
    before = os.environ.get("XDG_CACHE_HOME", "")  # empty is as good as unset
    os.environ["XDG_CACHE_HOME"] = str(place)
    try:
        yield
    finally:
        os.environ["XDG_CACHE_HOME"] = before


def _copy_untimed(source: Path, target: Path) -> None:
    """A durable copy of a run folder without what tells when it ran, and so how many ran before it.

    That is the time of each file and folder, and who locked its ledgers: process ids count up.
    """
    ignored = shutil.ignore_patterns("lock-*", ".*")
    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=ignored)
    for path in (*target.rglob("*"), target):
        os.utime(path)
        sync(path)
