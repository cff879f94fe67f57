"""A study's accounts: of the training records and, where scores come from private validation records, of those.

No record is in both, so what the study costs is the larger of the two (parallel composition): for two data sets that
differ in a training record everything about validation is fixed, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsink.privacy.ledger import PrivacyStatement, StudyLedger, TrialCost, planned_epsilon
from dpsink.privacy.plan import PrivacyPlan
from dpsink.privacy.storage import FencedError

TRAINING, SCORES = "training", "scores"
RECORDS = {TRAINING: "training", SCORES: "private validation"}  # whose an account is, in the statement
_DISJOINT = (
    "scores come from private validation records, with noise, on an account of their own; no record is both in"
    " training and in validation, and which one it is in does not depend on other records"
)


@dataclass(frozen=True)
class TrialCosts:
    """A trial's worst case on each account; `scores` is None where validation records are public."""

    training: TrialCost
    scores: TrialCost | None = None

    @classmethod
    def of(cls, plan: PrivacyPlan) -> TrialCosts:
        """The worst case of a plan."""
        return cls.make(plan.sample_rate, plan.noise_multiplier, plan.steps, plan.score_noise, plan.score_releases)

    @classmethod
    def make(cls, sample_rate: float, noise: float, steps: int, score_noise: float, score_releases: int) -> TrialCosts:
        """The worst case of a trial by its numbers; a score reads every validation record, its sample rate is 1."""
        scores = TrialCost(1.0, score_noise, score_releases) if score_releases else None
        return cls(TrialCost(sample_rate, noise, steps), scores)


@dataclass(frozen=True)
class AccountTerms:
    """What a study asks of its accounts; the arguments of `StudyLedger.open`, which never change.

    Attributes:
        planned: worst cases on the training account, see `plan_study`.
        planned_scores: the same on the account of scores; empty where validation records are public.
        adaptive: whether the costs of training may depend on earlier results.
        adaptive_scores: whether those of scores may.
        common: `delta`, `policy`, `study_epsilon`, `selection`: the same for both.
    """

    planned: Sequence[TrialCost]
    planned_scores: Sequence[TrialCost]
    adaptive: bool
    adaptive_scores: bool
    common: Mapping[str, Any]

    def of(self, account: str) -> dict[str, Any]:
        """The arguments for one account, besides its place."""
        if account == TRAINING:
            return {"planned": self.planned, "adaptive": self.adaptive, **self.common}
        return {"planned": self.planned_scores, "adaptive": self.adaptive_scores, **self.common}

    @property
    def accounts(self) -> tuple[str, ...]:
        """Names of the accounts, that of training first."""
        return (TRAINING, SCORES) if self.planned_scores else (TRAINING,)

    def worst_case(self) -> float | None:
        """The ε that the study would promise: the larger account's; None if nothing is claimed. Nothing is written.

        Raises:
            InputError: as `plan_study`.
        """
        each = [self.of(account) for account in self.accounts]
        planned = [planned_epsilon(terms.pop("planned"), terms.pop("delta"), **terms) for terms in each]
        return None if None in planned else max(epsilon for epsilon in planned if epsilon is not None)


class StudyAccounts:
    """The ledgers of a study, admitted and settled together; a context manager. Use `StudyAccounts.open`.

    The ledger of training lies in the folder itself, that of scores in its subfolder `scores`.
    """

    def __init__(self, ledgers: Mapping[str, StudyLedger], on_close: ExitStack) -> None:
        self._ledgers = dict(ledgers)
        self._on_close = on_close

    @classmethod
    def open(cls, folder: Path, terms: AccountTerms, *, witness: Mapping[str, Any] | None = None) -> StudyAccounts:
        """Opens or creates the ledgers; the folder is its owner's alone.

        Args:
            folder: of the ledgers.
            terms: what the study asks of them.
            witness: `witness()` as kept elsewhere.

        Raises:
            InputError: as `StudyLedger.open`.
        """
        _make_private(folder)
        ledgers: dict[str, StudyLedger] = {}
        with ExitStack() as stack:
            for name in terms.accounts:
                place = folder if name == TRAINING else folder / name
                seen = (witness or {}).get(name)
                ledger = StudyLedger.open(place, **terms.of(name), witness=seen, partner=ledgers.get(TRAINING))
                ledgers[name] = stack.enter_context(ledger)
            return cls(ledgers, stack.pop_all())

    @property
    def cap(self) -> float | None:
        """The study's guaranteed ε: the larger of the accounts'; None if nothing is claimed."""
        caps = [ledger.cap for ledger in self._ledgers.values()]
        return None if None in caps else max(cap for cap in caps if cap is not None)

    @property
    def trials(self) -> int | None:
        """`release_best`: the secret number K of trials; see `StudyLedger.trials`."""
        return self._ledgers[TRAINING].trials

    @property
    def admitted(self) -> frozenset[str]:
        """Trials that may have started: those that every account has admitted."""
        return frozenset.intersection(*(ledger.admitted for ledger in self._ledgers.values()))

    @property
    def settled(self) -> frozenset[str]:
        """Trials that never run again: those whose charge is final on any account."""
        return frozenset().union(*(ledger.settled for ledger in self._ledgers.values()))

    def covers(self, costs: TrialCosts) -> bool:
        """Whether the plan speaks of trials of these costs, on every account."""
        return all(ledger.covers(cost) for ledger, cost in self._on_each(costs))

    def check(self, trial_id: str, costs: TrialCosts) -> None:
        """Raises what `admit` would raise about a trial, and records nothing."""
        for ledger, cost in self._on_each(costs):
            ledger.check(trial_id, cost)

    def admit(self, trial_id: str, costs: TrialCosts) -> None:
        """Reserves a trial's worst case on every account, or on none.

        Raises:
            BudgetExhausted: an account has no room.
            InputError: as `StudyLedger.admit`.
        """
        self.check(trial_id, costs)
        for ledger, cost in self._on_each(costs):
            ledger.admit(trial_id, cost)

    def settle(self, trial_id: str, charged: Mapping[str, int]) -> None:
        """Records what a trial was charged; on an account that is not named its worst case stays."""
        for name, steps in charged.items():
            self._ledgers[name].settle(trial_id, steps)

    def spent(self) -> float:
        """ε spent so far, an odometer reading: the larger of the accounts'."""
        return max(ledger.spent() for ledger in self._ledgers.values())

    def statement(self, trial_epsilon: float, *, exact: bool = True) -> PrivacyStatement:
        """What may be said about the study: the larger account's statement, with both accounts in it.

        Args:
            trial_epsilon: ε of a trial on its own, over both accounts.
            exact: as for `StudyLedger.spent`.
        """
        statements = {
            RECORDS[name]: ledger.statement(trial_epsilon, exact=exact) for name, ledger in self._ledgers.items()
        }
        if len(statements) == 1:
            return statements[RECORDS[TRAINING]]
        largest = max(statements.values(), key=_size)
        return replace(
            largest,
            spent=max(statement.spent for statement in statements.values()),
            accountants=tuple(dict.fromkeys(name for one in statements.values() for name in one.accountants)),
            assumptions=(*largest.assumptions, _DISJOINT),
            accounts={name: _reading(statement) for name, statement in statements.items()},
        )

    @property
    def fenced(self) -> bool:
        """Whether another driver has opened the ledgers: then this one has no more say about the study."""
        try:
            self.refuse_if_fenced()
        except FencedError:
            return True
        return False

    def refuse_if_fenced(self) -> None:
        """Raises FencedError where `fenced`."""
        for ledger in self._ledgers.values():
            ledger.refuse_if_fenced()

    def witness(self) -> dict[str, Any]:
        """What to keep outside the ledgers; JSON-able."""
        return {name: ledger.witness() for name, ledger in self._ledgers.items()}

    def close(self) -> None:
        """Releases the ledgers."""
        self._on_close.close()

    def __enter__(self) -> StudyAccounts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_each(self, costs: TrialCosts) -> Iterator[tuple[StudyLedger, TrialCost]]:
        """The ledgers, each with what a trial costs there."""
        for name, ledger in self._ledgers.items():
            cost = costs.training if name == TRAINING else costs.scores
            assert cost is not None  # where one trial of a study is scored by private records, all are
            yield ledger, cost


def _size(statement: PrivacyStatement) -> tuple[float, float]:
    """By what accounts are compared: the claim, or what was spent where there is none."""
    return statement.study_epsilon or 0.0, statement.spent


def _reading(statement: PrivacyStatement) -> dict[str, Any]:
    """One account in the statement over both."""
    return {
        "epsilon": statement.study_epsilon,
        "guarantee": statement.guarantee,
        "order": statement.order,
        "spent": statement.spent,
    }


def _make_private(folder: Path) -> None:
    """Makes a folder that its owner alone can look into: with `release_best` the number of its files is secret."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
