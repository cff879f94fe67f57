"""The one object that derives sampling, noise and the number of steps: nobody else sets σ, q or T."""

import math
from dataclasses import dataclass, replace

from dpsink.config import PrivacyConfig, TrialConfig
from dpsink.errors import InputError
from dpsink.privacy.accounting import epsilon, max_steps, noise_multiplier_for
from dpsink.privacy.budget import BudgetTerms
from dpsink.privacy.questions import MAX_STEPS

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
        score_noise: σ of a score on a private validation split; 0 where the split is public or absent.
        score_releases: scores that may be released.
        score_records: private validation records, public; disjoint from the N.
    """

    mechanism: str
    records: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    target_epsilon: float
    delta: float
    score_noise: float = 0.0
    score_releases: int = 0
    score_records: int = 0

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

    def score_epsilon(self, releases: int) -> float:
        """ε that scores spend on the private validation records, which no training step reads."""
        if not self.private or not self.score_releases:
            return 0.0
        return epsilon(steps=releases, delta=self.delta, sample_rate=1.0, noise_multiplier=self.score_noise)

    def trial_epsilon(self, steps: int, releases: int) -> float:
        """ε of the trial: training and validation records are disjoint, so the larger of the two covers both."""
        return max(self.epsilon(steps), self.score_epsilon(releases))

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

    def score_terms(self, data_fingerprint: str) -> BudgetTerms:
        """The terms of the scores' own ledger: full-batch Gaussian releases on the validation records."""
        return BudgetTerms(
            mechanism="score",
            noise_multiplier=self.score_noise,
            sample_rate=1.0,
            clip_norm=1.0,
            records=self.score_records,
            delta=self.delta,
            target_epsilon=self.target_epsilon,
            steps_allowed=self.score_releases,
            data_fingerprint=data_fingerprint,
        )


def derive_plan(config: TrialConfig, records: int) -> PrivacyPlan:
    """Derives q, σ and T from a trial's settings and the public number of private records.

    Raises:
        InputError: δ ≥ 1/N, a batch larger than the data, a target that allows no step, or not the scores.
    """
    privacy = config.privacy
    _check_delta(privacy, records)
    if config.generator.kind == "class_mean":
        return _with_scores(_control_plan(privacy, records), config)
    if privacy.batch_size > records:
        raise InputError(f"privacy.batch_size={privacy.batch_size} must be at most the {records} private records")
    sample_rate = privacy.batch_size / records
    sigma, steps = _noise_and_steps(privacy, sample_rate)
    plan = PrivacyPlan(
        privacy.mechanism, records, sample_rate, sigma, privacy.clip_norm, steps, privacy.target_epsilon, privacy.delta
    )
    return _with_scores(plan, config)


def _with_scores(plan: PrivacyPlan, config: TrialConfig) -> PrivacyPlan:
    """Adds what scores on a private validation split may spend: one release per evaluation point."""
    noise = config.privacy.score_noise
    if noise is None or not plan.private:
        return plan
    scored = replace(
        plan,
        score_noise=noise,
        score_releases=min(config.evaluation.points, plan.steps),
        score_records=config.data.validation_size,
    )
    if scored.score_epsilon(scored.score_releases) > plan.target_epsilon:
        smallest = noise_multiplier_for(
            target_epsilon=plan.target_epsilon, delta=plan.delta, sample_rate=1.0, steps=scored.score_releases
        )
        raise InputError(
            f"privacy.score_noise={noise:g} spends more than epsilon {plan.target_epsilon:g} on "
            f"{scored.score_releases} scores; choose at least {smallest:.4g}, or fewer evaluation.points"
        )
    return scored


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
    limit = privacy.step_limit
    if limit is not None and limit <= MAX_STEPS:  # asking about the limit alone takes one composition of many
        asked = {"steps": limit, "delta": privacy.delta, "sample_rate": sample_rate, "noise_multiplier": sigma}
        if epsilon(**asked) <= privacy.target_epsilon:
            return limit
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
    return min(steps, limit or steps)
