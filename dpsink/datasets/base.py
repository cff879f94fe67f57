"""Labelled images in memory, and what every source of them offers before and after its pixels are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: uint8, (rows, C, H, W).
        labels: int64, (rows,), in [0, num_classes).
        num_classes: number of classes, a public constant of the data set.
        absent: private records that were declared but cannot be read. They count in `len`, the public N, and join
            no batch: an N that fell with every damaged file would tell a data set from its neighbour.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    absent: int = 0
    private: bool = False

    def __len__(self) -> int:
        return self.images.shape[0] + self.absent

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "LabelledImages":
        """The same images on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> "LabelledImages":
        """The rows that an int64 or bool index below `len` selects, without those that are absent."""
        if self.absent:
            rows = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
            index = rows[rows < self.images.shape[0]]
        return LabelledImages(self.images[index], self.labels[index], self.num_classes, private=self.private)


@dataclass(frozen=True)
class Decoded:
    """The pixels of one part.

    Attributes:
        images: uint8, (rows, C, H, W), in the order of the part's labels; zero where a row is bad.
        bad: row to one line that names the file and what is wrong with it.
    """

    images: np.ndarray
    bad: Mapping[int, str] = field(default_factory=dict)


class Source(Protocol):
    """A data set as it lies on disk: the parts it comes in, their labels, and, when asked, their pixels.

    Attributes:
        labels: part (`train`, and perhaps `validation` and `test`) to int64 labels, (rows,). The number of rows
            is public, and known without reading a pixel.
        num_classes: public.
        place: the file or folder that messages name.
    """

    @property
    def labels(self) -> Mapping[str, Tensor]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def place(self) -> Path: ...

    def images(self, part: str) -> Decoded:
        """Reads the pixels of a part."""
        ...
