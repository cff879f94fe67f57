"""A session tells what its study has spent, and no trial waits for that."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpsink.privacy.accounts import StudyAccounts
from dpsink.privacy.storage import FencedError
from tests.test_search import Driver, make_study
from tune.session import Session
from tune.sweep import _open_study


class Deaf:
    """A tracker that is told everything and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def poke(self, name: str | None = None) -> None:
        pass


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """Of a study of one trial that has ended just now."""
    monkeypatch.setattr("tune.session.MLflowTracker", Deaf)
    monkeypatch.setattr("tune.session.SETTLED", 0.0)
    driver = Driver(make_study(tmp_path, trials=1))
    _open_study(driver.study, driver.folder, driver.plan)
    session = Session(driver.study, driver.folder, driver.plan, driver.ledger, tmp_path)
    driver.searcher = session.searcher
    name = str(driver.suggest())
    driver.run(name)
    driver.end(name)
    yield session
    driver.close()


def spent(session: Session) -> float:
    return session.folder.statement()["spent"]


def test_what_was_spent_is_not_read_before_the_slot_of_a_trial_that_ended_has_the_next(session: Session) -> None:
    assert spent(session) == 0
    session.waiting()
    assert 0 < spent(session) == session.accounts.spent()


def test_a_session_that_was_replaced_ends_and_writes_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def fenced(_: StudyAccounts) -> None:
        raise FencedError("a newer attempt has opened the ledger")

    monkeypatch.setattr(StudyAccounts, "refuse_if_fenced", fenced)
    with pytest.raises(FencedError):
        session.waiting()
    assert spent(session) == 0


def test_what_was_spent_is_read_once_for_each_time_that_trials_end(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.waiting()
    monkeypatch.setattr(session, "write_statement", lambda: pytest.fail("read again"))
    session.waiting()


@pytest.mark.parametrize("finished", [False, True])
def test_only_a_study_that_has_ended_waits_for_the_exact_reading(
    session: Session, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    asked: list[bool] = []
    statement = StudyAccounts.statement

    def ask(self: StudyAccounts, trial_epsilon: float, *, exact: bool) -> Any:
        asked.append(exact)
        return statement(self, trial_epsilon, exact=exact)

    monkeypatch.setattr(StudyAccounts, "statement", ask)
    session.finished = finished
    session.write_statement()
    assert asked == [finished]
