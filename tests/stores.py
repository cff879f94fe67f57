"""MLflow databases with thousands of runs, written by SQL into a schema that MLflow made."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
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
SEEDS = 2  # of each configuration


def write_study(database: Path, name: str, count: int, *, study_id: str | None = None) -> None:
    """Adds a finished study of `count` searched runs and a class-mean control to a database that MLflow made."""
    study_id = study_id or f"id-{name}"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("pragma synchronous = off")
        runs = [_study_run(name, study_id), *_trial_runs(name, study_id, count)]
        _insert(connection, "runs", 13, (_head(run, index) for index, run in enumerate(runs)))
        _insert(connection, "tags", 3, ((key, value, run.id) for run in runs for key, value in run.tags.items()))
        params = ((key, str(value), run.id) for run in runs for key, value in run.params.items())
        _insert(connection, "params", 3, params)
        metrics = (_point(run, key, value) for run in runs for key, value in run.metrics.items())
        _insert(connection, "latest_metrics", 6, metrics)


def quality(params: dict[str, float], noise: float) -> dict[str, float]:
    """Metrics of a run: the learning rate matters most, the blur a little, σ not at all."""
    lr, blur = (math.log(params[path]) for path in ("optimizer.lr", "sinkhorn.blur"))
    loss = (lr - math.log(1e-2)) ** 2 + 0.3 * (blur - math.log(0.2)) ** 2
    accuracy = 0.85 * math.exp(-loss / 12) + 0.004 * noise
    return {
        "fid": 20 + 5 * loss + noise, "kid": 0.1, "precision": 0.6, "recall": 0.4, "variety": 0.5,
        **dict.fromkeys(("accuracy", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn"), accuracy),
    }  # fmt: skip


class Run(NamedTuple):
    """A run as MLflow would have been told."""

    id: str
    tags: dict[str, str]
    params: dict[str, Any]
    metrics: dict[str, float]


def _study_run(name: str, study_id: str) -> Run:
    facts = {
        "name": name, "target_epsilon": TARGET, "delta": 1e-5, "data_name": "digits", "objectives": "accuracy",
        "searched": ",".join(SPACE), "experiment": "Default",
    }  # fmt: skip
    tags = {
        schema.KIND_TAG: schema.KIND_STUDY, schema.STUDY_ID_TAG: study_id, schema.STUDY_NAME_TAG: name,
        schema.FINGERPRINT_TAG: FINGERPRINT, schema.EXTRACTOR_TAG: EXTRACTOR, schema.STATUS_TAG: "completed",
    }  # fmt: skip
    return Run(f"{name}-study", tags, {f"{schema.STUDY_PARAM}{key}": value for key, value in facts.items()}, {})


def _trial_runs(name: str, study_id: str, count: int) -> Iterator[Run]:
    rng = np.random.default_rng(0)
    base = flatten(load_config(None, ()))
    params: dict[str, float] = {}
    for index in range(count + 1):
        control = index == count
        if index % SEEDS == 0:
            params = {path: low * (high / low) ** rng.random() for path, (low, high) in SPACE.items()}
        trial = "baseline-class-mean" if control else f"search-{index:05d}"
        tags = {
            schema.KIND_TAG: schema.KIND_TRIAL, schema.STUDY_ID_TAG: study_id, schema.STUDY_NAME_TAG: name,
            schema.TRIAL_ID_TAG: trial, schema.ROLE_TAG: "baseline" if control else "search",
            schema.CONFIG_ID_TAG: f"c{index // SEEDS:05d}", schema.STATUS_TAG: "completed",
            schema.PRIVATE_TAG: "true", schema.FINGERPRINT_TAG: FINGERPRINT, schema.EXTRACTOR_TAG: EXTRACTOR,
            schema.CONFIG_SHA_TAG: f"{index:064d}", schema.FOLDER_TAG: f"/gone/{trial}",
            schema.ACCOUNTANT_TAG: "pld", schema.GRID_TAG: "0123456789abcdef", schema.PARENT_TAG: f"{name}-study",
        }  # fmt: skip
        kind = {"generator.kind": "class_mean"} if control else {}
        spent = {schema.EPSILON: rng.uniform(5, TARGET), schema.BUDGET_FRACTION: 1.0, schema.SPEED: 30.0}
        settings = base | params | kind | {"seed": index % SEEDS}
        yield Run(f"{name}-{index:05d}", tags, settings, quality(params, rng.normal()) | spent)


def _head(run: Run, index: int) -> tuple[Any, ...]:
    name = run.tags.get(schema.TRIAL_ID_TAG, run.id)
    return (run.id, name, "UNKNOWN", "", "", "nobody", "FINISHED", index, index + 1, "", "active", "/nowhere", 0)


def _point(run: Run, key: str, value: float) -> tuple[Any, ...]:
    return key, 0.0 if math.isnan(value) else value, 0, 100, int(math.isnan(value)), run.id


def _insert(connection: sqlite3.Connection, table: str, width: int, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = [row[1] for row in connection.execute(f"pragma table_info({table})")][:width]
    places = ", ".join("?" * width)
    connection.executemany(f"insert into {table} ({', '.join(columns)}) values ({places})", rows)
