"""Accounting never overspends: known answers, the libraries' own accountants, closed forms, bad input, the cache."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy.special import log_ndtr

from dpsink.errors import InputError
from dpsink.privacy import accounting, bounds
from dpsink.privacy.accounting import (
    accountant_version,
    epsilon,
    epsilon_curve,
    max_steps,
    noise_multiplier_for,
    sample_rate_for,
)
from dpsink.privacy.questions import MAX_STEPS, MIN_NOISE_MULTIPLIER, Accountant, Mechanism

ACCOUNTANTS = get_args(Accountant)
MNIST: dict[str, Any] = {"delta": 1e-5, "sample_rate": 50 / 60_000, "noise_multiplier": 1.1}
DIGITS: dict[str, Any] = {"delta": 1e-4, "sample_rate": 50 / 1_437, "noise_multiplier": 1.1}
QUICK: dict[str, Any] = {"delta": 1e-5, "sample_rate": 0.1, "noise_multiplier": 4.0}

BUDGETS = {  # wide enough for the branches (no step fits; RDP only; PLD), narrow enough to take a second each
    "target_epsilon": st.floats(0.2, 12.0),
    "delta": st.floats(-9.0, -1.0).map(lambda exponent: 10**exponent),
    "sample_rate": st.one_of(st.floats(-4.0, 0.0).map(lambda exponent: 10**exponent), st.just(1.0)),
    "noise_multiplier": st.floats(0.5, 8.0),
}
slowly = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on disk and in memory; the folder of its entries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accounting._recall.cache_clear()
    return tmp_path / "dpsink" / "accounting"


def gaussian_log_delta(mu: float, at_epsilon: float) -> float:
    """ln δ of the Gaussian mechanism with signal-to-noise ratio μ (Balle & Wang 2018, Theorem 8)."""
    first = log_ndtr(mu / 2 - at_epsilon / mu)
    second = at_epsilon + log_ndtr(-mu / 2 - at_epsilon / mu)
    return float(first + np.log1p(-np.exp(second - first)))


# Known answers: privacy.md has 3,986,344 and 4,468,684, measured without a charge for floating point. The first is one
# lower by the series' error in Opacus. The second is not reproducible: raw dp-accounting says 4,468,683 on one machine
# and 4,468,684 on another, and 80-bit FFTs 4,468,690; charged for that, it is 133 lower.
@pytest.mark.parametrize(
    ("target_epsilon", "noise_multiplier", "accountant", "steps"),
    [(10, 1.1, "rdp", 3_986_343), (10, 1.1, "pld", 4_468_551), (1, 0.8, "rdp", 12), (1, 0.8, "pld", 24_504)],
)
def test_max_steps_of_the_mnist_preset(target_epsilon, noise_multiplier, accountant, steps):
    mnist = {**MNIST, "noise_multiplier": noise_multiplier}
    got = max_steps(target_epsilon=target_epsilon, accountant=accountant, **mnist)
    assert got == pytest.approx(steps, abs=2)  # another processor's FFT may move the last step


@pytest.mark.parametrize(("accountant", "spent"), [("pld", 9.99902), ("rdp", 10.95926)])
def test_epsilon_of_the_digits_preset(accountant, spent):
    assert epsilon(steps=3_012, accountant=accountant, **DIGITS) == pytest.approx(spent, abs=1e-5)


def test_max_steps_of_the_digits_preset():
    assert max_steps(target_epsilon=10, **DIGITS) == 3_012


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@given(budget=st.fixed_dictionaries(BUDGETS))
@slowly
def test_max_steps_is_the_last_that_fits(accountant, budget):
    target = budget.pop("target_epsilon")
    steps = max_steps(target_epsilon=target, accountant=accountant, **budget)
    spent = epsilon_curve(steps=[steps, min(steps + 1, MAX_STEPS)], accountant=accountant, **budget)
    assert spent[0] <= target
    assert spent[1] > target or steps == MAX_STEPS


@pytest.mark.slow
@given(budget=st.fixed_dictionaries(BUDGETS))
@settings(slowly, max_examples=3)
def test_pld_allows_at_least_the_steps_of_rdp(budget):
    by_rdp = max_steps(accountant="rdp", **budget)
    assert max_steps(accountant="pld", **budget) >= by_rdp


@pytest.mark.parametrize("steps", [1, 10, 1_000, 100_000])
def test_pld_is_much_tighter_than_rdp_where_sampling_is_rare(steps):
    assert epsilon(steps=steps, **MNIST) < 0.95 * epsilon(steps=steps, accountant="rdp", **MNIST)


@pytest.mark.parametrize("parameters", [MNIST, DIGITS, QUICK], ids=["mnist", "digits", "quick"])
@pytest.mark.parametrize("steps", [1, 100, 3_000])
def test_pld_agrees_with_the_accountant_of_dp_accounting(parameters, steps):
    event = dp_accounting.PoissonSampledDpEvent(
        parameters["sample_rate"], dp_accounting.GaussianDpEvent(parameters["noise_multiplier"])
    )
    reference = PLDAccountant().compose(event, steps).get_epsilon(parameters["delta"])
    got = epsilon(steps=steps, **parameters)
    assert got == pytest.approx(reference, rel=2e-3)  # their grid of 1e-4 is coarser than ours for small losses
    assert got <= reference + 1e-6


@pytest.mark.parametrize("parameters", [MNIST, DIGITS], ids=["mnist", "digits"])
@pytest.mark.parametrize("steps", [1, 3_000, 1_000_000])
def test_rdp_agrees_with_the_accountant_of_opacus(parameters, steps):
    opacus = RDPAccountant()
    opacus.history = [(parameters["noise_multiplier"], parameters["sample_rate"], steps)]
    orders = list(bounds.RDP_ORDERS)
    reference = opacus.get_epsilon(parameters["delta"], alphas=orders)
    got = epsilon(steps=steps, accountant="rdp", **parameters)
    assert got == pytest.approx(reference, rel=1e-6)
    assert got >= reference


def test_rdp_of_rare_sampling_stays_positive():
    """Opacus loses log A to rounding here and returns negative RDP at most orders: more steps would cost less."""
    spent = epsilon_curve(steps=[10**8, 10**9], delta=1e-5, sample_rate=1e-8, noise_multiplier=20.0, accountant="rdp")
    assert np.all(bounds.rdp_curve(Mechanism(1e-8, 20.0)) > 0)
    assert 0 < spent[0] < spent[1]


@pytest.mark.parametrize("steps", [1, 7, 1_000, 1_000_000])
@pytest.mark.parametrize("noise_multiplier", [0.5, 3.0, 100.0])
def test_full_sampling_is_the_plain_gaussian(steps, noise_multiplier):
    spent = epsilon(steps=steps, delta=1e-5, sample_rate=1.0, noise_multiplier=noise_multiplier)
    mu = math.sqrt(steps) / noise_multiplier
    assert gaussian_log_delta(mu, spent) <= math.log(1e-5) < gaussian_log_delta(mu, spent * (1 - 1e-9))


def test_nearly_full_sampling_approaches_the_plain_gaussian():
    nearly, full = (epsilon(steps=20, delta=1e-5, sample_rate=rate, noise_multiplier=3.0) for rate in (1 - 1e-9, 1.0))
    assert nearly == pytest.approx(full, rel=1e-3)


def test_pld_exceeds_the_exact_epsilon_of_one_step():
    """One step in closed form: removing a record has δ(ε) = q·δ_gauss(ln(1 + (e^ε - 1)/q)) (Balle et al. 2018)."""
    rate, sigma, delta = 0.1, 1.0, 1e-5
    spent = epsilon(steps=1, delta=delta, sample_rate=rate, noise_multiplier=sigma)

    def exact(at: float) -> float:
        return rate * math.exp(gaussian_log_delta(1 / sigma, math.log1p(math.expm1(at) / rate)))

    assert exact(spent) <= delta < exact(spent - 1e-4)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_steps_spend_nothing(accountant):
    assert epsilon(steps=0, accountant=accountant, **MNIST) == 0.0


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_more_steps_spend_more(accountant):
    spent = epsilon_curve(steps=[0, 1, 2, 10, 100, 1_000, 10_000], accountant=accountant, **QUICK)
    assert np.all(np.diff(spent) > 0)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_more_noise_spends_less(accountant):
    spent = [
        epsilon(steps=100, delta=1e-5, sample_rate=0.01, noise_multiplier=sigma, accountant=accountant)
        for sigma in (0.5, 1.0, 2.0, 8.0)
    ]
    assert np.all(np.diff(spent) < 0)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_a_curve_is_its_points(accountant):
    steps = [500, 0, 20, 500]
    curve = epsilon_curve(steps=steps, accountant=accountant, **QUICK)
    assert curve == [epsilon(steps=each, accountant=accountant, **QUICK) for each in steps]


def test_a_curve_builds_one_loss_distribution():
    bounds._one_step.cache_clear()
    epsilon_curve(steps=[1, 50, 300], **QUICK)
    assert bounds._one_step.cache_info().misses == 1


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(("target_epsilon", "sample_rate", "steps"), [(1.0, 0.1, 1_000), (5.0, 0.01, 100_000)])
def test_calibrated_noise_is_the_smallest_that_fits(accountant, target_epsilon, sample_rate, steps):
    budget: dict[str, Any] = {"delta": 1e-5, "sample_rate": sample_rate, "steps": steps, "accountant": accountant}
    sigma = noise_multiplier_for(target_epsilon=target_epsilon, **budget)
    assert epsilon(noise_multiplier=sigma, **budget) <= target_epsilon
    assert epsilon(noise_multiplier=sigma * 0.999, **budget) > target_epsilon


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(("target_epsilon", "noise_multiplier", "steps"), [(1.0, 2.0, 1_000), (10.0, 1.0, 10_000)])
def test_calibrated_sample_rate_is_the_largest_that_fits(accountant, target_epsilon, noise_multiplier, steps):
    budget: dict[str, Any] = {
        "delta": 1e-5,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "accountant": accountant,
    }
    rate = sample_rate_for(target_epsilon=target_epsilon, **budget)
    assert epsilon(sample_rate=rate, **budget) <= target_epsilon
    assert epsilon(sample_rate=rate * 1.001, **budget) > target_epsilon


def test_calibration_stops_at_the_limits():
    assert sample_rate_for(target_epsilon=10, delta=1e-5, noise_multiplier=100, steps=10) == 1.0
    generous = noise_multiplier_for(target_epsilon=1e6, delta=1e-5, sample_rate=1.0, steps=10)
    assert generous == MIN_NOISE_MULTIPLIER


@pytest.mark.parametrize(
    ("question", "arguments"),
    [
        (noise_multiplier_for, {"sample_rate": 1.0, "steps": MAX_STEPS}),
        (sample_rate_for, {"noise_multiplier": 0.1, "steps": MAX_STEPS}),
    ],
)
def test_an_unreachable_target_is_refused(question, arguments):
    with pytest.raises(InputError, match="raise target_epsilon"):
        question(target_epsilon=1e-6, delta=1e-12, **arguments)


def test_a_budget_below_one_step_gives_no_steps():
    assert max_steps(target_epsilon=1.0, delta=1e-5, sample_rate=1.0, noise_multiplier=0.5) == 0


@pytest.mark.parametrize(
    ("target_epsilon", "delta", "sample_rate", "noise_multiplier"),
    [(1e300, 1e-5, 0.5, 1.0), (10, 1e-5, 1e-300, 1.0), (10, 0.5, 1e-6, 50.0), (10, 1e-5, 1e-3, 1e300)],
)
def test_a_boundless_budget_gives_the_cap(target_epsilon, delta, sample_rate, noise_multiplier):
    steps = max_steps(
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, noise_multiplier=noise_multiplier
    )
    assert steps == MAX_STEPS


def test_a_delta_below_the_rounding_of_the_fft_is_left_to_rdp():
    tiny = {**MNIST, "delta": 1e-15}
    assert epsilon(steps=1_000_000, **tiny) == epsilon(steps=1_000_000, accountant="rdp", **tiny)


def test_a_wide_composition_is_left_to_rdp():
    wide: dict[str, Any] = {"delta": 1e-5, "sample_rate": 0.5, "noise_multiplier": 0.5}
    assert epsilon(steps=10**6, **wide) == epsilon(steps=10**6, accountant="rdp", **wide)


def test_a_sparse_loss_distribution_composes_millions_of_times():
    """dp-accounting computes size**T for distributions of at most 1,000 points, and hangs."""
    start = time.process_time()
    spent = epsilon(steps=10**6, delta=1e-5, sample_rate=1e-3, noise_multiplier=50.0)
    assert 0 < spent < 1
    assert time.process_time() - start < 10


NOT_NUMBERS = [math.nan, math.inf, -math.inf, None, True, "1", -1, [1], 1j]
BAD = [
    *(("target_epsilon", value) for value in [*NOT_NUMBERS, 0, 10**400]),
    *(("delta", value) for value in [*NOT_NUMBERS, 0, 1, 1.5]),
    *(("sample_rate", value) for value in [*NOT_NUMBERS, 0, 1.0000001]),
    *(("noise_multiplier", value) for value in [*NOT_NUMBERS, 0, MIN_NOISE_MULTIPLIER * 0.999]),
    *(("steps", value) for value in [*NOT_NUMBERS, 1.0, 0.5, MAX_STEPS + 1]),
    *(("accountant", value) for value in [None, "prv", "PLD", 1, ["pld"]]),
]
QUESTIONS = {
    epsilon: ("steps", "delta", "sample_rate", "noise_multiplier"),
    max_steps: ("target_epsilon", "delta", "sample_rate", "noise_multiplier"),
    noise_multiplier_for: ("target_epsilon", "delta", "sample_rate", "steps"),
    sample_rate_for: ("target_epsilon", "delta", "noise_multiplier", "steps"),
}
GOOD = {"target_epsilon": 1.0, "steps": 10, **QUICK}
BAD_QUESTIONS = [
    pytest.param(question, takes, name, value, id=f"{question.__name__}-{name}={str(value)[:12]}")
    for question, takes in QUESTIONS.items()
    for name, value in BAD
    if name in (*takes, "accountant")
]


@pytest.mark.parametrize(("question", "takes", "name", "value"), BAD_QUESTIONS)
def test_bad_input_is_refused_by_name(question, takes, name, value):
    arguments = {key: GOOD[key] for key in takes} | {name: value}
    with pytest.raises(InputError, match=rf"^{name}=.* must be .*; ") as error:
        question(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [5, None, "12", {1: 2}, [1, math.nan], [1, -1], [1.0]])
def test_a_curve_refuses_steps_that_are_not_whole(steps):
    with pytest.raises(InputError, match=r"^steps="):
        epsilon_curve(steps=steps, **QUICK)


@pytest.mark.parametrize("question", [noise_multiplier_for, sample_rate_for])
def test_calibration_refuses_no_steps(question):
    arguments = {key: GOOD[key] for key in QUESTIONS[question]} | {"steps": 0}
    with pytest.raises(InputError, match=r"^steps=0 must be an integer in \[1,"):
        question(**arguments)


def test_numpy_scalars_are_numbers():
    plain = epsilon(steps=10, **QUICK)
    delta, rate, sigma = (np.float64(QUICK[key]) for key in ("delta", "sample_rate", "noise_multiplier"))
    assert epsilon(steps=np.int64(10), delta=delta, sample_rate=rate, noise_multiplier=sigma) == plain  # pyright: ignore


def test_versions_name_the_library():
    assert accountant_version("pld") == "dp-accounting 0.6.0"
    assert accountant_version("rdp").startswith("opacus ")


# The cache. A planted answer is one that accounting cannot give, so that it shows whether it was believed.
PLANTED = 777


def remembered() -> int:
    """One question, asked past the memory: from disk or computed."""
    accounting._recall.cache_clear()
    return max_steps(target_epsilon=1.0, accountant="rdp", **QUICK)


def plant(entry: Path) -> None:
    """Replace the answer in a cache file by a false one, with a correct digest."""
    content = json.loads(entry.read_text())
    content["value"] = PLANTED
    content["digest"] = accounting._digest([content["question"], PLANTED])
    entry.write_text(json.dumps(content))


def only_entry(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_the_second_process_reads_the_answer_from_disk(cache):
    assert remembered() != PLANTED
    plant(only_entry(cache))
    assert remembered() == PLANTED


@pytest.mark.parametrize("forget", [False, True], ids=["memory", "disk"])
def test_a_known_answer_takes_under_a_millisecond(forget):
    remembered()
    durations = []
    for _ in range(20):
        if forget:
            accounting._recall.cache_clear()
        start = time.perf_counter()
        max_steps(target_epsilon=1.0, accountant="rdp", **QUICK)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1e-3  # the least: others may hold the processor


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"value": 777}', "\x00\xff"])
def test_a_corrupt_entry_is_computed_again(cache, content):
    expected = remembered()
    only_entry(cache).write_text(content, encoding="latin-1")
    assert remembered() == expected
    assert json.loads(only_entry(cache).read_text())["value"] == expected


def test_a_flipped_digit_is_not_believed(cache):
    expected = remembered()
    entry = only_entry(cache)
    entry.write_text(entry.read_text().replace(f'"value": {expected}', f'"value": {expected + 1}'))
    assert str(expected + 1) in entry.read_text()
    assert remembered() == expected


def test_an_entry_copied_under_another_key_is_not_believed(cache):
    expected = remembered()
    accounting._recall.cache_clear()
    max_steps(target_epsilon=50.0, accountant="rdp", **QUICK)
    mine, other = sorted(cache.iterdir(), key=lambda path: json.loads(path.read_text())["value"])
    shutil.copy(other, mine)
    assert json.loads(mine.read_text())["value"] > expected
    assert remembered() == expected


@pytest.mark.parametrize("library", ["dp-accounting", "opacus", "numpy", "scipy"])
def test_an_answer_of_another_library_version_is_not_reused(cache, monkeypatch, library):
    expected = remembered()
    plant(only_entry(cache))
    real = accounting._library_version
    monkeypatch.setattr(accounting, "_library_version", lambda name: "99" if name == library else real(name))
    assert remembered() == expected


def test_neighbouring_floats_are_different_questions(cache):
    for delta in (1e-5, math.nextafter(1e-5, 1)):
        max_steps(target_epsilon=1.0, accountant="rdp", **{**QUICK, "delta": delta})
    assert len(list(cache.iterdir())) == 2


def test_every_question_has_its_own_entry(cache):
    epsilon(steps=10, **QUICK)
    epsilon(steps=10, accountant="rdp", **QUICK)
    epsilon_curve(steps=[10], **QUICK)
    max_steps(target_epsilon=1.0, **QUICK)
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    expected = remembered()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert remembered() == expected


def test_the_cache_lies_in_the_home_without_a_configured_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remembered()
    assert len(list((tmp_path / "home" / ".cache" / "dpsink" / "accounting").iterdir())) == 1
