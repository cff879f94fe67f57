"""The driver's word to the processes of all trials: whether to go on. It lies in the folder that all can see."""

import math
import time

from tune.folder import StudyFolder

LOOK_SECONDS = 1.0  # between two looks


class Orders:
    """What the driver wants of a trial's process, looked at now and then."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder, self._looked, self._stop = folder, -math.inf, False

    def stop(self) -> bool:
        """Whether the study is to stop."""
        if not self._stop and time.monotonic() - self._looked > LOOK_SECONDS:
            self._stop, self._looked = self._folder.ordered_to_stop(), time.monotonic()
        return self._stop
