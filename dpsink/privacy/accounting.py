"""How much privacy training spends: ε ↔ steps ↔ noise multiplier ↔ sample rate.

The mechanism is the Poisson-subsampled Gaussian under add/remove one record: in every step each record joins with
probability `sample_rate`, and the released sum carries Gaussian noise of standard deviation `noise_multiplier` ×
sensitivity. Two accountants bound its ε:

- ``pld``, the reference: connect-the-dots privacy loss distributions (dp-accounting; Doroshenko et al. 2022,
  https://arxiv.org/abs/2207.04380), or the closed form where sample_rate = 1, and never more than ``rdp``.
- ``rdp``: Rényi curves (Opacus; Mironov et al. 2019, https://arxiv.org/abs/1908.10530), looser and nearly instant.

Every answer errs to the safe side: ε up, steps down, noise up, sampling down. That includes floating point: what the
libraries' rounding can add up to over the steps is charged (`bounds.py`). Answers are kept in memory and, one small
file each, under ``$XDG_CACHE_HOME/dpsink/accounting``.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpsink.disk import cache_folder
from dpsink.errors import InputError
from dpsink.privacy.questions import (
    Accountant,
    check_accountant,
    check_delta,
    check_mechanism,
    check_noise_multiplier,
    check_sample_rate,
    check_target_epsilon,
    check_whole,
    shown,
)

_REVISION = 1  # of the arithmetic in `bounds`; raise it whenever an answer may change

# ---------------------------------------------------------------------------------------------------------------------
# Questions that callers ask.


def epsilon(
    *, steps: int, delta: float, sample_rate: float, noise_multiplier: float, accountant: Accountant = "pld"
) -> float:
    """ε that `steps` steps spend: an upper bound.

    Args:
        steps: Number of noisy releases, an integer in [0, MAX_STEPS]; empty batches count.
        delta: δ in (0, 1).
        sample_rate: Poisson probability of each record in a step, in (0, 1]; 1 is the plain Gaussian.
        noise_multiplier: Noise standard deviation over sensitivity, ≥ MIN_NOISE_MULTIPLIER.
        accountant: ``pld`` or ``rdp``.

    Returns:
        ε ≥ 0; 0.0 for no steps.

    Raises:
        InputError: An argument is not a number in its range.
    """
    return _answer(
        "epsilon",
        accountant,
        steps=check_whole("steps", steps, low=0),
        delta=check_delta(delta),
        mechanism=check_mechanism(sample_rate, noise_multiplier),
    )


def epsilon_curve(
    *,
    steps: Sequence[int],
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: Accountant = "pld",
) -> list[float]:
    """`epsilon` at several numbers of steps, in their order; the loss distribution is built once for all.

    Args:
        steps: Integers in [0, MAX_STEPS], in any order; may be empty.
        delta: δ in (0, 1).
        sample_rate: Poisson probability of each record in a step, in (0, 1].
        noise_multiplier: Noise standard deviation over sensitivity, ≥ MIN_NOISE_MULTIPLIER.
        accountant: ``pld`` or ``rdp``.

    Returns:
        One upper bound of ε for each entry of `steps`.

    Raises:
        InputError: An argument is not a number in its range, or `steps` is not a sequence.
    """
    if isinstance(steps, str | bytes) or not isinstance(steps, Sequence | np.ndarray):
        raise InputError(f"steps={shown(steps)} must be a sequence of integers; give a list such as [100, 200]")
    points = tuple(check_whole("steps", each, low=0) for each in steps)
    mechanism = check_mechanism(sample_rate, noise_multiplier)
    return list(_answer("epsilon_curve", accountant, steps=points, delta=check_delta(delta), mechanism=mechanism))


def max_steps(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: Accountant = "pld",
) -> int:
    """The largest number of steps T with ε(T) ≤ `target_epsilon`; both ε(T) and ε(T + 1) were evaluated.

    Args:
        target_epsilon: ε > 0, finite.
        delta: δ in (0, 1).
        sample_rate: Poisson probability of each record in a step, in (0, 1].
        noise_multiplier: Noise standard deviation over sensitivity, ≥ MIN_NOISE_MULTIPLIER.
        accountant: ``pld`` or ``rdp``.

    Returns:
        T in [0, MAX_STEPS]: 0 when not even one step fits, MAX_STEPS when the budget allows that many or more.

    Raises:
        InputError: An argument is not a number in its range.
    """
    return _answer(
        "max_steps",
        accountant,
        target_epsilon=check_target_epsilon(target_epsilon),
        delta=check_delta(delta),
        mechanism=check_mechanism(sample_rate, noise_multiplier),
    )


def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The smallest noise multiplier with ε(steps) ≤ `target_epsilon`, rounded up.

    Args:
        target_epsilon: ε > 0, finite.
        delta: δ in (0, 1).
        sample_rate: Poisson probability of each record in a step, in (0, 1].
        steps: Number of noisy releases, an integer in [1, MAX_STEPS].
        accountant: ``pld`` or ``rdp``.

    Returns:
        Noise standard deviation over sensitivity, in [MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER], at most 0.1 % above
        the smallest that the accountant allows there.

    Raises:
        InputError: An argument is not a number in its range, or no noise up to MAX_NOISE_MULTIPLIER is enough.
    """
    return _answer(
        "noise_multiplier_for",
        accountant,
        target_epsilon=check_target_epsilon(target_epsilon),
        delta=check_delta(delta),
        sample_rate=check_sample_rate(sample_rate),
        steps=check_whole("steps", steps, low=1),
    )


def sample_rate_for(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: Accountant = "pld",
) -> float:
    """The largest Poisson sample rate with ε(steps) ≤ `target_epsilon`, rounded down.

    Args:
        target_epsilon: ε > 0, finite.
        delta: δ in (0, 1).
        noise_multiplier: Noise standard deviation over sensitivity, ≥ MIN_NOISE_MULTIPLIER.
        steps: Number of noisy releases, an integer in [1, MAX_STEPS].
        accountant: ``pld`` or ``rdp``.

    Returns:
        Probability in [MIN_SAMPLE_RATE, 1], at most 0.1 % below the largest that the accountant allows there.

    Raises:
        InputError: An argument is not a number in its range, or even MIN_SAMPLE_RATE spends more.
    """
    return _answer(
        "sample_rate_for",
        accountant,
        target_epsilon=check_target_epsilon(target_epsilon),
        delta=check_delta(delta),
        noise_multiplier=check_noise_multiplier(noise_multiplier),
        steps=check_whole("steps", steps, low=1),
    )


def accountant_version(accountant: Accountant) -> str:
    """The library behind `accountant` with its version, for records: ``dp-accounting 0.6.0``.

    Raises:
        InputError: `accountant` is neither ``pld`` nor ``rdp``.
    """
    return _library_version("dp-accounting" if check_accountant(accountant) == "pld" else "opacus")


# ---------------------------------------------------------------------------------------------------------------------
# The cache. An entry names its whole question, so that no answer can serve another one.

_Value = int | float | tuple[float, ...]


def _answer(function: str, accountant: object, **arguments: Any) -> Any:
    known = check_accountant(accountant)
    return _recall(function, known, _versions(), tuple(sorted(arguments.items())))


@functools.lru_cache(maxsize=4096)
def _recall(function: str, accountant: Accountant, versions: tuple[str, ...], arguments: tuple) -> _Value:
    """The answer from memory (this cache), from disk, or computed and then kept in both."""
    question = {
        "function": function,
        "accountant": accountant,
        "versions": list(versions),
        "arguments": {name: _exact(value) for name, value in arguments},
    }
    stored = _read(question)
    if stored is not None:
        return stored
    value = _compute(function, accountant, dict(arguments))
    _write(question, value)
    return value


def _compute(function: str, accountant: Accountant, arguments: dict[str, Any]) -> _Value:
    from dpsink.privacy import bounds  # its libraries take seconds to load, which an answer on disk spares

    return getattr(bounds, function)(accountant, **arguments)


def _versions() -> tuple[str, ...]:
    """Everything whose change may change an answer; the tighter accountant uses the other one's library too."""
    numerics = (_library_version("numpy"), _library_version("scipy"))
    return (f"accounting {_REVISION}", accountant_version("pld"), accountant_version("rdp"), *numerics)


@functools.cache
def _library_version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def _exact(value: object) -> Any:
    """`value` for a question: floats by their bits, so that none is rounded onto another."""
    if isinstance(value, tuple):
        return [_exact(each) for each in value]
    return value.hex() if isinstance(value, float) else value


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(question: dict) -> _Value | None:
    """The stored answer to exactly this question, or None: missing, unreadable, damaged, or another's."""
    try:
        entry = json.loads((cache_folder("accounting") / f"{_digest(question)}.json").read_text())
        # The second digest covers the answer: a flipped digit must not become a budget.
        if entry["question"] != question or entry["digest"] != _digest([question, entry["value"]]):
            return None
        value = entry["value"]
        return tuple(value) if isinstance(value, list) else value
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def _write(question: dict, value: _Value) -> None:
    """Store an answer, whole or not at all; a folder that cannot be written only costs time."""
    entry = {"question": question, "value": value, "digest": _digest([question, value])}
    try:
        folder = cache_folder("accounting")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(descriptor, "w") as file:
            json.dump(entry, file)
        os.replace(temporary, folder / f"{_digest(question)}.json")
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return
