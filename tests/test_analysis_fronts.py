"""The Pareto front and its hypervolume: against their definitions and against Optuna."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna._hypervolume import compute_hypervolume

from analysis.charts import pareto_figure
from analysis.fronts import hypervolume, non_dominated, pareto, pareto_in_words
from analysis.runs import Runs, load_runs
from dpsink.errors import InputError
from tests.stores import study_run, trial_run, write_runs

POINTS = {  # trial to FID, accuracy, ε
    "good": (10.0, 0.8, 9.0), "cheap": (20.0, 0.7, 2.0), "worse": (20.0, 0.7, 9.0), "twin": (10.0, 0.8, 9.0),
    "worst": (40.0, 0.5, 9.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    database = tmp_path_factory.mktemp("fronts") / "mlflow.db"
    shutil.copyfile(empty_database[0], database)
    trials = [
        trial_run("one", name, {"fid": fid, "accuracy": accuracy, "epsilon": epsilon})
        for name, (fid, accuracy, epsilon) in POINTS.items()
    ]
    write_runs(database, [study_run("one"), *trials])
    return load_runs("one", f"sqlite:///{database}")


@pytest.mark.parametrize("metrics", [2, 3])
def test_the_front_is_what_optuna_calls_best(metrics: int) -> None:
    losses = np.random.default_rng(metrics).integers(0, 6, size=(60, metrics)).astype(float)  # with ties
    study = optuna.create_study(directions=[optuna.study.StudyDirection.MINIMIZE] * metrics)
    study.add_trials(optuna.create_trial(values=list(point)) for point in losses)
    assert set(np.flatnonzero(non_dominated(losses))) == {trial.number for trial in study.best_trials}


@pytest.mark.parametrize("metrics", [2, 3])
def test_the_hypervolume_agrees_with_optuna(metrics: int) -> None:
    losses = np.random.default_rng(metrics).random((40, metrics)) * 1.2
    reference = np.ones(metrics)
    inside = losses[(losses < 1).all(axis=1)]
    assert hypervolume(losses, reference) == pytest.approx(compute_hypervolume(inside, reference), rel=1e-12)


def test_the_hypervolume_of_boxes_is_known() -> None:
    assert hypervolume(np.array([[1.0, 2.0]]), np.array([3.0, 5.0])) == 6
    assert hypervolume(np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([3.0, 3.0])) == 3 + 6 - 2
    assert hypervolume(np.array([[4.0, 0.0]]), np.array([3.0, 3.0])) == 0


def test_the_hypervolume_does_not_depend_on_the_order_of_points_or_metrics() -> None:
    losses = np.random.default_rng(0).random((12, 3))
    reference = np.array([1.0, 1.1, 1.2])
    volumes = [
        hypervolume(losses[::-1][:, order], reference[order]) for order in map(list, itertools.permutations(range(3)))
    ]
    assert volumes == pytest.approx([volumes[0]] * 6, rel=1e-12)


def test_every_configuration_that_none_beats_is_on_the_front_with_its_twin(runs: Runs) -> None:
    found = pareto(runs)
    assert set(found["trial"][found["on_front"]]) == {"good", "twin", "cheap"}
    assert len(found) == len(POINTS)


def test_the_front_comes_first_from_its_best_in_the_first_metric(runs: Runs) -> None:
    assert list(pareto(runs)["trial"])[:3] == ["good", "twin", "cheap"]
    assert pareto(runs, ("epsilon", "fid"))["trial"].iloc[0] == "cheap"


def test_the_reference_is_the_worst_that_was_found_unless_it_is_given(runs: Runs) -> None:
    found = pareto(runs, ("fid", "accuracy"))
    assert found.attrs["reference"] == {"fid": 40.0, "accuracy": 0.5}
    assert found.attrs["hypervolume"] == pytest.approx((40 - 10) * (0.8 - 0.5))
    assert found.attrs["share"] == pytest.approx(1)
    given = pareto(runs, ("fid", "accuracy"), reference={"fid": 110.0, "accuracy": 0.0})
    assert given.attrs["hypervolume"] == pytest.approx(100 * 0.8)
    assert "up to FID 110, accuracy 0" in pareto_in_words(given)


def test_where_all_are_alike_in_a_metric_there_is_no_share(runs: Runs) -> None:
    found = pareto(runs, ("fid", "accuracy"), where=["trial=good"])
    assert math.isnan(found.attrs["share"])
    assert "nan" not in pareto_in_words(found)


@pytest.mark.parametrize(
    ("metrics", "reference", "told"),
    [
        (("fid",), {}, "two or three"),
        (("fid", "fid"), {}, "two or three"),
        (("fid", "acuracy"), {}, "did you mean 'accuracy'"),
        (("fid", "kid"), {}, "no configuration has all of fid, kid"),
        (("fid", "accuracy"), {"kid": 1.0}, "none of the metrics compared"),
    ],
)
def test_metrics_that_make_no_front_are_refused(
    runs: Runs, metrics: tuple[str, ...], reference: dict[str, float], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        pareto(runs, metrics, reference=reference)


@pytest.mark.parametrize("metrics", [("fid", "accuracy"), ("fid", "accuracy", "epsilon")])
def test_the_picture_shows_every_configuration(runs: Runs, metrics: tuple[str, ...]) -> None:
    figure = pareto_figure(pareto(runs, metrics))
    axes = figure.axes[0]
    assert sum(np.shape(points.get_offsets())[0] for points in axes.collections) == len(POINTS)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("FID", "accuracy")
