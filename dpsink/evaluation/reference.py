"""Features of public real images, computed once: Inception takes minutes for 10,000 images on a CPU."""

from functools import lru_cache

from torch import Tensor

from dpsink.data import LabelledImages
from dpsink.disk import cache_folder
from dpsink.evaluation.extractors import Extractor
from dpsink.evaluation.kept import digest, recall, refuse_private


@lru_cache(maxsize=4)
def reference_features(extractor: Extractor, reference: LabelledImages) -> Tensor:
    """Features, float32 (N, D), from memory, from `$XDG_CACHE_HOME/dpsink/references`, or computed now and kept there.

    An entry is named by the extractor's weights and by the images themselves, so by their data set, split and number.

    Raises:
        ReleaseRefused: private images, whose features nobody may keep.
    """
    refuse_private(reference)
    if extractor.digest is None:
        return extractor.features(reference.images)
    path = cache_folder("references") / f"{digest(extractor.digest, reference)}.safetensors"
    return recall(path, lambda: {"features": extractor.features(reference.images)})["features"]
