"""Room on a disk or in memory: a study that runs out of it stops, and goes on when there is some."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpsink.disk import nearest_folder

LEAST = 32 * 2**20  # bytes: below, a study stops while it can still say where it stands
FULL = (errno.ENOSPC, errno.EDQUOT)


class Blocked(BaseException):
    """The study goes on when somebody has helped: a disk is full, or a node's memory, or a node is unfit.

    No Exception: Ray would take it for a trial's failure.
    """


def free_bytes(place: Path) -> int:
    """What is free where a folder is, or will be."""
    return shutil.disk_usage(nearest_folder(place)).free


def free_memory() -> int:
    """Bytes that this machine's memory has left for new processes; all that it has where the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_room(place: Path) -> None:
    """Raises Blocked where there is hardly any room left."""
    if (free := free_bytes(place)) < LEAST:
        raise Blocked(f"the disk of {place} is full ({free / 2**20:.0f} MiB left); make room")


@contextmanager
def told_when_full(place: Path) -> Iterator[None]:
    """Turns the system's error about a full disk, or a quota, into `Blocked`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Blocked(f"the disk of {place} is full ({error.strerror}); make room") from None
