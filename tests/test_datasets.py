"""Sources of images: official formats written small, own folders and arrays, what is bad in them, the cache."""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as torchvision_sets

from dpsink.checkpoint import load_generator
from dpsink.config import DataConfig, load_config
from dpsink.data import ImageData, load_dataset, private_records
from dpsink.datasets import DATASETS, celeba, files
from dpsink.errors import InputError
from dpsink.judging import judge
from dpsink.records import latest_checkpoint, read_state
from dpsink.synthesis import balanced_labels
from dpsink.training import train as run_training
from dpsink.writing import synthesize

OWN: dict[str, Any] = {"test": "public", "validation": "public"}
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; the folder that entries lie in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dpsink" / "data"


def load(root: Path, name: str, **settings: Any) -> ImageData:
    return load_dataset(DataConfig.model_validate({"name": name, **settings}), root=root)


def refused(act: Callable[[], object]) -> str:
    """The one line that an act is refused with."""
    with pytest.raises(InputError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# CIFAR-10 and SVHN, as torchvision reads them.


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Six pickled batches of 10 images and their meta file under `tmp_path`; batch to its pixels, (10, 3072)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    batches = {name: noise(10, 3072) for name in names}
    for name, data in batches.items():
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(torchvision_sets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(torchvision_sets.CIFAR10, "test_list", sums[5:])
    meta = {**torchvision_sets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(torchvision_sets.CIFAR10, "meta", meta)
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], sizes={"train": 50, "test": 10}))
    return batches


def test_cifar10_is_read_channels_first(cifar: dict[str, np.ndarray], tmp_path: Path) -> None:
    data = load(tmp_path, "cifar10")
    assert data.train.images.numpy().tobytes() == b"".join(cifar[f"data_batch_{k}"].tobytes() for k in range(1, 6))
    assert data.test.images.numpy().tobytes() == cifar["test_batch"].tobytes()
    assert data.train.shape == (3, 32, 32)


def test_cifar10_labels_are_those_of_the_batches(cifar: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert load(tmp_path, "cifar10").train.labels.tolist() == list(range(10)) * 5


def test_damaged_batch_of_cifar10_is_named(cifar: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: damaged, its MD5 is not" in refused(lambda: load(tmp_path, "cifar10"))


def test_cifar10_with_other_numbers_of_images_is_refused(
    cifar: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], sizes={"train": 51, "test": 10}))
    assert "must hold 51 training images, not 50" in refused(lambda: load(tmp_path, "cifar10"))


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """`train_32x32.mat` and `test_32x32.mat` of 20 images, the digit 0 labelled 10; their pixels, (32, 32, 3, 20)."""
    pixels, digits = noise(32, 32, 3, 20), np.tile(np.arange(1, 11, dtype=np.uint8), 2)[:, None]
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": digits})
    sums = {split: ["", f"{split}_32x32.mat", md5(tmp_path / f"{split}_32x32.mat")] for split in ("train", "test")}
    monkeypatch.setattr(torchvision_sets.SVHN, "split_list", {**torchvision_sets.SVHN.split_list, **sums})
    monkeypatch.setitem(DATASETS, "svhn", replace(DATASETS["svhn"], sizes={"train": 20, "test": 20}))
    return pixels


def test_svhn_is_read_channels_first(svhn: np.ndarray, tmp_path: Path) -> None:
    assert np.array_equal(load(tmp_path, "svhn").train.images.numpy(), svhn.transpose(3, 2, 0, 1))


def test_label_ten_of_svhn_is_the_digit_zero(svhn: np.ndarray, tmp_path: Path) -> None:
    assert load(tmp_path, "svhn").test.labels.tolist() == [*range(1, 10), 0] * 2


def test_svhn_file_of_another_checksum_is_named(svhn: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path}: damaged" in refused(lambda: load(tmp_path, "svhn"))


def test_parser_that_fails_is_told_in_one_line(
    svhn: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:200])
    sums = {**torchvision_sets.SVHN.split_list, "train": ["", path.name, md5(path)]}
    monkeypatch.setattr(torchvision_sets.SVHN, "split_list", sums)
    assert "SVHN under" in refused(lambda: load(tmp_path, "svhn"))


@pytest.mark.parametrize(
    ("name", "looked"), [("cifar10", "data_batch_1"), ("svhn", "train_32x32.mat"), ("celeba", "list_attr_celeba.txt")]
)
def test_missing_files_name_what_was_looked_for(name: str, looked: str, tmp_path: Path) -> None:
    line = refused(lambda: load(tmp_path, name))
    assert looked in line and "--data-root" in line


@pytest.mark.parametrize(
    ("name", "records"), [("mnist", 55_000), ("cifar10", 45_000), ("svhn", 68_257), ("celeba", 162_770)]
)
def test_number_of_private_records_needs_no_files(name: str, records: int, tmp_path: Path) -> None:
    """CelebA's validation images come out of its own part, the others' out of the training part."""
    assert private_records(DataConfig(name=name, validation_size=5000), root=tmp_path / "absent") == records


def test_built_in_images_take_the_form_that_is_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path, "digits", size=16, colour="colour").train.shape == (3, 16, 16)


def test_built_in_data_bring_their_own_test_images() -> None:
    assert "test_size=5" in refused(lambda: load_config(None, ["data.test_size=5"]))


# CelebA.

HEADER = [f"A{k}" for k in range(20)] + ["Male", *(f"B{k}" for k in range(19))]


def write_faces(place: Path, parts: Sequence[int]) -> np.ndarray:
    """CelebA's three places with one 178×218 JPEG per entry of `parts` (0 train, 1 validation, 2 test)."""
    (place / "img_align_celeba").mkdir(parents=True)
    values = np.where(np.arange(40) + np.arange(len(parts))[:, None] % 2 > 0, 1, -1)
    values[:, 20] = np.where(np.arange(len(parts)) % 3 == 0, 1, -1)
    values[:, 0] = -values[:, 20]
    names = [f"{number:06d}.jpg" for number in range(1, len(parts) + 1)]
    rows = [f"{name} " + " ".join(f"{value:2d}" for value in row) for name, row in zip(names, values, strict=True)]
    (place / "list_attr_celeba.txt").write_text(f"{len(parts)}\n{' '.join(HEADER)} \n" + "\n".join(rows) + "\n")
    listed = [f"{name} {part}" for name, part in zip(names, parts, strict=True)]
    (place / "list_eval_partition.txt").write_text("\n".join(listed) + "\n")
    for number, name in enumerate(names):
        small = Image.fromarray(np.random.default_rng(number).integers(0, 256, (7, 6, 3), dtype=np.uint8))
        small.resize((178, 218), Image.Resampling.BICUBIC).save(place / "img_align_celeba" / name)
    return values


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A CelebA of 12 / 6 / 6 images under `tmp_path/celeba`; its attributes, (24, 40), ±1."""
    monkeypatch.setattr(celeba, "SIZES", {"train": 12, "validation": 6, "test": 6})
    return write_faces(tmp_path / "celeba", [0] * 12 + [1] * 6 + [2] * 6)


def test_celeba_follows_the_official_partition(faces: np.ndarray, tmp_path: Path) -> None:
    data = load(tmp_path, "celeba", validation_size=6)
    assert data.validation is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 6, 6]


def test_celeba_s_validation_images_leave_the_private_records_alone(faces: np.ndarray, tmp_path: Path) -> None:
    assert load(tmp_path, "celeba", validation_size=3).fingerprint == load(tmp_path, "celeba").fingerprint


@pytest.mark.parametrize(("settings", "column"), [({}, 20), ({"attribute": "A0"}, 0)])
def test_label_of_celeba_is_the_attribute(settings: Any, column: int, faces: np.ndarray, tmp_path: Path) -> None:
    assert load(tmp_path, "celeba", **settings).train.labels.tolist() == (faces[:12, column] > 0).astype(int).tolist()


def test_faces_are_cropped_to_the_central_square_and_resized(faces: np.ndarray, tmp_path: Path) -> None:
    with Image.open(tmp_path / "celeba/img_align_celeba/000019.jpg") as picture:
        expected = picture.crop((0, 20, 178, 198)).resize((32, 32), Image.Resampling.BILINEAR)
    found = load(tmp_path, "celeba").test.images[0].numpy()
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))


def test_celeba_may_lie_in_the_data_root_itself(faces: np.ndarray, tmp_path: Path) -> None:
    assert len(load(tmp_path / "celeba", "celeba").train) == 12


def test_unknown_attribute_names_the_nearest(faces: np.ndarray, tmp_path: Path) -> None:
    assert "did you mean 'Male'" in refused(lambda: load(tmp_path, "celeba", attribute="male"))


def test_attribute_is_for_celeba_only() -> None:
    assert "attribute=Male" in refused(lambda: load_config(None, ["data.attribute=Male"]))


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("list_attr_celeba.txt", lambda lines: lines[:-1], "says 24 images and lists 23"),
        ("list_attr_celeba.txt", lambda lines: [*lines[:5], lines[5][:40]], "line 6 must be a file name and 40 values"),
        ("list_attr_celeba.txt", lambda lines: [], "is no column"),
        ("list_eval_partition.txt", lambda lines: [*lines[:3], "000004.jpg 3"], "line 4 must be a file name and 0, 1"),
        ("list_eval_partition.txt", lambda lines: lines[:-1], "'000024.jpg' stands in one of"),
    ],
)
def test_damaged_list_of_celeba_is_named(
    name: str, damage: Callable[[list[str]], list[str]], named: str, faces: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "celeba" / name
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    line = refused(lambda: load(tmp_path, "celeba"))
    assert named in line and name in line


def test_celeba_that_is_not_unpacked_is_told(faces: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "celeba/img_align_celeba").rename(tmp_path / "celeba/elsewhere")
    (tmp_path / "celeba/img_align_celeba.zip").touch()
    assert "unpack img_align_celeba.zip" in refused(lambda: load(tmp_path, "celeba"))


def test_listed_face_that_is_missing_is_named(faces: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "celeba/img_align_celeba/000002.jpg").unlink()
    assert "000002.jpg: is no file" in refused(lambda: load(tmp_path, "celeba"))


# The cache.


def no_decoding(*_: object) -> Any:
    pytest.fail("decoded")


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.npz"))


def test_second_load_decodes_nothing(faces: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tmp_path, "celeba")
    monkeypatch.setattr(files, "decode", no_decoding)
    assert torch.equal(load(tmp_path, "celeba").train.images, first.train.images)


def test_another_attribute_decodes_nothing(faces: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, "celeba")
    monkeypatch.setattr(files, "decode", no_decoding)
    load(tmp_path, "celeba", attribute="A0")


def test_another_size_is_kept_beside_the_first(faces: np.ndarray, tmp_path: Path, cache: Path) -> None:
    load(tmp_path, "celeba")
    assert load(tmp_path, "celeba", size=16).train.shape == (3, 16, 16)
    assert len(entries(cache)) == 4  # two parts each


def test_cached_pixels_are_readable_by_their_owner_only(faces: np.ndarray, tmp_path: Path, cache: Path) -> None:
    load(tmp_path, "celeba")
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[: len(content) // 2] + b"\0\1\2\3" + content[len(content) // 2 + 4 :],
        lambda content: b"no zip at all",
    ],
)
def test_damaged_entry_is_decoded_again(
    damage: Callable[[bytes], bytes], faces: np.ndarray, tmp_path: Path, cache: Path
) -> None:
    first = load(tmp_path, "celeba").train
    whole = {path: path.read_bytes() for path in entries(cache)}
    for path, content in whole.items():
        path.write_bytes(damage(content))
    assert torch.equal(load(tmp_path, "celeba").train.images, first.images)
    assert all(len(path.read_bytes()) == len(content) for path, content in whole.items())


def test_changed_file_replaces_its_entry(faces: np.ndarray, tmp_path: Path, cache: Path) -> None:
    before, kept = load(tmp_path, "celeba"), entries(cache)
    Image.fromarray(noise(218, 178, 3)).save(tmp_path / "celeba/img_align_celeba/000001.jpg")
    after = load(tmp_path, "celeba")
    assert not torch.equal(before.train.images[0], after.train.images[0])
    assert torch.equal(before.train.images[1:], after.train.images[1:])
    assert entries(cache) == kept


def test_nothing_but_entries_locks_and_lists_is_left_in_the_cache(
    faces: np.ndarray, tmp_path: Path, cache: Path
) -> None:
    load(tmp_path, "celeba")
    assert {path.suffix for path in cache.iterdir()} == {".npz", ".lock"}


def test_cache_that_cannot_be_written_costs_only_time(
    faces: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(tmp_path, "celeba").train) == 12


# Own folders.


def write_folder(place: Path, classes: Sequence[str] = ("cat", "dog"), count: int = 10) -> Path:
    """Grey 8×8 PNGs, `count` a class; the first pixel of each tells its class and number."""
    for label, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise(8, 8)
            pixels[0, :2] = label, number
            Image.fromarray(pixels).save(place / name / f"{number:03d}.png")
    return place


def tags(images: Any) -> list[tuple[int, int]]:
    """(class, number) of images of `write_folder`."""
    return [(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in images.images]


def test_classes_are_the_sub_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    data = load(tmp_path, "folder:pets", test_size=4, **OWN)
    assert data.train.labels.tolist() == [tag[0] for tag in tags(data.train)]
    assert data.train.num_classes == 2


def test_classes_whose_names_are_numbers_are_labelled_in_their_order(tmp_path: Path) -> None:
    """By name class 10 would be the third."""
    write_folder(tmp_path / "twelve", [str(number) for number in range(12)], count=2)
    data = load(tmp_path, "folder:twelve", test_size=12, **OWN)
    assert data.train.labels.tolist() == [tag[0] for tag in tags(data.train)]
    assert data.train.num_classes == 12


def test_held_out_splits_are_disjoint_stratified_and_complete(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    data = load(tmp_path, "folder:pets", test_size=4, validation_size=6, **OWN)
    assert data.validation is not None
    splits = [tags(part) for part in (data.train, data.validation, data.test)]
    assert [sum(label for label, _ in part) for part in splits] == [5, 3, 2]
    assert sorted(tag for part in splits for tag in part) == [
        (label, number) for label in range(2) for number in range(10)
    ]


def test_held_out_splits_are_the_same_each_time(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    first, second = (load(tmp_path, "folder:pets", test_size=4, **OWN) for _ in range(2))
    assert tags(first.test) == tags(second.test)


def test_parts_that_own_data_bring_are_used_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("validation", 3), ("test", 2)):
        write_folder(tmp_path / "pets" / part, count=count)
    data = load(tmp_path, "folder:pets", validation_size=6, **OWN)
    assert data.validation is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 6, 4]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    (write_folder(tmp_path / "pets") / "cat" / ".DS_Store").write_text("")
    assert private_records(DataConfig(name="folder:pets", test_size=4, **OWN), root=tmp_path) == 16


def test_number_of_own_records_is_known_before_a_pixel_is_read(tmp_path: Path) -> None:
    config = DataConfig(name="folder:pets", test_size=4, validation_size=6, **OWN)
    (write_folder(tmp_path / "pets") / "cat" / "000.png").write_text("no image")
    assert private_records(config, root=tmp_path) == 10


def test_relative_path_lies_below_the_data_root_wherever_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a worker of Ray, whose working directory is another: the root it is given is absolute."""
    write_folder(tmp_path / "pets")
    here = load(tmp_path, "folder:pets", test_size=4, **OWN)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(tmp_path, "folder:pets", test_size=4, **OWN).fingerprint == here.fingerprint


def test_absolute_path_needs_no_data_root(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "pets")
    assert len(load(tmp_path / "absent", f"folder:{place}", test_size=4, **OWN).train) == 16


def test_data_root_of_the_environment_serves_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pets")
    monkeypatch.setenv("DPSINK_DATA_ROOT", str(tmp_path))
    assert private_records(DataConfig(name="folder:pets", test_size=4, **OWN)) == 16


def test_size_and_colour_bring_unequal_images_to_one_form(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "pets")
    Image.fromarray(noise(20, 12, 3)).save(place / "cat" / "colour.jpg")
    assert load(tmp_path, "folder:pets", test_size=4, size=12, colour="grey", **OWN).train.shape == (1, 12, 12)


def test_camera_s_orientation_is_applied(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "pets")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(place / "dog" / "zzz.png", exif=exif)
    data = load(tmp_path, "folder:pets", test_size=4, **OWN)
    turned = [image for image in torch.cat([data.train.images, data.test.images]) if int(image[0, 0].sum()) == 0]
    assert len(turned) == 1 and int(turned[0][0, 7].min()) == 255


def add_folder(*names: str) -> Callable[[Path], object]:
    return lambda place: place.joinpath(*names).mkdir(parents=True)


def as_parts(place: Path) -> None:
    """Moves the classes into train/, and gives test/ one class of another name."""
    (place / "train").mkdir()
    for name in ("cat", "dog"):
        (place / name).rename(place / "train" / name)
    write_folder(place / "test", ("cat", "cow"))


def flat(place: Path) -> None:
    """Images without a folder of their class."""
    for number, path in enumerate(sorted(place.rglob("*.png"))):
        path.rename(place / f"{number}.png")
    for name in ("cat", "dog"):
        (place / name).rmdir()


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda place: place.rename(place.with_name("gone")), {}, "pets is no folder; give --data-root"),
        (add_folder("cow"), {}, "pets/cow: holds no image"),
        (add_folder("cat", "kittens"), {}, "pets/cat/kittens: a folder inside a class"),
        (as_parts, {"test_size": 0}, "pets/test: must hold the classes of train/, and 'cow' is in one"),
        (add_folder("train", "cat"), {"test_size": 0}, "pets/cat: beside"),
        (
            lambda place: (place / "cat").rename(place.parent / "cat"),
            {},
            "pets: holds 1 sub-folders and 0 other files;",
        ),
        (flat, {}, "pets/0.png); must hold a sub-folder for each of at least 2 classes, with the images of the class"),
        (lambda place: None, {"test_size": 0}, "folder:pets has no test images"),
        (lambda place: None, {"test_size": 20}, "data.test_size=20 must be below the 20 training images"),
        (lambda place: None, {"test_size": 10, "validation_size": 10}, "data.test_size=10 and data.validation_size=10"),
        (lambda place: None, {"test_size": 1}, "folder:pets: data.test_size=1 cannot be split by class: of 20 images"),
    ],
)
def test_folder_that_cannot_be_used_is_told(
    change: Callable[[Path], object], settings: dict[str, int], named: str, tmp_path: Path
) -> None:
    change(write_folder(tmp_path / "pets"))
    line = refused(lambda: load(tmp_path, "folder:pets", **{"test_size": 4, **OWN, **settings}))
    assert named in line


def test_test_size_beside_a_test_part_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / "pets" / part)
    assert "brings its own test images" in refused(lambda: load(tmp_path, "folder:pets", test_size=4, **OWN))


def test_validation_part_that_is_too_small_is_refused(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        write_folder(tmp_path / "pets" / part, count=5)
    line = refused(lambda: load(tmp_path, "folder:pets", validation_size=11, **OWN))
    assert "data.validation_size=11 must be at most the 10 validation images" in line


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.name=folder:pets"], "set test and validation"),
        (["data.name=folder:pets", "data.test=public"], "set validation"),
        (["data.name=npz:pets.npz", "data.validation=public", "data.classes=2"], "set test"),
        (["data.name=npz:pets.npz", "data.test=public", "data.validation=public"], "classes must be set"),
        (["data.name=folder:pets", "data.test=public", "data.validation=public", "data.classes=2"], "classes must be"),
        (["data.name=folder:pets", "data.test=private", "data.validation=public"], "data.test='private'"),
        (["data.name='folder:'"], "needs a path"),
        (["data.name=folder:"], "data.name"),  # a mapping, in YAML
        (["data.name=folder"], "'folder:PATH'"),
        (["data.size=2"], "data.size=2"),
        (["data.colour=red"], "data.colour='red'"),
    ],
)
def test_setting_of_data_that_cannot_be_is_told(overrides: list[str], named: str) -> None:
    assert named in refused(lambda: load_config(None, overrides))


# Bad images.


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no image"),
    "sixteen_bits": lambda path: Image.fromarray(np.zeros((8, 8), np.uint16)).save(path),
    "other_size": lambda path: Image.fromarray(noise(9, 8)).save(path),
    "other_colour": lambda path: Image.fromarray(noise(8, 8, 3)).save(path),
    "dangling": lambda path: (path.unlink(), path.symlink_to("/nonexistent")),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_image_is_named(damage: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "pets") / "dog" / "003.png"
    DAMAGES[damage](path)
    line = refused(lambda: load(tmp_path, "folder:pets", test_size=4, **OWN))
    assert str(path) in line and "data.skip_bad=true" in line


def bad_pets(tmp_path: Path, **settings: Any) -> ImageData:
    """20 training images of which three are bad, and a test part of 20 with one, loaded without the bad ones."""
    for part in ("train", "test"):
        write_folder(tmp_path / "pets" / part)
    for path in ("train/cat/001.png", "train/cat/002.png", "train/dog/007.png", "test/dog/000.png"):
        truncated(tmp_path / "pets" / path)
    return load(tmp_path, "folder:pets", skip_bad=True, **{**OWN, **settings})


def test_skipped_record_still_counts_in_n(tmp_path: Path) -> None:
    assert len(bad_pets(tmp_path).train) == 20


def test_skipped_record_is_in_no_batch(tmp_path: Path) -> None:
    private = bad_pets(tmp_path).train
    expected = {(label, number) for label in range(2) for number in range(10)} - {(0, 1), (0, 2), (1, 7)}
    assert set(tags(private.take(torch.arange(20)))) == set(tags(private)) == expected
    assert len(private.take(torch.ones(20, dtype=torch.bool)).images) == 17


def test_skipped_public_image_is_left_out(tmp_path: Path) -> None:
    assert len(bad_pets(tmp_path).test) == 19


def test_bad_image_does_not_move_the_split_of_the_others(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "pets")
    whole = load(tmp_path, "folder:pets", test_size=6, **OWN)
    truncated(place / "cat" / "000.png")
    skipped = load(tmp_path, "folder:pets", test_size=6, skip_bad=True, **OWN)
    for before, after in ((whole.train, skipped.train), (whole.test, skipped.test)):
        assert set(tags(before)) - {(0, 0)} == set(tags(after))


def test_skipped_images_are_listed_for_their_owner_only(tmp_path: Path, cache: Path) -> None:
    bad_pets(tmp_path)
    listed = {path.name.split("-")[1]: path for path in cache.glob("*.bad.txt")}
    assert [line.split(":")[0].rpartition("/")[2] for line in listed["train"].read_text().splitlines()] == [
        "001.png", "002.png", "007.png",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in listed.values()} == {0o600}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What this project logs, whatever a command before has set up."""
    monkeypatch.setattr(logging.getLogger("dpsink"), "propagate", True)
    return caplog


def test_skipped_images_are_told_in_the_log(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    bad_pets(tmp_path)
    assert "3 bad train images are skipped, listed in" in told.text


def test_skipped_images_are_told_from_the_cache_too(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    bad_pets(tmp_path)
    told.clear()
    load(tmp_path, "folder:pets", skip_bad=True, **OWN)
    assert "3 bad train images" in told.text


def test_cached_bad_image_is_refused_without_the_option(tmp_path: Path) -> None:
    bad_pets(tmp_path)
    assert "001.png" in refused(lambda: load(tmp_path, "folder:pets", **OWN))


def test_bad_private_validation_image_is_not_skipped(tmp_path: Path) -> None:
    settings = {"validation": "private", "validation_size": 18}
    assert "private validation data" in refused(lambda: bad_pets(tmp_path, **settings))


def test_class_of_bad_images_only_is_told(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "pets")
    for path in (place / "cat").iterdir():
        truncated(path)
    line = refused(lambda: load(tmp_path, "folder:pets", test_size=4, skip_bad=True, **OWN))
    assert "class 0 has no usable" in line


def test_number_of_skipped_images_is_in_no_file_of_a_run(tmp_path: Path) -> None:
    """N is what was listed, whatever could be read; counts, names and reasons stay beside the data."""
    data, config = bad_pets(tmp_path), small_trial("data.skip_bad=true")
    list(run_training(config, data, tmp_path / "run"))
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert read_state(checkpoint).plan["records"] == 20
    written = [path.read_text() for path in (tmp_path / "run").rglob("*.json")]
    numbers = {word for text in written for word in re.findall(r"[\w.]+", text)}
    assert "20" in numbers and not {"17", "19", "absent", "001.png"} & numbers


# Own arrays.


def write_npz(path: Path, **changes: Any) -> Path:
    """12 colour images of three classes; the first pixel of each is its number."""
    images = noise(12, 8, 8, 3)
    images[:, 0, 0, 0] = np.arange(12)
    arrays = {"images": images, "labels": np.arange(12) % 3, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


NPZ = {**OWN, "classes": 3, "test_size": 3}


def test_arrays_are_read_channels_first(tmp_path: Path) -> None:
    images = noise(12, 8, 8, 3)
    write_npz(tmp_path / "set.npz", images=images)
    data = load(tmp_path, "npz:set.npz", **NPZ)
    found = {image.numpy().tobytes() for image in torch.cat([data.train.images, data.test.images])}
    assert found == {image.transpose(2, 0, 1).tobytes() for image in images}


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz")
    train = load(tmp_path, "npz:set.npz", **NPZ).train
    assert train.labels.tolist() == [int(image[0, 0, 0]) % 3 for image in train.images]


def test_grey_arrays_need_no_channel(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", images=noise(12, 8, 8))
    assert load(tmp_path, "npz:set.npz", **NPZ).train.shape == (1, 8, 8)


def test_folder_of_npz_files_is_split_as_they_are_named(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        write_npz(tmp_path / "set" / f"{part}.npz")
    data = load(tmp_path, "npz:set", validation_size=6, classes=3, **OWN)
    assert data.validation is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 6, 12]


def test_own_arrays_are_resized(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz")
    assert load(tmp_path, "npz:set.npz", size=4, colour="grey", **NPZ).train.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({"images": None}, {}, "holds no array 'images'"),
        ({"labels": None}, {}, "holds no array 'labels'"),
        ({"labels": np.arange(12) / 2}, {}, "labels must be whole numbers, one an image, not float64 12"),
        ({"labels": np.arange(11) % 3}, {}, "12 images and 11 labels"),
        ({"labels": np.zeros((12, 3), int)}, {}, "labels must be whole numbers"),
        ({"labels": np.array([None] * 12)}, {}, "no npz of plain numbers"),
        ({"images": noise(12, 8, 8, 3) / 255}, {}, "images must be uint8"),
        ({"images": noise(12, 3, 8, 8)}, {}, "not uint8 12×3×8×8"),
        ({"labels": np.array([-1, 1, 2] + [0, 1, 2] * 3)}, {}, "label -1 of image 0 must be in [0, 2]"),
        ({"labels": np.arange(12) % 4}, {}, "label 3 of image 3 must be in [0, 2], for data.classes=3"),
        ({}, {"classes": 4}, "class 3 has no usable"),
        ({}, {"classes": 10}, "10 classes are more than the 9 train images"),
    ],
)
def test_arrays_that_cannot_be_used_are_told(
    changes: dict[str, Any], settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path / "set.npz", **changes)
    line = refused(lambda: load(tmp_path, "npz:set.npz", **{**NPZ, **settings}))
    assert named in line and str(path) in line


@pytest.mark.parametrize("content", [b"", b"no zip", pickle.dumps([1, 2, 3])])
def test_file_that_is_no_npz_is_named(content: bytes, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz")
    path.write_bytes(content)
    line = refused(lambda: load(tmp_path, "npz:set.npz", **NPZ))
    assert str(path) in line and "pickle" not in line


def test_truncated_npz_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz")
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(lambda: load(tmp_path, "npz:set.npz", **NPZ))


def test_label_out_of_range_is_skipped_where_that_is_asked(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", labels=np.array([0, 1, 2] * 3 + [0, 1, 7]))
    data = load(tmp_path, "npz:set.npz", skip_bad=True, **{**NPZ, "test_size": 6})
    parts = torch.cat([data.train.images, data.test.images])
    assert 11 not in parts[:, 0, 0, 0].tolist() and len(parts) == 11


def test_parts_of_different_shapes_are_told(tmp_path: Path) -> None:
    write_npz(tmp_path / "set" / "train.npz")
    write_npz(tmp_path / "set" / "test.npz", images=noise(12, 9, 9, 3))
    line = refused(lambda: load(tmp_path, "npz:set", classes=3, **OWN))
    assert "test images are 3×9×9, training images 3×8×8; set data.size" in line


# Whole lives.


def small_trial(*overrides: str) -> Any:
    settings = [
        "data.name=folder:pets", "data.test=public", "data.validation=public", "generator.hidden_dim=2",
        "sinkhorn.gen_batch_size=4", "sinkhorn.cost=l2", "privacy.noise_multiplier=10", "privacy.batch_size=4",
        "privacy.delta=1e-3", "privacy.step_limit=2", "evaluation.samples=20", "evaluation.classifiers=[logreg]",
    ]  # fmt: skip
    return load_config(None, [*settings, *overrides])


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """The run folder of a trial on `tmp_path/pets`."""
    write_folder(tmp_path / "pets", count=40)
    config = small_trial("data.test_size=20", "data.validation_size=20")
    list(run_training(config, load_dataset(config.data, root=tmp_path), tmp_path / "run"))
    return tmp_path / "run"


def test_generator_of_own_data_is_judged_from_its_checkpoint(own_run: Path, tmp_path: Path) -> None:
    answer = judge(own_run, samples=20, data_root=tmp_path)
    assert 0 <= answer["metrics"]["accuracy_logreg"] <= 1


def test_generator_of_own_data_that_have_changed_is_refused(own_run: Path, tmp_path: Path) -> None:
    data = load_dataset(load_config(own_run / "config.yaml").data, root=tmp_path)
    label, number = tags(data.train)[0]
    Image.fromarray(noise(8, 8)).save(tmp_path / "pets" / ("cat", "dog")[label] / f"{number:03d}.png")
    assert "other data" in refused(lambda: judge(own_run, samples=20, data_root=tmp_path))


def test_card_of_own_data_names_no_file_of_theirs(own_run: Path, tmp_path: Path) -> None:
    from dpsink.judging import privacy_card

    card = json.dumps(privacy_card(own_run, load_generator(own_run)[1]), default=str)
    assert "folder:pets" in card and ".png" not in card


def test_synthetic_data_set_is_own_data_to_the_next_trial(own_run: Path, tmp_path: Path) -> None:
    generator, description = load_generator(own_run)
    for out, settings in (("made.npz", {"classes": 2}), ("made", {})):
        synthesize(generator, description, {}, labels=balanced_labels(12, 2), seed=0, out=tmp_path / out)
        name = f"{'npz' if settings else 'folder'}:{out}"
        assert len(load(tmp_path, name, test_size=4, **settings, **OWN).train) == 8
