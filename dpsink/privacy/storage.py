"""Durable storage of the two ledgers: sealed objects that are created once and never change.

`Storage` is the little that a ledger asks of a file system or an object store: nothing is ever appended,
overwritten or removed. `Chain` is the ledger's log on top of it, used by `budget.py` and `ledger.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dpsink.disk import sync
from dpsink.errors import InputError

GENESIS = "ledger.json"  # the first object: the ledger's random id and its terms


class DamagedLedger(InputError):
    """A ledger that does not hold all that was written to it; to go on would under-count."""


class InUse(InputError):
    """A ledger that another process of this host has open."""


class FencedError(RuntimeError):
    """A newer attempt has opened the ledger: this one has to stop, and has been granted nothing."""


class Storage(Protocol):
    """Exclusive durable create, list, read. Implementations must be strongly consistent.

    POSIX is below. An object store creates with its "if none match" condition and locks with `nullcontext`:
    across hosts it is the attempt numbers of `Chain`, not the lock, that keep an older process out.
    """

    def create(self, name: str, content: bytes) -> None:
        """Create an object, whole and durable before this returns.

        Raises:
            FileExistsError: the name is taken.
            OSError: nothing may be relied on; whatever became visible is whole.
        """
        ...

    def names(self) -> list[str]:
        """The names of all objects, in any order; empty if nothing was created yet."""
        ...

    def read(self, name: str) -> bytes:
        """An object's content.

        Raises:
            FileNotFoundError: there is no object of that name.
        """
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes of this host out for as long as the context lasts.

        Raises:
            InUse: another process holds the lock.
        """
        ...


class FolderStorage:
    """Objects as `*.json` files (mode 0600) in a folder of a POSIX file system with hard links."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def create(self, name: str, content: bytes) -> None:
        """See `Storage.create`: written aside, synced, linked to its name, and the folder synced."""
        aside = self.folder / f".{secrets.token_hex(8)}"  # one left behind by a crash is never read
        try:
            _write_durably(aside, content)
            os.link(aside, self.folder / name)  # unlike rename, link refuses a name that is taken
        finally:
            aside.unlink(missing_ok=True)
        sync(self.folder)

    def names(self) -> list[str]:
        """See `Storage.names`."""
        if not self.folder.is_dir():
            return []
        return [n for n in os.listdir(self.folder) if n.endswith(".json") and not n.startswith(".")]

    def read(self, name: str) -> bytes:
        """See `Storage.read`."""
        return (self.folder / name).read_bytes()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Storage.lock`: flock on a file of this host's own, which the kernel releases when the process dies.

        Not one for all hosts: a network file system may hold the lock of a host that has vanished for ever.
        """
        _make_folder_durably(self.folder)
        with open(self.folder / f"lock-{socket.gethostname()}", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "(unknown)"
                raise InUse(
                    f"{self} is in use by process {holder}; one process at a time: wait for it or stop it"
                ) from None
            file.truncate(0)
            print(os.getpid(), "on", socket.gethostname(), file=file, flush=True)
            yield


def as_storage(place: str | os.PathLike[str] | Storage) -> Storage:
    """A folder's storage, or the storage itself."""
    return FolderStorage(place) if isinstance(place, str | os.PathLike) else place


def _write_durably(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make_folder_durably(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder_durably(folder.parent)
        folder.mkdir(exist_ok=True)
    # Also when it was there: an earlier process may have died between its mkdir and its sync.
    if folder != folder.parent:
        sync(folder.parent)


@dataclass(frozen=True)
class Entry:
    """One object of a ledger, sealed by a checksum over all of its fields.

    Args:
        name: the object's own name, so that a copy under another name is found.
        ledger: the ledger's random id, so that an object of another ledger is found.
        previous: checksums of the entries that no entry followed yet when this one was written. Mostly one;
            two when an older attempt wrote last after a newer one had begun.
        data: what the ledger recorded; JSON-able.
    """

    name: str
    ledger: str
    previous: tuple[str, ...]
    data: dict[str, Any]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the canonical JSON of the fields, in hex."""
        return hashlib.sha256(_canonical(self._fields())).hexdigest()

    def to_bytes(self) -> bytes:
        """The object's content."""
        return _canonical({**self._fields(), "sha256": self.checksum})

    @staticmethod
    def from_bytes(content: bytes) -> Entry:
        """The entry of an object.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not what `to_bytes` wrote.
        """
        fields = json.loads(content)
        checksum = fields.pop("sha256")
        entry = Entry(**{**fields, "previous": tuple(fields["previous"])})
        if entry.checksum != checksum:
            raise ValueError("the checksum does not match")
        return entry

    def _fields(self) -> dict[str, Any]:
        return {"name": self.name, "ledger": self.ledger, "previous": self.previous, "data": self.data}


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def read_entries(storage: Storage, known: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
    """All entries of a ledger by name, verified: whole, of one ledger, and none missing before another.

    Args:
        known: entries that were read before and need not be read again.

    Returns:
        Name to entry, sorted by name; empty if there is no ledger.

    Raises:
        DamagedLedger: an object is missing, truncated, edited, copied, or from another ledger. That the
            newest objects are missing can only be seen against a witness: see `Chain.open`.
    """
    names = sorted(storage.names())
    entries = {name: (known or {}).get(name) or _read_entry(storage, name) for name in names}
    if names and GENESIS not in entries:
        raise _damaged(storage, f"{GENESIS} is missing")
    checksums = {entry.checksum for entry in entries.values()}
    for name, entry in entries.items():
        if entry.ledger != entries[GENESIS].ledger:
            raise _damaged(storage, f"{name} belongs to another ledger")
        if not checksums.issuperset(entry.previous) or bool(entry.previous) == (name == GENESIS):
            raise _damaged(storage, f"an object written before {name} is missing")
    return entries


def _read_entry(storage: Storage, name: str) -> Entry:
    try:
        entry = Entry.from_bytes(storage.read(name))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(storage, f"{name} is truncated or was edited") from None
    if entry.name != name:
        raise _damaged(storage, f"{name} is a copy of {entry.name}")
    return entry


def _damaged(storage: Storage, what: str) -> DamagedLedger:
    return DamagedLedger(
        f"ledger {storage}: {what}; what was spent is no longer known: restore the ledger from a backup, or"
        " give it up together with its checkpoints and start anew under a new name"
    )


class Chain:
    """An append-only ledger, open for one process at a time; a context manager.

    Entries are sealed, carry the ledger's random id and name the checksums of those before them, so what is
    missing, edited or foreign is found when the ledger is opened. Each opening takes the next attempt number
    by an exclusive create (`000001.json`, ...): from then on older attempts are refused.

    Use `Chain.open`.
    """

    def __init__(self, storage: Storage, lock: ExitStack) -> None:
        self._storage = storage
        self._lock = lock
        self._entries: dict[str, Entry] = {}
        self._heads: list[str] = []  # checksums that no entry follows yet
        self._open = True
        self.attempt = 0  # numbered from 1

    @classmethod
    def open(cls, storage: Storage, terms: Mapping[str, Any], *, witness: Mapping[str, Any] | None = None) -> Chain:
        """Create a ledger, or open it as its next attempt.

        Args:
            storage: where it is.
            terms: what may never change during the ledger's life; JSON-able.
            witness: what `witness()` returned earlier, for example when a checkpoint was written.

        Raises:
            InUse: another process has it open.
            InputError: a term has changed.
            DamagedLedger: not all that was written, or that the witness saw, is there.
            OSError: the storage failed.
        """
        with ExitStack() as lock:
            lock.enter_context(storage.lock())
            chain = cls(storage, lock)
            chain._refresh()
            chain._verify(witness)
            if not chain._entries:
                chain._create(terms)
            chain._refuse_changed(terms)
            chain._take_attempt()
            chain._lock = lock.pop_all()
        return chain

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """What was recorded, by name, the ledger's own objects included."""
        return {name: entry.data for name, entry in self._entries.items()}

    def append(self, name: str, data: Mapping[str, Any]) -> None:
        """Record `data` as the object `name`, durable before this returns.

        Raises:
            FencedError: a newer attempt exists. The entry may have been written and then counts, but the
                caller must act as if it were not.
            OSError: the storage failed; the same holds.
        """
        self.refuse_if_fenced()
        self._write(name, data)
        # A newer attempt reads all entries after it took its number. So either it has read this entry, or
        # its number is seen here: what both would count as theirs is never granted.
        self.refuse_if_fenced()

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has opened the ledger, RuntimeError if this one is closed."""
        if not self._open:
            raise RuntimeError(f"ledger {self._storage} is closed")
        try:
            self._storage.read(_attempt_name(self.attempt + 1))
        except FileNotFoundError:
            return
        raise FencedError(f"ledger {self._storage}: attempt {self.attempt} was replaced by a newer one")

    def witness(self) -> dict[str, Any]:
        """What to keep elsewhere, so that `open` can tell whether anything was lost since; JSON-able."""
        return {"ledger": self._id, "objects": len(self._entries), "heads": self._heads}

    def close(self) -> None:
        """Release the lock; nothing can be recorded any more."""
        self._open = False
        self._lock.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _id(self) -> str:
        return self._entries[GENESIS].ledger

    def _refresh(self) -> None:
        self._entries = read_entries(self._storage, self._entries)
        followed = {checksum for entry in self._entries.values() for checksum in entry.previous}
        self._heads = sorted({entry.checksum for entry in self._entries.values()} - followed)

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        entry = Entry(name, self._id, tuple(self._heads), dict(data))
        self._storage.create(name, entry.to_bytes())
        self._entries[name], self._heads = entry, [entry.checksum]

    def _create(self, terms: Mapping[str, Any]) -> None:
        genesis = Entry(GENESIS, secrets.token_hex(16), (), {"terms": dict(terms)})
        with suppress(FileExistsError):  # another host was first: its terms count
            self._storage.create(GENESIS, genesis.to_bytes())
        self._refresh()

    def _verify(self, witness: Mapping[str, Any] | None) -> None:
        if witness is None:
            return
        if not self._entries:
            raise _damaged(self._storage, "it is gone, but a checkpoint of it exists")
        if witness["ledger"] != self._id:
            raise _damaged(self._storage, "it is not the ledger that the checkpoint was written with")
        if not {entry.checksum for entry in self._entries.values()}.issuperset(witness["heads"]):
            seen, left = witness["objects"], len(self._entries)
            raise _damaged(self._storage, f"the checkpoint saw {seen} objects, {left} are left, not all of those")

    def _refuse_changed(self, terms: Mapping[str, Any]) -> None:
        old = self._entries[GENESIS].data["terms"]
        new = json.loads(json.dumps(dict(terms)))
        for field in sorted(old.keys() | new.keys()):
            if old.get(field) != new.get(field):
                raise InputError(
                    f"{field}={new.get(field)!r} differs from {old.get(field)!r}, the terms of the ledger"
                    f" {self._storage}, which never change: set it back, or start anew under a new name"
                )

    def _take_attempt(self) -> None:
        while True:
            self.attempt = 1 + sum(1 for entry in self._entries.values() if "attempt" in entry.data)
            try:
                self._write(_attempt_name(self.attempt), {"attempt": self.attempt})
                break
            except FileExistsError:
                self._refresh()  # another host took the number first
        self._refresh()  # what older attempts wrote until now counts; from now on they are refused


def _attempt_name(attempt: int) -> str:
    return f"{attempt:06d}.json"
