"""Tensors that cost time and can be made again, kept below the cache folder: safetensors with their own checksum."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpsink.data import LabelledImages
from dpsink.disk import keep
from dpsink.privacy.release import ReleaseRefused

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


def recall(path: Path, make: Callable[[], Tensors], *, valid: Callable[[Tensors], object] = lambda _: None) -> Tensors:
    """The entry, or what `make` gives, which is then kept; a damaged entry is made again.

    Args:
        valid: raises RuntimeError for an entry that does not fit.
    """
    entry = _read(path)
    if entry is not None:
        try:
            valid(entry)
            return entry
        except RuntimeError:
            log.warning("%s: does not fit; made again", path)
    made = make()
    keep(path, lambda file: file.write(save(made, {"sha256": _checksum(made)})))
    return made


def digest(*parts: LabelledImages | object) -> str:
    """SHA-256 of facts and of public images, hexadecimal: a name in the cache.

    Raises:
        ReleaseRefused: private images, of which a plain hash and whatever is kept under it would be a release.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, LabelledImages):
            refuse_private(part)
            sha.update(repr((part.shape, len(part), part.num_classes)).encode())
            sha.update(part.images.contiguous().numpy().data)
            sha.update(part.labels.contiguous().numpy().data)
        else:
            sha.update(repr(part).encode())
    return sha.hexdigest()


def refuse_private(reference: LabelledImages) -> None:
    """Only public images are ever a reference: what is fitted to them is told, and kept, without noise.

    Raises:
        ReleaseRefused: they are private.
    """
    if reference.private:
        raise ReleaseRefused("private images cannot be the reference of an evaluation: its figures carry no noise")


def _read(path: Path) -> Tensors | None:
    """None where the entry is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as entry:
            tensors = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118 (not a dict)
            return tensors if (entry.metadata() or {}).get("sha256") == _checksum(tensors) else None
    except (OSError, SafetensorError, RuntimeError):
        return None


def _checksum(tensors: Tensors) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
