"""The mechanisms: what is computed from private records, its sensitivity, and the noise that covers it.

Each mechanism has one function of the private batch, `query`, whose L2 sensitivity under adding or removing one
record is `sensitivity`; `sanitize` is the only caller, and adds the noise. What comes after is post-processing.

A mechanism serves one trial, or K at once: tensors then have a leading axis K, and clip norms, noise multipliers and
expected batches are tensors (K, 1, 1). A trial's answer does not depend on the others.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpsink.data import to_unit
from dpsink.entropy import Entropy
from dpsink.privacy.noise import Noise, gaussian_noise
from dpsink.sinkhorn import Points, Problem, cost_gradient, debiasing_gradients, record_terms, transport_gradient

# Sums of float32 terms overshoot their bound by rounding (3.4e-6 seen at a thousand records): aim below it.
ROUNDING_MARGIN = 1e-4
CHUNK = 1024  # records per pass: memory O(n·CHUNK + CHUNK·d) whatever the batch


@dataclass(frozen=True)
class Generated:
    """The public side of a step: made of latents that are independent of the data, no real record enters.

    Attributes:
        x: X, n rows.
        debiasing: gradient of −OT_λ(X, X') in the images of X, ([K,] n, d).
        tilde_debiasing: the same in those of X̃, ([K,] r, d).
    """

    x: Points
    debiasing: Tensor
    tilde_debiasing: Tensor

    @classmethod
    def of(cls, x: Points, x_tilde: Points, problem: Problem) -> "Generated":
        """The public side from X and from X̃, which carries the labels of the first r rows of X."""
        return cls(x, *debiasing_gradients(x, x_tilde, problem))


class Mechanism(Protocol):
    """A bounded query of the private batch, and what to do with its noised answer."""

    @property
    def sensitivity(self) -> float | Tensor:
        """max ‖F(S ∪ {record}) − F(S)‖₂ over all S and records."""
        ...

    def query(self, generated: Generated, real: Points) -> Tensor:
        """F(S), ([K,] n, d), float64; the only function of private records. Finite for every input."""
        ...

    def loss_gradients(self, generated: Generated, released: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the loss in X ([K,] n, d) and X̃ ([K,] r, d) from the released answer; post-processing."""
        ...


@dataclass(frozen=True)
class BatchMechanism:
    """The paper's: the gradient of the whole batch, clipped to C. Sensitivity 2C, which is tight.

    F is not additive: one record can turn the whole clipped gradient around. The subsampled Gaussian covers it
    because F(∅) has the same shape and noise as any other answer.
    """

    clip_norm: float | Tensor
    sinkhorn: Problem

    @property
    def sensitivity(self) -> float | Tensor:
        return 2 * self.clip_norm

    def query(self, generated: Generated, real: Points) -> Tensor:
        gradient = generated.debiasing
        if real.labels.shape[-1]:
            records = sanitize_records(real, generated.x.images.dtype)
            real_gradient = 2 * transport_gradient(generated.x, records, self.sinkhorn)
            gradient = gradient + (real_gradient if real.present is None else _unless_empty(real_gradient, real))
        return clip(gradient, self.clip_norm)

    def loss_gradients(self, generated: Generated, released: Tensor) -> tuple[Tensor, Tensor]:
        # X̃ meets no real record, so its gradient is clipped like the other but needs no noise.
        return released, clip(generated.tilde_debiasing, self.clip_norm)


@dataclass(frozen=True)
class RecordMechanism:
    """Ours: each record's own term of the semi-dual gradient, clipped to c, summed. Sensitivity c.

    Column j of the coupling depends on record j and on public values only (X and the potential f = 0), so F is
    additive and this is the standard subsampled Gaussian. `expected_batch` = q·N is a public constant; the size
    of the realised batch is never used.
    """

    clip_norm: float | Tensor
    sinkhorn: Problem
    expected_batch: float | Tensor

    @property
    def sensitivity(self) -> float | Tensor:
        return self.clip_norm

    def query(self, generated: Generated, real: Points) -> Tensor:
        total = torch.zeros_like(generated.x.images, dtype=torch.float64)
        for start in range(0, real.labels.shape[-1], CHUNK):
            total += self._chunk_sum(generated.x, _rows(real, slice(start, start + CHUNK)))
        return total

    def _chunk_sum(self, x: Points, real: Points) -> Tensor:
        """Σ_j s_j v_j over a chunk of records, with s_j = min(1, c/‖v_j‖)."""
        real = sanitize_records(real, x.images.dtype)
        coupling, norms = record_terms(x, real, self.sinkhorn)
        bound = self.clip_norm * (1 - ROUNDING_MARGIN)
        scale = (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None, :]).clamp_max(1)
        # A column that is not finite (it cannot be, after sanitising) must vanish rather than spread; its norm, a
        # sum over the column, is not finite either.
        usable = torch.isfinite(norms)
        usable = usable if real.present is None else usable & real.present
        weights = coupling.mul_(scale).masked_fill_(~usable[..., None, :], 0)
        return cost_gradient(weights, x, real, self.sinkhorn).double()

    def loss_gradients(self, generated: Generated, released: Tensor) -> tuple[Tensor, Tensor]:
        return generated.debiasing + 2 / self.expected_batch * released, generated.tilde_debiasing


def sanitize(
    mechanism: Mechanism, generated: Generated, real: Points, noise_multiplier: float | Tensor, noise: Noise
) -> Tensor:
    """One release: F(S) + N(0, (σ·sensitivity)²), ([K,] n, d), float64. The empty batch is no special case."""
    answer = mechanism.query(generated, real)
    std = noise_multiplier * mechanism.sensitivity
    return answer + std * noise(tuple(answer.shape))


def release_class_means(
    images: Tensor, labels: Tensor, num_classes: int, clip_norm: float, noise_multiplier: float, entropy: Entropy
) -> Tensor:
    """The class-mean control: one Gaussian release of clipped class sums and counts.

    A record adds its pixels, scaled to [0, 1] and clipped to norm R, to its class's sum, and R to that
    class's count, so the joint sensitivity is √2·R.

    Args:
        images: uint8, (N, C, H, W), private.
        labels: int64, (N,), private.
        clip_norm: R.

    Returns:
        Means in [-1, 1], (num_classes, C, H, W), float32: post-processing of the release.
    """
    pixels = images.flatten(1).double() / 255
    norms = pixels.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    pixels = pixels * (clip_norm * (1 - ROUNDING_MARGIN) / norms).clamp_max(1)
    rows = torch.cat([pixels, torch.full_like(norms, clip_norm)], dim=1)
    sums = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, rows)
    std = noise_multiplier * class_means_sensitivity(clip_norm)
    released = sums + std * gaussian_noise(tuple(sums.shape), entropy)
    counts = (released[:, -1:] / clip_norm).clamp_min(1)
    means = (released[:, :-1] / counts).clamp(0, 1) * 2 - 1
    return means.float().reshape(num_classes, *images.shape[1:])


def class_means_sensitivity(clip_norm: float) -> float:
    """√2·R: a record's clipped pixels and its count entry, each of norm at most R."""
    return math.sqrt(2) * clip_norm


def release_counts(counts: Tensor, noise_multiplier: float, entropy: Entropy) -> Tensor:
    """Noisy counts of correct answers on private validation records; one Gaussian release.

    One record adds at most one to each of the k counts: the joint sensitivity is √k.

    Args:
        counts: float64, (k,).
        noise_multiplier: σ, relative to the sensitivity.
    """
    std = noise_multiplier * math.sqrt(counts.numel())
    return counts + std * gaussian_noise(tuple(counts.shape), entropy)


def clip(values: Tensor, bound: float | Tensor) -> Tensor:
    """Scales (n, d), or each of (K, n, d), to L2 norm at most `bound`; float64. A non-finite entry counts as zero."""
    values = torch.nan_to_num(values.double(), nan=0.0, posinf=0.0, neginf=0.0)
    if not values.numel():
        return values
    # Through a unit vector: the square of 1e200 overflows, and 1e-6 / 1e308 has few digits left.
    tiny = torch.finfo(torch.float64).tiny
    largest = values.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    unit = values / largest
    norm = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True).clamp_min(tiny)
    clipped = unit * (bound * (1 - 1e-12) / norm)
    return torch.where(norm * largest <= bound * (1 - 1e-12), values, clipped)


def sanitize_records(real: Points, dtype: torch.dtype) -> Points:
    """Pixels as finite numbers in [-1, 1]: one bad record must not spread.

    Images of bytes are that by construction; of others, a non-finite pixel becomes 0 and the rest are clamped.
    """
    if real.images.dtype == torch.uint8:
        return real._replace(images=to_unit(real.images, dtype))
    images = torch.nan_to_num(real.images, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    return real._replace(images=images.to(dtype))


def _rows(points: Points, rows: slice) -> Points:
    present = None if points.present is None else points.present[..., rows]
    return Points(points.images[..., rows, :], points.labels[..., rows], present)


def _unless_empty(gradient: Tensor, real: Points) -> Tensor:
    """Zero for a trial whose batch is nothing but padding."""
    assert real.present is not None
    return gradient.masked_fill(~real.present.any(-1)[..., None, None], 0)
