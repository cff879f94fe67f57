"""Names that cross from studies to analysis: tags, params and metrics of MLflow, states of a trial.

One parent run per study, one child run per trial. Everything that analysis reads is named here, once.
"""

import logging
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

PARENT_TAG = "mlflow.parentRunId"
KIND_TAG = "dpsink.kind"
STUDY_ID_TAG = "dpsink.study_id"
STUDY_NAME_TAG = "dpsink.study"
TRIAL_ID_TAG = "dpsink.trial_id"
ROLE_TAG = "dpsink.role"
CONFIG_ID_TAG = "dpsink.config_id"
STATUS_TAG = "dpsink.status"
ERROR_TAG = "dpsink.error"
ACCOUNTANT_TAG = "dpsink.accountant"
EXTRACTOR_TAG = "dpsink.fid_extractor"
CONFIG_SHA_TAG = "dpsink.config_sha256"
FINGERPRINT_TAG = "dpsink.data_fingerprint"
PRIVATE_TAG = "dpsink.private"  # "true", or "NON-PRIVATE"
STATEMENT_TAG = "dpsink.statement"
FOLDER_TAG = "dpsink.folder"
FLOOR_TAG = "dpsink.floor"  # of a study: FID and KID of real images against real ones, and of which, as JSON
SPACE_TAG = "dpsink.space"  # of a study: its search space as JSON, as the study file writes it
REPEATS_TAG = "dpsink.repeats"  # of a study that repeats the best of another: that study's id
GRID_TAG = "dpsink.samples_sha256"  # which sample grid was logged last

KIND_STUDY, KIND_TRIAL = "study", "trial"
ROLE_BASELINE, ROLE_SEARCH = "baseline", "search"
SEALING_POLICY, WINNER = "release_best", "winner"  # under that policy one trial is published, by that name

STUDY_PARAM = "study."  # prefix of the study run's params: fields of `tune.folder.StudyRecord`
DERIVED_STEPS = "derived.steps"
DERIVED_SAMPLE_RATE = "derived.sample_rate"
DERIVED_NOISE = "derived.noise_multiplier"

EPSILON, BUDGET_FRACTION, SPEED = "epsilon", "budget_fraction", "steps_per_second"
QUALITY = (
    "fid", "kid", "precision", "recall", "variety",
    "accuracy", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn",
)  # fmt: skip
TEST_PREFIX = "test_"
LOWER_IS_BETTER = frozenset({"fid", "kid"})

GRID_ARTIFACT = "samples.png"
CONFIG_ARTIFACT = "config.yaml"
STATEMENT_ARTIFACT = "statement.json"  # of the study run

State = Literal["pending", "running", "completed", "stopped_early", "diverged", "failed", "interrupted"]
ENDED: frozenset[str] = frozenset({"completed", "stopped_early", "diverged", "failed"})
FINAL: frozenset[str] = frozenset({"completed", "diverged"})  # whose metrics are those of the whole budget

# How a state of ours is told in MLflow's vocabulary.
MLFLOW_STATUS: dict[str, str] = {
    "pending": "SCHEDULED",
    "running": "RUNNING",
    "completed": "FINISHED",
    "stopped_early": "FINISHED",
    "diverged": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


def mode_of(metric: str) -> Literal["min", "max"]:
    """Whether a quality metric is to be minimised or maximised."""
    return "min" if metric.removeprefix(TEST_PREFIX) in LOWER_IS_BETTER else "max"


# MLflow's client as both sides use it. It never repeats a request by itself: a repeated log call would
# store a point twice, so whoever writes repeats, after looking what arrived.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def quiet_mlflow() -> None:
    """Sets MLflow's defaults and silences its chatter; call before importing it. The user's variables win."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def sqlite_file(uri: str) -> Path | None:
    """The database file that a tracking URI names; None for a server."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path else None


def shown_uri(uri: str) -> str:
    """A tracking URI for messages: without the password that it may hold."""
    place = urlsplit(uri).netloc
    return uri.replace(place, place.rpartition("@")[2], 1) if place else uri


def mlflow_reason(error: Exception, uri: str) -> str:
    """What went wrong with MLflow, in one short line without a password."""
    text = " ".join(str(error).split()).replace(uri, shown_uri(uri))
    cause = text.rpartition("Caused by ")[2] if "Caused by " in text else ""  # of a failed HTTP request
    return (cause.rpartition(": ")[2].rstrip("\"')") or text)[:200]
