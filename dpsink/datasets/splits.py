"""Which rows train, validate and test: fixed by the settings, the labels and one seed, before a pixel is read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsink.config import DataConfig
from dpsink.datasets.base import TEST, TRAIN, VALIDATION
from dpsink.errors import InputError

SPLIT_SEED = 0  # fixed: the splits are part of the data set's definition


@dataclass(frozen=True)
class Rows:
    """Rows of one part: `index` is int64 and ascending."""

    part: str
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)


def training_records(config: DataConfig, sizes: Mapping[str, int]) -> int:
    """N, the private training records that are left after what is held out of them.

    Args:
        sizes: rows of each part that the data set comes in, public.

    Raises:
        InputError: the settings ask for more than there is, or for a part twice.
    """
    _check_test_size(config, sizes)
    held = {TEST: config.test_size, VALIDATION: config.validation_size}
    for part, size in held.items():
        if size > sizes.get(part, size):
            raise InputError(
                f"data.{part}_size={size} must be at most the {sizes[part]} {part} images of {config.name}"
            )
    held = {f"data.{part}_size={size}": size for part, size in held.items() if size and part not in sizes}
    if sum(held.values()) >= sizes[TRAIN]:
        asked = " and ".join(held) or "what is held out"
        raise InputError(f"{asked} must be below the {sizes[TRAIN]} training images of {config.name}")
    return sizes[TRAIN] - sum(held.values())


def assign_rows(config: DataConfig, labels: Mapping[str, Tensor]) -> dict[str, Rows]:
    """The rows of `train`, of `test`, and of `validation` where one is asked for.

    A part that the data set brings is used as it is (`validation_size` rows of it, stratified); what it does not
    bring is held out of the training part, stratified, test first.
    """
    train, found = torch.arange(len(labels[TRAIN])), {}
    if TEST in labels:
        found[TEST] = Rows(TEST, torch.arange(len(labels[TEST])))
    else:
        train, held = _hold_out(labels[TRAIN], train, config.test_size, f"{config.name}: data.test_size")
        found[TEST] = Rows(TRAIN, held)
    if config.validation_size and VALIDATION in labels:
        everything = torch.arange(len(labels[VALIDATION]))
        _, held = _hold_out(
            labels[VALIDATION], everything, config.validation_size, f"{config.name}: data.validation_size"
        )
        found[VALIDATION] = Rows(VALIDATION, held)
    elif config.validation_size:
        train, held = _hold_out(labels[TRAIN], train, config.validation_size, f"{config.name}: data.validation_size")
        found[VALIDATION] = Rows(TRAIN, held)
    return {TRAIN: Rows(TRAIN, train), **found}


def stratified_split(labels: Tensor, held_out: int, setting: str) -> tuple[Tensor, Tensor]:
    """Positions that are kept and that are held out, each ascending, in the classes' proportions.

    Args:
        labels: int64, (rows,).
        setting: of which data, and what asked for it, for the message.

    Raises:
        InputError: too few of a class.
    """
    from sklearn.model_selection import train_test_split

    try:
        kept, held = train_test_split(
            np.arange(len(labels)), test_size=held_out, stratify=labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError:
        counts = labels.bincount()
        found = counts.nonzero().flatten()
        rarest = int(found[counts[found].argmin()])
        raise InputError(
            f"{setting}={held_out} cannot be split by class: of {len(labels)} images in {len(found)} classes "
            f"class {rarest} has {int(counts[rarest])}, and both sides need one of each; change the size, or add images"
        ) from None
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))


def _hold_out(labels: Tensor, rows: Tensor, size: int, setting: str) -> tuple[Tensor, Tensor]:
    if size == len(rows):
        return rows[:0], rows
    kept, held = stratified_split(labels[rows], size, setting)
    return rows[kept], rows[held]


def _check_test_size(config: DataConfig, sizes: Mapping[str, int]) -> None:
    if TEST in sizes and config.test_size:
        raise InputError(f"data.test_size={config.test_size}: {config.name} brings its own test images; leave it out")
    if TEST not in sizes and not config.test_size:
        raise InputError(f"{config.name} has no test images: give it a test part (docs/data.md), or set data.test_size")
