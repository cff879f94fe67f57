"""MLflow databases written by SQL into a schema that MLflow made: thousands of runs in seconds."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpsink.config import flatten, load_config
from tune import schema

EXTRACTOR, FINGERPRINT, TARGET = "classifier@180", "hmac:ours", 10.0
SPACE = {  # searched path to (low, high), log-uniform
    "optimizer.lr": (1e-4, 1e-2),
    "sinkhorn.blur": (0.05, 1.0),
    "privacy.noise_multiplier": (3.0, 5.0),
}
SEEDS = 2  # of each configuration of a large study


class Run(NamedTuple):
    """A run as MLflow would have been told."""

    id: str
    tags: dict[str, str]
    params: dict[str, Any]
    metrics: dict[str, float]


def write_runs(database: Path, runs: Sequence[Run]) -> None:
    """Adds runs to the default experiment of a database that MLflow made."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("pragma synchronous = off")
        _insert(connection, "runs", 13, (_head(run, index) for index, run in enumerate(runs)))
        _insert(connection, "tags", 3, ((key, value, run.id) for run in runs for key, value in run.tags.items()))
        params = ((key, str(value), run.id) for run in runs for key, value in run.params.items())
        _insert(connection, "params", 3, params)
        metrics = (_point(run, key, value) for run in runs for key, value in run.metrics.items())
        _insert(connection, "latest_metrics", 6, metrics)


def study_run(name: str, *, tags: dict[str, str] | None = None, **facts: Any) -> Run:
    """The run of a study; `facts` replace those of its record."""
    usual = {
        "name": name, "target_epsilon": TARGET, "delta": 1e-5, "data_name": "digits", "objectives": "accuracy",
        "searched": ",".join(SPACE), "experiment": "Default",
    }  # fmt: skip
    told = {
        schema.KIND_TAG: schema.KIND_STUDY, schema.STUDY_ID_TAG: f"id-{name}", schema.STUDY_NAME_TAG: name,
        schema.FINGERPRINT_TAG: FINGERPRINT, schema.EXTRACTOR_TAG: EXTRACTOR, schema.STATUS_TAG: "completed",
    }  # fmt: skip
    params = {f"{schema.STUDY_PARAM}{key}": value for key, value in (usual | facts).items()}
    return Run(f"{name}-study", told | (tags or {}), params, {})


def trial_run(
    study: str,
    name: str,
    metrics: dict[str, float],
    *,
    config: str | None = None,
    role: str = schema.ROLE_SEARCH,
    params: dict[str, Any] | None = None,
    tags: dict[str, str] | None = None,
) -> Run:
    """A completed trial's run; the metrics are added to the usual ones."""
    told = {
        schema.KIND_TAG: schema.KIND_TRIAL, schema.STUDY_ID_TAG: f"id-{study}", schema.STUDY_NAME_TAG: study,
        schema.TRIAL_ID_TAG: name, schema.ROLE_TAG: role, schema.CONFIG_ID_TAG: config or f"c-{name}",
        schema.STATUS_TAG: "completed", schema.PRIVATE_TAG: "true", schema.FINGERPRINT_TAG: FINGERPRINT,
        schema.EXTRACTOR_TAG: EXTRACTOR, schema.CONFIG_SHA_TAG: f"sha-{name}", schema.FOLDER_TAG: f"/gone/{name}",
        schema.ACCOUNTANT_TAG: "pld", schema.GRID_TAG: "0123456789abcdef", schema.PARENT_TAG: f"{study}-study",
    }  # fmt: skip
    usual = {schema.EPSILON: 9.0, schema.BUDGET_FRACTION: 1.0, schema.SPEED: 30.0}
    return Run(f"{study}-{name}", told | (tags or {}), BASE | (params or {}), usual | metrics)


BASE = flatten(load_config(None, ()))


def control_run(study: str, metrics: dict[str, float]) -> Run:
    """The class-mean control of a study."""
    params = {"generator.kind": "class_mean"}
    return trial_run(study, "baseline-class-mean", metrics, role=schema.ROLE_BASELINE, params=params)


def large_study(name: str, count: int, *, told: bool = True) -> list[Run]:
    """A finished study of `count` searched runs and the control, with a space that it tells, or not."""
    space = {path: {"log_uniform": bounds} for path, bounds in SPACE.items()} if told else {}
    rng = np.random.default_rng(0)
    study = study_run(name, tags={schema.SPACE_TAG: json.dumps(space)})
    control = control_run(name, {"fid": 90.0, "accuracy": 0.75, "variety": 0.01, "recall": 0.0})
    return [study, *_searched(name, count, rng), control]


def _searched(study: str, count: int, rng: np.random.Generator) -> Iterator[Run]:
    params: dict[str, float] = {}
    for index in range(count):
        if index % SEEDS == 0:
            params = {path: low * (high / low) ** rng.random() for path, (low, high) in SPACE.items()}
        metrics = quality(params, rng.normal()) | {schema.EPSILON: rng.uniform(5, TARGET)}
        config, settings = f"c{index // SEEDS:05d}", params | {"seed": index % SEEDS}
        yield trial_run(study, f"trial-{index:05d}", metrics, config=config, params=settings)


def quality(params: dict[str, float], noise: float) -> dict[str, float]:
    """Metrics of a run: the learning rate matters most, the blur a little, σ not at all."""
    lr, blur = (math.log(params[path]) for path in ("optimizer.lr", "sinkhorn.blur"))
    loss = (lr - math.log(1e-2)) ** 2 + 3 * (blur - math.log(0.2)) ** 2
    accuracy = 0.85 * math.exp(-loss / 12) + 0.004 * noise
    return {
        "fid": 20 + 5 * loss + noise, "kid": 0.1, "precision": 0.6, "recall": 0.4, "variety": 0.5,
        **dict.fromkeys(("accuracy", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn"), accuracy),
    }  # fmt: skip


def _head(run: Run, index: int) -> tuple[Any, ...]:
    name = run.tags.get(schema.TRIAL_ID_TAG, run.id)
    return (run.id, name, "UNKNOWN", "", "", "nobody", "FINISHED", index, index + 1, "", "active", "/nowhere", 0)


def _point(run: Run, key: str, value: float) -> tuple[Any, ...]:
    return key, 0.0 if math.isnan(value) else value, 0, 100, int(math.isnan(value)), run.id


def _insert(connection: sqlite3.Connection, table: str, width: int, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = [row[1] for row in connection.execute(f"pragma table_info({table})")][:width]
    places = ", ".join("?" * width)
    connection.executemany(f"insert into {table} ({', '.join(columns)}) values ({places})", rows)
