"""What may be asked of an accountant: the numbers' ranges, checked before a library sees any (q = NaN hangs Opacus)."""

import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from dpsink.errors import InputError

Accountant = Literal["pld", "rdp"]

MIN_NOISE_MULTIPLIER = 0.1  # here one drawn record's step costs ε ≈ 90; below, a loss grid of 1e-4 takes minutes
MAX_NOISE_MULTIPLIER = 1e6  # more noise is accounted as this much
MIN_SAMPLE_RATE = 1e-9  # rarer sampling is accounted as this rate
MAX_STEPS = 10**9  # the largest number of steps that is accounted or given


class Mechanism(NamedTuple):
    """One step: Poisson rate in [MIN_SAMPLE_RATE, 1], noise multiplier ≤ MAX_NOISE_MULTIPLIER."""

    sample_rate: float
    noise_multiplier: float


def shown(value: object) -> str:
    """A value in one short line."""
    return " ".join(reprlib.repr(value).split())


def _number(name: str, value: object, rule: str, within: Callable[[float], bool]) -> float:
    """`value` as a float where it is a real number (no bool) and `within` holds (which no NaN passes)."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the floats
            number = math.inf
        if within(number):
            return number
    raise InputError(f"{name}={shown(value)} must be {rule}")


def check_target_epsilon(value: object) -> float:
    """ε > 0, finite; raises InputError for anything else."""
    rule = "a finite number > 0; give for example 10 (training without privacy has no budget to account)"
    return _number("target_epsilon", value, rule, lambda x: 0 < x < math.inf)


def check_delta(value: object) -> float:
    """δ in (0, 1); raises InputError for anything else."""
    rule = "in (0, 1); use less than 1 / (number of records), for example 1e-5"
    return _number("delta", value, rule, lambda x: 0 < x < 1)


def check_sample_rate(value: object) -> float:
    """A probability in (0, 1], raised to MIN_SAMPLE_RATE; raises InputError for anything else."""
    rule = "in (0, 1]; use batch size / number of records"
    return max(_number("sample_rate", value, rule, lambda x: 0 < x <= 1), MIN_SAMPLE_RATE)


def check_noise_multiplier(value: object) -> float:
    """At least MIN_NOISE_MULTIPLIER, lowered to MAX_NOISE_MULTIPLIER; raises InputError for anything else."""
    rule = f"finite and >= {MIN_NOISE_MULTIPLIER}; choose 0.5 or more"
    number = _number("noise_multiplier", value, rule, lambda x: MIN_NOISE_MULTIPLIER <= x < math.inf)
    return min(number, MAX_NOISE_MULTIPLIER)


def check_mechanism(sample_rate: object, noise_multiplier: object) -> Mechanism:
    """A step of both checked values."""
    return Mechanism(check_sample_rate(sample_rate), check_noise_multiplier(noise_multiplier))


def check_whole(name: str, value: object, *, low: int) -> int:
    """An integer in [low, MAX_STEPS]; raises InputError for anything else."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        whole = int(value)
        if low <= whole <= MAX_STEPS:
            return whole
    raise InputError(
        f"{name}={shown(value)} must be an integer in [{low}, {MAX_STEPS}]; give a number of steps in that range"
    )


def check_accountant(accountant: object) -> Accountant:
    """`pld` or `rdp`; raises InputError for anything else."""
    for known in get_args(Accountant):
        if isinstance(accountant, str) and accountant == known:
            return known
    raise InputError(f"accountant={shown(accountant)} must be 'pld' or 'rdp'; use 'pld', the tighter one")
