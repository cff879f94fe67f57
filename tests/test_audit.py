"""Audits: right mechanisms pass, broken ones are found, and the bounds are those of the literature."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpsink import console
from dpsink.privacy import audit
from dpsink.privacy.audit import (
    STEP_CLIP_NORM,
    STEP_SINKHORN,
    Kind,
    audit_mechanism,
    audit_step,
    audit_trial,
    clopper_pearson,
    gaussian_epsilon,
    guess,
    hadamard_canaries,
    one_run_bound,
    one_run_p_value,
    signal_to_noise,
    threshold_bound,
    worst_case_pairs,
)
from dpsink.privacy.mechanism import BatchMechanism, Generated, Mechanism, RecordMechanism, sanitize
from dpsink.privacy.noise import Noise
from dpsink.sinkhorn import Points, annealing_schedule, cost_gradient, pairwise_cost, potentials, record_terms

KINDS: tuple[Kind, ...] = ("record", "batch")
FEW = 50_000  # draws that a factor of 2 needs


class SensitivityC(BatchMechanism):
    """Broken: the factor 2 is forgotten."""

    @property
    def sensitivity(self) -> float | Tensor:
        return self.clip_norm


class PrivatePotentials(RecordMechanism):
    """Broken: the potential is that of the private batch, so a record moves the columns of all others."""

    def query(self, generated: Generated, real: Points) -> Tensor:
        if not len(real.images):
            return super().query(generated, real)
        schedule = annealing_schedule(1, self.sinkhorn)
        f = potentials(pairwise_cost(generated.x, real, self.sinkhorn), schedule)[0][:, 0]
        coupling, norms = record_terms(generated.x, real, self.sinkhorn, f)
        weights = coupling * (self.clip_norm / norms).clamp_max(1)
        return cost_gradient(weights, generated.x, real, self.sinkhorn).double()


def half_sigma(mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise) -> Tensor:
    """Broken: half of the noise that is claimed."""
    return sanitize(mechanism, generated, real, sigma / 2, noise)


def silent_when_empty(
    mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise
) -> Tensor | None:
    """Broken: an empty batch is skipped."""
    return sanitize(mechanism, generated, real, sigma, noise) if len(real.images) else None


def bare_when_empty(mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise) -> Tensor:
    """Broken: an empty batch takes its step without noise."""
    return sanitize(mechanism, generated, real, sigma if len(real.images) else 0.0, noise)


def quieter_when_empty(mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise) -> Tensor:
    """Broken: the noise depends on the batch."""
    return sanitize(mechanism, generated, real, sigma if len(real.images) else sigma * 0.9, noise)


def longer_with_more(mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise) -> Tensor:
    """Broken: the shape of the answer tells the size of the batch."""
    answer = sanitize(mechanism, generated, real, sigma, noise)
    return torch.cat([answer, answer[..., :1, :].expand(len(real.images), -1)])


# --- One step.


@pytest.mark.parametrize("kind", KINDS)
def test_right_mechanism_passes_the_step_audit(kind: Kind) -> None:
    found = audit_step(audit_mechanism(kind))
    assert not found.violated, found.verdict


@pytest.mark.parametrize("kind", KINDS)
def test_step_audit_is_tight(kind: Kind) -> None:
    """The pairs reach the full sensitivity."""
    found = audit_step(audit_mechanism(kind))
    assert found.claimed == pytest.approx(3.921, abs=1e-3)
    assert found.estimate == pytest.approx(found.claimed, rel=0.03)


def test_five_percent_less_noise_is_found() -> None:
    def less(mechanism: Mechanism, generated: Generated, real: Points, sigma: float, noise: Noise) -> Tensor:
        return sanitize(mechanism, generated, real, 0.95 * sigma, noise)

    assert audit_step(audit_mechanism("record"), release=less).violated


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_noise_is_found(kind: Kind) -> None:
    found = audit_step(audit_mechanism(kind), draws=FEW, release=half_sigma)
    assert found.violated
    assert found.estimate == pytest.approx(8.9, rel=0.05)


def test_sensitivity_without_the_factor_2_is_found() -> None:
    found = audit_step(SensitivityC(STEP_CLIP_NORM, STEP_SINKHORN), draws=FEW)
    assert found.violated
    assert found.estimate == pytest.approx(8.9, rel=0.05)


def test_potentials_of_the_private_batch_are_found() -> None:
    found = audit_step(PrivatePotentials(STEP_CLIP_NORM, STEP_SINKHORN, expected_batch=1.0), draws=FEW)
    assert (found.violated, found.pair) == (True, "chain")
    assert found.estimate_low > 2 * found.claimed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("release", "event"),
    [
        (silent_when_empty, "no answer"),
        (bare_when_empty, "same answer twice"),
        (longer_with_more, "different shapes"),
        (quieter_when_empty, "times the size"),
    ],
    ids=["skipped", "without noise", "shape", "less noise"],
)
def test_empty_batch_that_is_treated_apart_is_found(kind: Kind, release: Any, event: str) -> None:
    found = audit_step(audit_mechanism(kind), draws=FEW, release=release)
    assert found.violated
    assert event in str(found.event)


def test_threshold_bound_alone_finds_half_the_noise() -> None:
    """Without the assumption that the noise is Gaussian."""
    found = audit_step(audit_mechanism("batch"), release=half_sigma)
    assert found.bound > found.claimed


@pytest.mark.parametrize("kind", KINDS)
def test_worst_case_pairs_reach_the_sensitivity(kind: Kind) -> None:
    mechanism, moved = audit_mechanism(kind), []
    for pair in worst_case_pairs(STEP_SINKHORN):
        difference = mechanism.query(pair.generated, pair.with_canary) - mechanism.query(pair.generated, pair.without)
        moved.append(float(difference.norm()))
    assert max(moved) == pytest.approx(mechanism.sensitivity, rel=2e-4)


def test_worst_case_pairs_differ_by_one_record() -> None:
    for pair in worst_case_pairs(STEP_SINKHORN):
        assert len(pair.with_canary.images) == len(pair.without.images) + 1
        assert torch.equal(pair.with_canary.images[:-1], pair.without.images)


def test_gaussian_epsilon_is_the_known_one() -> None:
    assert gaussian_epsilon(1 / 1.1, 1e-5) == pytest.approx(3.92125, abs=1e-5)
    assert gaussian_epsilon(2 / 1.1, 1e-5) == pytest.approx(8.89523, abs=1e-5)


@pytest.mark.parametrize("ratio", [0.0, -0.5])
def test_gaussian_epsilon_of_no_signal_is_zero(ratio: float) -> None:
    assert gaussian_epsilon(ratio, 1e-5) == 0.0


def test_signal_to_noise_errs_by_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    pulls = []
    for _ in range(2_000):
        ratio, error = signal_to_noise(rng.normal(0, 2, 500), rng.normal(3, 2, 500))
        pulls.append((ratio - 1.5) / error)
    assert np.std(pulls) == pytest.approx(1, rel=0.08)  # 5 standard errors
    assert abs(np.mean(pulls)) < 0.12


def test_clopper_pearson_limits_are_the_known_ones() -> None:
    """0 of n: 1 − level^(1/n) ("rule of three"); n of n: its mirror image."""
    low, high = clopper_pearson(np.array([0, 10]), 10, 0.05)
    np.testing.assert_allclose([low[0], high[1]], [0, 1])
    np.testing.assert_allclose([high[0], low[1]], [1 - 0.05**0.1, 0.05**0.1])


def test_threshold_bound_stays_below_the_true_epsilon_of_randomised_response() -> None:
    """Scores 0 and 1, kept with probability e^ε / (1 + e^ε), are ε-DP and no more: the bound is just below."""
    rng, kept = np.random.default_rng(1), 1 / (1 + math.exp(-1.0))
    bounds = []
    for _ in range(40):
        scores = rng.random(4_000) + (rng.random(4_000) > kept), rng.random(4_000) + (rng.random(4_000) < kept)
        bounds.append(threshold_bound(*scores, delta=0.0, false_alarm=0.05))
    assert sum(bound > 1.0 for bound in bounds) <= 6  # 2 expected at most; 7 or more have probability 0.5 %
    assert np.median(bounds) > 0.75


def test_threshold_bound_of_equal_scores_is_zero() -> None:
    rng = np.random.default_rng(2)
    assert threshold_bound(rng.random(5_000), rng.random(5_000), delta=1e-5, false_alarm=1e-6) == 0.0


# --- One run.


@pytest.mark.parametrize(
    ("counts", "delta", "published"),
    [((1000, 100, 75), 1e-4, 0.673), ((100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_one_run_bound_is_the_published_one(counts: tuple[int, int, int], delta: float, published: float) -> None:
    """Steinke, Nasr & Jagielski 2023, appendix D and section 7; the paper rounds or cuts the third decimal."""
    assert one_run_bound(*counts, delta=delta, confidence=0.95) == pytest.approx(published, abs=1e-3)


def test_one_run_bound_is_the_closed_form_when_all_guesses_are_right() -> None:
    """Pure DP: P[W = r] = q^r, so q = β^(1/r) and ε = ln(q / (1 − q))."""
    rate = 0.05 ** (1 / 80)
    expected = math.log(rate / (1 - rate))
    assert one_run_bound(500, 80, 80, delta=0.0, confidence=0.95) == pytest.approx(expected, abs=1e-5)


def test_one_run_p_value_is_the_sum_of_its_definition() -> None:
    """P[W ≥ 2] + 2·3·0.01·max(P[W = 1], P[0 ≤ W < 2] / 2) for W ~ Binomial(3, 1/2): 4/8 + 0.06 · 3/8."""
    assert one_run_p_value(3, 3, 2, epsilon=0.0, delta=0.01) == pytest.approx(0.5 + 0.06 * 0.375)


def test_one_run_bound_grows_with_right_guesses() -> None:
    bounds = [one_run_bound(400, 100, correct, delta=1e-5, confidence=0.95) for correct in range(60, 101, 5)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0]


def test_one_run_bound_shrinks_with_delta() -> None:
    bounds = [one_run_bound(400, 100, 90, delta=delta, confidence=0.95) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0]


def test_one_run_bound_shrinks_with_confidence() -> None:
    bounds = [one_run_bound(400, 100, 90, delta=1e-5, confidence=c) for c in (0.5, 0.9, 0.99, 0.999)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0]


@pytest.mark.parametrize("counts", [(100, 100, 50), (100, 100, 0), (100, 0, 0)])
def test_one_run_bound_of_mere_chance_is_zero(counts: tuple[int, int, int]) -> None:
    assert one_run_bound(*counts, delta=0.0, confidence=0.95) == 0.0


def test_one_run_bound_holds_for_randomised_response_with_its_confidence() -> None:
    """A run that tells each coin through randomised response is ε-DP, and nothing that is ε-DP tells more."""
    right = np.random.default_rng(3).binomial(2_000, 1 / (1 + math.exp(-2.0)), size=300)
    bounds = [one_run_bound(2_000, 2_000, int(v), delta=0.0, confidence=0.95) for v in right]
    assert sum(bound > 2.0 for bound in bounds) <= 30  # 15 expected at most; 31 or more have probability 1e-4
    assert np.median(bounds) > 1.8


def test_guesses_are_the_extremes() -> None:
    scores = torch.arange(16.0)
    included = scores >= 14
    assert guess(scores, included) == (4, 4)
    assert guess(-scores, included) == (4, 0)


def test_canaries_of_a_class_are_orthogonal() -> None:
    canaries = hadamard_canaries()
    patterns = canaries.images[canaries.labels == 3].flatten(1).double() / 127.5 - 1
    torch.testing.assert_close(patterns @ patterns.T, 64 * torch.eye(63, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_right_trial_passes_the_one_run_audit(kind: Kind) -> None:
    found = audit_trial(kind)
    assert not found.violated, found.verdict


def test_one_run_audit_sees_something_in_a_right_trial() -> None:
    """At a weak claim the bound is well above 0, so the attack is one."""
    found = audit_trial("record", noise_multiplier=2.0)
    assert 1 < found.bound < found.claimed


@pytest.mark.parametrize(("kind", "sigma"), [("record", 6.0), ("batch", 20.0)])
def test_trial_without_noise_is_found(kind: Kind, sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(mechanism: Mechanism, generated: Generated, real: Points, _sigma: float, noise: Noise) -> Tensor:
        return sanitize(mechanism, generated, real, 0.0, noise)

    monkeypatch.setattr("dpsink.engine.sanitize", bare)
    found = audit_trial(kind, noise_multiplier=sigma)
    assert found.violated, found.verdict


# --- The command.


def run_command(*arguments: str) -> int:
    from dpsink.cli import app

    return app(["audit", *arguments], standalone_mode=False) or 0


def test_command_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--mechanism", "batch", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["mechanism"], told["violated"]) == ("BatchMechanism", False)
    assert told["limits"] == audit.LIMITS


def test_command_says_what_an_audit_cannot_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--one-run") == 0
    assert "not that one holds" in " ".join(capsys.readouterr().out.split())


def test_command_fails_when_the_claim_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "audit_mechanism", lambda _: SensitivityC(STEP_CLIP_NORM, STEP_SINKHORN))
    assert run_command("--mechanism", "batch", "--json") == console.FAILED
