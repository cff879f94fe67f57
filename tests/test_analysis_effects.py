"""Importance: what made the difference stands out, what did not looks like chance, few runs are called few."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.charts import importance_figure
from analysis.effects import MATTERS, NOISE, Dimension, _advice, importance
from analysis.page import render
from analysis.runs import Runs, load_runs
from dpsink.errors import InputError
from tests.stores import SPACE, large_study, study_run, trial_run, write_runs
from tune import schema

LR, BLUR, SIGMA = SPACE
TRIALS = 140


@pytest.fixture(scope="module")
def database(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("effects") / "mlflow.db"
    shutil.copyfile(empty_database[0], database)
    write_runs(database, large_study("told", TRIALS))
    write_runs(database, large_study("few", 12, told=False))
    return database


def load(database: Path, study: str) -> Runs:
    return load_runs(study, f"sqlite:///{database}")


@pytest.fixture(scope="module")
def found(database: Path) -> pd.DataFrame:
    """Of a study in which accuracy depends on the learning rate most, on the blur a little, on σ not at all."""
    return importance(load(database, "told")).set_index("parameter")


@pytest.fixture(scope="module")
def few(database: Path) -> pd.DataFrame:
    """Of six configurations in a space that the study does not tell."""
    return importance(load(database, "few"))


def test_the_parameter_that_made_the_difference_stands_first(found: pd.DataFrame) -> None:
    assert found.index[0] == LR
    assert found.loc[LR, "verdict"] == MATTERS
    assert found["fanova"].tolist()[0] > 0.6


def test_a_parameter_that_makes_no_difference_looks_like_chance(found: pd.DataFrame) -> None:
    assert found.loc[SIGMA, "verdict"] == NOISE
    assert str(found.loc[SIGMA, "advice"]).startswith("fix at ")


def test_every_share_lies_in_its_interval(found: pd.DataFrame) -> None:
    for name in ("fanova", "ped_anova"):
        low, middle, high = (found[column].to_numpy() for column in (f"{name}_low", name, f"{name}_high"))
        assert np.all((low >= 0) & (low <= middle) & (middle <= high) & (high <= 1))
        assert np.any(low < high)


def test_shares_of_the_parameters_and_of_chance_add_up_to_at_most_one(found: pd.DataFrame) -> None:
    assert sum(found["fanova"].tolist()) < 1.05  # medians of shares that add up to 1 with the one of chance


def test_the_best_at_the_edge_of_the_range_say_widen(found: pd.DataFrame) -> None:
    assert str(found.loc[LR, "advice"]).startswith("widen above: the best lie around 0.00")
    assert "of [0.0001, 0.01]" in str(found.loc[LR, "advice"])


ADVICE = [  # where the best of a range from 0.0001 to 0.01 lie, by logarithm
    (np.linspace(0.35, 0.65, 12), "narrow to [0.000501, 0.002] of [0.0001, 0.01]"),
    (np.linspace(0.7, 1.0, 12), "widen above: the best lie around 0.0050"),
    (np.linspace(0.0, 0.3, 12), "widen below: the best lie around 0.0002"),
    (np.linspace(0.1, 0.9, 12), "keep"),
]


@pytest.mark.parametrize(("best", "wanted"), ADVICE)
def test_what_to_search_next_follows_from_where_the_best_lie(best: np.ndarray, wanted: str) -> None:
    positions = np.concatenate([best, np.linspace(0, 1, 36)])  # the best quarter comes first
    dimension = Dimension(LR, positions, 1e-4, 1e-2, True, None, True)
    assert _advice(dimension, MATTERS, enough=True).startswith(wanted)


@pytest.mark.parametrize(("enough", "wanted"), [(True, "fix at l2"), (False, "keep: too few to tell")])
def test_a_choice_is_fixed_by_enough_configurations_only(enough: bool, wanted: str) -> None:
    dimension = Dimension("sinkhorn.cost", np.array([1.0] * 5 + [0.0] * 15), None, None, False, ("l1", "l2"), True)
    assert _advice(dimension, MATTERS, enough=enough) == wanted


def test_the_same_seed_gives_the_same_numbers(database: Path, few: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(few, importance(load(database, "few")))


def test_the_picture_has_a_line_for_every_parameter(database: Path, found: pd.DataFrame) -> None:
    table = found.reset_index()
    table.attrs = found.attrs | {"metric": "accuracy", "configurations": TRIALS // 2, "note": ""}
    (axes,) = importance_figure(table).axes
    assert [label.get_text().splitlines()[0] for label in axes.get_yticklabels()] == list(found.index)


def test_few_runs_are_called_few_and_nothing_is_fixed(database: Path) -> None:
    found = importance(load(database, "few"))
    assert "6 configurations for 3 parameters are few" in found.attrs["note"]
    assert not [advice for advice in found["advice"] if advice.startswith("fix")]


def test_a_range_that_the_study_does_not_tell_is_the_one_that_was_seen(database: Path) -> None:
    advice = " ".join(importance(load(database, "few"))["advice"])
    assert "that was seen" in advice or advice.count("keep") == 3


def write(
    empty_database: tuple[Path, str], place: Path, count: int, searched: str = "optimizer.lr,sinkhorn.cost",
    space: dict[str, Any] | None = None,
) -> Runs:  # fmt: skip
    """Trials whose accuracy depends on a choice: `l2` is good."""
    shutil.copyfile(empty_database[0], place / "mlflow.db")
    rng = np.random.default_rng(1)
    trials = [
        trial_run(
            "choices", f"t{index}", {"accuracy": 0.5 + 0.3 * (index % 2) + 0.01 * rng.random()},
            params={"sinkhorn.cost": ["l1", "l2"][index % 2], "optimizer.lr": rng.random() + 1},
        )
        for index in range(count)
    ]  # fmt: skip
    tags = {schema.SPACE_TAG: json.dumps(space or {})}
    write_runs(place / "mlflow.db", [study_run("choices", searched=searched, tags=tags), *trials])
    return load_runs("choices", f"sqlite:///{place}/mlflow.db")


def test_a_choice_that_all_the_best_share_is_to_be_fixed(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    found = importance(write(empty_database, tmp_path, 40)).set_index("parameter")
    assert found.index[0] == "sinkhorn.cost"
    assert found.loc["sinkhorn.cost", "advice"] == "fix at l2"
    assert found.loc["sinkhorn.cost", "best"] == "l2"


CONDITIONAL = {
    "sinkhorn.cost": {"choice": ["l1", "l2"]},
    "optimizer.lr": {"uniform": [1.0, 2.0], "when": {"sinkhorn.cost": ["l2"]}},
    "seed": {"choice": [0, 1], "when": {"optimizer.lr": [1.5]}},
}


def test_what_was_searched_under_a_choice_only_is_left_out_and_said_to_be(
    empty_database: tuple[Path, str], tmp_path: Path
) -> None:
    runs = write(empty_database, tmp_path, 40, searched=",".join(CONDITIONAL), space=CONDITIONAL)
    found = importance(runs)
    assert list(found["parameter"]) == ["sinkhorn.cost"]
    assert found.attrs["left_out"] == ["optimizer.lr", "seed"]  # the one below it too
    assert (
        "optimizer.lr is left out: only some configurations searched it (--where 'sinkhorn.cost=l2'"
        in (found.attrs["note"])
    )


def test_under_its_choice_it_counts(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    runs = write(empty_database, tmp_path, 40, searched=",".join(CONDITIONAL), space=CONDITIONAL)
    found = importance(runs, where=["sinkhorn.cost=l2"])
    assert list(found["parameter"]) == ["optimizer.lr"]
    assert found.attrs["left_out"] == ["seed"]


def test_too_few_configurations_are_refused(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs 5 configurations, it has 4"):
        importance(write(empty_database, tmp_path, 4))


def test_a_metric_that_does_not_vary_is_refused(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    runs = write(empty_database, tmp_path, 6)
    runs.table["accuracy"] = 0.5
    with pytest.raises(InputError, match="have the same accuracy"):
        importance(runs)


def test_a_study_that_searched_nothing_is_refused(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no searched parameter has two values"):
        importance(write(empty_database, tmp_path, 6, searched=""))


def tied(runs: Runs, apart: int) -> Runs:
    """All configurations but `apart` have one accuracy; the others are better."""
    runs.table["accuracy"] = [0.6 + index / 1000 if index < apart else 0.5 for index in range(len(runs.table))]
    return runs


def test_ties_that_leave_nothing_to_tell_apart_are_one_line(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"have the same accuracy: \d+ of 30 resamples cannot") as caught:
        importance(tied(write(empty_database, tmp_path, 12), 1))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")  # Optuna warns where its answer means nothing
def test_tied_resamples_are_left_out_and_said_to_be(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    found = importance(tied(write(empty_database, tmp_path, 12), 4))
    assert re.search(r"\b\d+ of 30 resamples are left out: their best are tied", found.attrs["note"])
    assert np.isfinite(found["fanova"]).all()


def test_a_report_says_that_ties_leave_nothing_to_tell_apart(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    page = render(tied(write(empty_database, tmp_path, 12), 1))
    assert "Note: study 'choices': too many configurations have the same accuracy" in html.unescape(page)
