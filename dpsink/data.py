"""Data sets as uint8 tensors in memory, their splits and their keyed fingerprint."""

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpsink.config import DataConfig
from dpsink.datasets import LabelledImages, open_source, part_sizes
from dpsink.datasets.base import TEST, TRAIN, VALIDATION
from dpsink.datasets.loading import load_splits
from dpsink.datasets.splits import assign_rows, training_records
from dpsink.errors import InputError

KEY_FILE_VARIABLE = "DPSINK_KEY_FILE"
DATA_ROOT_VARIABLE = "DPSINK_DATA_ROOT"
SHORTEST_KEY = 16  # bytes: a key that can be guessed makes the fingerprint a plain hash


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
    def public_validation(self) -> LabelledImages | None:
        """The validation split, where there is one and everyone may see it."""
        return self.validation if self.validation_is_public else None

    @property
    def public_reference(self) -> LabelledImages:
        """Real images that anything may be fitted to: the validation split if it is public, else the test split."""
        return self.test if self.public_validation is None else self.public_validation


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to floats in [-1, 1], any shape."""
    return images.to(dtype).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] to uint8 pixels; values outside and non-finite ones are clamped."""
    return ((torch.nan_to_num(images, nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def private_records(config: DataConfig, *, root: Path | None = None) -> int:
    """N, the number of private training records: a public constant, known before a pixel is read.

    Built-in data sets need no files; the user's own are counted where they lie.

    Raises:
        InputError: the splits leave nothing to train on, or own data that are not there.
    """
    return training_records(config, part_sizes(config, root or default_root()))


def load_dataset(config: DataConfig, *, root: Path | None = None, download: bool = False) -> ImageData:
    """Loads and splits a data set.

    Args:
        config: which data set, in which form, split how.
        root: folder of the built-in data sets (`MNIST/raw/...`), and of relative `folder:` and `npz:` paths.
        download: fetch missing files through torchvision.

    Raises:
        InputError: files that are missing or damaged, splits that cannot be, images that do not fit together.
    """
    private_records(config, root=root)  # what cannot be split is told before anything is read
    source = open_source(config, root or default_root(), download=download)
    splits = load_splits(config, source, assign_rows(config, source.labels))
    return ImageData(
        name=config.name,
        train=splits[TRAIN],
        validation=splits.get(VALIDATION),
        test=splits[TEST],
        fingerprint=fingerprint(splits[TRAIN]),
        validation_is_public=config.validation == "public",
    )


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
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _owner_key() -> bytes:
    path = Path(os.environ.get(KEY_FILE_VARIABLE) or _config_home() / "dpsink" / "fingerprint.key")
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        key = _create_key(path)
    except OSError as error:
        raise InputError(
            f"{path}: the fingerprint key cannot be read ({error.strerror}); make it readable, or name another file by "
            f"{KEY_FILE_VARIABLE}"
        ) from None
    if len(key) < SHORTEST_KEY:
        raise InputError(
            f"{path}: the fingerprint key has {len(key)} bytes, and must have {SHORTEST_KEY}; remove the file, and a "
            f"new key is made, or name another by {KEY_FILE_VARIABLE}"
        )
    return key


def _create_key(path: Path) -> bytes:
    """Makes the key once, mode 0600; a process that loses the race reads the winner's."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise InputError(
            f"{path}: the fingerprint key cannot be created ({error.strerror}); name a file that can by "
            f"{KEY_FILE_VARIABLE}"
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
