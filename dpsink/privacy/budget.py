"""The privacy budget of one trial: steps are reserved durably before their noise is drawn.

A crash may leave steps that were reserved and never run, but none that ran and were not reserved: the charge
can be too high after a crash, and never too low.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpsink.errors import InputError
from dpsink.privacy.storage import GENESIS, Chain, Storage, as_storage, read_entries


@dataclass(frozen=True)
class BudgetTerms:
    """All that a trial's guarantee is computed from; none of it may change when the trial resumes.

    Args:
        mechanism: name of the mechanism, `record` or `batch`.
        noise_multiplier: noise standard deviation over sensitivity (σ), >= 0; 0 only without privacy.
        sample_rate: probability (q) with which a record joins a step, in [0, 1].
        clip_norm: L2 bound (C) of the clipped quantity, > 0.
        records: number of private records (N), public, >= 1.
        delta: δ of the trial, in [0, 1).
        target_epsilon: ε that the trial may spend, > 0; infinite without privacy.
        steps_allowed: steps (T) that spend at most `target_epsilon`, >= 1.
        data_fingerprint: keyed fingerprint of the private records.

    Raises:
        InputError: a value is outside its range.
    """

    mechanism: str
    noise_multiplier: float
    sample_rate: float
    clip_norm: float
    records: int
    delta: float
    target_epsilon: float
    steps_allowed: int
    data_fingerprint: str

    def __post_init__(self) -> None:
        rules = {
            "noise_multiplier": (0 <= self.noise_multiplier < math.inf, "in [0, inf)"),
            "sample_rate": (0 <= self.sample_rate <= 1, "in [0, 1]"),
            "clip_norm": (0 < self.clip_norm < math.inf, "in (0, inf)"),
            "records": (self.records >= 1, ">= 1"),
            "delta": (0 <= self.delta < 1, "in [0, 1)"),
            "target_epsilon": (self.target_epsilon > 0, "> 0"),
            "steps_allowed": (self.steps_allowed >= 1, ">= 1"),
        }
        for field, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"{field}={getattr(self, field)!r} must be {rule}; correct it in the trial")


class TrialBudget:
    """Write-ahead reservations of one trial; a context manager. Use `TrialBudget.open`.

    Each reservation is a new object `<attempt>-<start>-<end>.json` in the ledger: `start` and `end` count all
    steps reserved so far, those given back included, so a name never returns. Charged is the sum over the
    objects: steps that are replayed after a crash are reserved, and charged, again.

    A TrialBudget is used by one thread and not across a fork.
    """

    def __init__(self, chain: Chain, terms: BudgetTerms) -> None:
        self.terms = terms
        self._chain = chain
        self._reserved, self._given_back = _totals(chain.data)  # steps since the ledger began
        self._last: tuple[str, int] | None = None  # object and size of the reservation that may be settled

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str] | Storage,
        terms: BudgetTerms,
        *,
        witness: Mapping[str, Any] | None = None,
    ) -> TrialBudget:
        """Open a trial's ledger as its next attempt, or create it.

        Args:
            place: the ledger's own folder, created if needed, or its storage.
            terms: the trial's terms.
            witness: `witness()` as stored in the checkpoint that is resumed; always pass it. Without it, a
                ledger that lost its newest objects, or all, cannot be told from a younger one.

        Raises:
            InputError: in use by another process, or a term has changed.
            DamagedLedger: the ledger does not hold all that was written to it.
            OSError: the storage failed.
        """
        return cls(Chain.open(as_storage(place), asdict(terms), witness=witness), terms)

    @property
    def allowed(self) -> int:
        """Steps (T) that the trial may run over its whole life."""
        return self.terms.steps_allowed

    @property
    def charged(self) -> int:
        """Steps charged so far, in [steps run, allowed]."""
        # More than T can be on record only if an attempt was replaced while it reserved: it was granted
        # nothing (see Chain.append), so T still bounds what ran.
        return min(self.allowed, self._reserved - self._given_back)

    @property
    def remaining(self) -> int:
        """Steps that can still be reserved."""
        return self.allowed - self.charged

    @property
    def attempt(self) -> int:
        """How often the ledger has been opened, this time included."""
        return self._chain.attempt

    def reserve(self, steps: int) -> int:
        """Reserve steps, durable before this returns; only then may their noise be drawn.

        Args:
            steps: steps wanted, >= 0.

        Returns:
            Steps granted: min(steps, remaining), 0 when the budget is exhausted.

        Raises:
            ValueError: negative steps.
            FencedError: a newer attempt has opened the ledger; nothing is granted.
            OSError: the storage failed (a full disk); nothing is granted.
        """
        granted = min(_whole_number("steps", steps), self.remaining)
        if granted == 0:
            self._chain.refuse_if_fenced()
            return 0
        start, end = self._reserved, self._reserved + granted
        name = f"{self.attempt:06d}-{start:012d}-{end:012d}"
        self._chain.append(f"{name}.json", {"reserved": granted})
        self._reserved, self._last = end, (name, granted)
        return granted

    def settle(self, used: int) -> None:
        """At a clean stop, give back what the last reservation has left; nothing more runs under it.

        Args:
            used: steps that ran under the last reservation, in [0, its size].

        Raises:
            ValueError: `used` is outside that range.
            RuntimeError: this attempt has no reservation that is not settled.
            FencedError: a newer attempt has opened the ledger.
            OSError: the storage failed; the reservation stays charged in full.
        """
        if self._last is None:
            raise RuntimeError("nothing to settle: this attempt has no open reservation")
        name, granted = self._last
        if _whole_number("used", used) > granted:
            raise ValueError(f"used={used} must be <= {granted}, the size of the last reservation")
        # Even if the write below fails it may have been recorded: a second, higher figure would not count.
        self._last = None
        if used < granted:
            self._chain.append(f"{name}-settled.json", {"given_back": granted - used})
            self._given_back += granted - used

    def refuse_if_fenced(self) -> None:
        """Raise FencedError if a newer attempt has opened the ledger: the trial is another's to go on with."""
        self._chain.refuse_if_fenced()

    def witness(self) -> dict[str, Any]:
        """What a checkpoint stores, and `open` verifies on resume; JSON-able."""
        return {**self._chain.witness(), "charged": self.charged}

    def close(self) -> None:
        """Release the ledger. What is reserved and not settled stays charged."""
        self._chain.close()

    def __enter__(self) -> TrialBudget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def charged_steps(place: str | os.PathLike[str] | Storage) -> int:
    """Steps charged to a trial, read from its ledger without opening it: for the driver, after a worker died.

    Raises:
        InputError: there is no ledger; 0 would be a guess.
        DamagedLedger: the ledger does not hold all that was written to it.
    """
    entries = read_entries(as_storage(place))
    if not entries:
        raise InputError(f"{place} holds no ledger; give the folder in which the trial keeps its ledger")
    reserved, given_back = _totals({name: entry.data for name, entry in entries.items()})
    return min(entries[GENESIS].data["terms"]["steps_allowed"], reserved - given_back)


def _totals(data: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Steps reserved, and steps given back, over all objects."""
    records = data.values()
    return sum(r.get("reserved", 0) for r in records), sum(r.get("given_back", 0) for r in records)


def _whole_number(field: str, value: int) -> int:
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{field}={value} must be >= 0")
    return number
