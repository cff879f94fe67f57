"""Ray: starts it, hands it the study's searcher and trainable, and listens."""

import logging
import os
from typing import Any, Protocol

# Ray reads these when it is imported: a quiet console, and no snapshots of what the study folder already holds.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune

from tune.folder import StudyFolder
from tune.search import StudySearcher
from tune.study import Study
from tune.trainable import run_trial

WORKER_RETRIES = 2  # of one trial whose process died


class Interrupted(Exception):
    """A person, or the system, asked the study to stop."""


class Listener(Protocol):
    """Who is told of reports and failures."""

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        """A trial reported."""
        ...

    def failed(self, name: str, error: str) -> None:
        """A trial failed for good."""
        ...


class _Relay(tune.Callback):
    """Passes Tune's events on in our own vocabulary."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles callbacks into a state of its own, which is never used here."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.listener.progressed(trial.config["trial"], result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.listener.failed(trial.config["trial"], _last_line(trial))


def run_on_ray(study: Study, folder: StudyFolder, searcher: StudySearcher, listener: Listener) -> None:
    """Runs the searcher's trials to the end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
    """
    _start(study)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"cpu": study.resources.cpu}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=searcher.remaining,
            max_concurrent_trials=study.resources.concurrency or None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.path),
            callbacks=[_Relay(listener)],
            failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        ray.shutdown()


def _start(study: Study) -> None:
    if not ray.is_initialized():
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            configure_logging=True,
        )  # fmt: skip


def _last_line(trial: Any) -> str:
    error = trial.get_error()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process died"
