"""The one object that derives sampling, noise and the number of steps: nobody else sets σ, q or T."""

import math
from dataclasses import dataclass

from dpsink.config import PrivacyConfig, TrialConfig
from dpsink.errors import InputError
from dpsink.privacy.accounting import epsilon, epsilon_curve, max_steps, noise_multiplier_for
from dpsink.privacy.budget import BudgetTerms

NON_PRIVATE = "NON-PRIVATE"


@dataclass(frozen=True)
class PrivacyPlan:
    """What a trial may do, fixed before the first private record is read.

    Attributes:
        mechanism: `record`, `batch`, or `class_mean` (the control's single release).
        records: N, public.
        sample_rate: q, the probability with which each record joins a step.
        noise_multiplier: σ, relative to the sensitivity; 0 only without privacy.
        clip_norm: C, c or R.
        steps: T, the most steps that may ever be charged.
        target_epsilon: the bound; inf without privacy.
        delta: of the (ε, δ) guarantee.
    """

    mechanism: str
    records: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    target_epsilon: float
    delta: float

    @property
    def private(self) -> bool:
        return math.isfinite(self.target_epsilon)

    def epsilon(self, steps: int) -> float:
        """ε spent by that many charged steps at the plan's δ (PLD); inf without privacy."""
        if not self.private:
            return math.inf
        return epsilon(
            steps=steps, delta=self.delta, sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier
        )

    def epsilons(self, steps: list[int]) -> list[float]:
        """`epsilon` for several step counts at the price of one."""
        if not self.private:
            return [math.inf] * len(steps)
        return epsilon_curve(
            steps=steps, delta=self.delta, sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier
        )

    def terms(self, data_fingerprint: str) -> BudgetTerms:
        """What a resumed trial must agree on with its ledger."""
        return BudgetTerms(
            mechanism=self.mechanism,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            clip_norm=self.clip_norm,
            records=self.records,
            delta=self.delta,
            target_epsilon=self.target_epsilon,
            steps_allowed=self.steps,
            data_fingerprint=data_fingerprint,
        )


def derive_plan(config: TrialConfig, records: int) -> PrivacyPlan:
    """Derives q, σ and T from a trial's settings and the public number of private records.

    Raises:
        InputError: δ ≥ 1/N, a batch larger than the data, a target that allows no step.
    """
    privacy = config.privacy
    _check_delta(privacy, records)
    if config.generator.kind == "class_mean":
        return _control_plan(privacy, records)
    if privacy.batch_size > records:
        raise InputError(f"privacy.batch_size={privacy.batch_size} must be at most the {records} private records")
    sample_rate = privacy.batch_size / records
    sigma, steps = _noise_and_steps(privacy, sample_rate)
    return PrivacyPlan(
        privacy.mechanism, records, sample_rate, sigma, privacy.clip_norm, steps, privacy.target_epsilon,
        privacy.delta,
    )  # fmt: skip


def delta_warning(config: TrialConfig, records: int) -> str | None:
    """A line for the log when δ is legal but weak."""
    delta = config.privacy.delta
    if not config.privacy.private or delta <= 1 / (10 * records):
        return None
    return f"privacy.delta={delta:g} is above 1/(10·N) = {1 / (10 * records):.3g}: a weak guarantee"


def _check_delta(privacy: PrivacyConfig, records: int) -> None:
    if privacy.private and privacy.delta >= 1 / records:
        raise InputError(
            f"privacy.delta={privacy.delta:g} must be below 1/N = {1 / records:.3g} (N = {records} private "
            f"records); choose {0.1 / records:.0e} or less"
        )


def _control_plan(privacy: PrivacyConfig, records: int) -> PrivacyPlan:
    """One Gaussian release of the whole data set: q = 1, T = 1."""
    sigma = 0.0
    if privacy.private:
        sigma = noise_multiplier_for(
            target_epsilon=privacy.target_epsilon, delta=privacy.delta, sample_rate=1.0, steps=1
        )
    return PrivacyPlan("class_mean", records, 1.0, sigma, privacy.clip_norm, 1, privacy.target_epsilon, privacy.delta)


def _noise_and_steps(privacy: PrivacyConfig, sample_rate: float) -> tuple[float, int]:
    if not privacy.private:
        assert privacy.steps is not None  # the config insists
        return privacy.noise_multiplier or 0.0, privacy.steps
    if privacy.steps is not None:
        sigma = noise_multiplier_for(
            target_epsilon=privacy.target_epsilon, delta=privacy.delta, sample_rate=sample_rate, steps=privacy.steps
        )
        return sigma, privacy.steps
    assert privacy.noise_multiplier is not None  # the config insists
    return privacy.noise_multiplier, _affordable_steps(privacy, privacy.noise_multiplier, sample_rate)


def _affordable_steps(privacy: PrivacyConfig, sigma: float, sample_rate: float) -> int:
    steps = max_steps(
        target_epsilon=privacy.target_epsilon, delta=privacy.delta, sample_rate=sample_rate, noise_multiplier=sigma
    )
    if steps == 0:
        smallest = noise_multiplier_for(
            target_epsilon=privacy.target_epsilon, delta=privacy.delta, sample_rate=sample_rate, steps=1
        )
        raise InputError(
            f"privacy.noise_multiplier={sigma:g} allows no step within epsilon {privacy.target_epsilon:g} at sample "
            f"rate {sample_rate:.4g}; choose at least {smallest:.4g}"
        )
    return min(steps, privacy.step_limit or steps)
