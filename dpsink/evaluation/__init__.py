"""How good are synthetic images? Judged on real ones by classifiers, feature distances and variety."""

from collections.abc import Sequence

import torch

from dpsink.data import LabelledImages
from dpsink.errors import InputError
from dpsink.evaluation.classifiers import CLASSIFIERS, classifier_accuracies
from dpsink.evaluation.extractors import (
    Extractor,
    build_extractor,
    classifier_extractor,
    inception_extractor,
    require_extractor,
)
from dpsink.evaluation.fidelity import WORST_DISTANCE, fidelity
from dpsink.evaluation.floor import Floor, distance_floor
from dpsink.evaluation.kept import refuse_private
from dpsink.evaluation.variety import variety

__all__ = [
    "CLASSIFIERS",
    "WORST_DISTANCE",
    "Extractor",
    "Floor",
    "build_extractor",
    "classifier_accuracies",
    "classifier_extractor",
    "distance_floor",
    "evaluate",
    "fidelity",
    "inception_extractor",
    "require_extractor",
    "variety",
]

MIN_IMAGES = 10  # a tenth is held back


def evaluate(
    synthetic: LabelledImages,
    reference: LabelledImages,
    *,
    extractor: Extractor,
    classifiers: Sequence[str] = CLASSIFIERS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    labelled: bool = True,
) -> dict[str, float]:
    """All metrics of synthetic images against real ones; every value is finite, whatever the images show.

    Args:
        synthetic: uint8 images on the CPU, at least 10; classes may be missing.
        reference: real images of the same shape and classes, public, at least 10.
        extractor: of the features behind `fid`, `kid`, `precision` and `recall`.
        classifiers: names out of `CLASSIFIERS`; may be empty.
        seed: of everything random; the metrics are a function of it and of the arguments.
        device: where classifiers are trained; the extractor has its own.
        labelled: whether the synthetic labels mean anything; without, there is neither `variety` nor accuracy.

    Returns:
        `fid`, `kid` (about 0 for real images, 1e6 at worst), `precision`, `recall` (in [0, 1]), `variety` (0
        for class means, about 1 for real images), `accuracy_<classifier>` (in [0, 1]), and `accuracy`, their
        mean, where all three classifiers were run.

    Raises:
        InputError: too few images, sets that do not match, or an unknown classifier.
        ReleaseRefused: a private reference.
    """
    refuse_private(reference)
    _check(synthetic, reference)
    distances = fidelity(synthetic, reference, extractor=extractor, seed=seed)
    if not labelled:
        return distances
    return (
        distances
        | {"variety": variety(synthetic, reference)}
        | classifier_accuracies(synthetic, reference, classifiers=classifiers, seed=seed, device=device)
    )


def _check(synthetic: LabelledImages, reference: LabelledImages) -> None:
    fewest = min(len(synthetic), len(reference))
    if fewest < MIN_IMAGES:
        raise InputError(f"{fewest} images are too few to evaluate; give {MIN_IMAGES} or more")
    if (synthetic.shape, synthetic.num_classes) != (reference.shape, reference.num_classes):
        raise InputError(
            f"synthetic images {synthetic.shape} of {synthetic.num_classes} classes must match the real "
            f"ones, {reference.shape} of {reference.num_classes}; evaluate against the data set they were made for"
        )
