"""The bounds behind `accounting`, from arguments that are checked: by RDP, by PLD, and one search for all questions.

Every answer errs to the safe side: ε up, steps down, noise up, sampling down. That includes floating point: what the
libraries' rounding can add up to over the steps is charged (`_fft_slack`, `rdp_curve`).
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from dp_accounting.pld import common
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from opacus.accountants.analysis import rdp
from scipy.optimize import toms748

from dpsink.errors import InputError
from dpsink.privacy.mixture import TooWide, compose
from dpsink.privacy.questions import (
    MAX_NOISE_MULTIPLIER,
    MAX_STEPS,
    MIN_NOISE_MULTIPLIER,
    MIN_SAMPLE_RATE,
    Accountant,
    Mechanism,
)

_CALIBRATION_TOLERANCE = 5e-4  # relative; how near a calibrated value comes to the exact one
_SIGNIFICANT_DIGITS = 6  # of a calibrated value, so that a person can copy it
_MAX_GRID_POINTS = 2**22  # of a composed loss distribution: about 0.5 GB and 3 s
_MAX_MIXED_POINTS = 2**23  # of that of different mechanisms, whose transforms are real: as much memory
_UNIT_ROUNDOFF = 2.0**-53
_MIXED_INTERVAL = 1e-4  # nats; of the grid that different mechanisms share, dp-accounting's own
_TAIL_MASS = 1e-15  # that dp-accounting cuts off a composition and counts as a certain loss

# ---------------------------------------------------------------------------------------------------------------------
# RDP.

# Dense where most optima lie; next to 1 for budgets in the hundreds, up to 1024 for budgets of a few hundredths
# (binomial coefficients overflow beyond). Fractional orders only up to 11: there their series is accurate.
RDP_ORDERS = (
    *(1.01, 1.02, 1.05),
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *map(float, (*range(11, 65), 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)),
)


@functools.lru_cache(maxsize=1 << 14)  # at least the trials of a large study: its filter adds them up at each start
def rdp_curve(mechanism: Mechanism, orders: tuple[float, ...] = RDP_ORDERS) -> np.ndarray:
    """RDP of one step at each order: float64 [orders], > 0.

    Opacus returns log(A_α) / (α - 1). At small q that logarithm is lost in rounding and even comes out negative, which
    a million steps would turn into a claim. So its error is added: against 60 digits we measured ≤ 2e-16·(α + 1) for
    whole orders and ≤ 1.4e-13 for fractional ones, whose series is cut at e^-30.
    """
    sample_rate, noise_multiplier = mechanism
    curve = np.asarray(rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(orders)))
    order = np.array(orders)
    series_error = np.where(order % 1 == 0, 0.0, 5e-13)
    rounding = (series_error + 1e-15 * (order + 1)) / (order - 1) + 1e-12 * np.abs(curve)
    return np.nan_to_num(curve + rounding, nan=math.inf, posinf=math.inf)


def _rdp_overhead(delta: float) -> np.ndarray:
    """What the conversion adds to an RDP curve: ε = RDP + overhead, float64 [orders] (Balle et al. 2020, Thm. 21)."""
    orders = np.array(RDP_ORDERS)
    return np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)


def _rdp_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    return max(0.0, float(np.min(steps * rdp_curve(mechanism) + _rdp_overhead(delta))))


def _rdp_max_steps(mechanism: Mechanism, target_epsilon: float, delta: float) -> int:
    """The largest T that fits at some order, T ≤ (ε - overhead) / RDP; the caller settles the rounding."""
    with np.errstate(over="ignore"):
        fractional = float(np.max((target_epsilon - _rdp_overhead(delta)) / rdp_curve(mechanism)))
    return int(min(max(fractional, 0.0), MAX_STEPS))


# ---------------------------------------------------------------------------------------------------------------------
# PLD.


@functools.lru_cache(maxsize=64)
def _interval(mechanism: Mechanism) -> float:
    """Spacing of the grid of privacy losses, in nats: 1e-4 for ordinary mechanisms.

    Finer, to a tenth of the deviation, where one step's losses are small, and coarser where they span hundreds
    (building takes a second per 200,000 points). A finer grid is not always a tighter one: rounding in the library adds
    a mass of about span × 1e-17 / interval² to every step.
    """
    span = max(_loss_span(mechanism, AdjacencyType.ADD), _loss_span(mechanism, AdjacencyType.REMOVE))
    return min(max(span / 20_000, _step_mu(mechanism) / 10, 1e-5), max(1e-4, span / 200_000))


def _loss_span(mechanism: Mechanism, adjacency: AdjacencyType) -> float:
    """Width in nats of the range that dp-accounting covers with its grid for one step."""
    loss = GaussianPrivacyLoss(
        mechanism.noise_multiplier, sampling_prob=mechanism.sample_rate, adjacency_type=adjacency
    )
    bounds = loss.connect_dots_bounds()
    assert bounds.epsilon_upper is not None and bounds.epsilon_lower is not None  # the noise is continuous
    return float(bounds.epsilon_upper - bounds.epsilon_lower)


@functools.lru_cache(maxsize=64)  # a megabyte each; building takes longer than composing, and a grid has dozens
def _one_step(mechanism: Mechanism, interval: float) -> pld.PrivacyLossDistribution:
    """The pessimistic privacy loss distribution of one step, for adding and for removing a record."""
    step = pld.from_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier,
        sampling_prob=mechanism.sample_rate,
        value_discretization_interval=interval,
        pessimistic_estimate=True,
        use_connect_dots=True,
    )
    # A distribution of up to 1,000 points comes sparse, and composing a sparse one T times first computes the integer
    # size**T: it hangs for T in the millions, which the trials of a large study take together.
    return pld.PrivacyLossDistribution(step._pmf_remove.to_dense_pmf(), step._pmf_add.to_dense_pmf())


def _fft_slack(steps: int) -> float:
    """Bound on the δ that floating point hides in a composition of `steps` steps.

    The library composes by raising an FFT to the power T, and takes one step's δ from differences of normal
    probabilities: both err by a few unit roundoffs a step. Against 80-bit FFTs we measured up to 2.1 of them for a few
    steps, 0.6 in the long run, on either side, and of different mechanisms together up to 2.3; 8 are charged. That
    costs 0.003 % of the steps of an MNIST run.
    """
    return 8 * _UNIT_ROUNDOFF * steps


def _composed_points(mechanism: Mechanism, steps: int) -> int:
    """Grid points of a composition, by the library's own tail bounds.

    They run to 10^7 and beyond where one step's grid is short (the bounds are loose) or rounding has added mass.
    """
    step = _one_step(mechanism, _interval(mechanism))
    bounds = (
        common.compute_self_convolve_bounds(pmf.to_dense_pmf()._probs, steps, _TAIL_MASS)  # pyright: ignore[reportArgumentType]
        for pmf in (step._pmf_remove, step._pmf_add)
    )
    return max(high - low + 1 for low, high in bounds)


def _has_pld(mechanism: Mechanism, steps: int, delta: float) -> bool:
    """Whether rounding stays below δ and the composition fits into memory; RDP answers for the others."""
    return 2 * _fft_slack(steps) < delta and _composed_points(mechanism, steps) <= _MAX_GRID_POINTS


def _composed(mechanism: Mechanism, steps: int) -> pld.PrivacyLossDistribution:
    with np.errstate(over="ignore", invalid="ignore"):  # added mass can overflow; the callers check for NaN
        return _one_step(mechanism, _interval(mechanism)).self_compose(steps, tail_mass_truncation=_TAIL_MASS)


def _pld_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    allowed = delta - _fft_slack(steps)
    composed = _composed(mechanism, steps)
    delta_at_zero = float(composed.get_delta_for_epsilon(0.0))
    if not math.isfinite(delta_at_zero):
        return math.inf
    # The library's walk down the losses is only safe from overflow while ε is positive.
    return 0.0 if delta_at_zero <= allowed else float(composed.get_epsilon_for_delta(allowed))


def _pld_log_excess(mechanism: Mechanism, steps: int, target_epsilon: float, delta: float) -> float:
    """ln of δ(steps; target ε) over the allowed δ: smooth in all arguments, > 0 where the target is exceeded."""
    spent = float(_composed(mechanism, steps).get_delta_for_epsilon(target_epsilon))
    return math.log(max(spent, 1e-300) / (delta - _fft_slack(steps))) if math.isfinite(spent) else math.inf


def mixed_pld_epsilon(parts: Sequence[tuple[Mechanism, int]], delta: float) -> float:
    """ε of different mechanisms together, each for at least one step; infinite where PLD has no answer."""
    allowed = delta - _fft_slack(sum(steps for _, steps in parts))
    if allowed <= 0:
        return math.inf
    losses = [(_one_step(mechanism, _MIXED_INTERVAL), steps) for mechanism, steps in parts]
    removing = [(step._pmf_remove.to_dense_pmf(), steps) for step, steps in losses]
    adding = [(step._pmf_add.to_dense_pmf(), steps) for step, steps in losses]
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # as in `_composed`
            remove, add = (compose(each, _TAIL_MASS, _MAX_MIXED_POINTS) for each in (removing, adding))
            together = pld.PrivacyLossDistribution(remove, add)
            delta_at_zero = float(together.get_delta_for_epsilon(0.0))
    except TooWide:
        return math.inf
    return float(together.get_epsilon_for_delta(allowed)) if math.isfinite(delta_at_zero) else math.inf


def _gaussian_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    """ε of T plain Gaussian releases = one with noise σ / √T, in closed form (Balle & Wang 2018, Thm. 8)."""
    exact = get_epsilon_gaussian(mechanism.noise_multiplier / math.sqrt(steps), delta)
    return float(exact * (1 + 1e-12) + 2e-12)  # the library's root is good to 1e-12 on either side


# ---------------------------------------------------------------------------------------------------------------------
# The answers, from checked input.


def epsilon(accountant: Accountant, *, steps: int, delta: float, mechanism: Mechanism) -> float:
    """ε ≥ 0 that `steps` ≥ 0 steps spend, at most."""
    if steps == 0:
        return 0.0
    bound = _rdp_epsilon(mechanism, steps, delta)
    if accountant == "rdp":
        return bound
    if mechanism.sample_rate == 1:
        return min(bound, _gaussian_epsilon(mechanism, steps, delta))
    if _has_pld(mechanism, steps, delta):
        return min(bound, _pld_epsilon(mechanism, steps, delta))
    return bound


def epsilon_curve(
    accountant: Accountant, *, steps: tuple[int, ...], delta: float, mechanism: Mechanism
) -> tuple[float, ...]:
    """`epsilon` at each of `steps`."""
    return tuple(epsilon(accountant, steps=each, delta=delta, mechanism=mechanism) for each in steps)


def _excess(accountant: Accountant, *, steps: int, target_epsilon: float, delta: float, mechanism: Mechanism) -> float:
    """A number with the sign of ε - target, in units in which the search converges fast."""
    bound = _rdp_epsilon(mechanism, steps, delta) - target_epsilon
    if accountant == "rdp" or bound <= 0:
        return bound
    if mechanism.sample_rate == 1:
        return _gaussian_epsilon(mechanism, steps, delta) - target_epsilon
    if _has_pld(mechanism, steps, delta):
        return _pld_log_excess(mechanism, steps, target_epsilon, delta)
    return bound


def max_steps(accountant: Accountant, *, target_epsilon: float, delta: float, mechanism: Mechanism) -> int:
    """The largest T ≤ MAX_STEPS with ε(T) ≤ `target_epsilon`."""

    def fits(steps: int) -> bool:
        if _rdp_epsilon(mechanism, steps, delta) <= target_epsilon:  # spares a composition: ε is never more
            return True
        return epsilon(accountant, steps=steps, delta=delta, mechanism=mechanism) <= target_epsilon

    steps = _rdp_max_steps(mechanism, target_epsilon, delta)
    if accountant == "pld" and steps < MAX_STEPS:
        steps = _pld_max_steps(mechanism, target_epsilon, delta)
    # Both starts are right up to rounding, and the search reads δ at the target: the promise is about ε at δ.
    while steps > 0 and not fits(steps):
        steps -= 1
    while steps < MAX_STEPS and fits(steps + 1):
        steps += 1
    return steps


def _pld_max_steps(mechanism: Mechanism, target_epsilon: float, delta: float) -> int:
    def excess(steps: float) -> float:
        return _excess("pld", steps=int(steps), target_epsilon=target_epsilon, delta=delta, mechanism=mechanism)

    guess = (_gaussian_mu(target_epsilon, delta) / _step_mu(mechanism)) ** 2
    found = _last_that_fits(excess, guess=guess, safe=1, unsafe=MAX_STEPS, snap=round, tolerance=0.0)
    return 0 if found is None else int(found)


def noise_multiplier_for(
    accountant: Accountant, *, target_epsilon: float, delta: float, sample_rate: float, steps: int
) -> float:
    """The smallest noise multiplier that fits, rounded up; raises InputError where none does."""
    mu = _gaussian_mu(target_epsilon, delta) / sample_rate / math.sqrt(steps)
    found = _calibrated(
        lambda noise_multiplier: Mechanism(sample_rate, noise_multiplier),
        accountant,
        target_epsilon=target_epsilon,
        delta=delta,
        steps=steps,
        guess=1 / math.sqrt(max(np.logaddexp(0.0, 2 * math.log(mu)), 1e-300)),  # μ = √(e^{1/σ²} - 1)
        safe=MAX_NOISE_MULTIPLIER,
        unsafe=MIN_NOISE_MULTIPLIER,
    )
    if found is None:
        raise InputError(
            f"target_epsilon={target_epsilon!r} is not reached with noise_multiplier <= {MAX_NOISE_MULTIPLIER:g};"
            f" raise target_epsilon, or lower steps={steps} or sample_rate={sample_rate!r}"
        )
    return found


def sample_rate_for(
    accountant: Accountant, *, target_epsilon: float, delta: float, noise_multiplier: float, steps: int
) -> float:
    """The largest sample rate that fits, rounded down; raises InputError where none does."""
    every_record = Mechanism(1.0, noise_multiplier)
    found = _calibrated(
        lambda sample_rate: Mechanism(sample_rate, noise_multiplier),
        accountant,
        target_epsilon=target_epsilon,
        delta=delta,
        steps=steps,
        guess=_gaussian_mu(target_epsilon, delta) / _step_mu(every_record) / math.sqrt(steps),
        safe=MIN_SAMPLE_RATE,
        unsafe=1.0,
    )
    if found is None:
        raise InputError(
            f"target_epsilon={target_epsilon!r} is exceeded even at sample_rate={MIN_SAMPLE_RATE:g};"
            f" raise target_epsilon or noise_multiplier={noise_multiplier!r}, or lower steps={steps}"
        )
    return found


def _calibrated(
    mechanism: Callable[[float], Mechanism],
    accountant: Accountant,
    *,
    target_epsilon: float,
    delta: float,
    steps: int,
    guess: float,
    safe: float,
    unsafe: float,
) -> float | None:
    """The parameter of `mechanism` nearest to `unsafe` at which `steps` steps fit; None where none does."""

    def excess(value: float) -> float:
        budget = {"steps": steps, "delta": delta, "target_epsilon": target_epsilon}
        return _excess(accountant, mechanism=mechanism(value), **budget)

    def spent(value: float) -> float:
        return epsilon(accountant, steps=steps, delta=delta, mechanism=mechanism(value))

    found = _last_that_fits(excess, guess, safe=safe, unsafe=unsafe, snap=_rounded, tolerance=_CALIBRATION_TOLERANCE)
    # The search compared δ at the target; the promise is about ε at δ, which can differ by rounding.
    while found is not None and found != safe and spent(found) > target_epsilon:
        found = _toward(found, safe, 1 + 1e-5, _rounded)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One search for all three questions: the last value on the way from a safe to an unsafe limit that still fits.


def _last_that_fits(
    excess: Callable[[float], float],
    guess: float,
    *,
    safe: float,
    unsafe: float,
    snap: Callable[[float], float],
    tolerance: float,
) -> float | None:
    """The value nearest to `unsafe` with excess(value) ≤ 0, found with few evaluations from a good `guess`.

    Args:
        excess: Changes sign once between the limits, ≤ 0 on the side of `safe`.
        guess: Where to start; any number.
        safe: Limit > 0 at which the excess is smallest.
        unsafe: Limit > 0 at which it is largest.
        snap: Rounds a value to those that may be returned.
        tolerance: Relative distance to a value that does not fit; 0.0 asks for the neighbour.

    Returns:
        A value whose own excess was seen to be ≤ 0; None where there is none.
    """
    seen = functools.lru_cache(maxsize=None)(excess)
    start = snap(min(max(guess, min(safe, unsafe)), max(safe, unsafe)))
    fitting, failing = _bracket(seen, start, safe=safe, unsafe=unsafe, snap=snap)
    if fitting is None or failing is None:
        return fitting
    return _narrowed(seen, fitting, failing, snap=snap, tolerance=tolerance)


def _toward(value: float, limit: float, factor: float, snap: Callable[[float], float]) -> float:
    moved = snap(value * factor if limit > value else value / factor)
    return min(moved, limit) if limit > value else max(moved, limit)


def _bracket(
    excess: Callable[[float], float],
    start: float,
    *,
    safe: float,
    unsafe: float,
    snap: Callable[[float], float],
) -> tuple[float | None, float | None]:
    """A value that fits and one that does not, by growing steps from `start`; None where a limit was reached first."""
    fitting = failing = None
    value, factor = start, 1.05
    while True:
        if excess(value) <= 0:
            fitting, limit = value, unsafe
        else:
            failing, limit = value, safe
        if value == limit or (fitting is not None and failing is not None):
            return fitting, failing
        value, factor = _toward(value, limit, factor, snap), min(factor**2, 1e3)


def _narrowed(
    excess: Callable[[float], float],
    fitting: float,
    failing: float,
    *,
    snap: Callable[[float], float],
    tolerance: float,
) -> float:
    """Close a bracket on the logarithmic scale (TOMS 748), then by halves down to neighbours or `tolerance`."""
    best = {True: fitting, False: failing}

    def visit(log_value: float) -> float:
        value = snap(math.exp(log_value))
        result = excess(value)
        side = result <= 0
        if abs(math.log(value / best[not side])) < abs(math.log(best[side] / best[not side])):
            best[side] = value
        return min(max(result, -1e3), 1e3)  # a mechanism beyond accounting has infinite excess

    low, high = sorted((math.log(fitting), math.log(failing)))
    toms748(visit, low, high, xtol=tolerance / 2 or 0.25 / max(fitting, failing))
    while abs(math.log(best[True] / best[False])) > tolerance:
        middle = snap((best[True] + best[False]) / 2)
        if middle in best.values():
            break
        visit(math.log(middle))
    return best[True]


def _gaussian_mu(target_epsilon: float, delta: float) -> float:
    """Signal-to-noise ratio μ of the one Gaussian release that is about (ε, δ)-DP: it only guides the search."""
    bounded = min(max(target_epsilon, 1e-6), 1e6)  # where the library's own search is quick and does not overflow
    return 1 / float(get_sigma_gaussian(bounded, min(max(delta, 1e-100), 0.9)))


def _step_mu(mechanism: Mechanism) -> float:
    """Signal-to-noise ratio of one step in the central limit: q·√(e^{1/σ²} - 1) (Bu et al. 2020)."""
    return mechanism.sample_rate * math.sqrt(math.expm1(mechanism.noise_multiplier**-2))


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
