"""When to look for news of trials again."""

import time

SHARE, LONGEST = 1 / 200, 0.5  # of the time since the last news, and in seconds


class Pace:
    """Lets Tune rest while nothing happens.

    Tune looks for news ten times a second, and over all its own affairs each time: beside trials on all cores that
    takes 3 % of one. What has been quiet for long may rest for longer; by that an event waits for a four-hundredth of
    what it took, on average.
    """

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def hear(self) -> None:
        """Something happened, and more may follow at once."""
        self._heard = time.monotonic()

    def seconds(self) -> float:
        """How long to rest now."""
        return min(LONGEST, SHARE * (time.monotonic() - self._heard))
