"""Audits: ε as an attacker measures it who knows all but one record, to be held against the ε that is claimed.

An audit attacks the running code, so it finds what a proof does not see: a forgotten factor, noise that is not
drawn, a quantity that was thought public. What it finds is a lower bound of ε. A bound above the claim shows that the
guarantee is broken; a bound below it does not show that the guarantee holds.

`audit_step` attacks one release many times, on pairs of batches that differ in a worst-case record, a canary. It is
fast, and tight: the pairs reach the full sensitivity. `audit_trial` attacks one whole run of `engine.TrialStack` that
trained on hundreds of canaries, each put in or left out by a coin. It sees the sampling, the composition and the
training loop too, and its bound is loose.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from dp_accounting import get_epsilon_gaussian
from scipy.linalg import hadamard
from scipy.stats import beta, binom, norm
from torch import Tensor, nn

from dpsink.config import ConvCondConfig, Performance, PrivacyConfig, SinkhornConfig, TrialConfig
from dpsink.data import LabelledImages, to_unit
from dpsink.datasets import DATASETS
from dpsink.engine import Trial, TrialStack, build_mechanism, initial_state
from dpsink.entropy import Entropy, OsEntropy
from dpsink.privacy.accounting import epsilon
from dpsink.privacy.mechanism import BatchMechanism, Generated, Mechanism, RecordMechanism, sanitize
from dpsink.privacy.noise import Noise, fresh_noise
from dpsink.privacy.plan import PrivacyPlan
from dpsink.privacy.sampling import poisson_batch
from dpsink.sinkhorn import Points, record_terms

Kind = Literal["record", "batch"]
Release = Callable[[Mechanism, Generated, Points, float, Noise], Tensor | None]

DELTA = 1e-5
LIMITS = (
    "An audit can show that a guarantee is broken, not that one holds: it tries one attack on inputs of its own, and "
    "its bound lies below the true epsilon."
)

STEP_NOISE_MULTIPLIER = 1.1
STEP_DRAWS = 200_000  # releases on each of the two batches
STEP_FALSE_ALARM = 1e-6  # probability that a right mechanism is called broken, over all tests of an audit
STEP_CLIP_NORM = 0.05  # below the norm of every term of the pairs: clipping makes them as large as they can be
STEP_SINKHORN = SinkhornConfig(cost="l2", blur=0.002)
_TESTS = 3  # per pair: the Gaussian estimate, the threshold bound, the size of the noise
_CHUNK = 20_000  # releases at once, for memory

TRIAL_NOISE_MULTIPLIER = 6.0
TRIAL_STEPS = 40
TRIAL_SAMPLE_RATE = 0.5
TRIAL_CONFIDENCE = 0.99
_TRIAL_RECORDS = 200  # real digits beside the canaries
_TRIAL_CLIP_NORM = 4.0  # every canary's term is longer, so each is clipped and counts in full
_GUESSED = 0.25  # part of the canaries that is guessed; fixed beforehand, for a bound picked afterwards is none
_SIDE, _CLASSES = 8, 10  # of digits


# ---------------------------------------------------------------------------------------------------------------------
# One step, many times.


class NeighbouringPair(NamedTuple):
    """A public side, a private batch, and the same batch with the canary."""

    name: str
    generated: Generated
    without: Points
    with_canary: Points


@dataclass(frozen=True)
class StepAudit:
    """What the attack on one unsampled release found, on the pair where it found most.

    Attributes:
        mechanism: name of the mechanism's class.
        pair: name of the neighbouring pair.
        noise_multiplier: σ that is claimed.
        delta: δ of all figures.
        draws: releases on each batch.
        claimed: ε of one release without sampling, by the accountant.
        estimate: ε of the Gaussian with the measured signal-to-noise ratio.
        estimate_low: the estimate less its statistical error; above `claimed` only with the false-alarm probability.
        bound: ε that the error rates of the best threshold prove, whatever the noise's distribution.
        false_alarm: probability that a right mechanism is called broken.
        event: what tells the batches apart without any statistics, None if nothing does.
    """

    mechanism: str
    pair: str
    noise_multiplier: float
    delta: float
    draws: int
    claimed: float
    estimate: float
    estimate_low: float
    bound: float
    false_alarm: float
    event: str | None = None

    @property
    def violated(self) -> bool:
        """Whether the claim is refuted."""
        return self.event is not None or max(self.estimate_low, self.bound) > self.claimed

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if self.event is not None:
            return f"VIOLATED: {self.event} (pair '{self.pair}')."
        finding, relation = ("VIOLATED", "above") if self.violated else ("No violation found", "not above")
        return (
            f"{finding}: epsilon is at least {max(self.estimate_low, self.bound):.3g} (best estimate "
            f"{self.estimate:.3g}), which is {relation} the claimed {self.claimed:.3g}; a right mechanism is called "
            f"broken with probability {self.false_alarm:g} at most."
        )


def worst_case_pairs(sinkhorn: SinkhornConfig) -> list[NeighbouringPair]:
    """Neighbouring batches on which a mistake shows most.

    `flip`: one record added to the empty batch turns the whole clipped gradient around, by 2C. `chain`: generated
    points and records alternate on a line. Any coupling that depends on the other records is pushed along the whole
    line when the canary arrives at its end; with public potentials nothing moves but the canary's own column.
    """
    flip = Generated.of(_points([0.0, 0.0]), _points([1.0, 1.0]), sinkhorn)
    line = [-0.9 + 0.1 * k for k in range(12)]
    between, canary = [x + 0.05 for x in line[:-1]], [1.0]
    chain = Generated.of(_points(line), _points([]), sinkhorn)
    return [
        NeighbouringPair("flip", flip, _points([]), _points(canary)),
        NeighbouringPair("chain", chain, _points(between), _points(between + canary)),
    ]


def audit_mechanism(kind: Kind) -> Mechanism:
    """The mechanism of that name at the size of the pairs."""
    if kind == "batch":
        return BatchMechanism(STEP_CLIP_NORM, STEP_SINKHORN)
    return RecordMechanism(STEP_CLIP_NORM, STEP_SINKHORN, expected_batch=1.0)


def audit_step(
    mechanism: Mechanism,
    *,
    noise_multiplier: float = STEP_NOISE_MULTIPLIER,
    delta: float = DELTA,
    draws: int = STEP_DRAWS,
    release: Release = sanitize,
    entropy: Entropy | None = None,
) -> StepAudit:
    """Attacks one release, without sampling, on each of the worst-case pairs.

    The query is a function of the batch and of public values, so it is computed once and only the noise is redrawn,
    through `release` itself. The attacker knows both batches and projects on the direction in which their answers
    differ, which is the optimal test for Gaussian noise.

    Args:
        mechanism: for images of one pixel; clips below the norms of the pairs, as `audit_mechanism` does.
        noise_multiplier: σ that is claimed, ≥ 0.1.
        delta: δ of the claim, in (0, 1).
        draws: releases on each batch, at least 1,000.
        release: what is audited.
        entropy: source of the noise; the operating system's by default.

    Returns:
        The pair that says most against the mechanism.

    Raises:
        InputError: σ or δ outside its range.
    """
    claimed = epsilon(steps=1, delta=delta, sample_rate=1.0, noise_multiplier=noise_multiplier)
    attack = partial(_Attack, release, mechanism, noise_multiplier, entropy or OsEntropy(), draws)
    pairs = worst_case_pairs(STEP_SINKHORN)
    level = STEP_FALSE_ALARM / (_TESTS * len(pairs))
    found = [_judge(attack(pair), claimed, delta, level) for pair in pairs]
    return max(found, key=lambda audit: (audit.violated, audit.estimate))


@dataclass(frozen=True)
class _Attack:
    """A release, and the pair that it is asked about."""

    release: Release
    mechanism: Mechanism
    noise_multiplier: float
    entropy: Entropy
    draws: int
    pair: NeighbouringPair

    def ask(self, batch: Points, times: int | None = None) -> Tensor | None:
        """One answer (n, d) as training asks for it, or `times` independent ones (times, n, d)."""
        mechanism = self.mechanism if times is None else _Repeated(self.mechanism, times)
        return self.release(mechanism, self.pair.generated, batch, self.noise_multiplier, fresh_noise(self.entropy))

    def direction(self) -> Tensor:
        """Unit vector from the answer without the canary to the one with it, (n, d)."""
        public = self.pair.generated
        moved = self.mechanism.query(public, self.pair.with_canary) - self.mechanism.query(public, self.pair.without)
        return moved / moved.norm()

    def scores(self, batch: Points) -> np.ndarray:
        """The answers' components in the direction of the difference, float64, (draws,)."""
        direction = self.direction()
        sizes = [min(_CHUNK, self.draws - start) for start in range(0, self.draws, _CHUNK)]
        answers = (self.ask(batch, size) for size in sizes)
        return np.concatenate([(answer * direction).sum((1, 2)).numpy() for answer in answers if answer is not None])

    def obvious(self) -> str | None:
        """What tells the batches apart with certainty; None if nothing does."""
        once, again, other = (
            self.ask(batch) for batch in (self.pair.without, self.pair.without, self.pair.with_canary)
        )
        if once is None or again is None or other is None:
            return "one of the batches gets no answer"
        if once.shape != other.shape:
            return f"the answers have different shapes, {tuple(once.shape)} and {tuple(other.shape)}"
        if torch.equal(once, again):
            return "a batch gets the same answer twice, without fresh noise"
        return None


@dataclass(frozen=True)
class _Repeated:
    """A mechanism whose answer is repeated, so that one release draws the noise of many."""

    mechanism: Mechanism
    times: int

    @property
    def sensitivity(self) -> float | Tensor:
        return self.mechanism.sensitivity

    def query(self, generated: Generated, real: Points) -> Tensor:
        return self.mechanism.query(generated, real).expand(self.times, -1, -1)

    def loss_gradients(self, generated: Generated, released: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("an audit looks at the release only")


def _judge(attack: _Attack, claimed: float, delta: float, level: float) -> StepAudit:
    told = partial(
        StepAudit, type(attack.mechanism).__name__, attack.pair.name, attack.noise_multiplier, delta, attack.draws,
        claimed, false_alarm=STEP_FALSE_ALARM,
    )  # fmt: skip
    if event := attack.obvious():
        return told(estimate=math.inf, estimate_low=math.inf, bound=math.inf, event=event)
    without, with_canary = attack.scores(attack.pair.without), attack.scores(attack.pair.with_canary)
    ratio, error = signal_to_noise(without, with_canary)
    return told(
        estimate=gaussian_epsilon(ratio, delta),
        estimate_low=gaussian_epsilon(ratio - float(norm.isf(level)) * error, delta),
        bound=threshold_bound(without, with_canary, delta=delta, false_alarm=level),
        event=_unequal_noise(without, with_canary, level),
    )


def signal_to_noise(without: np.ndarray, with_canary: np.ndarray) -> tuple[float, float]:
    """Distance of two samples' means over their standard deviation, and the standard error of that ratio.

    Args:
        without, with_canary: float64, (draws,) each, normal with one variance.
    """
    variance = (without.var(ddof=1) + with_canary.var(ddof=1)) / 2
    ratio = abs(float(with_canary.mean() - without.mean())) / math.sqrt(variance)
    return ratio, math.sqrt(2 / len(without) + ratio**2 / (4 * len(without)))


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """ε at δ of telling N(0, 1) from N(ratio, 1): exact (Balle & Wang 2018, theorem 8); 0 for ratio ≤ 0."""
    return float(get_epsilon_gaussian(1 / ratio, delta)) if ratio > 1e-6 else 0.0


def threshold_bound(without: np.ndarray, with_canary: np.ndarray, *, delta: float, false_alarm: float) -> float:
    """Lower bound of ε from the error rates of a threshold, for scores of any distribution.

    (ε, δ)-DP bounds every event E both ways, P'(E) ≤ e^ε P(E) + δ. The events are score > t and score < t. The first
    half of the draws chooses t, the second half counts; both rates are bounded by Clopper & Pearson.

    Args:
        without, with_canary: scores, (draws,) each.
        false_alarm: probability with which the bound may exceed the true ε.

    Returns:
        ε ≥ 0.
    """
    level = false_alarm / 4  # two directions, two rates
    above = _one_sided_bound(without, with_canary, delta, level)
    below = _one_sided_bound(-with_canary, -without, delta, level)
    return max(0.0, above, below)


def clopper_pearson(successes: np.ndarray, trials: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact limits of a binomial rate, each of which fails with probability `level` at most.

    Args:
        successes: int64, any shape.

    Returns:
        Lower and upper limits, of the same shape.
    """
    low = np.where(successes == 0, 0.0, beta.ppf(level, np.maximum(successes, 1), trials - successes + 1))
    high = np.where(successes == trials, 1.0, beta.isf(level, successes + 1, np.maximum(trials - successes, 1)))
    return low, high


def _one_sided_bound(low: np.ndarray, high: np.ndarray, delta: float, level: float) -> float:
    """The bound from events score > t, which are likelier under `high`."""
    half = len(low) // 2
    candidates = np.quantile(np.concatenate([low[:half], high[:half]]), np.linspace(0.5, 1, 2000, endpoint=False))
    chosen = candidates[np.argmax(_bounds_at(candidates, low[:half], high[:half], delta, level))]
    return float(_bounds_at(np.array([chosen]), low[half:], high[half:], delta, level)[0])


def _bounds_at(thresholds: np.ndarray, low: np.ndarray, high: np.ndarray, delta: float, level: float) -> np.ndarray:
    """ln((P'(E) − δ) / P(E)) at the limits of both rates, for E = score > t; −inf where that says nothing."""
    false_positives, true_positives = (
        len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right") for scores in (low, high)
    )
    _, likely = clopper_pearson(false_positives, len(low), level)
    certain, _ = clopper_pearson(true_positives, len(high), level)
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(certain - delta, 0)) - np.log(likely)


def _unequal_noise(without: np.ndarray, with_canary: np.ndarray, level: float) -> str | None:
    """The Gaussian's guarantee needs one noise for all batches: the variances may differ by chance only."""
    log_ratio = math.log(with_canary.var(ddof=1) / without.var(ddof=1))
    error = 2 / math.sqrt(len(without))  # standard error of the log of a ratio of two normal samples' variances
    if abs(log_ratio) <= float(norm.isf(level / 2)) * error:
        return None
    return f"the noise has {math.exp(log_ratio / 2):.3g} times the size when the canary is there"


def _points(values: list[float]) -> Points:
    """Images of one pixel, all of one class."""
    return Points(torch.tensor(values, dtype=torch.float32).reshape(-1, 1), torch.zeros(len(values), dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# One run, many canaries.


@dataclass(frozen=True)
class TrialAudit:
    """What the attack on one whole trial found.

    Attributes:
        mechanism: `record` or `batch`.
        noise_multiplier: σ that is claimed.
        sample_rate: q.
        steps: T.
        delta: δ of both figures.
        claimed: ε of the trial, by the accountant.
        bound: lower bound of ε.
        confidence: probability with which the bound is one.
        canaries: m, each put in with probability 1/2.
        guesses: r, how many of them were guessed.
        correct: v, how many guesses were right.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    claimed: float
    bound: float
    confidence: float
    canaries: int
    guesses: int
    correct: int

    @property
    def violated(self) -> bool:
        """Whether the claim is refuted."""
        return self.bound > self.claimed

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        finding, relation = ("VIOLATED", "above") if self.violated else ("No violation found", "not above")
        return (
            f"{finding}: {self.correct} of {self.guesses} guesses were "
            f"right, so epsilon is at least {self.bound:.3g} (confidence {self.confidence:.1%}), which is {relation} "
            f"the claimed {self.claimed:.3g}."
        )


def audit_trial(
    kind: Kind,
    *,
    noise_multiplier: float = TRIAL_NOISE_MULTIPLIER,
    delta: float = DELTA,
    steps: int = TRIAL_STEPS,
    sample_rate: float = TRIAL_SAMPLE_RATE,
    confidence: float = TRIAL_CONFIDENCE,
    entropy: Entropy | None = None,
) -> TrialAudit:
    """Trains once on digits and canaries with the training step, then guesses which canaries were there.

    The attacker sees what the guarantee covers: every step's public side and noisy gradient; and knows all records
    but the coins. Per step it adds up, for each canary, the inner product of the gradient, less what all others
    contribute on average, with the canary's own term. It guesses "in" for the highest sums, "out" for the lowest, and
    abstains in between.

    Args:
        kind: the mechanism. Against `batch` the attack is weak: a canary is one of hundreds under one clip.
        noise_multiplier: σ, ≥ 0.1.
        delta: δ in (0, 1); far below 1 / (2 · canaries), or the bound is 0.
        steps: T ≥ 1.
        sample_rate: q in (0, 1].
        confidence: in (0, 1).
        entropy: of coins, membership and noise; the operating system's by default.

    Raises:
        InputError: a privacy parameter outside its range.
    """
    source = entropy or OsEntropy()
    claimed = epsilon(steps=steps, delta=delta, sample_rate=sample_rate, noise_multiplier=noise_multiplier)
    records, canaries = _real_records(), hadamard_canaries()
    included = torch.zeros(len(canaries), dtype=torch.bool)
    included[poisson_batch(source, len(canaries), 0.5)] = True
    # N must not tell the coins: it is public, and only scales the gradient.
    size = len(records) + len(canaries) // 2
    plan = PrivacyPlan(kind, size, sample_rate, noise_multiplier, _TRIAL_CLIP_NORM, steps, claimed, delta)
    private = _joined(records, canaries.take(included))
    scores = _train_and_listen(plan, private, _Suspects(_as_points(records), _as_points(canaries)), source)
    guesses, correct = guess(scores, included)
    bound = one_run_bound(len(canaries), guesses, correct, delta=delta, confidence=confidence)
    return TrialAudit(
        kind, noise_multiplier, sample_rate, steps, delta, claimed, bound, confidence, len(canaries), guesses, correct
    )


def one_run_p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """How likely an (ε, δ)-DP run allows so many right guesses; an upper bound.

    Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2. Of m canaries each is
    put in with probability 1/2, independently. Under ε-DP every guess is right with probability at most
    q = e^ε / (1 + e^ε), whatever became of the other guesses, as if the coins had passed through randomised response:
    the number of right ones is below W ~ Binomial(r, q) in distribution. δ adds F right guesses at most, F depending on
    the run, with E[F] ≤ 2mδ. V ≥ v then needs W ≥ v − F, and P[v − i ≤ W < v] ≤ i · max_i P[v − i ≤ W < v] / i, so

        P[V ≥ v] ≤ P[W ≥ v] + 2mδ · max_{i = 1..m} P[v − i ≤ W < v] / i.

    Args:
        canaries: m ≥ r.
        guesses: r ≥ v; the auditor abstains on the other canaries, and r is fixed in advance.
        correct: v ≥ 0.
        epsilon: ε ≥ 0.
        delta: δ in [0, 1].

    Returns:
        A probability in [0, 1].
    """
    rate = 1 / (1 + math.exp(-epsilon))
    fewer = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))  # P[v − i ≤ W < v] for i = 1..v
    worst = float((fewer / np.arange(1, correct + 1)).max(initial=0.0))  # i > v only divides by more
    return min(1.0, float(binom.sf(correct - 1, guesses, rate)) + 2 * canaries * delta * worst)


def one_run_bound(canaries: int, guesses: int, correct: int, *, delta: float, confidence: float) -> float:
    """The largest ε ≥ 0 that so many right guesses refute: a lower bound, with that confidence.

    Args:
        canaries, guesses, correct, delta: see `one_run_p_value`.
        confidence: in (0, 1).
    """

    def refuted(epsilon: float) -> bool:
        return one_run_p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) < 1 - confidence

    low, high = 0.0, 1.0
    while refuted(high):  # ends: at large ε right guesses are no surprise
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guess(scores: Tensor, included: Tensor) -> tuple[int, int]:
    """Number of guesses and of right ones: "in" for the highest scores, "out" for as many of the lowest.

    Args:
        scores: float64, (m,).
        included: bool, (m,).
    """
    each = int(_GUESSED * len(scores) / 2)
    order = torch.argsort(scores)
    return 2 * each, int(included[order[-each:]].sum() + (~included[order[:each]]).sum())


def hadamard_canaries() -> LabelledImages:
    """630 canaries: each class with each black-and-white pattern of a Hadamard matrix but the white image.

    Patterns of one class are orthogonal and those of other classes meet other generated points, so no canary's term
    hides another's; and no real digit looks like one.
    """
    rows = hadamard(_SIDE**2)[1:]
    patterns = torch.from_numpy(np.where(rows > 0, 255, 0).astype(np.uint8)).reshape(-1, 1, _SIDE, _SIDE)
    labels = torch.arange(_CLASSES).repeat_interleave(len(patterns))
    return LabelledImages(patterns.repeat(_CLASSES, 1, 1, 1), labels, _CLASSES)


@dataclass(frozen=True)
class _Suspects:
    """What the attacker knows of the data.

    Attributes:
        records: the real records, all of them in training.
        canaries: those that may be.
    """

    records: Points
    canaries: Points

    def expected_answer(self, mechanism: Mechanism, generated: Generated, plan: PrivacyPlan) -> Tensor:
        """What the query would answer if every coin fell half-way, (n, d)."""
        if isinstance(mechanism, RecordMechanism):  # additive, so the mean is exact
            ask = partial(mechanism.query, generated)
            return plan.sample_rate * (ask(self.records) + ask(self.canaries) / 2)
        images = torch.cat([self.records.images, self.canaries.images])
        labels = torch.cat([self.records.labels, self.canaries.labels])
        return mechanism.query(generated, Points(images, labels))

    def evidence(self, residual: Tensor, generated: Generated, config: SinkhornConfig) -> Tensor:
        """⟨residual, term⟩ for each canary's own clipped term, up to a factor: float64, (m,).

        The term is P_ij · 2(x_i − y_j). Only −y_j is the canary's alone, x_i is common to all of a class.
        """
        terms = record_terms(generated.x, self.canaries, config)
        return -((terms.coupling.T @ residual) * self.canaries.images).sum(1)


class _Wiretap:
    """Records the generated images, labels and the gradient of the last step, from outside of the engine."""

    def __init__(self, generator: nn.Module) -> None:
        self.images, self.labels, self.gradient = (torch.empty(0) for _ in range(3))
        generator.register_forward_hook(self._forward)

    def _forward(self, _generator: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.images, self.labels = output.detach().flatten(1), inputs[1]
        output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.gradient = gradient.flatten(1).double()

    def generated(self, config: SinkhornConfig) -> Generated:
        """The public side of the last step."""
        n = config.gen_batch_size
        x, x_tilde = (Points(self.images[rows], self.labels[rows]) for rows in (slice(n), slice(n, None)))
        return Generated.of(x, x_tilde, config)


def _train_and_listen(plan: PrivacyPlan, private: LabelledImages, suspects: _Suspects, entropy: Entropy) -> Tensor:
    """The canaries' scores after a whole training run, float64, (m,)."""
    config = _trial_config(plan)
    stack, mechanism = TrialStack(config, private, Performance()), build_mechanism(plan, config.sinkhorn)
    stack.join(Trial(config, plan, initial_state(config, private), entropy))
    wiretap = _Wiretap(stack.generators.modules[0])
    scores = torch.zeros(len(suspects.canaries.images), dtype=torch.float64)
    for _ in range(plan.steps):
        stack.step()
        generated = wiretap.generated(config.sinkhorn)
        expected = suspects.expected_answer(mechanism, generated, plan)
        gradient = wiretap.gradient[: config.sinkhorn.gen_batch_size]
        residual = gradient - mechanism.loss_gradients(generated, expected)[0]
        scores += suspects.evidence(residual, generated, config.sinkhorn)
    return scores


def _trial_config(plan: PrivacyPlan) -> TrialConfig:
    """A small generator, and one generated point for each class."""
    return TrialConfig(
        generator=ConvCondConfig(hidden_dim=4),
        sinkhorn=SinkhornConfig(cost="l2", gen_batch_size=_CLASSES),
        privacy=PrivacyConfig(noise_multiplier=plan.noise_multiplier),
    )


def _real_records() -> LabelledImages:
    # Without `load_dataset`: an audit needs no fingerprint, and so no key.
    digits, _ = DATASETS["digits"].load(Path(), False)
    return digits.take(torch.arange(_TRIAL_RECORDS))


def _joined(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    images, labels = torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels])
    return LabelledImages(images, labels, first.num_classes)


def _as_points(data: LabelledImages) -> Points:
    return Points(to_unit(data.images).flatten(1), data.labels)
