"""What can be judged: a trained generator, or synthetic images on disk, ours or a competitor's."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpsink.config import DataConfig
from dpsink.data import LabelledImages
from dpsink.datasets.base import TRAIN, Decoded
from dpsink.datasets.files import decode
from dpsink.datasets.npz import has_labels, open_npz, read_images
from dpsink.datasets.pictures import Form, shape_text
from dpsink.errors import InputError
from dpsink.writing import UNLABELLED

log = logging.getLogger("dpsink")


@dataclass(frozen=True)
class Subject:
    """A source of synthetic images.

    Attributes:
        place: where it lies.
        card: its privacy card; None where nothing is known.
        labelled: whether its labels mean anything.
        draw: at most so many images, by a seed.
        available: how many there are at most; a generator has no end of them.
    """

    place: Path
    card: Mapping[str, Any] | None
    labelled: bool
    draw: Callable[[int, int], LabelledImages]
    available: float = math.inf


def holds_images(place: Path) -> bool:
    """Whether a place is an npz file, or a folder of classes and no run."""
    if not place.is_dir():
        return place.suffix == ".npz" and place.is_file()
    run = any((place / name).exists() for name in ("config.yaml", "state.json")) or any(place.glob("checkpoint-*"))
    return not run and bool(_classes(place))


def read_subject(place: Path, reference: LabelledImages, card: Mapping[str, Any] | None, *, skip_bad: bool) -> Subject:
    """Synthetic images of an npz or a folder, in the channels of the real ones.

    Args:
        reference: real images that they will be compared with.
        skip_bad: leave out what cannot be read.

    Raises:
        InputError: files that cannot be read, another size, other classes.
    """
    decoded, labels, labelled = (_read_folder if place.is_dir() else _read_npz)(place, reference)
    # The card is of all that lie there, whatever can be read: it must not come to stand for other images.
    if card is not None and card.get("images", len(labels)) != len(labels):
        raise InputError(f"{place}: holds {len(labels)} images, its card is of {card['images']}; remove the card")
    images = _usable(decoded, labels, reference, skip_bad)
    if images.shape != reference.shape:
        raise InputError(
            f"{place}: images are {shape_text(images.shape)}, the real ones {shape_text(reference.shape)}; resize them"
        )
    return Subject(place, card, labelled, lambda samples, seed: _part(images, samples, seed), len(images))


def _part(images: LabelledImages, samples: int, seed: int) -> LabelledImages:
    """All of them, or a random part where there are more."""
    if len(images) <= samples:
        return images
    return images.take(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples])


def _read_npz(place: Path, reference: LabelledImages) -> tuple[Decoded, torch.Tensor, bool]:
    """Pixels, labels, and whether these mean anything."""
    colour = _form(reference).colour
    if not has_labels(place):
        pixels = _form(reference).apply_to_all(read_images(place))
        return Decoded(pixels), torch.zeros(len(pixels), dtype=torch.int64), False
    settings: dict[str, Any] = {"test": "public", "validation": "public", "colour": colour}
    source = open_npz(DataConfig(name=f"npz:{place}", classes=reference.num_classes, **settings), place)
    return source.images(TRAIN), source.labels[TRAIN], True


def _read_folder(place: Path, reference: LabelledImages) -> tuple[Decoded, torch.Tensor, bool]:
    names = _classes(place)
    if names == [UNLABELLED]:
        numbers = [0]
    elif all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
    else:
        numbers = list(range(len(names)))
        if len(names) != reference.num_classes:
            raise InputError(
                f"{place}: holds {len(names)} classes, the real images {reference.num_classes}; name the folders by "
                "number, or fill all of them"
            )
    if (largest := max(numbers)) >= reference.num_classes:
        odd = place / names[numbers.index(largest)]
        raise InputError(f"{odd}: classes of the real images are 0 to {reference.num_classes - 1}")
    files = [
        (f"{name}/{file.name}", number)
        for name, number in zip(names, numbers, strict=True)
        for file in sorted((place / name).iterdir())
        if not file.name.startswith(".")
    ]
    decoded = decode(place, [name for name, _ in files], _form(reference))
    labels = torch.tensor([number for _, number in files], dtype=torch.int64)
    return decoded, labels, names != [UNLABELLED]


def _usable(decoded: Decoded, labels: torch.Tensor, reference: LabelledImages, skip_bad: bool) -> LabelledImages:
    images = LabelledImages(torch.from_numpy(decoded.images), labels, reference.num_classes)
    if not decoded.bad:
        return images
    if not skip_bad:
        more = f" (and {len(decoded.bad) - 1} more)" if len(decoded.bad) > 1 else ""
        raise InputError(f"{decoded.bad[min(decoded.bad)]}{more}; mend or remove it, or skip it with --skip-bad")
    log.warning("%d bad synthetic images are skipped", len(decoded.bad))
    usable = torch.ones(len(labels), dtype=torch.bool)
    usable[list(decoded.bad)] = False
    return images.take(usable)


def _form(reference: LabelledImages) -> Form:
    return Form(colour="grey" if reference.shape[0] == 1 else "colour")


def _classes(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
