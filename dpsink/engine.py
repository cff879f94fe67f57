"""The training step: generate, ask the mechanism once, back-propagate, update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpsink.config import TrialConfig
from dpsink.data import LabelledImages, poisson_batch, to_unit
from dpsink.entropy import Entropy
from dpsink.generators import ClassMean, build_generator, draw_latents
from dpsink.privacy.mechanism import (
    BatchMechanism,
    Generated,
    Mechanism,
    RecordMechanism,
    release_class_means,
    sanitize,
)
from dpsink.privacy.plan import PrivacyPlan
from dpsink.sinkhorn import Points


@dataclass
class TrialState:
    """What a checkpoint holds of a trial, besides its number of steps.

    Attributes:
        generator: the module in training.
        optimizer: Adam over its parameters; None for the control, which has none.
        rng: public randomness of latents and labels.
        step: optimiser steps done, the position on the learning-rate schedule.
    """

    generator: nn.Module
    optimizer: torch.optim.Adam | None
    rng: torch.Generator
    step: int = 0

    @property
    def finite(self) -> bool:
        """Whether every weight and statistic is a finite number."""
        return all(bool(torch.isfinite(value).all()) for value in self.generator.state_dict().values())


def initial_state(config: TrialConfig, data: LabelledImages) -> TrialState:
    """The state before the first step; depends on the public seed and the shape of the data only."""
    generator = build_generator(config, data.shape, data.num_classes)
    parameters = list(generator.parameters())
    adam = config.optimizer
    optimizer = torch.optim.Adam(parameters, adam.lr, (adam.beta1, adam.beta2)) if parameters else None
    rng = torch.Generator().manual_seed(config.seed)
    return TrialState(generator, optimizer, rng)


def build_mechanism(config: TrialConfig, plan: PrivacyPlan) -> Mechanism:
    """The mechanism of a neural trial, with the clip norm and batch of its plan."""
    if plan.mechanism == "batch":
        return BatchMechanism(plan.clip_norm, config.sinkhorn)
    return RecordMechanism(plan.clip_norm, config.sinkhorn, plan.sample_rate * plan.records)


def step(state: TrialState, private: LabelledImages, config: TrialConfig, plan: PrivacyPlan, entropy: Entropy) -> None:
    """One step that the caller has reserved: updates `state` in place."""
    if isinstance(state.generator, ClassMean):
        state.generator.means = release_class_means(
            private.images, private.labels, private.num_classes, plan.clip_norm, plan.noise_multiplier, entropy
        )
    else:
        _gradient_step(state, private, config, plan, entropy)
    state.step += 1


def _gradient_step(
    state: TrialState, private: LabelledImages, config: TrialConfig, plan: PrivacyPlan, entropy: Entropy
) -> None:
    assert state.optimizer is not None  # only the control has none
    mechanism = build_mechanism(config, plan)

    # Draw the private batch, each record with probability q.
    members = private.take(poisson_batch(entropy, len(private), plan.sample_rate))
    real = Points(to_unit(members.images).flatten(1), members.labels)

    # Generate X and X̃ from public randomness; n is a constant, never |S|.
    images, labels = _generate(state, config, private.num_classes)
    n = config.sinkhorn.gen_batch_size
    points = Points(images.detach().flatten(1), labels)
    x, x_tilde = (Points(points.images[rows], points.labels[rows]) for rows in (slice(n), slice(n, None)))

    # The single release of the step.
    generated = Generated.of(x, x_tilde, config.sinkhorn)
    released = sanitize(mechanism, generated, real, plan.noise_multiplier, entropy)

    # Back-propagate the sanitised image gradients; all from here on is post-processing.
    gradient = torch.cat(mechanism.loss_gradients(generated, released))
    state.optimizer.zero_grad(set_to_none=True)
    images.backward(gradient.to(images.dtype).reshape(images.shape))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step, plan.steps)
    state.optimizer.step()


def learning_rate(config: TrialConfig, step: int, total_steps: int) -> float:
    """Rate of a step: constant, or the half cosine from `lr` at step 0 to 0 at `total_steps`."""
    if config.optimizer.schedule == "constant":
        return config.optimizer.lr
    return config.optimizer.lr * (1 + math.cos(math.pi * step / total_steps)) / 2


def _generate(state: TrialState, config: TrialConfig, num_classes: int) -> tuple[Tensor, Tensor]:
    """X and X̃ in one pass: images (n + r, C, H, W) with gradients, labels (n + r,)."""
    n = config.sinkhorn.gen_batch_size
    r = math.floor(config.sinkhorn.debias_ratio * n)
    labels = _draw_labels(n, num_classes, config.sinkhorn.labels, state.rng)
    labels = torch.cat([labels, labels[:r]])
    state.generator.train()
    latents = draw_latents(n + r, int(state.generator.latent_dim), state.rng)  # pyright: ignore[reportArgumentType]
    return state.generator(latents, labels), labels


def _draw_labels(n: int, num_classes: int, kind: str, rng: torch.Generator) -> Tensor:
    if kind == "uniform":
        return torch.randint(num_classes, (n,), generator=rng)
    # Equal counts, up to a remainder that a random order of the classes spreads evenly; shuffled, because
    # debiasing treats the first r rows apart.
    classes = torch.randperm(num_classes, generator=rng).repeat(n // num_classes + 1)[:n]
    return classes[torch.randperm(n, generator=rng)]
