"""Data sets: real images, fixed splits, a keyed fingerprint, and errors that say where files are missing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpsink.config import DataConfig
from dpsink.data import LabelledImages, fingerprint, load_dataset, private_records, to_uint8, to_unit
from dpsink.errors import InputError


def test_digits_are_split_as_documented() -> None:
    data = load_dataset(DataConfig())
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (1437, 180, 180)


def test_digits_splits_are_disjoint_and_complete() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset(DataConfig())
    assert data.validation is not None
    parts = torch.cat([part.images for part in (data.train, data.validation, data.test)])
    everything = np.round(load_digits(return_X_y=True)[0] * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, parts.numpy())) == sorted(map(bytes, everything))


def test_digits_splits_are_stratified() -> None:
    data = load_dataset(DataConfig())
    assert data.validation is not None
    for part in (data.validation, data.test):
        assert torch.bincount(part.labels).min() >= 17


def test_public_size_agrees_with_the_loaded_one() -> None:
    for size in (0, 100, 180):
        config = DataConfig(name="digits", validation_size=size)
        assert private_records(config) == len(load_dataset(config).train)


def test_fingerprint_is_stable_for_the_same_owner(digits) -> None:
    assert fingerprint(digits.train) == digits.fingerprint


def test_fingerprint_depends_on_the_owner_s_key(digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPSINK_KEY_FILE", str(tmp_path / "other.key"))
    assert fingerprint(digits.train) != digits.fingerprint


def test_fingerprint_key_is_readable_by_its_owner_only(digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "my.key"
    monkeypatch.setenv("DPSINK_KEY_FILE", str(path))
    fingerprint(digits.train)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", [b"", b"guess me"])
def test_key_that_can_be_guessed_is_refused(
    key: bytes, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """An empty file, or /dev/null, would make the fingerprint a plain hash of private images."""
    path = tmp_path / "own.key"
    path.write_bytes(key)
    monkeypatch.setenv("DPSINK_KEY_FILE", str(path))
    with pytest.raises(
        InputError, match=rf"^{path}: the fingerprint key has {len(key)} bytes, and must have 16; remove"
    ):
        fingerprint(digits.train)


@pytest.mark.parametrize(("place", "fault"), [("", "cannot be read"), ("file/own.key", "cannot be")])
def test_key_that_cannot_be_had_is_named_with_the_variable_that_names_another(
    place: str, fault: str, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DPSINK_KEY_FILE", str(tmp_path / place))
    with pytest.raises(InputError, match=rf"^{tmp_path / place}: the fingerprint key {fault} .*by DPSINK_KEY_FILE$"):
        fingerprint(digits.train)


def test_fingerprint_changes_with_one_pixel(digits) -> None:
    images = digits.train.images.clone()
    images[0, 0, 0, 0] += 1
    changed = LabelledImages(images, digits.train.labels, 10)
    assert fingerprint(changed) != digits.fingerprint


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)


def test_non_finite_samples_become_pixels() -> None:
    assert to_uint8(torch.tensor([float("nan"), float("inf"), -9.0])).tolist() == [0, 255, 0]


def test_missing_files_name_the_folder_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "MNIST" / "raw")):
        load_dataset(DataConfig(name="mnist", validation_size=0), root=tmp_path)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_damaged_file_is_named_and_never_read(name: str, folder: str, download: bool, tmp_path: Path) -> None:
    """Also by --download, since torchvision downloads nothing where a file of that name is."""
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{stem}-ubyte").write_bytes(b"\x00\x00\x08\x03\x00\x00")
    with pytest.raises(
        InputError, match=rf"{raw}/train-images-idx3-ubyte: damaged, its MD5 is not \w{{32}}; remove it"
    ):
        load_dataset(DataConfig(name=name, validation_size=0), root=tmp_path, download=download)


@pytest.mark.parametrize("size", [1617, 5000])
def test_validation_split_must_leave_something_to_train_on(size: int) -> None:
    with pytest.raises(InputError, match=f"validation_size={size}"):
        load_dataset(DataConfig(name="digits", validation_size=size))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_images_have_the_documented_sizes(name, data_root: Path) -> None:
    data = load_dataset(DataConfig(name=name, validation_size=5000), root=data_root)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.train.shape == (1, 28, 28)
