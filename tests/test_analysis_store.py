"""Runs out of MLflow: by its client or from its tables the same, many of them soon, foreign stores told in a line."""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from analysis import store
from analysis.fronts import pareto
from analysis.registry import fetch_model
from analysis.runs import NUMBERS, SAMPLES, TEXTS, Runs, load_runs, rows_of
from analysis.selection import best
from analysis.store import find_runs
from dpsink.errors import InputError
from tests.stores import SEEDS, Run, control_run, large_study, study_run, trial_run, write_runs
from tune import schema

MANY = 10_000
Written = Callable[..., str]


@pytest.fixture(scope="module")
def large(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, float]:
    """A study of ten thousand runs, and the CPU seconds that it took to load."""
    database = tmp_path_factory.mktemp("large") / "mlflow.db"
    shutil.copyfile(empty_database[0], database)
    write_runs(database, large_study("large", MANY))
    started = time.process_time()
    runs = load_runs("large", f"sqlite:///{database}")
    return runs, time.process_time() - started


@pytest.fixture
def written(empty_database: tuple[Path, str], tmp_path: Path) -> Written:
    """Writes runs into a database of their own; answers with its URI."""

    def write(*runs: Run) -> str:
        shutil.copyfile(empty_database[0], tmp_path / "mlflow.db")
        write_runs(tmp_path / "mlflow.db", runs)
        return f"sqlite:///{tmp_path}/mlflow.db"

    return write


def few(study: str = "few") -> list[Run]:
    metrics = {"accuracy": 0.7, "fid": math.nan, "kid": 0.1 + 0.2}
    return [study_run(study), *(trial_run(study, f"t{index}", metrics) for index in range(3)), control_run(study, {})]


def test_best_and_front_of_ten_thousand_runs_take_five_seconds(large: tuple[Runs, float]) -> None:
    runs, _ = large
    started = time.process_time()
    assert len(best(runs, ["accuracy:0.01", "fid"])) == MANY / SEEDS
    assert 0 < pareto(runs)["on_front"].tolist().count(True) < MANY / SEEDS
    assert time.process_time() - started <= 5


def test_ten_thousand_runs_load_within_five_seconds(large: tuple[Runs, float]) -> None:
    runs, seconds = large
    assert (len(runs.accepted), len(runs.rejected)) == (MANY + 1, 0)
    assert seconds <= 5


def test_every_column_has_the_type_that_is_documented(large: tuple[Runs, float]) -> None:
    table = large[0].table
    assert list(table.columns[: len(TEXTS)]) == list(TEXTS)
    assert {str(table[name].dtype) for name in NUMBERS} == {"float64"}
    assert all(pd.api.types.is_numeric_dtype(table[name]) for name in ("optimizer.lr", "seed", "privacy.batch_size"))
    assert not pd.api.types.is_numeric_dtype(table["generator.kind"])


def test_the_tables_and_the_client_tell_the_same(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = written(*few(), *few("other"))
    by_tables = find_runs(uri, schema.STUDY_ID_TAG, ["id-few", "id-other"])
    monkeypatch.setattr(store, "KNOWN_TABLES", "of another day")
    by_client = find_runs(uri, schema.STUDY_ID_TAG, ["id-few", "id-other"])
    assert len(by_tables) == 10
    assert list(map(repr, by_tables)) == list(map(repr, by_client))  # NaN is not equal to itself


class Paged(list[Any]):
    """A page of answers."""

    token: str | None = None


class TwoPages:
    """A client that holds two experiments, each with a run, and tells one a page."""

    def search_experiments(self, *, page_token: str | None) -> Paged:
        return self._page([SimpleNamespace(experiment_id=name) for name in "ab"], page_token)

    def search_runs(self, experiments: list[str], query: str, *, max_results: int, page_token: str | None) -> Paged:
        data = SimpleNamespace(tags={}, params={}, metrics={})
        runs = [SimpleNamespace(info=SimpleNamespace(run_id=f"run-{name}", experiment_id=name, start_time=0), data=data)
                for name in experiments]  # fmt: skip
        return self._page(runs, page_token)

    def _page(self, found: list[Any], token: str | None) -> Paged:
        page = Paged(found[1:] if token else found[:1])
        page.token = None if token else "second"
        return page


def test_a_server_s_answers_are_read_to_the_last_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.MlflowClient", lambda **_: TwoPages())
    found = find_runs("http://server", schema.STUDY_ID_TAG, ["id-few"])
    assert [run.run_id for run in found] == ["run-a", "run-b"]


def test_the_tables_are_read_where_mlflow_of_this_installation_made_them(empty_database: tuple[Path, str]) -> None:
    """After an upgrade of MLflow: look at the tables again, then name their revision."""
    with closing(sqlite3.connect(empty_database[0])) as connection:
        assert connection.execute("select version_num from alembic_version").fetchone()[0] == store.KNOWN_TABLES


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_in_mlflow_is_not_read(written: Written, what: str) -> None:
    uri = written(*few())
    client = MlflowClient(uri)
    if what == "run":
        client.delete_run("few-t1")
        assert list(load_runs("few", uri).table["trial"]) == ["baseline-class-mean", "t0", "t2"]
    else:
        client.delete_experiment(client.create_experiment("mine"))
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection, connection:
            connection.execute("update runs set experiment_id = 1")
        with pytest.raises(InputError, match="it holds no study"):
            load_runs("few", uri)


def test_a_store_of_another_mlflow_is_told_in_one_line(written: Written) -> None:
    uri = written(*few())
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("update alembic_version set version_num = '97727af70f4d'")
    with pytest.raises(InputError, match="another version of MLflow made it") as caught:
        load_runs("few", uri)
    assert "\n" not in str(caught.value)


def test_a_store_of_a_later_mlflow_is_told_in_one_line(written: Written) -> None:
    uri = written(*few())
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
    with pytest.raises(InputError, match="another version of MLflow made it") as caught:
        load_runs("few", uri)
    assert "\n" not in str(caught.value)


def foreign(place: Path, kind: str) -> Path:
    """A file that is not MLflow's: no database, an empty one, another's, and one whose note is empty."""
    tables = {"another's": "create table mine (x)", "no revision": "create table alembic_version (version_num)"}
    if kind in tables:
        with closing(sqlite3.connect(place)) as connection, connection:
            connection.execute(tables[kind])
    else:
        place.write_text("no database\n" * 100 if kind == "text" else "")
    return place


@pytest.mark.parametrize("kind", ["text", "empty", "another's", "no revision"])
@pytest.mark.parametrize("ask", ["runs", "model"])
def test_a_file_that_is_not_mlflow_s_is_told_in_one_line_and_stays_as_it_is(
    ask: str, kind: str, tmp_path: Path
) -> None:
    file = foreign(tmp_path / "mine.db", kind)
    before, uri = file.read_bytes(), f"sqlite:///{file}"
    with pytest.raises(InputError, match=r"mine\.db: cannot be read as MLflow's \(") as caught:
        load_runs("few", uri) if ask == "runs" else fetch_model("models:/a@b", tmp_path / "out", tracking_uri=uri)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def halved(run: Run, what: str) -> Run:
    """A study's run as a killed writer, or a stranger, leaves it."""
    if what == "no params":
        return run._replace(params={})
    broken = {schema.SPACE_TAG: "{", schema.STATEMENT_TAG: "[1]"}
    return run._replace(tags=run.tags | {what: broken[what]})


@pytest.mark.parametrize("what", ["no params", schema.SPACE_TAG, schema.STATEMENT_TAG])
def test_a_study_s_run_that_is_half_written_is_told_in_one_line(written: Written, what: str) -> None:
    study, *trials = few()
    with pytest.raises(InputError, match="study 'few': its run in MLflow is not whole") as caught:
        load_runs("few", written(halved(study, what), *trials))
    assert "\n" not in str(caught.value)


def test_a_half_written_study_does_not_keep_another_from_being_read(written: Written) -> None:
    assert load_runs("few", written(halved(study_run("young"), "no params"), *few())).name == "few"


def test_studies_of_different_data_are_not_compared(written: Written) -> None:
    theirs = study_run("theirs", tags={schema.FINGERPRINT_TAG: "hmac:theirs"}, data_name="mnist")
    uri = written(*few(), theirs)
    with pytest.raises(InputError, match=r"'few' \(digits, .*'theirs' \(mnist, .*different data"):
        load_runs(["few", "theirs"], uri)


def test_studies_at_different_delta_are_not_compared(written: Written) -> None:
    uri = written(*few(), study_run("loose", delta=1e-3))
    with pytest.raises(InputError, match="different δ"):
        load_runs(["few", "loose"], uri)


def test_several_studies_are_one_table_in_the_order_asked_for(written: Written) -> None:
    runs = load_runs(["other", "few"], written(*few(), *few("other")))
    assert list(runs.table["study"]) == ["other"] * 4 + ["few"] * 4
    assert runs.name == "other+few"


def test_a_study_with_another_extractor_is_set_apart_from_the_first(written: Written) -> None:
    tags = {schema.EXTRACTOR_TAG: "inception@180"}
    inception = [study_run("inception", tags=tags), trial_run("inception", "t0", {"accuracy": 0.9}, tags=tags)]
    runs = load_runs(["few", "inception"], written(*few(), *inception))
    assert list(runs.rejected["reason"])[-1] == "with another FID extractor"


def test_runs_judged_by_another_number_of_samples_than_the_first_study_s_are_set_apart(written: Written) -> None:
    fewer = trial_run("fewer", "t0", {"accuracy": 0.9}, params={SAMPLES: 500})
    runs = load_runs(["few", "fewer"], written(*few(), study_run("fewer"), fewer))
    (row,) = [row for row in rows_of(runs.rejected) if row["study"] == "fewer"]
    assert (row["reason"], row["detail"]) == ("judged by another number of samples", "500, not 2000")


def test_a_run_above_the_target_of_its_own_study_is_set_apart(written: Written) -> None:
    strict = [study_run("strict", target_epsilon=1.0), trial_run("strict", "t0", {"accuracy": 0.9})]
    runs = load_runs(["few", "strict"], written(*few(), *strict))
    (reason,) = runs.rejected[runs.rejected["study"] == "strict"]["reason"]
    assert reason == "above the target epsilon"


def test_two_studies_of_one_name_are_not_mixed(written: Written, tmp_path: Path) -> None:
    uri = written(*few())
    twin = study_run("few")
    write_runs(
        Path(uri.removeprefix("sqlite:///")), [twin._replace(id="twin", tags=twin.tags | {schema.STUDY_ID_TAG: "id-2"})]
    )
    for study_id in ("id-few", "id-2"):
        (tmp_path / study_id).mkdir()
        (tmp_path / study_id / "study.json").write_text(f'{{"study_id": "{study_id}", "tracking_uri": "{uri}"}}')
    with pytest.raises(InputError, match="two studies are called 'few'"):
        load_runs([str(tmp_path / "id-few"), str(tmp_path / "id-2")])
