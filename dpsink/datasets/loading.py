"""From a source and the rows of each split to images in memory; bad ones are told, or left out where that is asked."""

import logging
from collections.abc import Mapping

import torch

from dpsink.config import DataConfig
from dpsink.datasets.base import TRAIN, VALIDATION, Decoded, LabelledImages, Source
from dpsink.datasets.cache import list_bad
from dpsink.datasets.pictures import shape_text
from dpsink.datasets.splits import Rows
from dpsink.errors import InputError

log = logging.getLogger("dpsink")


def load_splits(config: DataConfig, source: Source, rows: Mapping[str, Rows]) -> dict[str, LabelledImages]:
    """The images of each split.

    With `data.skip_bad`, bad images of a public split are left out, and those of the training split become absent
    records: N stays what was declared.

    Raises:
        InputError: a bad image that may not be skipped, parts of different shapes, a class without images.
    """
    parts = {part: source.images(part) for part in dict.fromkeys(row.part for row in rows.values())}
    for part, decoded in parts.items():
        _tell_bad(config, source, part, decoded.bad)
    _check_shapes(source, parts)
    splits = {split: _select(source, parts[row.part], row, split, config) for split, row in rows.items()}
    if config.validation == "private" and len(splits.get(VALIDATION, ())) < len(rows.get(VALIDATION, ())):
        # The size of a private split is declared: noisy scores are fractions of it.
        raise InputError(f"{source.place}: a bad image in private validation data cannot be skipped; remove it")
    for split, images in splits.items():
        _check_classes(source, split, images)
    return splits


def _tell_bad(config: DataConfig, source: Source, part: str, bad: Mapping[int, str]) -> None:
    """Refuses bad images, or counts and lists them here, where the data are; never in a report or a checkpoint."""
    if not bad:
        return
    first, more = bad[min(bad)], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    if not config.skip_bad:
        raise InputError(f"{first}{more}; mend or remove it, or skip it with --skip-bad (data.skip_bad=true)")
    listed = list_bad(source.place, part, bad.values())
    log.warning("%s: %d bad %s images are skipped, listed in %s", source.place, len(bad), part, listed or "no file")


def _check_shapes(source: Source, parts: Mapping[str, Decoded]) -> None:
    usual = parts[TRAIN].images.shape[1:]
    for part, decoded in parts.items():
        if decoded.images.shape[1:] != usual:
            raise InputError(
                f"{source.place}: {part} images are {shape_text(decoded.images.shape[1:])}, training images "
                f"{shape_text(usual)}; set data.size and data.colour"
            )


def _select(source: Source, decoded: Decoded, rows: Rows, split: str, config: DataConfig) -> LabelledImages:
    images, labels = torch.from_numpy(decoded.images), source.labels[rows.part]
    private = split == TRAIN or (split == VALIDATION and config.validation == "private")
    if not decoded.bad and len(rows) == len(images):
        return LabelledImages(images, labels, source.num_classes, private=private)  # everything: no copy
    usable = torch.ones(len(images), dtype=torch.bool)
    usable[list(decoded.bad)] = False
    kept = rows.index[usable[rows.index]]
    absent = len(rows) - len(kept) if split == TRAIN else 0
    return LabelledImages(images[kept], labels[kept], source.num_classes, absent, private)


def _check_classes(source: Source, split: str, images: LabelledImages) -> None:
    classes, labels = source.num_classes, images.labels
    if classes > len(images):
        raise InputError(f"{source.place}: {classes} classes are more than the {len(images)} {split} images")
    if ((labels < 0) | (labels >= classes)).any():
        raise InputError(f"{source.place}: {split} labels must be in [0, {classes - 1}]; the file is damaged")
    counts = torch.bincount(labels, minlength=classes)
    if not counts.all():
        raise InputError(f"{source.place}: class {int(counts.argmin())} has no usable {split} image; it needs one")
