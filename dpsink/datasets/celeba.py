"""CelebA as its authors publish it: aligned faces, 40 attributes, the official partition.

Faces are 178×218; the central 178×178 is cut out and resized to `data.size` (32 by default).
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from dpsink.config import DataConfig, nearest
from dpsink.datasets.base import PARTS
from dpsink.datasets.files import FileSource
from dpsink.datasets.pictures import Form
from dpsink.errors import InputError

SIZES = {"train": 162_770, "validation": 19_867, "test": 19_962}  # the official partition
CROP = 178
_IMAGES, _ATTRIBUTES, _PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
_PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


def open_celeba(config: DataConfig, root: Path) -> FileSource:
    """Reads the two lists under `ROOT/celeba` or `ROOT`; label 1 has the attribute, 0 has not.

    Raises:
        InputError: files that are missing or damaged, an attribute that does not exist.
    """
    place = _place(root)
    labels = _read_attribute(place / _ATTRIBUTES, str(config.attribute))
    parts = _read_partition(place / _PARTITION)
    if labels.keys() != parts.keys():
        odd = min(labels.keys() ^ parts.keys())
        raise InputError(f"{place}: '{odd}' stands in one of {_ATTRIBUTES} and {_PARTITION} only; fetch both again")
    names = {part: [name for name, number in parts.items() if number == index] for index, part in enumerate(PARTS)}
    return FileSource(
        name="celeba",
        place=place,
        files={part: [f"{_IMAGES}/{name}" for name in found] for part, found in names.items()},
        labels={part: torch.tensor([labels[name] for name in found]) for part, found in names.items()},
        num_classes=2,
        form=Form.of(config, crop=CROP),
    )


def _place(root: Path) -> Path:
    """The folder that holds the lists and the images: torchvision's `celeba`, or the root itself."""
    place = next((folder for folder in (root / "celeba", root) if (folder / _ATTRIBUTES).exists()), root / "celeba")
    for name in (_ATTRIBUTES, _PARTITION, _IMAGES):
        if not (place / name).exists():
            zipped = (place / f"{_IMAGES}.zip").exists() and name == _IMAGES
            hint = f"unpack {_IMAGES}.zip" if zipped else f"give --data-root, or fetch it from {_PAGE}"
            raise InputError(f"celeba is not under '{root}' (looked for {place / name}); {hint}")
    return place


def _read_attribute(path: Path, attribute: str) -> dict[str, int]:
    """File name to 0 or 1. The first line is the number of images, the second names the attributes."""
    lines = _lines(path)
    count, header = next(lines, [""]), next(lines, [])
    if attribute not in header:
        raise InputError(f"data.attribute={attribute} is no column of {path}{nearest(attribute, header)}")
    column = header.index(attribute) + 1
    labels: dict[str, int] = {}
    for number, words in enumerate(lines, 3):
        if len(words) != len(header) + 1 or words[column] not in ("-1", "1"):
            raise InputError(f"{path}: line {number} must be a file name and {len(header)} values of -1 or 1")
        labels[words[0]] = int(words[column] == "1")
    if count != [str(len(labels))]:
        raise InputError(f"{path}: says {' '.join(count)} images and lists {len(labels)}; fetch it again")
    return labels


def _read_partition(path: Path) -> dict[str, int]:
    """File name to 0 (train), 1 (validation) or 2 (test)."""
    parts: dict[str, int] = {}
    for number, words in enumerate(_lines(path), 1):
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise InputError(f"{path}: line {number} must be a file name and 0, 1 or 2")
        parts[words[0]] = int(words[1])
    return parts


def _lines(path: Path) -> Iterator[list[str]]:
    """Words of each line that has any."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return (words for words in map(str.split, text.splitlines()) if words)
