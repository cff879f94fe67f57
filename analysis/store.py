"""Runs as MLflow keeps them, through its client, or straight from the tables of an sqlite file whose form is known.

The client makes an object of every tag, param and metric: tens of seconds for ten thousand runs, where reading the
tables takes two. So a database file with the revision of the tables that this module was written for is read by
SQL; every other store, a server or a database of another MLflow, by the client, which says what it does not like.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from dpsink.errors import InputError
from tune import schema

if TYPE_CHECKING:  # its import takes seconds
    from mlflow import MlflowClient

KNOWN_TABLES = "dc11669786a5"  # alembic's revision of MLflow 3.17
PAGE = 1000  # runs of one answer of a server
MOST_NAMES = 500  # in one SQL statement
ANOTHER = "name another with --tracking-uri"


@dataclass(frozen=True)
class StoredRun:
    """A run as it was logged; `metrics` are the last values, NaN where NaN was logged."""

    run_id: str
    experiment_id: str
    start: int  # milliseconds
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def find_runs(uri: str, tag: str, values: Sequence[str]) -> list[StoredRun]:
    """The runs, oldest first, whose tag has one of the values; deleted runs and experiments are left out.

    Raises:
        InputError: MLflow does not answer, is of another version, or a file is none of its databases.
    """
    database, revision = _database(uri)
    if database and revision == KNOWN_TABLES:
        with _telling(uri):
            found = _from_tables(database, tag, values)
    else:
        with asking(uri) as client:
            found = _from_client(client, tag, values)
    return sorted(found, key=lambda run: (run.start, run.run_id))


@contextmanager
def asking(uri: str, failure: str = "cannot be read") -> Iterator["MlflowClient"]:
    """A client; whatever goes wrong with it is told in one line, which says `failure`."""
    _database(uri)
    schema.quiet_mlflow()
    with _telling(uri, failure):
        from mlflow import MlflowClient

        yield MlflowClient(tracking_uri=uri)


def all_pages(ask: Callable[[str | None], Any]) -> list[Any]:
    """All that a store tells, which it does page by page.

    Args:
        ask: for the page of a token; None is the first.
    """
    page = ask(None)
    found = list(page)
    while page.token:
        page = ask(page.token)
        found += page
    return found


def fetch_artifact(uri: str, run_id: str, name: str, folder: Path) -> Path | None:
    """Copies an artifact of a run into a folder; None if the run has none of that name.

    Raises:
        InputError: it cannot be read, or the store says that it lies outside the run's own artifacts.
    """
    with asking(uri) as client:
        place = client.get_run(run_id).info.artifact_uri
        if not place:
            return None
        _check_place(place, run_id, name)
        if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            return None
        folder.mkdir(exist_ok=True)
        return Path(client.download_artifacts(run_id, name, str(folder)))


def _check_place(place: str, run_id: str, name: str) -> None:
    """A store may be anybody's: one that calls a person's file a run's artifact would have it shown to others."""
    parts = urlsplit(place)
    if parts.scheme not in ("", "file"):
        return
    root = Path(unquote(parts.path) if parts.scheme else place).resolve()
    if root.parts[-2:] != (run_id, "artifacts") or not (root / name).resolve().is_relative_to(root):
        raise InputError(f"'{name}' of run {run_id} is not among the run's own artifacts, and is not read")


def fetch_history(uri: str, run_id: str, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """What a run reported on its way: metric to step to value, by step; without the metrics it has not.

    Raises:
        InputError: it cannot be read.
    """
    with asking(uri) as client:
        told = {name: client.get_metric_history(run_id, name) for name in metrics}
    return {
        name: {point.step: point.value for point in sorted(points, key=lambda point: point.step)}
        for name, points in told.items()
        if points
    }


def _database(uri: str) -> tuple[Path, str] | tuple[None, None]:
    """The sqlite file of a URI and the revision of its tables; a client would make it, or fill a foreign one."""
    database = schema.sqlite_file(uri)
    if database is None:
        return None, None
    if not database.exists():
        raise InputError(f"{database}: no such database; run a study first, or {ANOTHER}")
    return database, _revision(database)


@contextmanager
def _telling(uri: str, failure: str = "cannot be read") -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{schema.shown_uri(uri)}: {failure} ({_reason(error, uri)})") from None


def _reason(error: Exception, uri: str) -> str:
    if "out-of-date database schema" in str(error):
        return "another version of MLflow made it; `mlflow db upgrade` on a copy, or install that version"
    told = schema.mlflow_reason(error, uri)
    return told if schema.sqlite_file(uri) else f"{told}; is the MLflow server up?"


# Through the client.


def _from_client(client: "MlflowClient", tag: str, values: Sequence[str]) -> list[StoredRun]:
    told = all_pages(lambda token: client.search_experiments(page_token=token))
    experiments = [experiment.experiment_id for experiment in told]
    queries = [f"tags.`{tag}` = '{value}'" for value in values]
    return [_stored(run) for query in queries for run in all_pages(partial(_page, client, experiments, query))]


def _page(client: "MlflowClient", experiments: list[str], query: str, token: str | None) -> Any:
    return client.search_runs(experiments, query, max_results=PAGE, page_token=token)


def _stored(run: Any) -> StoredRun:
    info, data = run.info, run.data
    return StoredRun(info.run_id, info.experiment_id, info.start_time or 0, data.tags, data.params, data.metrics)


# From the tables.


def _revision(database: Path) -> str:
    """Of a database's tables; what has no such note is not MLflow's."""
    try:
        with closing(_open(database)) as connection:
            (revision,) = connection.execute("select version_num from alembic_version").fetchone() or (None,)
    except sqlite3.Error as error:
        raise InputError(f"{database}: cannot be read as MLflow's ({error}); {ANOTHER}") from None
    if revision is None:
        raise InputError(f"{database}: cannot be read as MLflow's (it has no revision); {ANOTHER}")
    return revision


def _open(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=30)


def _from_tables(database: Path, tag: str, values: Sequence[str]) -> list[StoredRun]:
    with closing(_open(database)) as connection:
        connection.execute("begin")  # one moment of the database, while others write
        found = {row[0]: StoredRun(*row, {}, {}, {}) for row in _wanted(connection, tag, values)}
        names = list(found)
        for key, value, run_id in _lines(connection, "tags", "value", names):
            found[run_id].tags[key] = value
        for key, value, run_id in _lines(connection, "params", "value", names):
            found[run_id].params[key] = value
        value = "case when is_nan then null else value end"  # sqlite has no NaN
        for key, number, run_id in _lines(connection, "latest_metrics", value, names):
            found[run_id].metrics[key] = float("nan") if number is None else number
    return list(found.values())


def _wanted(connection: sqlite3.Connection, tag: str, values: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    query = f"""
        select runs.run_uuid, cast(runs.experiment_id as text), coalesce(start_time, 0)
        from tags join runs using (run_uuid) join experiments using (experiment_id)
        where runs.lifecycle_stage = 'active' and experiments.lifecycle_stage = 'active'
          and tags.key = ? and tags.value in ({_places(values)})"""
    yield from connection.execute(query, (tag, *values))


def _lines(connection: sqlite3.Connection, table: str, value: str, names: Sequence[str]) -> Iterator[tuple]:
    """(key, value, run) of the named runs."""
    for start in range(0, len(names), MOST_NAMES):
        some = names[start : start + MOST_NAMES]
        yield from connection.execute(
            f"select key, {value}, run_uuid from {table} where run_uuid in ({_places(some)})", some
        )


def _places(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
