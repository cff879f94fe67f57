"""Places and promises of the file system that several modules share."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dpsink.errors import InputError

log = logging.getLogger("dpsink")

CARD = "card.json"  # what a folder holds that a command of this project made


def cache_folder(name: str) -> Path:
    """Folder of one kind of things that can be made again: `$XDG_CACHE_HOME/dpsink/NAME`, or below `~/.cache`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is invalid by the XDG specification and is to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "dpsink" / name


def keep(path: Path, write: Callable[[IO[bytes]], Any]) -> bool:
    """Writes a cache's entry whole or not at all, readable by its owner only; without a cache only time is lost.

    Of several processes that write one entry at once, the last one's stands.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        log.warning("%s: cannot be written, so it is not cached (%s)", path, error.strerror)
        return False
    return True


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(out: Path, *, force: bool) -> None:
    """Refuses to replace what exists, unless it is told to; and a folder of somebody else's, always.

    Raises:
        InputError: so it is.
    """
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out}: exists; choose another --out, or --force to replace it")
    if out.is_dir() and not (out / CARD).exists():
        raise InputError(f"{out}: cannot be written (without {CARD} it is not replaced); choose another --out")


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A path for a file or a folder that takes the place of `out` at the end; after an error `out` is as it was.

    Raises:
        InputError: it cannot be written.
    """
    draft, old = (out.with_name(f".{out.stem}.{kind}-{os.getpid()}{out.suffix}") for kind in ("draft", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if out.is_dir():  # a folder that holds files cannot be replaced in one step
            out.rename(old)
        draft.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        remove(draft)
        remove(old)


def remove(path: Path) -> None:
    """Deletes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
