"""The training step of K trials side by side, and the slots that the trials live in.

A stack holds K slots of one structure: the same mechanism, data, generator, n, r, cost and p. Everything else (σ, C,
blur, weights of the cost, learning rate, q) is a number per slot. A trial joins a slot, steps, and leaves it at any
time; its result does not depend on its neighbours, since each draws from its own public seed and its own entropy, and
no operation mixes slots. All randomness is drawn before a step, which is then one function of tensors of fixed
shapes, so that a GPU can record it once and replay it (`dpsink.graphs`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpsink.config import Performance, SinkhornConfig, TrialConfig
from dpsink.data import LabelledImages
from dpsink.entropy import Entropy
from dpsink.generators import ClassMean, build_generator, draw_latents
from dpsink.graphs import StaticStep
from dpsink.optimizer import StackedAdam
from dpsink.privacy.mechanism import (
    BatchMechanism,
    Generated,
    Mechanism,
    RecordMechanism,
    release_class_means,
    sanitize,
)
from dpsink.privacy.noise import Noise, fresh_noise
from dpsink.privacy.plan import PrivacyPlan
from dpsink.privacy.sampling import poisson_batch
from dpsink.sinkhorn import Points, Problem, StackedProblem, per_slot
from dpsink.stacking import StackedGenerator

SMALLEST_BUCKET = 64  # rows that a padded batch has at least
DTYPES = {"single": torch.float32, "tf32": torch.float32, "double": torch.float64}


@dataclass
class TrialState:
    """What a checkpoint holds of a trial, besides its number of steps; lives on the CPU.

    Attributes:
        generator: the module in training.
        moments: Adam's two averages over all parameters in their order, (2, P); empty for the control.
        rng: public randomness of latents and labels.
        step: optimiser steps done, the position on the learning-rate schedule.
    """

    generator: nn.Module
    moments: Tensor
    rng: torch.Generator
    step: int = 0


def initial_state(config: TrialConfig, data: LabelledImages) -> TrialState:
    """The state before the first step; depends on the public seed and the shape of the data only."""
    generator = build_generator(config, data.shape, data.num_classes)
    moments = torch.zeros(2, sum(parameter.numel() for parameter in generator.parameters()))
    return TrialState(generator, moments, torch.Generator().manual_seed(config.seed))


@dataclass
class Trial:
    """One trial as the engine sees it: `entropy` is asked for membership and noise, once per step.

    `noise` stays with the trial from slot to slot: a seed is drawn once.
    """

    config: TrialConfig
    plan: PrivacyPlan
    state: TrialState
    entropy: Entropy
    noise: Noise | None = None


class Stack(Protocol):
    """Slots that trials join, step in and leave."""

    @property
    def free(self) -> bool:
        """Whether a slot is empty."""
        ...

    def join(self, trial: Trial) -> int:
        """Puts a trial into an empty slot; returns the slot."""
        ...

    def leave(self, slot: int) -> None:
        """Brings a trial's state up to date and empties its slot."""
        ...

    def step(self) -> None:
        """One step, which the caller has reserved, of every trial that is there."""
        ...

    def update(self, slot: int) -> None:
        """Brings the state of a slot's trial up to date."""
        ...

    def finite(self, slot: int) -> bool:
        """Whether every weight and statistic is a finite number; a slot with another takes no more steps."""
        ...


def open_stack(config: TrialConfig, data: LabelledImages, performance: Performance, slots: int = 1) -> Stack:
    """Empty slots for trials of this one's structure."""
    if config.generator.kind == "class_mean":
        return ControlStack(data)
    return TrialStack(config, data, performance, slots)


def structure(config: TrialConfig) -> tuple[object, ...]:
    """What trials of one stack agree on. r is part of it, because batch norm sees all n + r generated images."""
    transport = config.sinkhorn
    return (
        config.data, config.generator, config.privacy.mechanism, transport.cost, transport.p, transport.backend,
        transport.gen_batch_size, debiasing_rows(transport),
    )  # fmt: skip


def debiasing_rows(config: SinkhornConfig) -> int:
    """r, the number of X̃'s images."""
    return math.floor(config.debias_ratio * config.gen_batch_size)


def build_mechanism(plan: PrivacyPlan, problem: Problem) -> Mechanism:
    """The mechanism of one trial, with the clip norm and batch of its plan."""
    return _mechanism(plan.mechanism, problem, plan.clip_norm, plan.sample_rate * plan.records)


def _mechanism(kind: str, problem: Problem, clip_norm: float | Tensor, expected_batch: float | Tensor) -> Mechanism:
    if kind == "batch":
        return BatchMechanism(clip_norm, problem)
    return RecordMechanism(clip_norm, problem, expected_batch)


def learning_rate(config: TrialConfig, step: int, total_steps: int) -> float:
    """Rate of a step: constant, or the half cosine from `lr` at step 0 to 0 at `total_steps`."""
    if config.optimizer.schedule == "constant":
        return config.optimizer.lr
    return config.optimizer.lr * (1 + math.cos(math.pi * step / total_steps)) / 2


class StepInputs(NamedTuple):
    """Everything random or scheduled of one step of K slots, drawn before it.

    Attributes:
        latents: (K, n + r, L).
        labels: int64, (K, n + r); the last r repeat the first r.
        members: int64, (K, B), rows of the private set, padded.
        present: bool, (K, B), which members are no padding; None where there is none.
        noise: standard normal, float64, (K, n, d).
        rates: learning rate, β₁, β₂ and the two bias corrections of Adam, float64, (K, 5).
        active: bool, (K,), slots that take this step.
    """

    latents: Tensor
    labels: Tensor
    members: Tensor
    present: Tensor | None
    noise: Tensor
    rates: Tensor
    active: Tensor


@dataclass(frozen=True)
class _Numbers:
    """What differs between the slots of a stack and stays the same from step to step."""

    problem: StackedProblem
    mechanism: Mechanism
    clip_norm: Tensor
    expected_batch: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, configs: Sequence[TrialConfig], plans: Sequence[PrivacyPlan], stack: "TrialStack") -> "_Numbers":
        iterations = len(stack.numbers.problem.annealing.temperatures) if stack.numbers else 0
        problem = StackedProblem.of(
            [config.sinkhorn for config in configs], stack.images.shape[1], stack.device, iterations
        )
        clip_norm = per_slot([plan.clip_norm for plan in plans], stack.device)
        expected_batch = per_slot([plan.sample_rate * plan.records for plan in plans], stack.device)
        sigma = per_slot([plan.noise_multiplier for plan in plans], stack.device)
        mechanism = _mechanism(plans[0].mechanism, problem, clip_norm, expected_batch)
        return cls(problem, mechanism, clip_norm, expected_batch, sigma)

    def take(self, other: "_Numbers") -> bool:
        """Copies another's numbers to this one's place; False where they do not fit."""
        ours, theirs = self._tensors(), other._tensors()
        if self.problem.backend == "geomloss" or len(ours) != len(theirs):
            return False
        for mine, new in zip(ours, theirs, strict=True):
            mine.copy_(new)
        return True

    def _tensors(self) -> list[Tensor]:
        return [self.clip_norm, self.expected_batch, self.sigma, *self.problem.tensors()]


class TrialStack:
    """K slots of one structure.

    Args:
        config: a trial of that structure.
        data: the private set, kept on the device.
        performance: device, precision, graphs.
        slots: K ≥ 1.
    """

    def __init__(self, config: TrialConfig, data: LabelledImages, performance: Performance, slots: int = 1) -> None:
        self.device, self.dtype = torch.device(performance.device), DTYPES[performance.precision]
        self.structure, self.slots = structure(config), slots
        self.records, self.num_classes = len(data), data.num_classes
        self.images = data.images.flatten(1).to(self.device)
        self.labels = data.labels.to(self.device)
        self.n, self.r = config.sinkhorn.gen_batch_size, debiasing_rows(config.sinkhorn)
        template = build_generator(config, data.shape, data.num_classes).to(self.device, self.dtype)
        self.generators = StackedGenerator(template, slots)
        self.adam = StackedAdam(self.generators.weights)
        self.trials: list[Trial | None] = [None] * slots
        self.alive = torch.ones(slots, dtype=torch.bool, device=self.device)
        self.numbers: _Numbers | None = None
        self._step = StaticStep(self._pure_step, self.device) if performance.captures else self._pure_step
        self._fixed_shapes = performance.captures or slots > 1

    @property
    def free(self) -> bool:
        return None in self.trials

    def join(self, trial: Trial) -> int:
        if structure(trial.config) != self.structure:
            raise ValueError("a trial of another structure needs another stack")
        slot = self.trials.index(None)
        self.trials[slot] = trial
        trial.noise = trial.noise or fresh_noise(trial.entropy, self.device)
        self.generators.load(slot, trial.state.generator)
        self.adam.moments[:, slot] = trial.state.moments
        self.alive[slot] = True
        self._set_numbers()
        return slot

    def leave(self, slot: int) -> None:
        self.update(slot)
        self.trials[slot] = None

    def update(self, slot: int) -> None:
        trial = self._at(slot)
        self.generators.save(slot, trial.state.generator)
        trial.state.moments = self.adam.moments[:, slot].clone().cpu()

    def finite(self, slot: int) -> bool:
        return self.generators.finite(slot)

    def step(self) -> None:
        self._step(self._draw())
        for trial in self._present():
            trial.state.step += 1

    def _present(self) -> Iterator[Trial]:
        return (trial for trial in self.trials if trial is not None)

    def _at(self, slot: int) -> Trial:
        trial = self.trials[slot]
        if trial is None:
            raise ValueError(f"slot {slot} is empty")
        return trial

    def _set_numbers(self) -> None:
        """Writes the present trials' numbers; in place where they fit, since a recorded step reads them there."""
        some = next(self._present())
        trials = [trial or some for trial in self.trials]
        new = _Numbers.of([trial.config for trial in trials], [trial.plan for trial in trials], self)
        if self.numbers is not None and self.numbers.take(new):
            return
        self.numbers = new
        if isinstance(self._step, StaticStep):
            self._step.forget()

    # -- the step ---------------------------------------------------------------------------------------------------

    def _pure_step(self, inputs: StepInputs) -> None:
        """Generate, ask the mechanism once, back-propagate, update: no random draw, no look at a value."""
        updated = inputs.active & self.alive
        occupied = [trial is not None for trial in self.trials]
        images = self.generators(inputs.latents, inputs.labels, occupied)
        points = images.detach().flatten(2)
        x = Points(points[:, : self.n], inputs.labels[:, : self.n])
        x_tilde = Points(points[:, self.n :], inputs.labels[:, self.n :])
        numbers = self.numbers
        assert numbers is not None  # a trial has joined

        # The single release of the step.
        generated = Generated.of(x, x_tilde, numbers.problem)
        released = sanitize(numbers.mechanism, generated, self._members(inputs), numbers.sigma, lambda _: inputs.noise)

        # Back-propagate the sanitised image gradients; all from here on is post-processing.
        gradient = torch.cat(numbers.mechanism.loss_gradients(generated, released), dim=1)
        weights_gradient = self.generators.backward(images, gradient.to(images.dtype).reshape(images.shape), updated)
        self.adam.step(weights_gradient, inputs.rates, updated)
        self.alive &= torch.isfinite(self.generators.weights).all(1)

    def _members(self, inputs: StepInputs) -> Points:
        rows = inputs.members.flatten()
        images = self.images.index_select(0, rows).reshape(*inputs.members.shape, self.images.shape[1])
        return Points(images, self.labels.index_select(0, rows).reshape(inputs.members.shape), inputs.present)

    # -- what is drawn before it ------------------------------------------------------------------------------------

    def _draw(self) -> StepInputs:
        members, present = self._draw_members()
        public = [self._draw_public(trial) for trial in self.trials]
        return StepInputs(
            latents=self._put(torch.stack([latents for latents, _ in public]).to(self.dtype)),
            labels=self._put(torch.stack([labels for _, labels in public])),
            members=self._put(members),
            present=None if present is None else self._put(present),
            noise=torch.stack([self._draw_noise(slot) for slot in range(self.slots)]),
            rates=self._put(torch.tensor([_rates(trial) for trial in self.trials], dtype=torch.float64)),
            active=self._put(torch.tensor([trial is not None for trial in self.trials])),
        )

    def _put(self, drawn: Tensor) -> Tensor:
        """On the device; from pinned memory, so that a GPU need not be waited for."""
        return drawn if self.device.type == "cpu" else drawn.pin_memory().to(self.device, non_blocking=True)

    def _draw_members(self) -> tuple[Tensor, Tensor | None]:
        """Each trial's private batch, each record with its probability q; padded where the shape has to be fixed."""
        nobody = torch.zeros(0, dtype=torch.int64)
        drawn = [nobody if trial is None else self._members_of(trial) for trial in self.trials]
        if not self._fixed_shapes:
            return drawn[0][None], None
        width = bucket(max(map(len, drawn)))
        members = torch.stack([nn.functional.pad(one, (0, width - len(one))) for one in drawn])
        return members, torch.arange(width) < torch.tensor([len(one) for one in drawn])[:, None]

    def _members_of(self, trial: Trial) -> Tensor:
        """Rows that join, of all N; records that are declared but cannot be read lie behind the last row."""
        rows = poisson_batch(trial.entropy, self.records, trial.plan.sample_rate)
        return rows[rows < self.images.shape[0]]

    def _draw_public(self, trial: Trial | None) -> tuple[Tensor, Tensor]:
        """Latents (n + r, L) and labels (n + r,) of X and X̃ from public randomness; n is a constant, never |S|."""
        rows, dimension = self.n + self.r, self.generators.latent_dim
        if trial is None:
            return torch.zeros(rows, dimension), torch.zeros(rows, dtype=torch.int64)
        labels = _draw_labels(self.n, self.num_classes, trial.config.sinkhorn.labels, trial.state.rng)
        return draw_latents(rows, dimension, trial.state.rng), torch.cat([labels, labels[: self.r]])

    def _draw_noise(self, slot: int) -> Tensor:
        shape = (self.n, self.images.shape[1])
        trial = self.trials[slot]
        if trial is None or trial.noise is None:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)
        return trial.noise(shape)


class ControlStack:
    """The control's one slot: its only step is one release of the class means."""

    def __init__(self, data: LabelledImages) -> None:
        self.data = data
        self.trial: Trial | None = None

    @property
    def free(self) -> bool:
        return self.trial is None

    def join(self, trial: Trial) -> int:
        if not isinstance(trial.state.generator, ClassMean):
            raise ValueError("a trial of another structure needs another stack")
        self.trial = trial
        return 0

    def leave(self, slot: int) -> None:
        self.trial = None

    def update(self, slot: int) -> None:
        """Nothing to do: the trial's own generator is in use."""

    def finite(self, slot: int) -> bool:
        return True  # a clamped release

    def step(self) -> None:
        assert self.trial is not None
        plan, state, data = self.trial.plan, self.trial.state, self.data
        state.generator.means = release_class_means(
            data.images, data.labels, data.num_classes, plan.clip_norm, plan.noise_multiplier, self.trial.entropy
        )
        state.step += 1


def bucket(rows: int) -> int:
    """Width of a padded batch: at most an eighth wider than needed, so that few shapes occur."""
    if rows <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    grain = 2 ** (rows.bit_length() - 4)
    return -(-rows // grain) * grain


def _rates(trial: Trial | None) -> list[float]:
    """Adam's numbers for the step ahead: rate, β₁, β₂, 1 − β₁ᵗ and √(1 − β₂ᵗ)."""
    if trial is None:
        return [0.0, 0.0, 0.0, 1.0, 1.0]
    adam, t = trial.config.optimizer, trial.state.step + 1
    rate = learning_rate(trial.config, trial.state.step, trial.plan.steps)
    return [rate, adam.beta1, adam.beta2, 1 - adam.beta1**t, math.sqrt(1 - adam.beta2**t)]


def _draw_labels(n: int, num_classes: int, kind: str, rng: torch.Generator) -> Tensor:
    if kind == "uniform":
        return torch.randint(num_classes, (n,), generator=rng)
    # Equal counts, up to a remainder that a random order of the classes spreads evenly; shuffled, because
    # debiasing treats the first r rows apart.
    classes = torch.randperm(num_classes, generator=rng).repeat(n // num_classes + 1)[:n]
    return classes[torch.randperm(n, generator=rng)]
