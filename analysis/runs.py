"""A study as MLflow shows it: the runs that may be compared, and why the others may not."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dpsink.config import nearest, read_yaml
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.records import read_json
from tune import schema

if TYPE_CHECKING:  # its import takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

DATABASE = "mlflow.db"
STORAGE = "studies"
ALL_QUALITY = (*schema.QUALITY, *(schema.TEST_PREFIX + name for name in schema.QUALITY))
Row = dict[str, Any]  # one run: column to value, NaN or None where it has none
COLUMNS = {  # of a table of runs, besides its metrics and params: column to tag
    "trial": schema.TRIAL_ID_TAG,
    "role": schema.ROLE_TAG,
    "state": schema.STATUS_TAG,
    "config_id": schema.CONFIG_ID_TAG,
    "config_sha256": schema.CONFIG_SHA_TAG,
    "data_fingerprint": schema.FINGERPRINT_TAG,
    "fid_extractor": schema.EXTRACTOR_TAG,
    "private": schema.PRIVATE_TAG,
    "error": schema.ERROR_TAG,
    "folder": schema.FOLDER_TAG,
}


@dataclass(frozen=True)
class StudyFacts:
    """What the study's own run says.

    Attributes:
        run_id: of the study's run in MLflow.
        statement: single values of the ledger's last statement; empty before the first.
    """

    name: str
    study_id: str
    run_id: str
    experiment_id: str
    target_epsilon: float
    delta: float
    data_name: str
    data_fingerprint: str
    extractor: str
    objectives: tuple[str, ...]
    searched: tuple[str, ...]
    statement: dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The runs of one study.

    Attributes:
        accepted: one row per run that may be compared, in the order of their names: `run_id`, `COLUMNS`, metrics
            and params by their names in MLflow; numbers where every value is one.
        rejected: `trial`, `role`, `reason` (one of few) and `detail`.
    """

    study: StudyFacts
    tracking_uri: str
    accepted: pd.DataFrame
    rejected: pd.DataFrame

    @property
    def rejected_counts(self) -> str:
        """`2 diverged, 1 unfinished`."""
        counts = Counter(str(reason) for reason in self.rejected["reason"])
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def load_runs(study: str, tracking_uri: str | None = None) -> Runs:
    """The runs of a study, those that may be compared apart from the others.

    Args:
        study: name of the study (the newest of that name), path of its YAML file, or its folder.
        tracking_uri: by default the one that the study names, $MLFLOW_TRACKING_URI, or sqlite in `studies`.

    Raises:
        InputError: MLflow does not answer, the study is not known, or has no run that may be compared.
    """
    tag, value, named_uri = _resolve(study)
    uri = tracking_uri or named_uri or default_uri(Path(STORAGE))
    with _reading(uri) as client:
        parent = _find_study(client, tag, value, uri)
        facts = _facts(parent)
        found = [_row(run) for run in _trials(client, facts)]
    runs = _sort_out(facts, uri, found)
    if runs.accepted.empty:
        why = f"all {len(found)} runs are rejected: {runs.rejected_counts}" if found else "no trial has started"
        raise InputError(f"study '{facts.name}' has nothing to compare: {why}; run `dpsink-tune sweep` on")
    return runs


def default_uri(storage: Path) -> str:
    """$MLFLOW_TRACKING_URI, or the database that studies keep in their storage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(storage / DATABASE).resolve()}"


def rows_of(table: pd.DataFrame, role: str) -> list[Row]:
    """The runs of a role, in the table's order."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records") if row["role"] == role]


def metrics_of(run: Row) -> dict[str, float]:
    """The quality metrics that a run has, validation before test."""
    return {name: run[name] for name in ALL_QUALITY if not math.isnan(run.get(name, math.nan))}


def fetch_artifact(runs: Runs, run_id: str, name: str, folder: Path) -> Path | None:
    """Copies an artifact of a run into a folder; None if the run has none of that name."""
    with _reading(runs.tracking_uri) as client:
        if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            return None
        folder.mkdir(exist_ok=True)
        return Path(client.download_artifacts(run_id, name, str(folder)))


def _resolve(study: str) -> tuple[str, str, str | None]:
    """The tag and its value by which a study is found, and the tracking URI that the place names."""
    path = Path(study)
    if (path / "study.json").exists():
        record = read_json(path / "study.json")
        return schema.STUDY_ID_TAG, record["study_id"], record["tracking_uri"]
    if path.suffix not in (".yaml", ".yml"):
        return schema.STUDY_NAME_TAG, study, None
    tree = read_yaml(path)
    if not isinstance(tree.get("name"), str):
        raise InputError(f"{path}: has no name: of a study; give a study file")
    uri = (tree.get("tracking") or {}).get("uri") or default_uri(Path(tree.get("storage") or STORAGE))
    return schema.STUDY_NAME_TAG, tree["name"], uri


@contextmanager
def _reading(uri: str) -> Iterator["MlflowClient"]:
    """A client; whatever goes wrong with it is told in one line."""
    database = schema.sqlite_file(uri)
    if database and not database.exists():  # a client would create it
        raise InputError(f"{database}: no such database; run a study first, or name another with --tracking-uri")
    schema.quiet_mlflow()
    from mlflow import MlflowClient

    try:
        yield MlflowClient(tracking_uri=uri)
    except InputError:
        raise
    except Exception as error:
        reason = schema.mlflow_reason(error, uri)
        raise InputError(f"{schema.shown_uri(uri)}: cannot be read ({reason}); is the MLflow server up?") from None


def _find_study(client: "MlflowClient", tag: str, value: str, uri: str) -> "Run":
    """The newest study run with that tag."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.`{schema.KIND_TAG}` = '{schema.KIND_STUDY}'"
    studies = _search(client, experiments, query, "attributes.start_time DESC")
    for run in studies:
        if run.data.tags.get(tag) == value:
            return run
    names = {run.data.tags.get(schema.STUDY_NAME_TAG, "") for run in studies}
    hint = nearest(value, names) if names else "; it holds no study"
    raise InputError(f"study '{value}' is not in {schema.shown_uri(uri)}{hint}")


def _trials(client: "MlflowClient", facts: StudyFacts) -> list["Run"]:
    wanted = {schema.KIND_TAG: schema.KIND_TRIAL, schema.STUDY_ID_TAG: facts.study_id}
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
    return _search(client, [facts.experiment_id], query, "attributes.start_time ASC")


def _search(client: "MlflowClient", experiments: list[str], query: str, order: str) -> list["Run"]:
    """All pages of a search."""
    found: list[Run] = []
    token = None
    while token != "":
        page = client.search_runs(experiments, query, max_results=1000, order_by=[order], page_token=token)
        found += page
        token = page.token or ""
    return found


def _facts(run: "Run") -> StudyFacts:
    params, tags = run.data.params, run.data.tags

    def names(field: str) -> tuple[str, ...]:
        return tuple(name for name in params[f"{schema.STUDY_PARAM}{field}"].split(",") if name)

    return StudyFacts(
        name=tags[schema.STUDY_NAME_TAG],
        study_id=tags[schema.STUDY_ID_TAG],
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        target_epsilon=float(params[f"{schema.STUDY_PARAM}target_epsilon"]),
        delta=float(params[f"{schema.STUDY_PARAM}delta"]),
        data_name=params[f"{schema.STUDY_PARAM}data_name"],
        data_fingerprint=tags[schema.FINGERPRINT_TAG],
        extractor=tags[schema.EXTRACTOR_TAG],
        objectives=names("objectives"),
        searched=names("searched"),
        statement=json.loads(tags.get(schema.STATEMENT_TAG, "{}")),
    )


def _row(run: "Run") -> Row:
    tags = {column: run.data.tags.get(tag) for column, tag in COLUMNS.items()}
    return {"run_id": run.info.run_id, **tags, **run.data.metrics, **run.data.params}


def _sort_out(facts: StudyFacts, uri: str, rows: list[Row]) -> Runs:
    accepted, rejected = [], []
    for row in sorted(rows, key=lambda row: str(row["trial"])):
        if problem := _problem(row, facts):
            reason, detail = problem
            rejected.append({"trial": row["trial"], "role": row["role"], "reason": reason, "detail": detail})
        else:
            accepted.append(row)
    columns = ["trial", "role", "reason", "detail"]
    return Runs(facts, uri, _typed(pd.DataFrame(accepted)), pd.DataFrame(rejected, columns=columns))


def _problem(row: Row, facts: StudyFacts) -> tuple[str, str] | None:
    """The first reason why a run may not be compared with the others, and its detail."""
    epsilon = row.get(schema.EPSILON, math.nan)
    missing = [name for name in facts.objectives if math.isnan(row.get(name, math.nan))]
    rules = (
        (row["state"] in ("failed", "diverged"), str(row["state"]), row["error"]),
        (row["state"] not in schema.ENDED, "unfinished", row["state"]),
        (row["state"] == "stopped_early", "stopped early", None),
        (row["private"] != "true", NON_PRIVATE, None),
        (math.isnan(epsilon), "without epsilon", None),
        (epsilon > facts.target_epsilon, "above the target epsilon", f"{epsilon:g} > {facts.target_epsilon:g}"),
        (row["data_fingerprint"] != facts.data_fingerprint, "on other data", row["data_fingerprint"]),
        (row["fid_extractor"] != facts.extractor, "with another FID extractor", row["fid_extractor"]),
        (bool(missing), "without its objective", ", ".join(missing)),
    )
    return next(((reason, detail or "") for holds, reason, detail in rules if holds), None)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """MLflow keeps params as text: columns that hold numbers only become numbers."""
    for column in table.columns.difference(["run_id", *COLUMNS]):
        values = pd.Series(table[column]).replace("None", None)
        try:
            table[column] = pd.to_numeric(values)
        except (ValueError, TypeError):
            table[column] = values
    return table
