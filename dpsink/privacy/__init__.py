"""The guarantee: accounting, mechanisms, budgets and ledgers. Read `docs/privacy.md` beside it."""

from dpsink.privacy.accounting import (
    epsilon,
    epsilon_curve,
    max_steps,
    noise_multiplier_for,
    sample_rate_for,
)
from dpsink.privacy.budget import BudgetTerms, TrialBudget
from dpsink.privacy.ledger import BudgetExhausted, PrivacyStatement, StudyLedger, TrialCost

__all__ = [
    "BudgetExhausted",
    "BudgetTerms",
    "PrivacyStatement",
    "StudyLedger",
    "TrialBudget",
    "TrialCost",
    "epsilon",
    "epsilon_curve",
    "max_steps",
    "noise_multiplier_for",
    "sample_rate_for",
]
