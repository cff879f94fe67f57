"""Which records join a step: Poisson sampling at no more than the accounted rate."""

import math

import numpy as np
import torch
from torch import Tensor

from dpsink.entropy import Entropy

# What the rate is lowered by: more than rounding of the logarithms, and the grid of 64-bit uniforms, can raise it.
RELATIVE_MARGIN, ABSOLUTE_MARGIN = 1e-12, 2.0**-64


def poisson_batch(entropy: Entropy, records: int, sample_rate: float) -> Tensor:
    """Indices of the records that join a batch, each independently with probability `sample_rate`.

    The gaps between members are geometric: the work and the bytes drawn are proportional to the batch, not to the
    data set. The rate is lowered by more than rounding can raise it, so the true one never exceeds the accounted one
    (`torch.rand() < q` in float32 would).

    Returns:
        int64, (|S|,), ascending; may be empty.
    """
    if sample_rate >= 1:
        return torch.arange(records)
    log_miss = np.log1p(-max(0.0, sample_rate * (1 - RELATIVE_MARGIN) - ABSOLUTE_MARGIN))
    parts, last = [np.empty(0)], -1.0
    while log_miss < 0 and last < records:
        words = np.frombuffer(entropy.random_bytes(8 * _enough_gaps(records, sample_rate)), dtype=np.uint64)
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-64
        with np.errstate(divide="ignore"):  # a uniform of 1, which ends the batch
            gaps = np.floor(np.log1p(-uniform) / log_miss) + 1
        parts.append(last + np.cumsum(gaps))
        last = parts[-1][-1]
    members = np.concatenate(parts)
    return torch.from_numpy(members[members < records].astype(np.int64))


def _enough_gaps(records: int, sample_rate: float) -> int:
    """Gaps to draw at once; a public number, so that the bytes asked for say nothing of the batch."""
    expected = records * sample_rate
    return int(expected + 6 * math.sqrt(expected)) + 16
