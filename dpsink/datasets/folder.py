"""`folder:PATH`: the user's own images, a sub-folder for each class."""

from collections.abc import Iterable
from pathlib import Path

import torch

from dpsink.config import DataConfig
from dpsink.datasets.base import PARTS, TRAIN
from dpsink.datasets.files import FileSource
from dpsink.datasets.pictures import Form
from dpsink.errors import InputError


def open_folder(config: DataConfig, place: Path) -> FileSource:
    """Lists `PLACE/CLASS/*`, or `PLACE/train/CLASS/*` with `test` and `validation` beside `train`.

    Raises:
        InputError: no such folder, a class without images, parts with other classes.
    """
    if not place.is_dir():
        raise InputError(f"{config.name}: {place} is no folder; give --data-root or an absolute path")
    parts = [part for part in PARTS if (place / part).is_dir()] if (place / TRAIN).is_dir() else []
    _check_nothing_is_left_over(place, parts)
    classes = _folders(place / TRAIN if parts else place)
    if len(classes) < 2:
        raise InputError(_too_few_classes(place / TRAIN if parts else place, classes))
    folders = {part: place / part for part in parts} if parts else {TRAIN: place}
    listed = {part: _list_part(folder, classes) for part, folder in folders.items()}
    files = {
        part: [str((folders[part] / name).relative_to(place)) for name, _ in rows] for part, rows in listed.items()
    }
    labels = {part: torch.tensor([label for _, label in rows]) for part, rows in listed.items()}
    return FileSource(place.name or "folder", place, files, labels, len(classes), Form.of(config))


def _too_few_classes(folder: Path, classes: list[str]) -> str:
    loose = [name for name in _visible(folder.iterdir()) if name not in classes]
    example = f" (such as {folder / loose[0]})" if loose else ""
    return (
        f"{folder}: holds {len(classes)} sub-folders and {len(loose)} other files{example}; must hold a sub-folder for "
        "each of at least 2 classes, with the images of the class in it"
    )


def _check_nothing_is_left_over(place: Path, parts: list[str]) -> None:
    for name in _folders(place) if parts else ():
        if name not in PARTS:
            raise InputError(
                f"{place / name}: beside {place / TRAIN} only validation/ and test/ may stand; move it away"
            )


def _list_part(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """`CLASS/FILE` and label of every image of a part, in the order of their names."""
    found = _folders(folder)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))[0]
        raise InputError(f"{folder}: must hold the classes of train/, and '{odd}' is in one of the two only")
    return [(f"{name}/{file}", label) for label, name in enumerate(classes) for file in _images(folder / name)]


def _images(folder: Path) -> list[str]:
    names = _visible(folder.iterdir())
    if not names:
        raise InputError(f"{folder}: holds no image; remove the class, or fill it")
    for name in names:
        if (folder / name).is_dir():
            raise InputError(
                f"{folder / name}: a folder inside a class; images must lie directly in the class's folder"
            )
    return names


def _folders(folder: Path) -> list[str]:
    """By number where all names are numbers, so that class 10 is no third; else by name."""
    names = _visible(path for path in folder.iterdir() if path.is_dir())
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _visible(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths if not path.name.startswith("."))
