"""Whether the storage carries a study: each node does there, with files of its own, what ledgers and checkpoints do."""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsink.errors import InputError
from dpsink.privacy.storage import FolderStorage
from dpsink.records import write_atomically

OURS, THEIRS = "driver.json", "node.json"


@contextmanager
def meeting_place(storage: Path) -> Iterator[Path]:
    """A folder in the storage for the nodes to try it out in, with an object of this process; gone afterwards.

    Raises:
        InputError: this process cannot do there what a study does.
    """
    place = storage / f".check-{secrets.token_hex(8)}"
    try:
        place.mkdir(parents=True)
        FolderStorage(place).create(OURS, b"{}")
    except OSError as error:
        raise InputError(f"storage {storage} cannot be written ({error.strerror}); set another storage") from None
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def try_out(place: Path, node: str) -> str:
    """What a node cannot do in a meeting place, in a few words; empty where it can do everything. Runs there.

    Args:
        node: name of the folder that it leaves, for `can_be_read`.
    """
    if not (place / OURS).exists():
        return "does not see what others wrote"
    own, aside = place / node, place / f"{node}-aside"
    objects = FolderStorage(aside)
    acts: dict[str, Callable[[], object]] = {
        "read what another node wrote": (place / OURS).read_bytes,
        "make a folder": aside.mkdir,
        "replace a file": lambda: [write_atomically(aside / "file", node) for _ in range(2)],
        "make a hard link": lambda: objects.create(THEIRS, node.encode()),
        "refuse a name that is taken": lambda: _create_again(objects),
        "lock a file": lambda: _lock(objects),
        "remove a file": (aside / "file").unlink,
        "rename a folder": lambda: aside.rename(own),
        "read its own file": (own / THEIRS).read_bytes,
    }
    for what, act in acts.items():
        try:
            act()
        except OSError as error:
            return f"cannot {what} ({error.strerror or error})"
    return ""


def can_be_read(place: Path, node: str) -> bool:
    """Whether this process reads what a node has left: their users, and what they see, are the same."""
    try:
        return (place / node / THEIRS).read_bytes() == node.encode()
    except OSError:
        return False


def _create_again(objects: FolderStorage) -> None:
    try:
        objects.create(THEIRS, b"")
    except FileExistsError:
        return
    raise OSError("it was taken twice")


def _lock(objects: FolderStorage) -> None:
    with objects.lock():
        pass
