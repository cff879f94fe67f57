"""Variety: does a generator give many images of a class, or one?"""

import torch

from dpsink.data import LabelledImages


def variety(synthetic: LabelledImages, reference: LabelledImages) -> float:
    """Within-class variance of synthetic images over that of real ones.

    Both are averaged over pixels, then over the classes that the reference holds. A class that the synthetic
    set lacks has variance 0.

    Returns:
        0 for class means, about 1 for real images, above 1 for noisy ones; 0 where the reference itself has
        no variance, so that there is nothing to compare with.
    """
    classes = reference.labels.unique().tolist()
    real = _within_class_variance(reference, classes)
    return _within_class_variance(synthetic, classes) / real if real > 0 else 0.0


def _within_class_variance(data: LabelledImages, classes: list[int]) -> float:
    return sum(_variance(data, label) for label in classes) / len(classes)


def _variance(data: LabelledImages, label: int) -> float:
    """Mean over pixels of the variance over the images of one class, in squared grey levels."""
    images = data.images[data.labels == label]
    if len(images) == 0:
        return 0.0
    # With the divisor n, not n - 1: a single image has variance 0, not NaN.
    return torch.var(images.float(), dim=0, correction=0).mean().item()
