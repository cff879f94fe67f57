"""Composition of different mechanisms: against dp-accounting, and by what any composition has."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.pld_pmf import DensePLDPmf
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsink.privacy.bounds import mixed_pld_epsilon
from dpsink.privacy.ledger import TrialCost, composed_epsilon, planned_epsilon
from dpsink.privacy.mixture import TooWide, compose
from dpsink.privacy.questions import Mechanism

TAIL, POINTS, DELTA = 1e-15, 2**22, 1e-5
LOSSES = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=40)


def gaussian(sample_rate: float, noise: float) -> DensePLDPmf:
    return pld.from_gaussian_mechanism(noise, sampling_prob=sample_rate)._pmf_remove.to_dense_pmf()


def distribution(weights: list[float], lowest: int, lost: float) -> DensePLDPmf:
    probs = np.array(weights) / sum(weights) * (1 - lost)
    return DensePLDPmf(1e-4, lowest, probs, lost, True)


PARTS = [(gaussian(0.01, 0.8), 300), (gaussian(0.2, 4.0), 20), (gaussian(1.0, 9.0), 2)]


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_delta_is_that_of_dp_accounting(epsilon):
    first, *others = [pmf.self_compose(steps, TAIL) for pmf, steps in PARTS]
    for other in others:
        first = first.compose(other)
    ours = compose(PARTS, TAIL, POINTS).get_delta_for_epsilon(epsilon)
    assert ours == pytest.approx(first.get_delta_for_epsilon(epsilon), rel=1e-9, abs=1e-13)


@given(LOSSES, LOSSES, st.integers(-20, 20), st.floats(0, 0.1), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_composition_is_the_convolution_of_all_steps(first, second, lowest, lost, steps, others):
    one, other = distribution(first, lowest, lost), distribution(second, -3, 0.0)
    expected = np.ones(1)
    for probs in [one._probs] * steps + [other._probs] * others:
        expected = np.convolve(expected, probs)
    composed = compose([(one, steps), (other, others)], TAIL, POINTS)
    start = composed._lower_loss - (steps * lowest - 3 * others)
    inside = expected[start : start + composed.size]
    assert np.abs(inside - composed._probs).max() < 1e-14
    assert expected.sum() - inside.sum() <= TAIL + 1e-14


def test_no_mass_is_forgotten():
    """Of Gaussian steps there is more than one in all: rounding in dp-accounting adds to each."""
    composed = compose(PARTS, TAIL, POINTS)
    assert 1 - 1e-12 < composed._probs.sum() + composed._infinity_mass < 1 + 1e-7


def test_losses_that_are_certain_in_a_step_are_certain_in_all():
    lossy = distribution([1.0, 2.0], 0, 1e-6)
    composed = compose([(lossy, 1000)], TAIL, POINTS)
    assert composed._infinity_mass == pytest.approx(-math.expm1(1000 * math.log1p(-1e-6)), rel=1e-9)


def test_order_of_the_mechanisms_does_not_matter():
    forward, backward = compose(PARTS, TAIL, POINTS), compose(PARTS[::-1], TAIL, POINTS)
    assert forward.get_delta_for_epsilon(1.0) == pytest.approx(backward.get_delta_for_epsilon(1.0), rel=1e-10)


def test_steps_of_one_mechanism_may_be_told_in_parts():
    pmf, steps = PARTS[0]
    whole, parts = compose([(pmf, steps)], TAIL, POINTS), compose([(pmf, steps - 100), (pmf, 100)], TAIL, POINTS)
    assert whole.get_delta_for_epsilon(1.0) == pytest.approx(parts.get_delta_for_epsilon(1.0), rel=1e-10)


def test_rare_loss_is_kept_where_the_exponentials_of_all_orders_underflow(recwarn):
    probs = np.zeros(200_000)
    probs[0], probs[150_000] = 1 - 1e-12, 1e-12
    composed = compose([(DensePLDPmf(1e-4, 0, probs, 0.0, True), 1)], TAIL, POINTS)
    assert composed.get_delta_for_epsilon(14.0) == pytest.approx(1e-12 * -math.expm1(-1.0), rel=1e-2)
    assert not recwarn.list


def test_rare_loss_is_kept_where_rounding_left_less_than_nothing_at_the_far_end():
    probs = np.zeros(200)
    probs[0], probs[100], probs[-1] = 1 - 1e-12, 1e-12, -1e-25
    composed = compose([(DensePLDPmf(1e-4, 0, probs, 0.0, True), 1)], TAIL, POINTS)
    assert composed.get_delta_for_epsilon(0.005) == pytest.approx(1e-12 * -math.expm1(-0.005), abs=2e-15)


def test_mass_that_overflows_has_no_answer_and_no_warning(recwarn, monkeypatch):
    heavy = pld.PrivacyLossDistribution(*(DensePLDPmf(1e-4, 0, np.full(4, 0.5), 0.0, True) for _ in range(2)))
    monkeypatch.setattr("dpsink.privacy.bounds._one_step", lambda *_: heavy)
    assert mixed_pld_epsilon([(Mechanism(0.1, 1.0), 100_000)], DELTA) == math.inf
    assert not recwarn.list


def test_result_that_is_too_wide_is_refused():
    points = compose(PARTS, TAIL, POINTS).size
    with pytest.raises(TooWide):
        compose(PARTS, TAIL, points - 1)


def test_rdp_answers_where_the_losses_are_too_wide_for_a_grid():
    costs = [TrialCost(1.0, 0.1, 100), TrialCost(1.0, 0.2, 100)]
    assert mixed_pld_epsilon([(Mechanism(1.0, 0.1), 100), (Mechanism(1.0, 0.2), 100)], DELTA) == math.inf
    assert math.isfinite(composed_epsilon(costs, DELTA))


def test_dozens_of_mechanisms_cost_less_together_than_by_rdp():
    costs = [TrialCost(0.002, 0.8 + number / 20, 1000) for number in range(40)]
    assert composed_epsilon(costs, DELTA) < (planned_epsilon(costs, DELTA) or 0)
