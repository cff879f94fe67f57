"""Places and promises of the file system that several modules share."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Folder of one kind of things that can be made again: `$XDG_CACHE_HOME/dpsink/NAME`, or below `~/.cache`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is invalid by the XDG specification and is to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "dpsink" / name


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
