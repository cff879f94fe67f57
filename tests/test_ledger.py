"""The study's ledger: what it promises, what it lets start, and what survives its driver."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import get_privacy_spent

from dpsink.errors import InputError
from dpsink.privacy.accounting import epsilon
from dpsink.privacy.ledger import (
    ORDERS,
    BudgetExhausted,
    PrivacyStatement,
    Selection,
    StudyLedger,
    TrialCost,
    composed_epsilon,
    plan_study,
    planned_epsilon,
    trial_statement,
)
from dpsink.privacy.storage import DamagedLedger, FencedError
from tests.test_budget import MemoryStorage, file_size_limit

DELTA = 1e-5
# The base trial of the reference values: MNIST's q, and the most steps with ε <= 1 by RDP (0.91 by PLD).
BASE = TrialCost(sample_rate=50 / 60_000, noise_multiplier=1.1, steps=65_601)
SMALL = TrialCost(0.01, 2.0, 100)
DIGITS = TrialCost(sample_rate=50 / 1437, noise_multiplier=1.1, steps=3012)


def quadrature_rdp(sample_rate: float, noise_multiplier: float, order: float) -> float:
    """Rényi divergence of one step, by direct integration (Mironov, Talwar & Zhang 2019, equation 3)."""
    x = np.linspace(-40 * noise_multiplier, 40 * noise_multiplier + 3 * order, 1_000_001)
    shifted = np.log(sample_rate) + (2 * x - 1) / (2 * noise_multiplier**2)
    log_ratio = np.logaddexp(np.log1p(-sample_rate), shifted)
    density = np.exp(order * log_ratio - x**2 / (2 * noise_multiplier**2))
    return float(np.log(np.trapezoid(density, x) / np.sqrt(2 * np.pi) / noise_multiplier) / (order - 1))


def rdp_epsilon(costs: list[TrialCost]) -> float:
    """ε by RDP at the best order, as Opacus converts it."""
    total = np.sum([cost.rdp() for cost in costs], axis=0)
    return float(get_privacy_spent(orders=list(ORDERS), rdp=total, delta=DELTA)[0])


def event_of(cost: TrialCost) -> dp_event.DpEvent:
    gaussian = dp_event.GaussianDpEvent(cost.noise_multiplier)
    step = dp_event.PoissonSampledDpEvent(cost.sample_rate, gaussian)
    return dp_event.SelfComposedDpEvent(step, cost.steps)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ledger's folder that does not exist yet."""
    return tmp_path / "study" / "ledger"


def open_ledger(place, **options) -> StudyLedger:
    return StudyLedger.open(place, **{"delta": DELTA, "study_epsilon": 3.0, **options})


def open_planned(place, planned, **options) -> StudyLedger:
    return StudyLedger.open(place, **{"delta": DELTA, "planned": planned, **options})


def admit_until_exhausted(ledger: StudyLedger, cost: TrialCost, prefix: str = "trial") -> int:
    """Returns how many trials were admitted."""
    for number in range(100_000):
        try:
            ledger.admit(f"{prefix}-{number}", cost)
        except BudgetExhausted:
            return number
    raise AssertionError("the filter never stops")


# Reference values


@pytest.mark.parametrize(
    ("shape", "mean", "expected"),
    [
        ("logarithmic", 10, 1.78),
        ("logarithmic", 30, 1.97),
        ("logarithmic", 100, 2.16),
        ("geometric", 10, 2.14),
        ("geometric", 30, 2.44),
        ("geometric", 100, 2.73),
    ],
)
def test_selection_costs_the_measured_epsilon(shape, mean, expected):
    study = planned_epsilon([BASE], DELTA, policy="release_best", selection=Selection(mean, shape))
    assert study == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("trials", "expected"), [(10, 3.23), (30, 6.10), (100, 12.7)])
def test_composing_all_trials_of_a_fixed_list_costs_the_measured_epsilon(trials, expected):
    assert planned_epsilon([BASE] * trials, DELTA, adaptive=False) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("rungs", "expected"), [(4, 2.10), (5, 2.38)])
def test_halving_by_3_costs_one_full_run_per_rung(rungs, expected):
    """27 trials have 4 rungs, 81 have 5; their costs depend on results: the filter's RDP."""
    assert planned_epsilon([BASE] * rungs, DELTA) == pytest.approx(expected, abs=0.005)


def test_study_of_one_trial_costs_that_trials_own_pld_figure():
    own = epsilon(**dataclasses.asdict(DIGITS), delta=1e-4)
    assert planned_epsilon([DIGITS], delta=1e-4, adaptive=False) == own
    assert own == pytest.approx(9.999, abs=1e-3)


def test_same_trial_in_an_adaptive_study_costs_its_rdp_figure():
    plan = plan_study([DIGITS], delta=1e-4)
    assert plan.epsilon == pytest.approx(10.97, abs=0.02)  # 10.96 by Opacus, 10.98 by dp-accounting


def test_empty_composition_costs_nothing():
    assert composed_epsilon([], DELTA) == composed_epsilon([TrialCost(0.1, 1.0, 0)], DELTA) == 0


def test_pld_composition_of_different_costs_lies_between_the_dearest_and_the_rdp_bound():
    costs = [SMALL, TrialCost(0.02, 3.0, 50), TrialCost(1.0, 20.0, 1)]
    composed = composed_epsilon(costs, DELTA)
    assert max(composed_epsilon([cost], DELTA) for cost in costs) < composed < rdp_epsilon(costs)


def test_pld_composition_of_different_costs_agrees_with_dp_accounting():
    costs = [SMALL, TrialCost(0.02, 3.0, 50), TrialCost(0.07, 50.0, 20_000), TrialCost(1.0, 20.0, 1)]
    accountant = PLDAccountant()
    for cost in costs:
        gaussian = dp_event.GaussianDpEvent(cost.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(cost.sample_rate, gaussian), cost.steps)
    composed, reference = composed_epsilon(costs, DELTA), accountant.get_epsilon(DELTA)
    assert composed == pytest.approx(reference, rel=1e-5) and composed >= reference


@pytest.mark.parametrize("order", [1.1, 2.3, 5.5, 32.0])
@pytest.mark.parametrize(("sample_rate", "noise_multiplier"), [(50 / 60_000, 1.1), (0.035, 17.5), (0.5, 3.0)])
def test_divergence_agrees_with_quadrature(sample_rate, noise_multiplier, order):
    """dp-accounting is no oracle here: at fractional orders it is up to three times too high."""
    expected = quadrature_rdp(sample_rate, noise_multiplier, order)
    assert TrialCost(sample_rate, noise_multiplier, 7).rdp((order,))[0] == pytest.approx(
        7 * expected, rel=1e-6, abs=1e-9
    )


@settings(max_examples=20, deadline=None)
@given(mean=st.floats(1.01, 1e4), shape=st.sampled_from(["logarithmic", "geometric"]))
def test_selection_agrees_with_dp_accounting(mean, shape):
    accountant = RdpAccountant(orders=ORDERS)
    eta = {"logarithmic": 0, "geometric": 1}[shape]
    cost = TrialCost(sample_rate=1.0, noise_multiplier=10.0, steps=5)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(event_of(cost), mean, eta))
    study = planned_epsilon([cost], DELTA, policy="release_best", selection=Selection(mean, shape))
    assert study == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-6)


def test_selection_over_several_noise_multipliers_costs_at_least_the_dearest():
    costs = [SMALL, TrialCost(0.001, 0.6, 100), TrialCost(0.02, 3.0, 200)]
    options = {"policy": "release_best", "selection": Selection(30)}
    together = planned_epsilon(costs, DELTA, **options)
    assert together is not None
    assert all(together >= (planned_epsilon([cost], DELTA, **options) or 0) for cost in costs)


@pytest.mark.parametrize("shape", ["logarithmic", "geometric"])
def test_drawn_numbers_of_trials_have_the_expected_mean(shape):
    selection = Selection(10, shape)
    draws = [selection.draw() for _ in range(4000)]
    assert min(draws) >= 1
    assert np.mean(draws) == pytest.approx(10, abs=5 * float(np.std(draws)) / math.sqrt(len(draws)))


# The plan


def test_filter_order_is_the_best_for_the_plan():
    plan = plan_study([SMALL] * 20, DELTA)
    assert plan.guarantee == "filter"
    assert plan.epsilon == pytest.approx(rdp_epsilon([SMALL] * 20), rel=1e-6)


def test_given_study_epsilon_is_the_cap():
    plan = plan_study([SMALL] * 20, DELTA, study_epsilon=1.5)
    assert (plan.guarantee, plan.epsilon) == ("filter", 1.5)


def test_fixed_list_that_exceeds_study_epsilon_falls_back_to_the_filter():
    assert plan_study([BASE] * 10, DELTA, study_epsilon=2.0, adaptive=False).guarantee == "filter"
    assert plan_study([BASE] * 10, DELTA, study_epsilon=4.0, adaptive=False).guarantee == "fixed_costs"


def test_per_trial_only_claims_nothing():
    assert planned_epsilon([SMALL], DELTA, policy="per_trial_only") is None


def test_trial_without_noise_makes_the_planned_epsilon_infinite():
    assert planned_epsilon([SMALL, TrialCost(0.01, 0.0, 10)], DELTA) == math.inf


@pytest.mark.parametrize(
    ("planned", "options", "field"),
    [
        ([], {}, "planned"),
        ([SMALL], {"delta": 0.0}, "delta"),
        ([SMALL], {"policy": "compose"}, "policy"),
        ([SMALL], {"study_epsilon": 0.0}, "study_epsilon"),
        ([SMALL] * 2, {"study_epsilon": 1e-9}, "study_epsilon"),
        ([SMALL], {"study_epsilon": math.nan}, "study_epsilon"),
        ([SMALL], {"policy": "release_best"}, "selection"),
        ([SMALL], {"selection": Selection(10)}, "selection"),
        ([], {"policy": "release_best", "selection": Selection(10)}, "planned"),
        ([SMALL], {"policy": "per_trial_only", "study_epsilon": 1.0}, "study_epsilon"),
        ([SMALL, TrialCost(0.01, 0.0, 1)], {}, "NON-PRIVATE"),
        ([TrialCost(0.01, 0.0, 1)], {"study_epsilon": 1.0}, "NON-PRIVATE"),
    ],
)
def test_bad_argument_is_refused_and_leaves_no_ledger(folder, planned, options, field):
    with pytest.raises(InputError, match=field):
        open_planned(folder, planned, **options)
    assert not folder.exists()


@pytest.mark.parametrize(
    "value", [(-0.1, 1.0, 1), (math.nan, 1.0, 1), (0.1, -1.0, 1), (0.1, math.inf, 1), (0.1, 1.0, -1)]
)
def test_cost_outside_its_range_is_refused(value):
    with pytest.raises(InputError, match="must be"):
        TrialCost(*value)


@pytest.mark.parametrize("mean", [0.5, 1.0, math.nan, math.inf])
def test_selection_outside_its_range_is_refused(mean):
    with pytest.raises(InputError, match="expected_trials"):
        Selection(mean)


# The filter


def test_filter_stops_the_study_before_it_exceeds_the_cap(folder):
    with open_ledger(folder, study_epsilon=1.0) as ledger:
        admitted = admit_until_exhausted(ledger, SMALL)
        assert admitted > 1
        assert rdp_epsilon([SMALL] * admitted) <= ledger.spent() + 1e-9 <= 1.0 + 1e-9


def test_default_study_epsilon_admits_exactly_the_plan(folder):
    with open_planned(folder, [SMALL] * 7) as ledger:
        assert admit_until_exhausted(ledger, SMALL) == 7


def test_settling_lower_makes_room_for_more(folder):
    with open_planned(folder, [SMALL] * 4) as ledger:
        assert admit_until_exhausted(ledger, SMALL) == 4
        ledger.settle("trial-0", 20)
        with pytest.raises(BudgetExhausted):
            ledger.admit("late", SMALL)
        ledger.admit("late", dataclasses.replace(SMALL, steps=80))


def test_cheaper_trial_may_start_when_a_dear_one_may_not(folder):
    with open_planned(folder, [SMALL] * 2) as ledger:
        with pytest.raises(BudgetExhausted, match="trial big may not start"):
            ledger.admit("big", dataclasses.replace(SMALL, steps=201))
        ledger.admit("small", SMALL)


def test_refused_trial_leaves_no_trace(folder):
    with open_planned(folder, [SMALL] * 2) as ledger:
        with pytest.raises(BudgetExhausted):
            ledger.admit("big", dataclasses.replace(SMALL, steps=1000))
        assert ledger.spent() == 0


def test_checking_a_trial_records_nothing(folder):
    with open_planned(folder, [SMALL] * 2) as ledger:
        before = sorted(folder.iterdir())
        ledger.check("a", SMALL)
        with pytest.raises(BudgetExhausted, match="trial b may not start"):
            ledger.check("b", dataclasses.replace(SMALL, steps=1000))
        assert (ledger.admitted, sorted(folder.iterdir())) == (frozenset(), before)


def test_trial_without_noise_never_passes_the_filter(folder):
    with open_ledger(folder, study_epsilon=100.0) as ledger, pytest.raises(BudgetExhausted):
        ledger.admit("open", TrialCost(0.01, 0.0, 1))


@pytest.mark.parametrize("policy", ["compose_all", "per_trial_only"])
def test_study_without_privacy_admits_everything(folder, policy):
    with open_ledger(folder, study_epsilon=math.inf, policy=policy) as ledger:
        ledger.admit("open", TrialCost(0.01, 0.0, 1))
        assert ledger.cap == ledger.spent() == math.inf


COSTS = st.builds(TrialCost, st.sampled_from([0.01, 0.05]), st.sampled_from([1.0, 2.0]), st.integers(1, 400))


@settings(max_examples=40, deadline=None)
@given(costs=st.lists(COSTS, max_size=12), data=st.data())
def test_spent_never_exceeds_the_cap_whatever_is_tried_and_settled(costs, data):
    ledger = open_ledger(MemoryStorage(), study_epsilon=2.0)
    for number, cost in enumerate(costs):
        try:
            ledger.admit(str(number), cost)
        except BudgetExhausted:
            continue
        assert ledger.spent() <= 2.0
        if data.draw(st.booleans()):
            ledger.settle(str(number), data.draw(st.integers(0, cost.steps)))


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 100), min_size=2, max_size=6), data=st.data())
def test_order_of_settlement_does_not_matter(steps, data):
    readings = []
    for order in (range(len(steps)), data.draw(st.permutations(range(len(steps))))):
        ledger = open_ledger(MemoryStorage(), study_epsilon=1.0)
        for number in range(len(steps)):
            ledger.admit(str(number), SMALL)
        for number in order:
            ledger.settle(str(number), steps[number])
        readings.append((ledger.spent(), admit_until_exhausted(ledger, SMALL)))
    assert readings[0] == readings[1]


# Admission and settlement


def test_admitting_again_at_the_same_cost_changes_nothing(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        spent = ledger.spent()
        ledger.admit("a", SMALL)
        assert ledger.spent() == spent


@pytest.mark.parametrize("change", [{"steps": 99}, {"noise_multiplier": 2.1}, {"sample_rate": 0.02}])
def test_admitting_again_at_another_cost_is_refused(folder, change):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        with pytest.raises(InputError, match="cost"):
            ledger.admit("a", dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize("trial_id", ["", "a/b", "../a", "a b", "x" * 101])
def test_trial_id_that_is_no_file_name_is_refused(folder, trial_id):
    with open_ledger(folder) as ledger, pytest.raises(InputError, match="trial_id"):
        ledger.admit(trial_id, SMALL)


def test_settling_again_to_the_same_figure_changes_nothing(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        ledger.settle("a", 60)
        spent = ledger.spent()
        ledger.settle("a", 60)
        assert ledger.spent() == spent


@pytest.mark.parametrize("steps", [59, 61])
def test_settling_again_to_another_figure_is_refused(folder, steps):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        ledger.settle("a", 60)
        with pytest.raises(InputError, match="60"):
            ledger.settle("a", steps)


@pytest.mark.parametrize("steps", [-1, 101])
def test_settling_outside_what_was_admitted_is_refused(folder, steps):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        with pytest.raises(InputError, match="steps_charged"):
            ledger.settle("a", steps)


def test_settling_a_trial_that_was_not_admitted_is_refused(folder):
    with open_ledger(folder) as ledger, pytest.raises(InputError, match="admitted"):
        ledger.settle("a", 0)


# Costs fixed in advance


def test_fixed_list_admits_each_cost_as_often_as_planned(folder):
    other = dataclasses.replace(SMALL, steps=50)
    with open_planned(folder, [SMALL, other, SMALL], adaptive=False) as ledger:
        ledger.admit("other", other)
        assert admit_until_exhausted(ledger, SMALL) == 2
        assert ledger.spent() == ledger.cap


def test_fixed_list_refuses_a_cost_that_was_not_planned(folder):
    with (
        open_planned(folder, [SMALL] * 2, adaptive=False) as ledger,
        pytest.raises(InputError, match="planned"),
    ):
        ledger.admit("a", dataclasses.replace(SMALL, steps=50))


def test_composition_that_was_asked_for_before_is_not_made_again(folder, monkeypatch):
    other = dataclasses.replace(SMALL, sample_rate=0.02)
    with open_planned(folder, [SMALL, other], adaptive=False) as ledger:
        ledger.admit("a", SMALL)
        ledger.admit("b", other)
        spent = ledger.spent()
        monkeypatch.setattr("dpsink.privacy.bounds.mixed_pld_epsilon", lambda *_: pytest.fail("composed again"))
        assert ledger.spent() == spent


def test_study_of_one_trial_reports_its_own_pld_figure_as_spent(folder):
    with open_planned(folder, [SMALL], adaptive=False) as ledger:
        ledger.admit("only", SMALL)
        ledger.settle("only", 40)
        assert ledger.spent() == epsilon(**{**dataclasses.asdict(SMALL), "steps": 40}, delta=DELTA)


GRID = [TrialCost(0.01, 2.0 + index / 10, 100) for index in range(12)]


def test_reading_that_cannot_wait_composes_no_grid_and_is_never_less_than_the_exact_one(folder, monkeypatch):
    with open_planned(folder, [*GRID, *GRID], adaptive=False) as ledger:
        for number, cost in enumerate(GRID):
            ledger.admit(f"trial-{number}", cost)
        exact = ledger.spent()
        monkeypatch.setattr("dpsink.privacy.ledger._mixed_epsilon", lambda *_: pytest.fail("composed"))
        assert exact < ledger.spent(exact=False) <= rdp_epsilon(GRID) * (1 + 1e-9)


@pytest.mark.parametrize(("mechanisms", "names"), [(GRID[:3], ["dp-accounting"]), (GRID, ["dp-accounting", "opacus"])])
def test_statement_that_cannot_wait_names_the_accountants_that_were_asked(folder, mechanisms, names):
    with open_planned(folder, mechanisms, adaptive=False) as ledger:
        for number, cost in enumerate(mechanisms):
            ledger.admit(f"trial-{number}", cost)
        assert [one.split()[0] for one in ledger.statement(1.0, exact=False).accountants] == names


def test_reading_that_cannot_wait_is_exact_where_mechanisms_are_few(folder):
    with open_planned(folder, GRID[:3], adaptive=False) as ledger:
        for number, cost in enumerate(GRID[:3]):
            ledger.admit(f"trial-{number}", cost)
        assert ledger.spent(exact=False) == ledger.spent()


# Publishing only the best


SELECTION = {"policy": "release_best", "study_epsilon": None, "selection": Selection(5.0)}


def test_selection_admits_exactly_the_number_of_trials_drawn(folder):
    with open_planned(folder, [SMALL], **SELECTION) as ledger:
        assert admit_until_exhausted(ledger, SMALL) == ledger.trials


def test_number_of_trials_is_drawn_once(folder):
    drawn = set()
    for _ in range(5):
        with open_planned(folder, [SMALL], **SELECTION) as ledger:
            drawn.add(ledger.trials)
    assert len(drawn) == 1


def test_selection_refuses_a_trial_that_costs_more_than_planned(folder):
    with open_planned(folder, [SMALL], **SELECTION) as ledger, pytest.raises(InputError, match="highest"):
        ledger.admit("a", dataclasses.replace(SMALL, steps=101))


def test_selection_admits_a_trial_that_costs_less_than_planned(folder):
    with open_planned(folder, [SMALL], **SELECTION) as ledger:
        ledger.admit("a", dataclasses.replace(SMALL, noise_multiplier=2.5))


def test_selection_covers_what_costs_at_most_the_highest_of_the_plan(folder):
    with open_planned(folder, [SMALL], **SELECTION) as ledger:
        assert ledger.covers(dataclasses.replace(SMALL, noise_multiplier=2.5))
        assert not ledger.covers(dataclasses.replace(SMALL, steps=101))


def test_partner_of_a_ledger_has_the_same_number_of_trials(tmp_path):
    selection = {**SELECTION, "selection": Selection(1e6, "geometric")}
    with (
        open_planned(tmp_path / "one", [SMALL], **selection) as one,
        open_planned(tmp_path / "other", [SMALL], **selection, partner=one) as other,
    ):
        assert one.trials == other.trials


def test_statement_of_a_selection_is_the_same_for_every_number_of_trials():
    texts = set()
    for _ in range(30):
        ledger = open_planned(MemoryStorage(), [SMALL], **SELECTION)
        admit_until_exhausted(ledger, SMALL)
        texts.add(ledger.statement(1.0).text())
    assert len(texts) == 1


def test_number_of_trials_is_not_shown_by_accident(folder):
    with open_planned(folder, [SMALL], **SELECTION) as ledger:
        assert "object at" in repr(ledger)
        assert {path.stat().st_mode & 0o077 for path in folder.glob("*.json")} == {0}


# The record


def test_promise_is_kept_when_the_study_is_opened_with_another_plan(folder):
    with open_planned(folder, [SMALL] * 5) as ledger:
        promised = ledger.plan
    with open_planned(folder, [SMALL] * 50) as ledger:
        assert ledger.plan == promised
        assert admit_until_exhausted(ledger, SMALL) == 5


CHANGED = {
    "delta": 1e-6,
    "study_epsilon": 4.0,
    "adaptive": False,
    "policy": "per_trial_only",
    "selection": Selection(7.0),
}


@pytest.mark.parametrize("field", CHANGED)
def test_changed_argument_is_refused_by_name(folder, field):
    open_ledger(folder).close()
    with pytest.raises(InputError, match=f"{field}="):
        open_ledger(folder, **{field: CHANGED[field]})


def test_reopened_ledger_knows_what_was_admitted_and_settled(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        ledger.admit("b", SMALL)
        ledger.settle("a", 30)
        spent = ledger.spent()
    with open_ledger(folder) as ledger:
        assert ledger.spent() == spent
        ledger.admit("b", SMALL)
        ledger.settle("b", 100)


def test_settled_trial_is_not_admitted_again(folder):
    """It would run on, and be charged only what it had run before."""
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        ledger.settle("a", 30)
        assert ledger.settled == {"a"}
    with open_ledger(folder) as ledger, pytest.raises(InputError, match="never runs again"):
        ledger.admit("a", SMALL)


def test_trial_that_a_dead_driver_left_open_counts_with_its_worst_case(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
    with open_ledger(folder) as ledger:
        assert ledger.spent() == pytest.approx(rdp_epsilon([SMALL]), rel=1e-6)


def test_second_driver_is_refused(folder):
    with open_ledger(folder), pytest.raises(InputError, match="in use by process"):
        open_ledger(folder)


def test_older_driver_that_comes_back_admits_nothing():
    storage = MemoryStorage()
    old = open_ledger(storage)
    open_ledger(storage)
    with pytest.raises(FencedError):
        old.admit("a", SMALL)
    assert open_ledger(storage).spent() == 0


def test_write_that_fails_admits_nothing(folder):
    with open_ledger(folder) as ledger:
        with file_size_limit(0), pytest.raises(OSError, match="large"):
            ledger.admit("a", SMALL)
        assert ledger.spent() == 0
        ledger.admit("a", SMALL)


def test_vanished_ledger_is_refused_with_the_witness(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        witness = ledger.witness()
    shutil.rmtree(folder)
    with pytest.raises(DamagedLedger):
        open_ledger(folder, witness=witness)


def test_missing_admission_of_a_settled_trial_is_found(folder):
    with open_ledger(folder) as ledger:
        ledger.admit("a", SMALL)
        ledger.settle("a", 30)
    (folder / "admit-a.json").unlink()
    with pytest.raises(DamagedLedger):
        open_ledger(folder)


def drive(folder: Path, life: int, announce: int) -> None:
    """A driver that admits and settles trials, and announces each before it goes on."""
    with open_ledger(folder, study_epsilon=30.0) as ledger:
        for number in count():
            ledger.admit(f"life{life}-{number}", SMALL)
            os.write(announce, f"life{life}-{number}\n".encode())
            ledger.settle(f"life{life}-{number}", 50)


def kill_driver(folder: Path, life: int, seconds: float) -> list[str]:
    """Fork a driver, kill it after a while, and return the trials that it announced as admitted."""
    reading, announce = os.pipe()
    driver = os.fork()
    if driver == 0:
        try:
            drive(folder, life, announce)
        finally:
            os._exit(1)
    os.close(announce)
    time.sleep(seconds)
    os.kill(driver, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]) == -signal.SIGKILL
    with open(reading) as announced:
        return announced.read().splitlines()


def test_killed_driver_forgets_no_admitted_trial(folder):
    announced = []
    for life in range(10):
        announced += kill_driver(folder, life, 0.013 * (life + 1))
        with open_ledger(folder, study_epsilon=30.0) as ledger:
            least = [dataclasses.replace(SMALL, steps=50)] * len(announced)
            assert ledger.spent() >= (rdp_epsilon(least) * (1 - 1e-6) if least else 0)
            assert ledger.admitted >= set(announced)
            for trial in set(announced) - ledger.settled:
                ledger.admit(trial, SMALL)  # known: no second charge, and no refusal
    assert announced


# The statement


@cache
def example_statements() -> dict[str, PrivacyStatement]:
    ledgers = {
        "filter": open_ledger(MemoryStorage()),
        "fixed": open_planned(MemoryStorage(), [SMALL] * 3, adaptive=False),
        "selection": open_planned(MemoryStorage(), [SMALL], **SELECTION),
        "per_trial": open_planned(MemoryStorage(), [SMALL], policy="per_trial_only"),
        "non_private": open_ledger(MemoryStorage(), study_epsilon=math.inf),
    }
    for ledger in ledgers.values():
        ledger.admit("a", SMALL)
    return {
        kind: ledger.statement(math.inf if kind == "non_private" else 0.41234567) for kind, ledger in ledgers.items()
    }


KINDS = ("filter", "fixed", "selection", "per_trial", "non_private")


@pytest.mark.parametrize("kind", KINDS)
def test_statement_survives_json(kind):
    statement = example_statements()[kind]
    text = json.dumps(statement.to_dict(), allow_nan=False)
    assert PrivacyStatement.from_dict(json.loads(text)) == statement


@pytest.mark.parametrize("kind", KINDS)
def test_statement_is_at_most_80_columns_wide(kind):
    assert max(map(len, example_statements()[kind].text().splitlines())) <= 80


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topic", ["timing", "random generator", "floating-point", "replace-one", "removing one"])
def test_statement_names_its_limits(kind, topic):
    assert topic in " ".join(example_statements()[kind].text().split())


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_statement_without_privacy_says_so(kind):
    assert ("NON-PRIVATE" in example_statements()[kind].text()) == (kind == "non_private")


@pytest.mark.parametrize("kind", KINDS)
def test_only_per_trial_statements_leave_the_selection_uncovered(kind):
    uncovered = any("selection" in item for item in example_statements()[kind].not_covered)
    assert uncovered == (kind == "per_trial")


def test_statement_of_a_lone_trial_claims_its_own_figure():
    statement = trial_statement(0.5, DELTA)
    assert statement.trial_epsilon == statement.study_epsilon == statement.spent == 0.5


def test_statement_of_a_selection_names_its_distribution():
    text = " ".join(example_statements()["selection"].text().split())
    assert "from a logarithmic distribution of mean 5" in text


def test_statement_rounds_epsilon_up():
    assert "epsilon 0.413, delta 1e-05" in example_statements()["filter"].text()


def test_statement_of_the_filter_names_its_order():
    statement = example_statements()["filter"]
    assert statement.order in ORDERS
    assert f"(order {statement.order:g})" in " ".join(statement.text().split())


def test_statement_takes_up_further_assumptions(folder):
    with open_ledger(folder) as ledger:
        assert "the test split is public" in ledger.statement(1.0, assumptions=["the test split is public"]).text()


@pytest.mark.parametrize("shape", ["logarithmic", "geometric"])
def test_drawn_number_exceeds_its_quantile_as_seldom_as_it_says(shape: Literal["logarithmic", "geometric"]) -> None:
    law = Selection(20, shape)
    most = law.quantile(0.9)
    above = sum(law.draw() > most for _ in range(2000))
    assert above <= 2000 * 0.1 + 5 * 14  # five standard deviations
