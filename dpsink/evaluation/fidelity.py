"""Distances between sets of images in feature space, by torch-fidelity's own functions.

Every value is finite: where a distance is not defined or overflows it is `WORST_DISTANCE`. torch-fidelity is imported
where it is used: it brings torchvision and torch's compiler, which takes seconds.
"""

import numpy as np
from torch import Tensor

from dpsink.data import LabelledImages
from dpsink.evaluation.extractors import Extractor
from dpsink.evaluation.reference import reference_features

WORST_DISTANCE = 1e6
KID_SUBSET_SIZE = 1000  # torch-fidelity's; smaller sets are used whole
NEIGHBOURS = 3  # of the k-NN balls of precision and recall, arXiv 1904.06991
DISTANCES = 20_000_000  # held at once: 160 MB


def fidelity(
    synthetic: LabelledImages, reference: LabelledImages, *, extractor: Extractor, seed: int = 0
) -> dict[str, float]:
    """`fid`, `kid`, `precision` and `recall` of synthetic images against real ones.

    Args:
        synthetic: at least 2 images.
        reference: at least 2 real images of the same shape, public: their features are kept.
        extractor: of the features.
        seed: of KID's subsets.
    """
    # float64: in float32 equal features come out up to 0.003 apart, so that a collapsed generator gets recall.
    generated = extractor.features(synthetic.images).double()
    real = reference_features(extractor, reference).double()
    return {"fid": fid(generated, real), "kid": kid(generated, real, seed=seed)} | precision_recall(generated, real)


def fid(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between two Gaussians fitted to features, in [0, 1e6] (arXiv 1706.08500, Equation 6).

    Args:
        features_a: float64, (N, D), N >= 2. Symmetric in both arguments.
        features_b: float64, (M, D), M >= 2.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (features_a, features_b)]
    try:
        distance = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    except np.linalg.LinAlgError:  # non-finite covariances, or eigenvalues that did not converge
        return WORST_DISTANCE
    return max(_bounded(distance), 0.0)  # rounding takes equal sets below 0


def kid(features_a: Tensor, features_b: Tensor, *, seed: int = 0) -> float:
    """Unbiased squared MMD with the cubic kernel, at most 1e6; about 0, of either sign, for equal sets.

    The mean over 100 random subsets of 1,000, or of the smaller set's size (arXiv 1801.01401). The order of the
    images does not matter.

    Args:
        features_a: float64, (N, D), N >= 2. Symmetric in both arguments.
        features_b: float64, (M, D), M >= 2.
        seed: of the subsets.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(features_a), len(features_b))
    features_a, features_b = (features[features.sum(1).argsort(stable=True)] for features in (features_a, features_b))
    scores = kid_features_to_metric(features_a, features_b, kid_subset_size=size, rng_seed=seed, verbose=False)
    return _bounded(scores[KEY_METRIC_KID_MEAN])


def precision_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """`precision`, the share of generated features among the real ones, and `recall`, the converse.

    Both in [0, 1], by k-nearest-neighbour balls (arXiv 1904.06991, Equations 1-2).

    Args:
        generated: float64, (N, D).
        real: float64, (M, D).
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    neighbours = min(NEIGHBOURS, len(generated) - 1, len(real) - 1)
    largest = max(len(generated), len(real))
    scores = prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=neighbours,
        prc_batch_size=max(1, DISTANCES // largest),  # rows against all columns
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": scores[KEY_METRIC_PRECISION], "recall": scores[KEY_METRIC_RECALL]}


def _bounded(distance: float) -> float:
    # A comparison with NaN is false.
    return distance if distance < WORST_DISTANCE else WORST_DISTANCE
