"""The plain step and ours on the same inputs: how far apart are loss and gradients?"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpsink.data import to_unit
from dpsink.engine import build_mechanism, debiasing_rows
from dpsink.generators import ConvCond, build_generator
from dpsink.privacy.mechanism import Generated, sanitize
from dpsink.sinkhorn import Points, annealing_schedule, comparison_points, pairwise_cost, transport_cost
from experiments.bench.plain import Batch, PlainTrial
from experiments.bench.subjects import CLASSES, Setting, random_images


class Case(NamedTuple):
    """Everything that enters a step without noise.

    Attributes:
        generator: ours, with random weights.
        latents: (n + r, L).
        labels: int64, (n + r,); the last r repeat the first r.
        real: uint8 images (B, d) and their labels.
    """

    generator: ConvCond
    latents: Tensor
    labels: Tensor
    real: Points

    def moved(self, device: str, dtype: torch.dtype) -> "Case":
        """The same case in another type, elsewhere."""
        real = Points(self.real.images.to(device), self.real.labels.to(device))
        generator = copy.deepcopy(self.generator).to(device, dtype)
        return Case(generator, self.latents.to(device, dtype), self.labels.to(device), real)


def random_case(setting: Setting) -> Case:
    """The same for the same setting; float64 on the CPU."""
    rng = torch.Generator().manual_seed(0)
    data = random_images(setting.records, setting.shape)
    generator = build_generator(setting.config, setting.shape, CLASSES)
    assert isinstance(generator, ConvCond)
    r = debiasing_rows(setting.config.sinkhorn)
    labels = torch.randint(CLASSES, (setting.n,), generator=rng)
    latents = torch.rand(setting.n + r, generator.latent_dim, generator=rng, dtype=torch.float64)
    members = torch.randperm(setting.records, generator=rng)[: setting.batch]
    real = Points(data.images[members].flatten(1), data.labels[members])
    return Case(generator.double(), latents, torch.cat([labels, labels[:r]]), real)


class Gradients(NamedTuple):
    """Of one step without noise: (n + r, d) after the mechanism, and (P,)."""

    images: Tensor
    weights: Tensor


def our_gradients(setting: Setting, case: Case) -> Gradients:
    """By the mechanism and analytic gradients."""
    mechanism = build_mechanism(setting.plan, setting.config.sinkhorn)
    images = case.generator(case.latents, case.labels)
    generated = Generated.of(*_points(setting, case, images), setting.config.sinkhorn)
    released = sanitize(mechanism, generated, case.real, 0.0, lambda shape: torch.zeros(shape, device=images.device))
    gradient = torch.cat(mechanism.loss_gradients(generated, released)).to(images.dtype)
    found = torch.autograd.grad(images, list(case.generator.parameters()), gradient.reshape(images.shape))
    return Gradients(gradient, torch.cat([one.flatten() for one in found]))


def plain_gradients(setting: Setting, case: Case) -> Gradients:
    """By geomloss and autograd."""
    trial = PlainTrial(setting, case.generator, str(case.latents.device), case.latents.dtype)
    images = trial.backward(case.latents, case.labels, _plain_batch(case), noise_multiplier=0)
    return Gradients(images, trial.generator.gradient_as_ours())


def differences(setting: Setting) -> dict[str, float]:
    """Largest differences of loss and gradients in float64; the loss is OT's, so only of mechanism `batch`."""
    case = random_case(setting)
    ours, theirs = our_gradients(setting, case), plain_gradients(setting, case)
    found = {
        "image gradient": float((ours.images - theirs.images).abs().max()),
        "weight gradient": float((ours.weights - theirs.weights).abs().max()),
    }
    if setting.mechanism == "batch":
        found["loss"] = abs(_our_loss(setting, case) - _plain_loss(setting, case))
    return found


def _our_loss(setting: Setting, case: Case) -> float:
    problem = setting.config.sinkhorn
    x, x_tilde = _points(setting, case, case.generator(case.latents, case.labels))
    real = case.real._replace(images=to_unit(case.real.images, x.images.dtype))
    annealing = annealing_schedule(math.prod(setting.shape), problem)
    to_real, to_itself = (
        transport_cost(pairwise_cost(x, y, problem), annealing) for y in (real, comparison_points(x, x_tilde))
    )
    return float(2 * to_real - to_itself)


def _plain_loss(setting: Setting, case: Case) -> float:
    loss = PlainTrial(setting, case.generator, dtype=case.latents.dtype).loss
    x, x_tilde = (Batch(*points[:2]) for points in _points(setting, case, case.generator(case.latents, case.labels)))
    return float(2 * loss.transport(x, _plain_batch(case)) - loss.debiasing(x, x_tilde))


def _points(setting: Setting, case: Case, images: Tensor) -> tuple[Points, Points]:
    flat, n = images.detach().flatten(1), setting.n
    return Points(flat[:n], case.labels[:n]), Points(flat[n:], case.labels[n:])


def _plain_batch(case: Case) -> Batch:
    return Batch(to_unit(case.real.images, case.latents.dtype), case.real.labels)
