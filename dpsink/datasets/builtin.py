"""Benchmarks that fit in memory as they come: digits, MNIST, Fashion-MNIST, CIFAR-10, SVHN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsink.config import DataConfig
from dpsink.datasets.base import TEST, TRAIN, Decoded, LabelledImages
from dpsink.datasets.pictures import Form
from dpsink.datasets.splits import stratified_split
from dpsink.errors import InputError

DIGITS_TEST_SIZE = 180


@dataclass(frozen=True)
class DatasetFacts:
    """Public facts about a built-in data set, known without loading it.

    Attributes:
        sizes: part to its number of images.
        load: from the data root, and whether to download what is missing, to the training and the test images.
    """

    sizes: Mapping[str, int]
    load: Callable[[Path, bool], tuple[LabelledImages, LabelledImages]]


@dataclass(frozen=True)
class MemorySource:
    """Images that are in memory already, a `Source`."""

    place: Path
    parts: Mapping[str, LabelledImages]
    form: Form

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """Part to labels."""
        return {part: images.labels for part, images in self.parts.items()}

    @property
    def num_classes(self) -> int:
        """The same in all parts."""
        return self.parts[TRAIN].num_classes

    def images(self, part: str) -> Decoded:
        """Pixels of a part."""
        return Decoded(self.form.apply_to_all(self.parts[part].images.numpy()))


def open_builtin(config: DataConfig, root: Path, download: bool) -> MemorySource:
    """Loads a data set of `DATASETS`.

    Raises:
        InputError: files that are missing, damaged, or not the standard ones.
    """
    train, test = DATASETS[config.name].load(root, download)
    return MemorySource(root, {TRAIN: train, TEST: test}, Form.of(config))


def _load_digits(_root: Path, _download: bool) -> tuple[LabelledImages, LabelledImages]:
    from sklearn.datasets import load_digits

    grey, target = load_digits(return_X_y=True)
    # Grey levels run from 0 to 16.
    pixels = torch.from_numpy(np.round(grey * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    everything = LabelledImages(pixels, torch.from_numpy(target.astype(np.int64)), 10)
    kept, test = stratified_split(everything.labels, DIGITS_TEST_SIZE, "the test split")
    return everything.take(kept), everything.take(test)


@dataclass(frozen=True)
class _Torchvision:
    """How torchvision's class of that name is called and what it keeps where.

    Attributes:
        splits: keyword arguments that choose the training and the test images.
        files: from torchvision's class to what must lie below the data root: file to MD5.
        images: of a loaded split, uint8 (N, C, H, W).
        labels: of a loaded split.
    """

    name: str
    splits: tuple[dict[str, Any], dict[str, Any]]
    files: Callable[[Any], Mapping[str, str]]
    images: Callable[[Any], Any]
    labels: Callable[[Any], Any]

    def load(self, root: Path, download: bool) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images."""
        self._check_files(root, may_miss=download)
        train, test = (self._read(root, split, download) for split in self.splits)
        return train, test

    def _check_files(self, root: Path, *, may_miss: bool) -> None:
        from torchvision.datasets.utils import check_integrity

        for file, md5 in self.files(self._type()).items():
            if (root / file).exists():
                if not check_integrity(str(root / file), md5):
                    raise InputError(f"{root / file}: damaged, its MD5 is not {md5}; remove it, and give --download")
            elif not may_miss:
                raise InputError(
                    f"{self.name} is not under '{root}' (looked for {root / file}); give --data-root, or --download"
                )

    def _read(self, root: Path, split: dict[str, Any], download: bool) -> LabelledImages:
        try:
            loaded = self._type()(root=str(root), download=download, **split)
            images, labels = np.ascontiguousarray(self.images(loaded)), np.asarray(self.labels(loaded), np.int64)
        except Exception as error:  # a parser may raise anything on a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            fault = "cannot be downloaded" if download else "cannot be read; fetch it again"
            raise InputError(f"{self.name} under '{root}': {fault} ({reason})") from None
        return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), 10)

    def _type(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.name)


def _idx(name: str, *checksums: str) -> _Torchvision:
    """A data set in the format of MNIST; checksums of the unpacked files, which torchvision does not compare."""
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return _Torchvision(
        name=name,
        splits=({"train": True}, {"train": False}),
        files=lambda _: {f"{name}/raw/{stem}-ubyte": md5 for stem, md5 in zip(stems, checksums, strict=True)},
        images=lambda split: split.data.unsqueeze(1),
        labels=lambda split: split.targets,
    )


_MNIST = _idx(
    "MNIST",
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
)
_FASHION_MNIST = _idx(
    "FashionMNIST",
    "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "9018921c3c673c538a1fc5bad174d6f9",
    "8181f5470baa50b63fa0f6fddb340f0a",
    "15d484375f8d13e6eb1aabb0c3f46965",
)
# Torchvision unpickles CIFAR-10, after it has compared the same checksums.
_CIFAR10 = _Torchvision(
    name="CIFAR10",
    splits=({"train": True}, {"train": False}),
    files=lambda its: {f"{its.base_folder}/{file}": md5 for file, md5 in (*its.train_list, *its.test_list)},
    images=lambda split: split.data.transpose(0, 3, 1, 2),
    labels=lambda split: split.targets,
)
_SVHN = _Torchvision(
    name="SVHN",
    splits=({"split": "train"}, {"split": "test"}),
    files=lambda its: {its.split_list[split][1]: its.split_list[split][2] for split in ("train", "test")},
    images=lambda split: split.data,
    labels=lambda split: split.labels,
)

DATASETS = {
    "digits": DatasetFacts({TRAIN: 1617, TEST: DIGITS_TEST_SIZE}, _load_digits),
    "mnist": DatasetFacts({TRAIN: 60_000, TEST: 10_000}, _MNIST.load),
    "fashion_mnist": DatasetFacts({TRAIN: 60_000, TEST: 10_000}, _FASHION_MNIST.load),
    "cifar10": DatasetFacts({TRAIN: 50_000, TEST: 10_000}, _CIFAR10.load),
    "svhn": DatasetFacts({TRAIN: 73_257, TEST: 26_032}, _SVHN.load),
}
