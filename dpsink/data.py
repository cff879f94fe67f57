"""Data sets as uint8 tensors in memory, their splits and their keyed fingerprint."""

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpsink.config import DataConfig
from dpsink.errors import InputError

KEY_FILE_VARIABLE = "DPSINK_KEY_FILE"
DATA_ROOT_VARIABLE = "DPSINK_DATA_ROOT"
SPLIT_SEED = 0  # fixed: the splits are part of the data set's definition
DIGITS_TEST_SIZE = 180


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), in [0, num_classes).
        num_classes: number of classes, a public constant of the data set.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, index: Tensor) -> "LabelledImages":
        """The rows that an int64 or bool index selects."""
        return LabelledImages(self.images[index], self.labels[index], self.num_classes)


@dataclass(frozen=True)
class ImageData:
    """A data set split by who may see it: `train` is private, `test` public, `validation` as declared."""

    name: str
    train: LabelledImages
    validation: LabelledImages | None
    test: LabelledImages
    fingerprint: str
    validation_is_public: bool = True

    @property
    def public_reference(self) -> LabelledImages:
        """Real images that anything may be fitted to: the validation split if it is public, else the test split."""
        return self.validation if self.validation is not None and self.validation_is_public else self.test


@dataclass(frozen=True)
class DatasetFacts:
    """Public facts about a built-in data set, known without loading it."""

    train_and_validation: int
    load: Callable[[Path, bool], tuple[LabelledImages, LabelledImages]]


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to floats in [-1, 1], any shape."""
    return images.to(dtype).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 pixels; values outside and non-finite ones are clamped."""
    return ((torch.nan_to_num(images, nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def private_records(config: DataConfig) -> int:
    """N, the number of private training records: a public constant, known without loading."""
    total = DATASETS[config.name].train_and_validation
    if config.validation_size >= total:
        raise InputError(
            f"data.validation_size={config.validation_size} must be below the {total} training images of {config.name}"
        )
    return total - config.validation_size


def load_dataset(config: DataConfig, *, root: Path | None = None, download: bool = False) -> ImageData:
    """Loads and splits a data set.

    Args:
        config: name of the data set and size of its validation split.
        root: folder that holds torchvision's layout (`MNIST/raw/...`); digits need none.
        download: fetch missing files through torchvision.

    Raises:
        InputError: the files are not there, or the validation split leaves nothing to train on.
    """
    records = private_records(config)
    training, test = DATASETS[config.name].load(root or default_root(), download)
    train, validation = _hold_out(training, config.validation_size)
    if len(train) != records:
        expected = DATASETS[config.name].train_and_validation
        raise InputError(f"{config.name} must hold {expected} training images, not {len(training)}: use standard files")
    return ImageData(config.name, train, validation, test, fingerprint(train), config.validation == "public")


def default_root() -> Path:
    """Where torchvision's files are looked for when nobody says: $DPSINK_DATA_ROOT, or ./datasets."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE, "datasets"))


def fingerprint(images: LabelledImages) -> str:
    """HMAC-SHA256 of a data set under the owner's key, hexadecimal.

    A plain hash of private data would tell a data set from its neighbour with certainty; without the key
    this one tells nothing, and with it the owner recognises the same data again.
    """
    digest = hmac.new(_owner_key(), digestmod=hashlib.sha256)
    digest.update(repr((tuple(images.images.shape), images.num_classes)).encode())
    for tensor in (images.images, images.labels):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _hold_out(training: LabelledImages, size: int) -> tuple[LabelledImages, LabelledImages | None]:
    if size == 0:
        return training, None
    kept, held = _stratified_split(training.labels, size)
    return training.take(kept), training.take(held)


def _stratified_split(labels: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    from sklearn.model_selection import train_test_split

    try:
        kept, held = train_test_split(
            np.arange(len(labels)), test_size=held_out, stratify=labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise InputError(f"data.validation_size={held_out} cannot be split by class: {error}") from None
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))


def _load_digits(_root: Path, _download: bool) -> tuple[LabelledImages, LabelledImages]:
    from sklearn.datasets import load_digits

    grey, target = load_digits(return_X_y=True)
    # Grey levels run from 0 to 16.
    pixels = torch.from_numpy(np.round(grey * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    everything = LabelledImages(pixels, torch.from_numpy(target.astype(np.int64)), 10)
    kept, test = _stratified_split(everything.labels, DIGITS_TEST_SIZE)
    return everything.take(kept), everything.take(test)


def _load_torchvision(name: str) -> Callable[[Path, bool], tuple[LabelledImages, LabelledImages]]:
    def load(root: Path, download: bool) -> tuple[LabelledImages, LabelledImages]:
        return _read_split(name, root, True, download), _read_split(name, root, False, download)

    return load


def _read_split(name: str, root: Path, train: bool, download: bool) -> LabelledImages:
    from torchvision import datasets

    try:
        split = getattr(datasets, name)(root=str(root), train=train, download=download)
    except RuntimeError:
        raise InputError(
            f"{name} is not under '{root}' (looked for {root / name / 'raw'}); give --data-root, or --download"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} under '{root}' cannot be read: {' '.join(str(error).split())}") from None
    return LabelledImages(split.data.unsqueeze(1).contiguous(), split.targets.to(torch.int64), 10)


def _owner_key() -> bytes:
    path = Path(os.environ.get(KEY_FILE_VARIABLE) or _config_home() / "dpsink" / "fingerprint.key")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return _create_key(path)
    except OSError as error:
        raise InputError(f"{path}: the fingerprint key cannot be read ({error.strerror})") from None


def _create_key(path: Path) -> bytes:
    """Makes the key once, mode 0600; a process that loses the race reads the winner's."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise InputError(
            f"{path}: the fingerprint key cannot be created ({error.strerror}); set {KEY_FILE_VARIABLE}"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(32))
    try:
        os.link(draft, path)  # unlike rename, never replaces a key that is already there
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_bytes()


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


DATASETS = {
    "digits": DatasetFacts(1617, _load_digits),
    "mnist": DatasetFacts(60_000, _load_torchvision("MNIST")),
    "fashion_mnist": DatasetFacts(60_000, _load_torchvision("FashionMNIST")),
}
