"""Decoded pixels kept on disk: one file a part, mode 0600 since the pixels are private, rebuilt when it is not whole.

Entries lie under `$XDG_CACHE_HOME/dpsink/data` (or `~/.cache/dpsink/data`). One is named by where the files lie and by
what is made of them, and holds a digest of their names, sizes and times: changed files replace their entry.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsink.datasets.base import Decoded
from dpsink.disk import cache_folder, keep

log = logging.getLogger("dpsink")

_FORMAT = 1  # raise it when what is made of a file changes


@dataclass(frozen=True)
class Entry:
    """One part of one data set in one form.

    Attributes:
        name: for people who look into the folder.
        key: where the files lie and what is made of them.
        listing: digest of the files as they are now.
    """

    name: str
    key: tuple[object, ...]
    listing: str

    def path(self, suffix: str = ".npz") -> Path:
        """Its file, and with another suffix a file beside it."""
        digest = hashlib.sha256(repr((_FORMAT, self.key)).encode()).hexdigest()
        return cache_folder("data") / f"{self.name}-{digest[:16]}{suffix}"


def recall(entry: Entry, decode: Callable[[], Decoded]) -> Decoded:
    """The pixels from the cache, or decoded and then kept; one process decodes while others wait for it."""
    with _only_one(entry):
        kept = _read(entry)
        if kept is not None:
            return kept
        decoded = decode()
        _write(entry, decoded)
        return decoded


def list_bad(place: Path, part: str, lines: Iterable[str]) -> Path | None:
    """Writes what is wrong with which image, mode 0600, into the cache's folder; None where that cannot be written."""
    path = Entry(f"{place.stem}-{part}", (str(place.absolute()), part), "").path(".bad.txt")
    return path if keep(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode())) else None


def _read(entry: Entry) -> Decoded | None:
    """None where there is no entry, a damaged one, or one of other files. The zip's own checksums find damage."""
    try:
        with np.load(entry.path(), allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            if facts["listing"] != entry.listing:
                return None
            return Decoded(stored["images"], {int(row): line for row, line in facts["bad"].items()})
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file may raise anything
        log.warning("%s: damaged (%s); decoding again", entry.path(), type(error).__name__)
        return None


def _write(entry: Entry, decoded: Decoded) -> None:
    facts = np.frombuffer(json.dumps({"listing": entry.listing, "bad": dict(decoded.bad)}).encode(), np.uint8)
    keep(entry.path(), lambda file: np.savez(file, facts=facts, images=decoded.images))


@contextmanager
def _only_one(entry: Entry) -> Iterator[None]:
    """Holds the entry's lock; where none can be had, several processes may do the same work."""
    try:
        path = entry.path(".lock")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    with os.fdopen(descriptor) as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
