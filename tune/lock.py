"""One sweep at a time has a study's folder; others can see which process that is."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dpsink.errors import InputError
from tune.folder import StudyFolder

LOOKS, PAUSE = 5, 0.1  # seconds: who only looks whether there is a holder has the lock for an instant


@dataclass(frozen=True)
class Holder:
    """Who runs a study: the process, `?` where that cannot be read, and since when (seconds since the epoch)."""

    pid: str
    since: float


@contextmanager
def only_one(folder: StudyFolder) -> Iterator[None]:
    """Refuses a second sweep on the same study."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with _place(folder).open("a+") as file:
        if not _lock_soon(file):
            file.seek(0)
            raise InputError(
                f"study {folder.path.name} is already being run by process {file.read().strip() or '?'}; wait for "
                "it, or give the study another name"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(folder: StudyFolder) -> Holder | None:
    """Who runs the study now; None if nobody does."""
    with suppress(FileNotFoundError), _place(folder).open() as file:
        if not _lock(file, fcntl.LOCK_SH):
            return Holder(file.read().strip() or "?", os.fstat(file.fileno()).st_mtime)
    return None


def _lock_soon(file: IO[str]) -> bool:
    for _ in range(LOOKS):
        if _lock(file, fcntl.LOCK_EX):
            return True
        time.sleep(PAUSE)
    return False


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{file.name} cannot be locked ({error.strerror}); put the study's storage on a file system with locks"
        ) from None
    return True


def _place(folder: StudyFolder) -> Path:
    return folder.path / ".lock"
