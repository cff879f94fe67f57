"""Data sets of one image file a record: decoded once, in parallel, and kept."""

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from torch import Tensor

from dpsink import console
from dpsink.datasets.base import Decoded
from dpsink.datasets.cache import Entry, recall
from dpsink.datasets.pictures import Form, shape_text

log = logging.getLogger("dpsink")

_TOGETHER = 64  # files that one task decodes: enough that handing out tasks costs nothing


@dataclass(frozen=True)
class FileSource:
    """Image files with their labels, a `Source`.

    Attributes:
        name: for the cache's file names.
        files: part to paths below `place`, in the order of the labels.
    """

    name: str
    place: Path
    files: Mapping[str, Sequence[str]]
    labels: Mapping[str, Tensor]
    num_classes: int
    form: Form

    def images(self, part: str) -> Decoded:
        """Pixels of a part, from the cache or decoded now."""
        return recall(self.entry(part), lambda: decode(self.place, self.files[part], self.form))

    def entry(self, part: str) -> Entry:
        """Where the pixels of a part are kept."""
        place = str(self.place.absolute())
        key = (place, part, self.form, PIL.__version__)
        return Entry(f"{self.name}-{part}", key, _listing(self.place, self.files[part]))


def decode(place: Path, files: Sequence[str], form: Form) -> Decoded:
    """Decodes files on all cores (Pillow lets go of Python's lock), with a bar on a terminal.

    Returns:
        Their pixels; bad are files that cannot be decoded, and those of another shape than most.
    """
    log.info("decoding %s images under %s, once", f"{len(files):,}", place)
    outcomes = list(_each(files, lambda name: _decode_one(place / name, form)))
    shapes = Counter(outcome.shape for outcome in outcomes if not isinstance(outcome, str))
    usual = max(shapes, key=lambda shape: (shapes[shape], shape), default=(1, 1, 1))
    images, bad = np.zeros((len(files), *usual), np.uint8), {}
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            bad[row] = f"{place / files[row]}: {outcome}"
        elif outcome.shape != usual:
            bad[row] = f"{place / files[row]}: {_other_shape(outcome.shape, usual)}"
        else:
            images[row] = outcome
        outcomes[row] = ""  # let go of it: at no time are there two copies of all
    return Decoded(images, bad)


def _each(files: Sequence[str], work: Callable[[str], np.ndarray | str]) -> Iterator[np.ndarray | str]:
    pool = ThreadPoolExecutor(os.cpu_count())
    batches = [files[start : start + _TOGETHER] for start in range(0, len(files), _TOGETHER)]
    done = pool.map(lambda batch: [work(name) for name in batch], batches)
    shown = track(done, "decoding", len(batches), console=console.err, disable=not console.err.is_terminal)
    try:
        for outcomes in shown:
            yield from outcomes
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C need not wait for the rest


def _decode_one(path: Path, form: Form) -> np.ndarray | str:
    """Pixels, or what is wrong with the file."""
    if not path.is_file():  # a pipe would wait for ever
        return "is no file"
    try:
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            return form.apply(picture)
    except UnidentifiedImageError:
        return "is no image of a format that Pillow reads" if path.stat().st_size else "is empty"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # a decoder may raise anything on a damaged file
        return " ".join(str(error).split()) or f"cannot be decoded ({type(error).__name__})"


def _other_shape(shape: tuple[int, ...], usual: tuple[int, ...]) -> str:
    setting = "data.colour" if shape[1:] == usual[1:] else "data.size"
    return f"is {shape_text(shape)}, most others are {shape_text(usual)}; {setting} brings them to one form"


def _listing(place: Path, files: Sequence[str]) -> str:
    """Digest of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(repr((name, *_state(place / name))).encode())
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-2, -2)
