"""The best of a finished study, trained again: which, how often, and what is claimed of both studies together."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsink.config import load_config
from dpsink.errors import InputError
from dpsink.privacy.ledger import PrivacyStatement, trial_statement
from tests.test_tracking import Fake, make_study, write_checkpoint
from tune.folder import SessionEnd, StudyFolder, TrialEnd
from tune.lock import only_one
from tune.preflight import check_study
from tune.repeat import earlier_study, repetition
from tune.search import config_id, make_record
from tune.study import Study, load_study

RATES = {"trial-0001": (0.001, 0.7), "trial-0002": (0.002, 0.9), "trial-0003": (0.003, 0.8)}  # lr, accuracy
FILE: dict[str, Any] = {
    "name": "first",
    "trial": {
        "seed": 7,
        "generator": {"hidden_dim": 4},
        "privacy": {"noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": 20},
        "evaluation": {"samples": 100},
    },
    "baselines": {
        "mean": {"generator": {"kind": "class_mean"}, "privacy": {"noise_multiplier": None, "step_limit": None}},
        "slow": {"optimizer.lr": 1e-5},
    },
    "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
    "objectives": ["accuracy"],
}


@pytest.fixture
def first(tmp_path: Path) -> StudyFolder:
    """A finished study of three configurations, of which the second is best."""
    folder = make_study(tmp_path / "first", [], "sqlite:///none.db", objectives=("accuracy",))
    (folder.path / "study.yaml").write_text(yaml.safe_dump({**FILE, "storage": str(tmp_path)}))
    study = load_study(folder.path / "study.yaml")
    for number, (name, (rate, accuracy)) in enumerate(RATES.items()):
        params = {"optimizer.lr": rate}
        folder.add_trial(make_record(name, "search", study.configure(params), 1437, params, number))
        write_checkpoint(folder.run(name), Fake(name, metrics={"accuracy": accuracy, "fid": accuracy}))
        folder.end_trial(name, TrialEnd(state="completed"))
    folder.write_statement(trial_statement(12.5, 5e-5).to_dict())
    folder.write_outcome(SessionEnd(finished=True))
    return folder


def test_the_best_configurations_are_listed_best_first(first: StudyFolder) -> None:
    again = repetition(str(first.path), top=2, seeds=3)
    assert again.points == [{"optimizer.lr": 0.002}, {"optimizer.lr": 0.003}]


def test_what_is_best_by_another_metric_can_be_asked_for(first: StudyFolder) -> None:
    assert repetition(str(first.path), top=1, seeds=3, by="fid").points == [{"optimizer.lr": 0.001}]


def test_a_repeated_configuration_has_the_name_that_it_had(first: StudyFolder) -> None:
    again = repetition(str(first.path), top=1, seeds=3)
    assert config_id(again.configure({"optimizer.lr": 0.002})) == first.read_trial("trial-0002").config_id


def test_a_repetition_starts_from_other_weights_than_the_first_study(first: StudyFolder) -> None:
    again = repetition(str(first.path), top=1, seeds=3)
    assert again.configure({}).seed == 8


def test_of_the_baselines_the_control_alone_is_repeated(first: StudyFolder) -> None:
    assert set(repetition(str(first.path), top=1, seeds=3).baselines) == {"mean"}


def test_a_repetition_has_fixed_costs_and_one_for_every_seed(first: StudyFolder) -> None:
    terms = check_study(repetition(str(first.path), top=2, seeds=3), None).terms
    assert not terms.adaptive
    assert len(terms.planned) == 3 * (1 + 2)


def begin(first: StudyFolder, again: Study) -> None:
    """Writes the folder of a repetition, as the driver does first."""
    record = first.read_study().model_copy(update={"repeats": earlier_study(first.path, "first-repeat")})
    StudyFolder(first.path.parent / "first-repeat").write_study(record, again.to_yaml())


def test_the_repetition_of_an_older_study_in_the_same_place_is_not_gone_on_with(first: StudyFolder) -> None:
    begin(first, repetition(str(first.path), top=2, seeds=3))
    newer = first.read_study().model_copy(update={"study_id": "id-newer"})
    first.write_study(newer, (first.path / "study.yaml").read_text())
    with pytest.raises(InputError, match="study first-repeat: exists"):
        repetition(str(first.path), top=2, seeds=3)


def test_the_same_repetition_asked_for_again_is_the_one_that_was_begun(first: StudyFolder) -> None:
    again = repetition(str(first.path), top=2, seeds=3)
    begin(first, again)
    first.end_trial("trial-0002", TrialEnd(state="failed"))  # would choose others now
    assert repetition(str(first.path), top=2, seeds=3) == again


def test_another_repetition_under_the_same_name_is_refused(first: StudyFolder) -> None:
    again = repetition(str(first.path), top=2, seeds=3)
    begin(first, again)
    with pytest.raises(InputError, match="exists, of 2 configurations with 3 seeds"):
        repetition(str(first.path), top=1, seeds=3)


def test_a_repetition_of_what_is_best_by_another_metric_is_not_gone_on_with(first: StudyFolder) -> None:
    by_fid = repetition(str(first.path), top=1, seeds=3, by="fid")
    begin(first, by_fid)
    assert repetition(str(first.path), top=1, seeds=3, by="fid") == by_fid
    with pytest.raises(InputError, match="not the best by accuracy"):
        repetition(str(first.path), top=1, seeds=3, by="accuracy")


def test_a_study_that_is_not_finished_is_not_repeated(first: StudyFolder) -> None:
    first.write_outcome(SessionEnd(finished=False, problem="stopped"))
    with pytest.raises(InputError, match="not finished"):
        repetition(str(first.path), top=1, seeds=3)


def test_a_study_that_is_being_run_is_not_repeated(first: StudyFolder) -> None:
    with only_one(first), pytest.raises(InputError, match="not finished"):
        repetition(str(first.path), top=1, seeds=3)


def test_more_configurations_than_there_are_cannot_be_repeated(first: StudyFolder) -> None:
    with pytest.raises(InputError, match="--top=4 must be at most 3"):
        repetition(str(first.path), top=4, seeds=3)


def test_an_unknown_metric_ranks_nothing(first: StudyFolder) -> None:
    with pytest.raises(InputError, match="--by=speed must be one of fid"):
        repetition(str(first.path), top=1, seeds=3, by="speed")


def test_the_first_studys_claim_is_remembered(first: StudyFolder) -> None:
    earlier = earlier_study(first.path, "first-repeat")
    assert (earlier.study_id, earlier.epsilon, earlier.delta) == ("id-first", 12.5, 5e-5)


def claimed(first: StudyFolder, name: str, own: float, *, spent: float, finished: bool) -> None:
    """A repetition as it stands in its folder; its own part of ε is `own`."""
    earlier = earlier_study(first.path, name)
    folder = StudyFolder(first.path.parent / name)
    record = first.read_study().model_copy(update={"study_id": f"id-{name}", "name": name, "repeats": earlier})
    folder.write_study(record, "")
    statement = replace(trial_statement(own, 1e-5), spent=spent)
    folder.write_statement(statement.after(earlier.name, earlier.epsilon, earlier.delta, earlier.spent).to_dict())
    folder.write_outcome(SessionEnd(finished=finished))


def test_a_second_repetition_counts_the_first_one_too(first: StudyFolder) -> None:
    claimed(first, "once", 2.0, spent=1.5, finished=True)
    claimed(first, "twice", 3.0, spent=2.5, finished=True)
    earlier = earlier_study(first.path, "thrice")
    assert earlier.name == "digits-study with its repetition once, twice"
    assert earlier.epsilon is not None and 17.5 <= earlier.epsilon < 17.500001
    assert earlier.delta == pytest.approx(5e-5 + 2e-5)
    assert earlier.spent == pytest.approx(12.5 + 1.5 + 2.5)


def test_a_repetition_that_goes_on_counts_with_all_that_it_may_spend(first: StudyFolder) -> None:
    claimed(first, "once", 2.0, spent=0.5, finished=False)
    assert earlier_study(first.path, "twice").spent == pytest.approx(12.5 + 2)


def test_a_repetition_that_has_claimed_nothing_yet_comes_first(first: StudyFolder) -> None:
    claimed(first, "once", 2.0, spent=0.5, finished=False)
    (first.path.parent / "once" / "statement.json").unlink()
    with pytest.raises(InputError, match="study once: has no privacy statement yet"):
        earlier_study(first.path, "twice")


def test_a_repetition_that_is_gone_on_with_does_not_count_itself(first: StudyFolder) -> None:
    claimed(first, "once", 2.0, spent=0.5, finished=False)
    assert earlier_study(first.path, "once").epsilon == 12.5


def test_what_follows_a_repetition_without_privacy_is_without_privacy(first: StudyFolder) -> None:
    claimed(first, "once", math.inf, spent=math.inf, finished=True)
    assert earlier_study(first.path, "twice").epsilon == math.inf


def test_both_studies_together_cost_the_sum() -> None:
    both = trial_statement(2.0, 1e-5).after("first", 12.5, 5e-5, 11.0)
    assert (both.study_epsilon, both.study_delta, both.spent) == (14.5, pytest.approx(6e-5), 13.0)
    assert both.trial_epsilon == 2.0


def test_nothing_is_claimed_of_both_where_nothing_was_of_one() -> None:
    assert trial_statement(2.0, 1e-5).after("first", None, 5e-5, 11.0).study_epsilon is None


def test_what_follows_a_study_without_privacy_is_non_private() -> None:
    both = trial_statement(2.0, 1e-5).after("first", math.inf, 5e-5, math.inf)
    assert both.non_private
    assert both.study_epsilon == math.inf


@pytest.mark.parametrize("epsilon", [12.5, None, math.inf])
def test_a_statement_of_both_is_read_as_it_was_written(epsilon: float | None) -> None:
    both = trial_statement(2.0, 1e-5).after("first", epsilon, 5e-5, 11.0)
    assert PrivacyStatement.from_dict(both.to_dict()) == both


def test_a_statement_of_both_names_the_first_study_and_its_part() -> None:
    text = " ".join(trial_statement(2.0, 1e-5).after("first", 12.5, 5e-5, 11.0).text().split())
    assert "epsilon 14.5, delta 6e-05" in text
    assert "epsilon 12.5, delta 5e-05 of the study first, which chose these trials" in text


def test_a_listed_study_takes_each_path_of_a_trial(first: StudyFolder) -> None:
    listed = repetition(str(first.path), top=1, seeds=1)
    default = load_config(None, ())
    assert listed.configure({"sinkhorn.blur": 3}).sinkhorn.blur == 3 != default.sinkhorn.blur
