"""The second judgement: fresh samples on images that chose nothing, kept as they come, and what they mean."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

import dpsink.judging
from analysis.charts import verdict_figure
from analysis.cli import app, main
from analysis.runs import Runs, load_runs, rows_of
from analysis.selection import best
from analysis.tables import guarantee
from analysis.verdict import FIRST_SEED, evaluate_top, outdated_in_words, read_verdict
from dpsink.data import ImageData
from dpsink.errors import InputError
from tests.test_tracking import Fake, make_study
from tune.folder import Earlier
from tune.tracking import rebuild

SELECTED = {"lucky": 0.9, "honest": 0.8, "third": 0.7, "last": 0.1}  # accuracy on validation
TRUE = {"lucky": 0.60, "honest": 0.8, "third": 0.79, "last": 0.1}
SCATTER = (-0.02, 0.0, 0.02)
Judge = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def runs(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Runs:
    place = tmp_path_factory.mktemp("verdict")
    shutil.copyfile(empty_database[0], place / "mlflow.db")
    fakes = [
        Fake(name, metrics={"accuracy": accuracy, "fid": 100 * (1 - accuracy)}, fingerprint=digits.fingerprint)
        for name, accuracy in SELECTED.items()
    ]
    uri = f"sqlite:///{place}/mlflow.db"
    rebuild(make_study(place / "study", fakes, uri, data_fingerprint=digits.fingerprint))
    return load_runs("digits-study", uri)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A judge who knows the truth, up to a scatter over seeds; notes what he was asked."""
    asked: list[dict[str, Any]] = []

    def judge(place: Path, **options: Any) -> dict[str, Any]:
        name = place.parent.parent.name
        asked.append({"trial": name, **options})
        accuracy = TRUE[name] + SCATTER[options["seed"] % len(SCATTER)]
        return {"metrics": {"accuracy": accuracy, "fid": 100 * (1 - accuracy), "variety": 0.5, "recall": 0.4}}

    monkeypatch.setattr(dpsink.judging, "judge", judge)
    return asked


@pytest.fixture(autouse=True)
def own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def test_the_best_are_judged_on_test_with_seeds_of_their_own(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(runs, top=2, seeds=3, samples=700)
    assert {(one["split"], one["samples"], one["extractor"]) for one in judged} == {("test", 700, "classifier")}
    assert sorted((one["trial"], one["seed"] - FIRST_SEED) for one in judged) == [
        (name, seed) for name in ("honest", "lucky") for seed in range(3)
    ]


def test_mean_and_interval_are_student_s(runs: Runs, judged: list[dict[str, Any]]) -> None:
    (row,) = evaluate_top(runs, top=1, seeds=3).to_dict("records")
    values = [TRUE["lucky"] + SCATTER[(FIRST_SEED + seed) % 3] for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert [row["judged"], row["judged_low"], row["judged_high"]] == pytest.approx([np.mean(values), low, high])
    assert (row["selected"], row["test_variety"], row["test_recall"]) == pytest.approx((0.9, 0.5, 0.4))


def test_a_lucky_winner_is_found_out(runs: Runs, judged: list[dict[str, Any]]) -> None:
    found = evaluate_top(runs, top=3, seeds=3)
    words = " ".join(found.attrs["words"])
    assert list(found["judged_rank"]) == [3, 1, 2]
    assert "The selection does not hold: honest is better by more than both intervals" in words
    assert "lucky is number 3 of 3 on test" in words
    assert "Not to be told apart from honest, the best on test: third." in words
    assert "Kendall's τ -0.33" in words


def test_a_winner_that_keeps_its_promise_is_confirmed(runs: Runs, judged: list[dict[str, Any]]) -> None:
    found = evaluate_top(runs, where=["accuracy<0.85", "trial!=third"], top=2, seeds=3)
    assert "The selection holds on these images: honest is number 1 of 2" in " ".join(found.attrs["words"])
    assert found["probability_best"].tolist()[0] > 0.99


def test_the_words_say_what_selected_and_what_judged(runs: Runs, judged: list[dict[str, Any]]) -> None:
    first, *_, last = evaluate_top(runs, weights="accuracy=1,fid=-0.01", top=2, seeds=2).attrs["words"]
    assert "Selected by 1·accuracy − 0.01·FID on validation" in first and "on test" in first
    assert "choose by validation, not by this table" in last


@pytest.mark.parametrize("by", ["accuracy", "fid"])
def test_probabilities_add_up_and_follow_the_metric_s_direction(
    runs: Runs, judged: list[dict[str, Any]], by: str
) -> None:
    rows = {row["trial"]: row for row in evaluate_top(runs, by, top=4, seeds=3).to_dict("records")}
    assert sum(row["probability_best"] for row in rows.values()) == pytest.approx(1)
    assert max(rows, key=lambda name: rows[name]["probability_best"]) == "honest"
    assert rows["last"]["judged_rank"] == 4


def test_the_result_is_a_file(runs: Runs, judged: list[dict[str, Any]], tmp_path: Path) -> None:
    found = evaluate_top(runs, top=2, seeds=2)
    place = tmp_path / "exports" / "digits-study" / "evaluate-top"
    document = json.loads((place / "result.json").read_text())
    assert [row["trial"] for row in document["rows"]] == ["lucky", "honest"]
    assert document["words"] == found.attrs["words"]
    assert list(pd.read_csv(place / "result.csv")["trial"]) == ["lucky", "honest"]


def test_what_was_measured_before_it_stopped_is_not_measured_again(
    runs: Runs, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = dpsink.judging.judge

    def stopped(place: Path, **options: Any) -> dict[str, Any]:
        if len(judged) == 4:
            raise KeyboardInterrupt
        return patient(place, **options)

    monkeypatch.setattr(dpsink.judging, "judge", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_top(runs, top=3, seeds=3)
    monkeypatch.setattr(dpsink.judging, "judge", patient)
    resumed = evaluate_top(runs, top=3, seeds=3)
    assert len(judged) == len({(one["trial"], one["seed"]) for one in judged}) == 9
    whole = evaluate_top(runs, top=3, seeds=3, out=Path("whole"))
    pd.testing.assert_frame_equal(resumed, whole)


def test_other_samples_are_measured_anew(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(runs, top=1, seeds=2, samples=500)
    evaluate_top(runs, top=1, seeds=2, samples=600, force=True)
    assert [one["samples"] for one in judged] == [500, 500, 600, 600]


def test_a_result_is_not_replaced_without_force(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(runs, top=1, seeds=2)
    with pytest.raises(InputError, match=r"result.json: exists.*--force"):
        evaluate_top(runs, top=1, seeds=2)
    assert len(judged) == 2


@pytest.mark.parametrize("name", ["result.json", "result.csv"])
def test_no_file_of_a_result_is_replaced_without_force_and_nothing_is_measured(
    runs: Runs, judged: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name}: exists.*--force"):
        evaluate_top(runs, top=1, seeds=2, out=tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_text() == "mine" and judged == []
    evaluate_top(runs, top=1, seeds=2, out=tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / name).read_text() != "mine"


def test_progress_counts_what_is_left(runs: Runs, judged: list[dict[str, Any]]) -> None:
    told: list[tuple[int, int, str]] = []
    evaluate_top(runs, top=2, seeds=2, on_progress=lambda *now: told.append(now))
    assert told[0] == (0, 4, "lucky, seed 1 of 2")
    assert told[-1] == (4, 4, "")


def without_files(runs: Runs, *names: str) -> Runs:
    """The same runs, read where some of their folders are not."""
    gone = runs.table["trial"].isin(names)
    return Runs(runs.studies, runs.tracking_uri, runs.table.assign(folder=runs.table["folder"].mask(gone, "/gone")))


def test_a_generator_whose_files_are_gone_is_told_and_the_others_judged(
    runs: Runs, judged: list[dict[str, Any]]
) -> None:
    found = evaluate_top(without_files(runs, "lucky"), top=3, seeds=2)
    assert list(found["trial"]) == ["honest", "third"]
    assert list(found["rank"]) == [2, 3]
    assert found.attrs["skipped"] == ["files of trial lucky are not at /gone; run this where the study's storage is"]


def test_where_all_files_are_gone_nothing_is_judged(runs: Runs, judged: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the best 2 can be judged: files of trial lucky"):
        evaluate_top(without_files(runs, "lucky", "honest"), top=2, seeds=2)
    assert not list(tmp_path.iterdir())


def test_the_test_split_may_not_select_and_judge(runs: Runs) -> None:
    with pytest.raises(InputError, match="may not select: the test split judges"):
        evaluate_top(runs, "test_accuracy")


def test_one_seed_makes_no_interval(runs: Runs) -> None:
    with pytest.raises(InputError, match="2 seeds for an interval"):
        evaluate_top(runs, seeds=1)


def test_the_picture_shows_promise_and_truth(runs: Runs, judged: list[dict[str, Any]]) -> None:
    (axes,) = verdict_figure(evaluate_top(runs, top=3, seeds=3)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1. lucky", "2. honest", "3. third"]
    assert axes.get_xlabel() == "accuracy"


def test_a_real_generator_is_judged_the_same_by_the_same_seeds(runs: Runs) -> None:
    one, again = (evaluate_top(runs, top=1, seeds=2, samples=40, out=Path(name)) for name in ("one", "again"))
    pd.testing.assert_frame_equal(one, again)
    assert all(math.isfinite(one[f"test_{name}"].iloc[0]) for name in ("accuracy", "fid", "variety", "recall"))


# What is judged by Inception.


def by_inception(runs: Runs) -> Runs:
    tag = "inception@180"
    studies = tuple(replace(study, extractor=tag) for study in runs.studies)
    return Runs(studies, runs.tracking_uri, runs.table.assign(fid_extractor=tag))


def test_inception_s_weights_are_refused_where_fid_is_of_other_features(
    runs: Runs, judged: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--inception-weights=w\.pth: study digits-study measured FID with class"):
        evaluate_top(runs, inception_weights=Path("w.pth"))
    assert judged == [] and not list(tmp_path.iterdir())


def test_inception_s_weights_are_used_where_fid_is_of_its_features(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(by_inception(runs), top=1, seeds=2, inception_weights=Path("w.pth"))
    assert [(one["extractor"], one["inception_weights"]) for one in judged] == [("inception", Path("w.pth"))] * 2


# The control beside them.


@pytest.fixture(scope="module")
def controlled(runs: Runs, digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A study of two with the class-mean control, which looks best of all."""
    metrics = {name: {"accuracy": SELECTED[name], "fid": 9.0} for name in ("lucky", "honest")}
    fakes = [Fake(name, metrics=told, fingerprint=digits.fingerprint) for name, told in metrics.items()]
    control = Fake(
        "class-mean", role="baseline", metrics={"accuracy": 0.95, "fid": 90.0}, fingerprint=digits.fingerprint,
        overrides=("generator={kind: class_mean}", "privacy.noise_multiplier=null"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("controlled") / "controlled"
    rebuild(
        make_study(folder, [*fakes, control], runs.tracking_uri, name="controlled", data_fingerprint=digits.fingerprint)
    )
    return load_runs("controlled", runs.tracking_uri)


@pytest.fixture
def truth_of_control(judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setitem(TRUE, "class-mean", 0.97)
    return judged


def test_the_control_is_judged_by_the_same_samples_and_seeds(
    controlled: Runs, truth_of_control: list[dict[str, Any]]
) -> None:
    evaluate_top(controlled, top=1, seeds=2, samples=700)
    asked = {(one["trial"], one["samples"], one["seed"] - FIRST_SEED) for one in truth_of_control}
    assert asked == {(name, 700, seed) for name in ("lucky", "class-mean") for seed in (0, 1)}


def test_the_control_is_no_part_of_the_ranking_or_its_words(controlled: Runs, truth_of_control: Any) -> None:
    with_control, control = evaluate_top(controlled), controlled.table["trial"] == "class-mean"
    alone = Runs(controlled.studies, controlled.tracking_uri, pd.DataFrame(controlled.table[~control]))
    without = evaluate_top(alone, force=True)
    pd.testing.assert_frame_equal(with_control, without)
    assert with_control.attrs["words"] == without.attrs["words"]
    assert (with_control.attrs["control"]["trial"], without.attrs["control"]) == ("class-mean", None)


def test_the_control_s_row_is_in_both_files_of_a_result_and_marked(controlled: Runs, truth_of_control: Any) -> None:
    written = evaluate_top(controlled).attrs["written"]
    control = json.loads(written.read_text())["control"]
    assert (control["trial"], control["selected"], control["judged"]) == pytest.approx(("class-mean", 0.95, 0.97))
    sheet = pd.read_csv(written.with_suffix(".csv"))
    assert list(sheet["role"]) == ["search", "search", "control"]
    assert sheet["rank"].isna().tolist() == [False, False, True]


def test_the_control_s_row_is_printed_and_marked(controlled: Runs, truth_of_control: Any) -> None:
    words = ["evaluate-top", "controlled", "--tracking-uri", controlled.tracking_uri]
    printed = CliRunner().invoke(app, words, standalone_mode=False).stdout.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("control ")] == ["class-mean"]


def test_a_control_whose_files_are_gone_is_told(controlled: Runs, truth_of_control: Any) -> None:
    found = evaluate_top(without_files(controlled, "class-mean"))
    (told,) = found.attrs["skipped"]
    assert told.startswith("class-mean control: files of trial class-mean are not at")
    assert found.attrs["control"] is None


# A selection that has changed since.


def outdated(runs: Runs, **better: float) -> str:
    """What is said of the result after some trials became better."""
    rows = [row | {"accuracy": better.get(row["trial"], row["accuracy"])} for row in rows_of(runs.table)]
    later = Runs(runs.studies, runs.tracking_uri, pd.DataFrame(rows))
    found = read_verdict(later)
    assert found is not None
    return outdated_in_words(later, found)


def test_a_result_whose_selection_has_changed_names_the_leader_and_the_command(
    runs: Runs, judged: list[dict[str, Any]]
) -> None:
    evaluate_top(runs, where=["accuracy>0.2"], top=2, seeds=2, samples=700)
    told = outdated(runs, third=0.95)
    assert "by accuracy third comes first now" in told
    options = "--by accuracy --where 'accuracy>0.2' --top 2 --seeds 2 --samples 700 --force"
    assert f"`dpsink-analysis evaluate-top digits-study {options}`" in told


def test_a_result_whose_lower_ranks_have_changed_is_outdated(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(runs, top=2, seeds=2)
    assert "by accuracy lucky comes first now" in outdated(runs, third=0.85)


def test_a_result_is_not_outdated_by_what_it_did_not_judge(runs: Runs, judged: list[dict[str, Any]]) -> None:
    evaluate_top(runs, top=2, seeds=2)
    assert outdated(runs, last=0.75) == ""


def test_a_result_without_its_rule_is_still_read(runs: Runs, judged: list[dict[str, Any]]) -> None:
    path = evaluate_top(runs, top=2, seeds=2).attrs["written"]
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "rule"}))
    assert outdated(runs, third=0.95) == ""


# Trained again.


@pytest.fixture(scope="module")
def repeated(runs: Runs, digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same study with one that trained the best two of it three times more."""
    folder = tmp_path_factory.mktemp("again") / "repeat"
    fakes = [
        Fake(f"{name}-{seed}", config_id=f"c-{name}", fingerprint=digits.fingerprint)
        for name in ("lucky", "honest")
        for seed in (1, 2, 3)
    ]
    first = Earlier(study_id=runs.study.study_id, name=runs.study.name, epsilon=20.0, delta=1e-5, spent=19.0)
    facts: dict[str, Any] = {"name": "again", "repeats": first, "seeds": 3, "data_fingerprint": digits.fingerprint}
    rebuild(make_study(folder, fakes, runs.tracking_uri, **facts))
    return load_runs(["digits-study", "again"], runs.tracking_uri)


@pytest.fixture
def truth_of_trainings(judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    truth = {"lucky-1": 0.5, "lucky-2": 0.6, "lucky-3": 0.7, "honest-1": 0.8, "honest-2": 0.8, "honest-3": 0.86}
    for name, value in truth.items():
        monkeypatch.setitem(TRUE, name, value)
    return truth


def test_what_was_trained_again_is_no_part_of_the_selection(repeated: Runs, truth_of_trainings: Any) -> None:
    assert list(evaluate_top(repeated, top=2)["trial"]) == ["lucky", "honest"]


def test_the_mean_over_new_trainings_has_student_s_interval(
    repeated: Runs, truth_of_trainings: dict[str, float]
) -> None:
    row = evaluate_top(repeated, top=2, seeds=3).to_dict("records")[0]
    values = [truth_of_trainings[f"lucky-{number}"] for number in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    told = [row["trainings"], row["retrained"], row["retrained_low"], row["retrained_high"]]
    assert told == pytest.approx([3, np.mean(values), low, high])


def test_an_order_that_new_trainings_turn_around_is_said_not_to_hold(repeated: Runs, truth_of_trainings: Any) -> None:
    words = evaluate_top(repeated, top=2).attrs["words"]
    told = "The order does not hold when they are trained again: honest has the best mean"
    assert f"{told}, but the intervals overlap: more seeds would tell." in words  # 0.6 ±0.25 and 0.82 ±0.09


def test_what_was_not_trained_again_has_no_such_mean(repeated: Runs, truth_of_trainings: Any) -> None:
    table = evaluate_top(repeated, top=3)
    assert list(table["trainings"]) == [3, 3, 0]
    assert math.isnan(table["retrained"].iloc[2])
    assert not any("order" in line and "trained again" in line for line in table.attrs["words"])


def test_the_picture_shows_new_trainings_where_there_are_some(repeated: Runs, truth_of_trainings: Any) -> None:
    (axes,) = verdict_figure(evaluate_top(repeated, top=3)).axes
    (again,) = [line for line in axes.lines if str(line.get_label()).startswith("trained again")]
    assert np.asarray(again.get_xdata()) == pytest.approx([0.6, 0.82])


def test_both_studies_together_cost_what_the_second_says(repeated: Runs) -> None:
    second = repeated.studies[1].statement
    assert f"ε ≤ {math.ceil(second['study_epsilon'] * 1000) / 1000:g}" in guarantee(repeated).splitlines()[-1]


def test_a_repeating_study_alone_is_ranked_like_any_other(repeated: Runs) -> None:
    alone = load_runs("again", repeated.tracking_uri)
    assert len(best(alone)) == 2


@pytest.mark.parametrize(
    ("moment", "told", "kept"),
    [
        ("analysis.cli._load", "interrupted", 0),
        ("dpsink.judging.judge", "interrupted; what is measured is kept: the same command goes on", 2),
    ],
)
def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    moment: str, told: str, kept: int, runs: Runs, judged: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge: Judge = dpsink.judging.judge

    def stop(*words: Any, **options: Any) -> Any:
        if len(judged) == kept:
            raise KeyboardInterrupt
        return judge(*words, **options)

    command = ["evaluate-top", runs.name, "--tracking-uri", runs.tracking_uri, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["dpsink-analysis", *command, "--top", "2"])
    monkeypatch.setattr(moment, stop)
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, lines[-1]) == (130, told)
    assert [line for line in lines[:-1] if not line.startswith("judging")] == []
    assert len(list(tmp_path.glob("out/measured/*.json"))) == kept
    assert not (tmp_path / "out" / "result.json").exists()
