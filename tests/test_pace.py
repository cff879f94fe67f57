"""When to look for news of trials again."""

import pytest

from tune import pace
from tune.pace import LONGEST, SHARE, Pace


class Clock:
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def test_rest_is_a_share_of_the_quiet_time(clock: Clock) -> None:
    paced = Pace()
    clock.now += 40
    assert paced.seconds() == pytest.approx(SHARE * 40)


def test_rest_has_an_end(clock: Clock) -> None:
    paced = Pace()
    clock.now += 1e6
    assert paced.seconds() == LONGEST


def test_news_end_the_rest(clock: Clock) -> None:
    paced = Pace()
    clock.now += 40
    paced.hear()
    assert paced.seconds() == 0
