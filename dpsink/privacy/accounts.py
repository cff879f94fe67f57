"""A study's two accounts: of the training records and, where scores come from private validation records, of those.

No record is in both, so what the study costs is the larger of the two (parallel composition).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from dpsink.privacy.ledger import PrivacyStatement, StudyLedger, TrialCost
from dpsink.privacy.plan import PrivacyPlan

TRAINING, SCORES = "training", "scores"
DISJOINT = (
    "Scores come from private validation records, with noise, on an account of their own; no record is both in "
    "training and in validation, and which one it is in does not depend on other records."
)


@dataclass(frozen=True)
class TrialCosts:
    """A trial's worst case on each account; `scores` is None where validation images are public."""

    training: TrialCost
    scores: TrialCost | None = None

    @classmethod
    def of(cls, plan: PrivacyPlan) -> "TrialCosts":
        """The worst case of a plan."""
        training = TrialCost(plan.sample_rate, plan.noise_multiplier, plan.steps)
        scores = TrialCost(1.0, plan.score_noise, plan.score_releases) if plan.score_releases else None
        return cls(training, scores)

    def on(self, account: str) -> TrialCost:
        """The cost on one account; nothing, where the trial does not use it."""
        return self.training if account == TRAINING else self.scores or TrialCost(1.0, 1.0, 0)


class StudyAccounts:
    """The ledgers of a study, admitted and settled together; a context manager. Use `StudyAccounts.open`."""

    def __init__(self, ledgers: Mapping[str, StudyLedger]) -> None:
        self._ledgers = dict(ledgers)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        planned: Sequence[TrialCosts],
        witness: Mapping[str, Any] | None = None,
        adaptive: bool = True,
        **terms: Any,
    ) -> "StudyAccounts":
        """Opens or creates the ledgers under a folder.

        Args:
            folder: holds one folder per account.
            planned: worst case of every planned trial.
            witness: `witness()` as kept elsewhere.
            adaptive: whether the costs of training may depend on earlier results; those of scores never do.
            terms: `delta`, `policy`, `study_epsilon`, as for `StudyLedger.open`.

        Raises:
            InputError: as `StudyLedger.open`.
        """
        names = [TRAINING, SCORES] if any(costs.scores for costs in planned) else [TRAINING]
        accounts = cls({})
        try:
            for name in names:
                accounts._ledgers[name] = StudyLedger.open(
                    folder / name,
                    planned=[costs.on(name) for costs in planned],
                    adaptive=adaptive and name == TRAINING,
                    witness=(witness or {}).get(name),
                    **terms,
                )
        except BaseException:
            accounts.close()
            raise
        return accounts

    @property
    def cap(self) -> float | None:
        """The study's guaranteed ε: the larger of the accounts'; None if nothing is claimed."""
        caps = [ledger.cap for ledger in self._ledgers.values()]
        return None if None in caps else max(cap for cap in caps if cap is not None)

    def admit(self, trial_id: str, costs: TrialCosts) -> None:
        """Reserves a trial's worst case on every account, or raises `BudgetExhausted`."""
        for name, ledger in self._ledgers.items():
            ledger.admit(trial_id, costs.on(name))

    def settle(self, trial_id: str, charged: Mapping[str, int]) -> None:
        """Records what a trial was charged; an account that is not named keeps its worst case."""
        for name, releases in charged.items():
            if name in self._ledgers:
                self._ledgers[name].settle(trial_id, releases)

    def spent(self) -> float:
        """ε spent so far, an odometer reading: the larger of the accounts'."""
        return max(ledger.spent() for ledger in self._ledgers.values())

    def statement(self, trial_epsilon: float) -> PrivacyStatement:
        """What may be said about the study, over all accounts."""
        statement = self._ledgers[TRAINING].statement(trial_epsilon)
        if SCORES not in self._ledgers:
            return statement
        assumptions = (*statement.assumptions, DISJOINT)
        return replace(statement, study_epsilon=self.cap, spent=self.spent(), assumptions=assumptions)

    def witness(self) -> dict[str, Any]:
        """What to keep outside the ledgers; JSON-able."""
        return {name: ledger.witness() for name, ledger in self._ledgers.items()}

    def close(self) -> None:
        """Releases the ledgers."""
        for ledger in self._ledgers.values():
            ledger.close()

    def __enter__(self) -> "StudyAccounts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

