"""What is best: over configurations, by rules that are stated, under conditions that nobody evaluates."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from analysis.conditions import meeting
from analysis.fronts import pareto, pareto_in_words
from analysis.rules import ordered, parse_rule
from analysis.runs import Row, Runs, load_runs
from analysis.selection import best, configurations, control_in_words, run_of, select_best
from dpsink.errors import InputError
from tests.stores import Run, control_run, study_run, trial_run, write_runs
from tests.test_tracking import Fake, make_study
from tune import choice, schema
from tune.tracking import rebuild

Loaded = Callable[..., Runs]


@pytest.fixture
def loaded(empty_database: tuple[Path, str], tmp_path: Path) -> Loaded:
    """The runs of studies that are made of what is given."""

    def load(trials: Sequence[Run], studies: Sequence[Run] = (study_run("one"),)) -> Runs:
        shutil.copyfile(empty_database[0], tmp_path / "mlflow.db")
        write_runs(tmp_path / "mlflow.db", [*studies, *trials])
        return load_runs([study.tags[schema.STUDY_NAME_TAG] for study in studies], f"sqlite:///{tmp_path}/mlflow.db")

    return load


def trial(name: str, config: str | None = None, **metrics: float) -> Run:
    return trial_run("one", name, {"accuracy": 0.5, **metrics}, config=config or name)


LUCKY = [trial("a0", "a", accuracy=0.9, fid=9), trial("a1", "a", accuracy=0.5, fid=9, epsilon=9.5)]
STEADY = [trial("b0", "b", accuracy=0.74, fid=5), trial("b1", "b", accuracy=0.78, fid=7)]


def table(**columns: Sequence[float]) -> pd.DataFrame:
    """Rows r0, r1, … with some metrics."""
    count = len(next(iter(columns.values())))
    usual = {"study": "one", "trial": [f"r{index}" for index in range(count)], "epsilon": 1.0, "fid_extractor": "x"}
    return pd.DataFrame({**usual, **columns}, index=range(count))


def order(rows: pd.DataFrame, by: str | Sequence[str] = (), weights: str | None = None) -> list[str]:
    return list(ordered(rows, parse_rule(by, weights))["trial"])


# Configurations.


def test_the_mean_of_the_seeds_decides_and_not_the_luckiest(loaded: Loaded) -> None:
    ranked = best(loaded([*LUCKY, *STEADY]), "accuracy")
    assert list(ranked["config_id"]) == ["b", "a"]
    assert list(ranked["rank"]) == [1, 2]
    assert list(ranked["accuracy"]) == pytest.approx([0.76, 0.7])


def test_a_mean_comes_with_its_seeds_and_its_standard_error(loaded: Loaded) -> None:
    steady, single = configurations(loaded([*STEADY, trial("c0")])).to_dict("records")
    assert (steady["seeds"], single["seeds"]) == (2, 1)
    assert steady["accuracy_se"] == pytest.approx(0.02)  # half the difference of two values
    assert math.isnan(single["accuracy_se"])


def test_a_configuration_has_the_largest_epsilon_of_its_seeds(loaded: Loaded) -> None:
    lucky, steady = configurations(loaded([*LUCKY, *STEADY])).to_dict("records")
    assert (lucky["epsilon"], steady["epsilon"]) == (9.5, 9.0)


def test_a_configuration_with_a_seed_set_apart_is_set_apart_whole(loaded: Loaded) -> None:
    broken = trial_run("one", "a2", {}, config="a", tags={schema.STATUS_TAG: "diverged"})
    runs = loaded([*LUCKY, broken, *STEADY])
    assert list(best(runs, "accuracy")["config_id"]) == ["b"]
    assert runs.rejected_counts == "2 beside another seed, 1 diverged"
    assert set(runs.rejected["detail"]) == {"a2: diverged", ""}


def test_a_configuration_short_of_a_seed_does_not_compete(loaded: Loaded) -> None:
    runs = loaded([*STEADY, trial("c0", accuracy=0.99)], [study_run("one", seeds=2)])
    assert list(best(runs, "accuracy")["config_id"]) == ["b"]
    assert list(runs.rejected[["trial", "reason", "detail"]].loc[0]) == ["c0", "without all its seeds", "1 of 2"]


def test_a_baseline_of_the_same_settings_is_no_seed_of_a_configuration(loaded: Loaded) -> None:
    same = trial_run("one", "baseline-x", {"accuracy": 0.5}, config="c0", role=schema.ROLE_BASELINE)
    runs = loaded([trial("c0"), same], [study_run("one", seeds=2)])
    assert runs.rejected_counts == "2 without all its seeds"


def test_a_metric_that_a_seed_lacks_ranks_no_configuration_and_is_said_to(loaded: Loaded) -> None:
    runs = loaded([*STEADY, trial("c0", "c", fid=1.0), trial("c1", "c")])
    ranked = best(runs, "fid")
    assert list(ranked["config_id"]) == ["b"]
    assert ranked.attrs["note"] == "1 of 2 configurations are left out: not all of their seeds have FID"
    assert "1 of 2 configurations are left out: not all" in pareto_in_words(pareto(runs, ["fid", "accuracy"]))
    partly = configurations(runs).set_index("config_id").loc["c"]
    assert math.isnan(partly["fid"]) and math.isnan(partly["fid_se"])


def test_the_run_to_take_is_the_best_seed_of_the_best_configuration(loaded: Loaded) -> None:
    assert select_best(loaded([*LUCKY, *STEADY]), parse_rule("accuracy"))["trial"] == "b1"


def test_a_study_that_repeats_another_is_not_selected_from(loaded: Loaded) -> None:
    again = study_run("again", tags={schema.REPEATS_TAG: "id-one"})
    runs = loaded([*STEADY, trial_run("again", "z", {"accuracy": 0.99})], [study_run("one"), again])
    assert list(best(runs, "accuracy")["config_id"]) == ["b"]


def test_the_same_configuration_of_two_studies_stays_apart(loaded: Loaded) -> None:
    runs = loaded([*STEADY, trial_run("two", "z", {"accuracy": 0.9}, config="b")], [study_run("one"), study_run("two")])
    ranked = best(runs, "accuracy")
    assert list(ranked["study"]) == ["two", "one"]
    assert run_of(runs, {"study": "one", "config_id": "b"}, parse_rule("accuracy"))["trial"] == "b1"


@pytest.mark.parametrize("metric", ["accuracy", "fid"])
def test_the_sweep_names_the_same_run(metric: str, empty_database: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copyfile(empty_database[0], tmp_path / "mlflow.db")
    values = [(0.7, 20.0, 9.0), (0.8, 20.0, 9.0), (0.8, 30.0, 8.0), (0.8, 25.0, 8.0)]
    fakes = [
        Fake(f"t{index}", metrics={"accuracy": accuracy, "fid": fid}, epsilons=(epsilon,))
        for index, (accuracy, fid, epsilon) in enumerate(values)
    ]
    folder = make_study(tmp_path / "study", fakes, f"sqlite:///{tmp_path}/mlflow.db")
    rebuild(folder)
    there = choice.select_best(folder, metric)
    assert there and select_best(load_runs(str(folder.path)), parse_rule(metric))["trial"] == there.name


# Rules.


def test_a_tolerance_lets_the_next_metric_decide_among_what_is_as_good() -> None:
    rows = table(accuracy=[0.80, 0.79, 0.70, 0.69], fid=[9.0, 5.0, 8.0, 7.0])
    assert order(rows, "accuracy") == ["r0", "r1", "r2", "r3"]
    assert order(rows, ["accuracy:0.01", "fid"]) == ["r1", "r0", "r3", "r2"]
    assert order(rows, ["accuracy:0.2", "fid"]) == ["r1", "r3", "r2", "r0"]


def test_weights_maximise_their_sum() -> None:
    rows = table(accuracy=[0.8, 0.6], fid=[30.0, 10.0])
    assert order(rows, weights="accuracy=1,fid=-0.001") == ["r0", "r1"]
    assert order(rows, weights="accuracy=1,fid=-0.02") == ["r1", "r0"]


def test_ties_go_to_less_epsilon_then_to_the_name() -> None:
    rows = table(accuracy=[0.8, 0.8, 0.8], epsilon=[2.0, 1.0, 1.0])
    assert order(rows, "accuracy") == ["r1", "r2", "r0"]
    assert order(rows, weights="accuracy=1") == ["r1", "r2", "r0"]
    assert order(rows.assign(accuracy_cnn=0.5), ["accuracy:0.5", "accuracy_cnn"]) == ["r1", "r2", "r0"]


@pytest.mark.parametrize(
    ("by", "weights", "told"),
    [
        ("acuracy", None, "did you mean 'accuracy'"),
        ("accuracy:much", None, "METRIC:TOLERANCE"),
        ("accuracy:-1", None, "METRIC:TOLERANCE"),
        (["fid", "fid:1"], None, "names a metric twice"),
        ((), "accuracy", "METRIC=WEIGHT"),
        ((), "accuracy=0", "not 0"),
        ((), "accuracy=nan", "METRIC=WEIGHT"),
        ("fid", "accuracy=1", "not both"),
    ],
)
def test_a_rule_that_cannot_be_read_says_how_to_write_it(by: str, weights: str | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_rule(by, weights)


def test_a_rule_has_a_title_for_people_and_a_name_for_a_folder() -> None:
    rule = parse_rule(["accuracy:0.01", "fid"])
    assert (rule.title, rule.slug) == ("accuracy within 0.01, then FID", "accuracy-fid")
    rule = parse_rule(weights="accuracy=1,fid=-0.02")
    assert (rule.title, rule.slug) == ("1·accuracy − 0.02·FID", "weighted-accuracy-fid")


def test_a_metric_that_no_run_has_is_told_with_those_that_they_have(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="none has the metric 'kid'; they have fid, accuracy"):
        best(loaded(STEADY), "kid")


# Conditions.


def test_conditions_hold_all_at_once(loaded: Loaded) -> None:
    runs = loaded([*LUCKY, *STEADY, trial("c0", accuracy=0.6, fid=1)])
    assert list(best(runs, "accuracy", where=["fid<9"])["config_id"]) == ["b", "c0"]
    assert list(best(runs, "accuracy", where=["fid<9", "accuracy >= 0.7"])["config_id"]) == ["b"]
    assert list(best(runs, "accuracy", epsilon=9.0)["config_id"]) == ["b", "c0"]
    assert set(best(runs, where=["generator.kind=conv_cond", "trial!=c0"])["config_id"]) == {"a", "b"}


def test_a_row_without_the_value_meets_no_condition_about_it() -> None:
    rows = table(accuracy=[0.8, math.nan])
    assert list(meeting(rows, ["accuracy!=0.1"])["trial"]) == ["r0"]


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("acuracy>0.8", "did you mean 'accuracy'"),
        ("accuracy", "COLUMN OP VALUE"),
        ("accuracy>", "COLUMN OP VALUE"),
        ("accuracy>high", "is a number and 'high' is none"),
        ("trial>r0", "is text; compare it with = or !="),
        ("accuracy>0.9", r"leaves none of 2 configurations: accuracy lies in \[0.5, 0.8\]"),
        ("__import__('os').system('true')>0", "COLUMN OP VALUE"),
        ("@pd.eval('1')>0", "COLUMN OP VALUE"),
    ],
)
def test_a_condition_that_cannot_be_met_or_read_says_why(condition: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        meeting(table(accuracy=[0.8, 0.5]), [condition])


# The control.


def chosen(runs: Runs) -> Row:
    return select_best(runs, parse_rule("accuracy"))


def test_the_control_stands_beside_the_best_with_variety_and_recall(loaded: Loaded) -> None:
    control = control_run("one", {"accuracy": 0.75, "variety": 0.01, "recall": 0.0})
    words = control_in_words(runs := loaded([trial("a", accuracy=0.8, variety=0.5, recall=0.3), control]), chosen(runs))
    assert "accuracy 0.8 against 0.75, variety 0.5 against 0.01, recall 0.3 against 0" in words
    assert "no better than the control" not in words


def test_a_best_run_that_the_control_beats_is_told_so(loaded: Loaded) -> None:
    runs = loaded([trial("a", accuracy=0.8), control_run("one", {"accuracy": 0.85})])
    assert "(no better than the control)" in control_in_words(runs, chosen(runs))


def test_a_control_at_another_epsilon_is_none(loaded: Loaded) -> None:
    control = control_run("one", {"accuracy": 0.75})
    control.params["privacy.target_epsilon"] = 1.0
    runs = loaded([trial("a"), control])
    assert "has no class-mean control at this ε" in control_in_words(runs, chosen(runs))
