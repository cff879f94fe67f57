"""The floor of FID and KID: what real images score against real ones. No generator can be expected below it."""

from dataclasses import dataclass

import torch

from dpsink.data import ImageData, LabelledImages
from dpsink.disk import cache_folder
from dpsink.evaluation.extractors import Extractor
from dpsink.evaluation.fidelity import fid, kid
from dpsink.evaluation.kept import Tensors, digest, recall
from dpsink.evaluation.reference import reference_features


@dataclass(frozen=True)
class Floor:
    """Distances between two disjoint public sets of real images.

    Attributes:
        fid, kid: as `fidelity` gives them.
        of: the two sets, for people.
    """

    fid: float
    kid: float
    of: str


def distance_floor(data: ImageData, extractor: Extractor) -> Floor:
    """Validation against test images; the test images' two halves where there is no public validation split.

    A function of the public images and the extractor alone, kept under `$XDG_CACHE_HOME/dpsink/references`. FID grows
    as sets shrink: the floor of halves is above that of whole sets, so it is no bound, and the sizes are told.
    """
    first, second, of = _public_pair(data)

    def measure() -> Tensors:
        a, b = (reference_features(extractor, images).double() for images in (first, second))
        return {"distances": torch.tensor([fid(a, b), kid(a, b)], dtype=torch.float64)}

    if extractor.digest is None:
        distances = measure()["distances"]
    else:
        path = cache_folder("references") / f"{digest('floor', extractor.digest, first, second)}.safetensors"
        distances = recall(path, measure)["distances"]
    measured_fid, measured_kid = distances.tolist()
    return Floor(measured_fid, measured_kid, of)


def _public_pair(data: ImageData) -> tuple[LabelledImages, LabelledImages, str]:
    if data.public_validation is not None:
        first, second, names = data.public_validation, data.test, ("validation", "test")
    else:
        first, second = _halves(data.test)
        names = ("one half of test", "the other")
    return (
        first,
        second,
        " against ".join(
            f"{name} ({len(images):,} images)" for name, images in zip(names, (first, second), strict=True)
        ),
    )


def _halves(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Every other image, class by class: the first half of MNIST's test images is easier than the second."""
    order = images.labels.argsort(stable=True)
    first, second = (order[start::2].sort().values for start in (0, 1))
    return images.take(first), images.take(second)
