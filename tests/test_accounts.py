"""A study's two accounts: of training records and of private validation records, admitted and settled together."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpsink.errors import InputError
from dpsink.privacy.accounts import SCORES, TRAINING, AccountTerms, StudyAccounts, TrialCosts
from dpsink.privacy.ledger import BudgetExhausted, PrivacyStatement, Selection, StudyLedger, TrialCost, planned_epsilon
from dpsink.privacy.plan import PrivacyPlan
from dpsink.privacy.storage import DamagedLedger

DELTA = 1e-5
TRIAL = TrialCosts(TrialCost(0.01, 2.0, 100), TrialCost(1.0, 20.0, 2))
LOUD = TrialCosts(TRIAL.training, TrialCost(1.0, 5.0, 2))  # its scores cost more than its training


def terms(*trials: TrialCosts, adaptive: bool = True, **common: Any) -> AccountTerms:
    usual = {"delta": DELTA, "policy": "compose_all", "study_epsilon": None, "selection": None}
    scores = [trial.scores for trial in trials if trial.scores]
    return AccountTerms([trial.training for trial in trials], scores, adaptive, adaptive, {**usual, **common})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def accounts(folder: Path) -> Iterator[StudyAccounts]:
    """Of a study of three trials."""
    with StudyAccounts.open(folder, terms(TRIAL, TRIAL, TRIAL)) as opened:
        yield opened


def test_costs_of_a_plan_are_its_steps_and_its_scores() -> None:
    plan = PrivacyPlan("record", 1437, 0.01, 2.0, 20.0, 100, 10.0, DELTA, 20.0, 2, 180)
    assert TrialCosts.of(plan) == TRIAL


def test_plan_without_private_scores_has_no_cost_of_scores() -> None:
    plan = PrivacyPlan("record", 1437, 0.01, 2.0, 20.0, 100, 10.0, DELTA)
    assert TrialCosts.of(plan).scores is None


@pytest.mark.parametrize("trial", [TRIAL, LOUD])
@pytest.mark.parametrize("adaptive", [True, False])
def test_study_costs_the_larger_of_its_accounts(folder: Path, trial: TrialCosts, adaptive: bool) -> None:
    assert trial.scores
    apart = [planned_epsilon([cost] * 3, DELTA, adaptive=adaptive) for cost in (trial.training, trial.scores)]
    with StudyAccounts.open(folder, terms(trial, trial, trial, adaptive=adaptive)) as accounts:
        assert accounts.cap == max(one or 0 for one in apart)


def test_policy_without_a_claim_has_no_cap(folder: Path) -> None:
    with StudyAccounts.open(folder, terms(TRIAL, policy="per_trial_only")) as accounts:
        assert accounts.cap is None


def test_account_of_scores_is_there_only_where_scores_are_private(folder: Path) -> None:
    with StudyAccounts.open(folder, terms(TrialCosts(TRIAL.training))) as accounts:
        assert set(accounts.witness()) == {TRAINING}
        assert accounts.statement(1.0).accounts == {}


def test_either_account_ends_the_study(folder: Path) -> None:
    """LOUD has room for three trainings and not for the scores of a second trial."""
    with StudyAccounts.open(folder, terms(LOUD, TRIAL, TRIAL, study_epsilon=1.5)) as accounts:
        accounts.admit("a", LOUD)
        with pytest.raises(BudgetExhausted, match="trial b may not start"):
            accounts.admit("b", LOUD)
        assert accounts.admitted == {"a"}


def test_trial_that_one_account_refuses_costs_nothing_on_the_other(folder: Path) -> None:
    with StudyAccounts.open(folder, terms(LOUD, TRIAL, TRIAL, study_epsilon=1.5)) as accounts:
        accounts.admit("a", LOUD)
        with pytest.raises(BudgetExhausted):
            accounts.admit("b", LOUD)
    assert not (folder / "admit-b.json").exists()


def test_driver_that_died_between_the_two_admissions_admits_once_more(folder: Path) -> None:
    with StudyLedger.open(folder, **terms(TRIAL, TRIAL).of(TRAINING)) as ledger:
        ledger.admit("a", TRIAL.training)
    with StudyAccounts.open(folder, terms(TRIAL, TRIAL)) as accounts:
        assert accounts.admitted == frozenset()
        accounts.admit("a", TRIAL)
        assert accounts.admitted == {"a"}


def test_both_accounts_are_settled(accounts: StudyAccounts) -> None:
    accounts.admit("a", TRIAL)
    accounts.settle("a", {TRAINING: 0, SCORES: 0})
    assert accounts.spent() == 0


@pytest.mark.parametrize("known", [TRAINING, SCORES])
def test_account_that_is_not_known_keeps_its_worst_case(accounts: StudyAccounts, known: str) -> None:
    accounts.admit("a", TRIAL)
    accounts.settle("a", {known: 0})
    assert accounts.spent() > 0


@pytest.mark.parametrize("shape", ["logarithmic", "geometric"])
def test_number_of_trials_is_drawn_once_for_both(folder: Path, shape: Any) -> None:
    chosen = terms(TRIAL, policy="release_best", selection=Selection(3, shape))
    with StudyAccounts.open(folder, chosen) as accounts:
        for number in range(accounts.trials or 0):
            accounts.admit(str(number), TRIAL)
        with pytest.raises(BudgetExhausted):
            accounts.admit("more", TRIAL)


def test_selection_costs_the_larger_of_its_accounts(folder: Path) -> None:
    options: dict[str, Any] = {"policy": "release_best", "selection": Selection(10)}
    assert LOUD.scores
    scores = planned_epsilon([LOUD.scores], DELTA, **options)
    with StudyAccounts.open(folder, terms(LOUD, **options)) as accounts:
        assert accounts.cap == scores
        assert (scores or 0) > (planned_epsilon([LOUD.training], DELTA, **options) or 0)


def test_statement_names_both_accounts_the_larger_first(folder: Path) -> None:
    with StudyAccounts.open(folder, terms(LOUD, LOUD)) as accounts:
        accounts.admit("a", LOUD)
        statement = accounts.statement(1.0)
    lines = [line for line in statement.text().splitlines() if line.startswith(("- training", "- private validation"))]
    assert [line.partition(" records")[0] for line in lines] == ["- private validation", "- training"]
    assert statement.study_epsilon == statement.accounts["private validation"]["epsilon"]


def test_statement_of_two_accounts_says_why_the_larger_is_enough(accounts: StudyAccounts) -> None:
    assert "no record is both in training and in validation" in " ".join(accounts.statement(1.0).assumptions)


def test_statement_of_two_accounts_survives_json(accounts: StudyAccounts) -> None:
    statement = accounts.statement(1.0)
    assert PrivacyStatement.from_dict(json.loads(json.dumps(statement.to_dict(), allow_nan=False))) == statement


def test_statement_of_two_accounts_is_at_most_80_columns_wide(accounts: StudyAccounts) -> None:
    assert max(map(len, accounts.statement(1.0).text().splitlines())) <= 80


def test_ledgers_are_their_owners_alone(accounts: StudyAccounts, folder: Path) -> None:
    assert folder.stat().st_mode & 0o077 == 0


def test_vanished_account_of_scores_is_refused_with_the_witness(folder: Path) -> None:
    with StudyAccounts.open(folder, terms(TRIAL)) as accounts:
        accounts.admit("a", TRIAL)
        witness = accounts.witness()
    shutil.rmtree(folder / SCORES)
    with pytest.raises(DamagedLedger):
        StudyAccounts.open(folder, terms(TRIAL), witness=witness)


def test_ledger_that_cannot_be_opened_releases_the_other(folder: Path) -> None:
    with (
        StudyLedger.open(folder / SCORES, **terms(TRIAL).of(SCORES)),
        pytest.raises(InputError, match="in use by process"),
    ):
        StudyAccounts.open(folder, terms(TRIAL))
    StudyAccounts.open(folder, terms(TRIAL)).close()


def test_terms_that_no_account_can_keep_are_refused_before_anything_is_written() -> None:
    with pytest.raises(InputError, match="study_epsilon"):
        terms(TRIAL, TRIAL, study_epsilon=1e-9).worst_case()
