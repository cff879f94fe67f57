"""Where images come from: built-in benchmarks, CelebA, and the user's own folders and arrays."""

from collections.abc import Mapping
from pathlib import Path

from dpsink.config import DataConfig
from dpsink.datasets import celeba
from dpsink.datasets.base import PARTS, Decoded, LabelledImages, Source
from dpsink.datasets.builtin import DATASETS, open_builtin
from dpsink.datasets.folder import open_folder
from dpsink.datasets.npz import open_npz
from dpsink.errors import InputError

__all__ = ["DATASETS", "Decoded", "LabelledImages", "Source", "open_source", "part_sizes"]


def open_source(config: DataConfig, root: Path, *, download: bool = False) -> Source:
    """The data set of a trial, without its pixels where they lie in files of their own.

    Args:
        root: folder of the built-in data sets, and of relative `folder:` and `npz:` paths.
        download: fetch missing files through torchvision; it has no part in CelebA or own data.

    Raises:
        InputError: files that are missing, damaged, or not the standard ones.
    """
    if config.path is not None:
        place = root / config.path.expanduser()  # an absolute path stands for itself
        return (open_folder if config.name.startswith("folder:") else open_npz)(config, place)
    faces = config.name == "celeba"
    source = celeba.open_celeba(config, root) if faces else open_builtin(config, root, download)
    _check_standard(config, source)
    return source


def part_sizes(config: DataConfig, root: Path) -> Mapping[str, int]:
    """Images in each part, public: known beforehand for built-in data sets, counted for the user's own."""
    known = _standard_sizes(config)
    if known is not None:
        return known
    return {part: len(labels) for part, labels in open_source(config, root).labels.items()}


def _standard_sizes(config: DataConfig) -> Mapping[str, int] | None:
    if config.name == "celeba":
        return celeba.SIZES
    return DATASETS[config.name].sizes if config.name in DATASETS else None


def _check_standard(config: DataConfig, source: Source) -> None:
    for part, expected in (_standard_sizes(config) or {}).items():
        found = len(source.labels[part])
        if found != expected:
            noun = "training" if part == PARTS[0] else part
            raise InputError(f"{config.name} must hold {expected} {noun} images, not {found}: use standard files")
