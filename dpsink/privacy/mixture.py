"""The privacy loss distribution of different mechanisms, each for many steps, in one Fourier transform.

dp-accounting composes mechanism by mechanism and looks for the ends of each result by itself: up to ten times as long,
in which the driver of a study hears nobody. Here the transforms of all are raised to their powers and multiplied, and
the ends are looked for once (Koskela, Jälkö, Prediger, Honkela 2021, "Tight differential privacy for discrete-valued
mechanisms and for the subsampled Gaussian mechanism using FFT").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf
from scipy.fft import next_fast_len

# Of Chernoff's bound, in standard deviations of the sum: about 8.4 would be best for a normal one and a mass of 1e-15,
# less where its tail is heavy.
_ORDERS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0)
_LEAST = 1e-290  # of a sum of exponentials: below it terms that count may have underflowed
Part = tuple[DensePLDPmf, int]  # the loss of one step, and how many steps


class TooWide(Exception):
    """The sum has more grid points than asked for."""


@dataclass(frozen=True)
class _Window:
    """Where the sum of all indices lies, but for the mass that was asked for on either side."""

    low: int
    high: int

    @property
    def points(self) -> int:
        return self.high - self.low + 1


def compose(parts: Sequence[Part], tail_mass: float, most_points: int) -> DensePLDPmf:
    """The distribution of the sum of all steps' losses, pessimistic as they are.

    Args:
        parts: on the same grid; at least one.
        tail_mass: that is cut off at most, and counts as a certain loss.
        most_points: of the result.

    Returns:
        The distribution; not finite, with NumPy's warnings, where rounding has added so much mass that it overflows.

    Raises:
        TooWide: it has more.
    """
    window = _window(parts, tail_mass)
    if window.points > most_points:
        raise TooWide
    least = max(window.points, *(pmf.size for pmf, _ in parts))
    length: Any = next_fast_len(least, real=True)  # scipy tells no type
    # Indices come out modulo the length; what lies outside of the window lands in it, on top of being counted as lost.
    probs = np.roll(np.fft.irfft(_spectrum(parts, length), length), -window.low)[: window.points]
    lowest = sum(steps * pmf._lower_loss for pmf, steps in parts) + window.low
    finite = sum(steps * math.log1p(-pmf._infinity_mass) for pmf, steps in parts)
    return DensePLDPmf(parts[0][0]._discretization, lowest, probs, tail_mass - math.expm1(finite), True)


def _spectrum(parts: Sequence[Part], length: int) -> np.ndarray:
    """The product of the transforms' powers, by modulus and phase: five times as fast as complex powers."""
    modulus, phase = np.zeros(length // 2 + 1), np.zeros(length // 2 + 1)
    for pmf, steps in parts:
        transform = np.fft.rfft(pmf._probs, length)
        with np.errstate(divide="ignore"):  # a frequency that is not there
            modulus += steps * np.log(np.abs(transform))
        phase += steps * np.angle(transform)
    return np.exp(modulus) * np.exp(1j * phase)


def _window(parts: Sequence[Part], tail_mass: float) -> _Window:
    """By Chernoff's bound on either side at the best of some orders, and never beyond what can be."""
    spread = math.sqrt(sum(steps * _variance(pmf) for pmf, steps in parts))
    most = sum(steps * (pmf.size - 1) for pmf, steps in parts)
    orders = np.array(_ORDERS) / max(spread, 1.0)
    logarithm = math.log(2 / tail_mass)
    upper = (sum(steps * _log_mgf(pmf, orders) for pmf, steps in parts) + logarithm) / orders
    lower = -(sum(steps * _log_mgf(pmf, -orders) for pmf, steps in parts) + logarithm) / orders
    high = min([most, *(math.ceil(bound) for bound in upper if math.isfinite(bound))])
    return _Window(max([0, *(math.floor(bound) for bound in lower if math.isfinite(bound))]), high)


def _variance(pmf: DensePLDPmf) -> float:
    """Of one step's index."""
    index = np.arange(pmf.size)
    mass = pmf._probs.sum()
    mean = pmf._probs @ index / mass
    return float(pmf._probs @ (index - mean) ** 2 / mass)


def _log_mgf(pmf: DensePLDPmf, orders: np.ndarray) -> np.ndarray:
    """ln E[exp(order · index)] of one step: float64 [orders]; infinite where it cannot be told."""
    index = np.arange(pmf.size)
    shift = np.where(orders > 0, orders * (pmf.size - 1), 0.0)  # the largest exponent, so that nothing overflows
    sums = np.array([np.exp(order * index - most) @ pmf._probs for order, most in zip(orders, shift, strict=True)])
    # Too small a value would cut off more than was asked for.
    return np.where(sums > _LEAST, np.log(np.maximum(sums, _LEAST)) + shift, math.inf)
