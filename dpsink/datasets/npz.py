"""`npz:PATH`: the user's own arrays, `images` and `labels`, as `dpsink sample` writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpsink.config import DataConfig
from dpsink.datasets.base import PARTS, TRAIN, Decoded
from dpsink.datasets.pictures import Form, shape_text
from dpsink.errors import InputError


@dataclass(frozen=True)
class NpzSource:
    """One npz file a part, a `Source`.

    Attributes:
        files: part to path.
        bad: part to rows whose label is out of range; they count as class 0 where rows are split by class.
    """

    place: Path
    files: Mapping[str, Path]
    labels: Mapping[str, Tensor]
    bad: Mapping[str, Mapping[int, str]]
    num_classes: int
    form: Form

    def images(self, part: str) -> Decoded:
        """Pixels of a part, read now."""
        path, rows = self.files[part], len(self.labels[part])
        pixels = read_images(path)
        if len(pixels) != rows:
            raise InputError(f"{path}: holds {len(pixels)} images and {rows} labels; there must be one label an image")
        return Decoded(self.form.apply_to_all(pixels), self.bad[part])


def open_npz(config: DataConfig, place: Path) -> NpzSource:
    """Reads the labels of `PLACE`, a file, or of `PLACE/train.npz` with `test.npz` and `validation.npz` beside it.

    Raises:
        InputError: no such file, not an npz, arrays of another form.
    """
    files = {part: place / f"{part}.npz" for part in PARTS if (place / f"{part}.npz").is_file()}
    files = files if place.is_dir() else {TRAIN: place}
    if TRAIN not in files or not files[TRAIN].is_file():
        looked = place / "train.npz" if place.is_dir() else place
        raise InputError(f"{config.name}: {looked} is no file; give --data-root or an absolute path")
    classes = config.classes
    assert classes is not None  # the config insists
    labels = {part: _labels(path) for part, path in files.items()}
    bad = {part: _out_of_range(files[part], values, classes) for part, values in labels.items()}
    usable = {part: _without(values, bad[part]) for part, values in labels.items()}
    return NpzSource(place, files, usable, bad, classes, Form.of(config))


def has_labels(path: Path) -> bool:
    """Whether an npz names a class for each image."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return "labels" in arrays.files
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path}: is damaged, or no npz of plain numbers ({type(error).__name__})") from None


def _labels(path: Path) -> np.ndarray:
    labels = _array(path, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{path}: labels must be whole numbers, one an image, not {_described(labels)}")
    return labels.astype(np.int64)


def read_images(path: Path) -> np.ndarray:
    """The images of an npz, uint8 (rows, C, H, W).

    Raises:
        InputError: no npz, or an array of another form.
    """
    images = _array(path, "images")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        raise InputError(f"{path}: images must be uint8, (N, H, W) or (N, H, W, 1 or 3), not {_described(images)}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except KeyError:
        raise InputError(f"{path}: holds no array '{name}'; an npz needs images and labels") from None
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{path}: is damaged, or no npz of plain numbers ({type(error).__name__})") from None


def _out_of_range(path: Path, labels: np.ndarray, classes: int) -> dict[int, str]:
    rows = np.flatnonzero((labels < 0) | (labels >= classes))
    return {
        int(
            row
        ): f"{path}: label {labels[row]} of image {row} must be in [0, {classes - 1}], for data.classes={classes}"
        for row in rows
    }


def _without(labels: np.ndarray, bad: Mapping[int, str]) -> Tensor:
    kept = labels.copy()
    kept[list(bad)] = 0
    return torch.from_numpy(kept)


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {shape_text(array.shape)}"
