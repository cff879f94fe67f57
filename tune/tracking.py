"""The one writer of MLflow runs. The study folder is the durable record, and MLflow its mirror.

Everything here looks at both sides and writes the difference, so it can be repeated at any time: after an
outage, on resume, by `dpsink-tune track`. A trial's state is written last: a run that shows its end has all
that came before.
"""

import hashlib
import json
import logging
import math
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpsink.checkpoint import CheckpointState, Report, latest_checkpoint, read_state
from dpsink.config import config_sha256, dump_config, flatten, read_yaml
from dpsink.errors import InputError
from dpsink.privacy.accounting import accountant_version
from dpsink.privacy.plan import NON_PRIVATE
from tune import schema
from tune.folder import StudyFolder, TrialEnd, TrialRecord

if TYPE_CHECKING:  # its import takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("dpsink.tracking")

CHECK_SECONDS = 5  # that a tracking server may take to answer before a study starts
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds between attempts during an outage
LARGEST_GRID = 100 * 1024  # bytes; more would make the runs table slow
LARGEST_TAG = 8000  # characters, of MLflow


def check_tracking(uri: str) -> None:
    """Makes sure that runs can be written, before a study starts.

    Raises:
        InputError: an unknown kind of URI, a server that does not answer, a database that cannot be written.
    """
    if uri.startswith("sqlite:"):
        _check_database(uri)
    elif not uri.startswith(("http://", "https://")):
        raise InputError(f"tracking URI '{uri}' must be sqlite:///FILE or http(s)://HOST:PORT; correct it")
    try:
        with _answer_within(CHECK_SECONDS):
            connect(uri).search_experiments(max_results=1)
    except Exception as error:
        reason = schema.mlflow_reason(error, uri)
        raise InputError(
            f"tracking URI {schema.shown_uri(uri)} does not answer: {reason}; start the MLflow server, or name "
            "another in tracking.uri or MLFLOW_TRACKING_URI"
        ) from None


def connect(uri: str) -> "MlflowClient":
    """A client for a tracking URI. The first call takes seconds."""
    schema.quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def rebuild(folder: StudyFolder, uri: str | None = None, *, unfinished: schema.State | None = None) -> int:
    """Brings MLflow in line with a study folder, whatever it holds already.

    Args:
        uri: where to write; by default where the study was tracked.
        unfinished: the state of what has not ended; None leaves it as MLflow shows it.

    Returns:
        The number of trials.

    Raises:
        InputError: not a study folder, or MLflow cannot be written.
    """
    uri = uri or folder.read_study().tracking_uri
    check_tracking(uri)
    mirror = Mirror(connect(uri), folder)
    trials = folder.trials()
    mirror.study(unfinished and mirror.study_state())
    for trial in trials:
        mirror.trial(trial.name, unfinished)
    return len(trials)


class Mirror:
    """One study folder and its runs in MLflow. Every method may be repeated: then it changes nothing."""

    def __init__(self, client: "MlflowClient", folder: StudyFolder) -> None:
        self.client, self.folder = client, folder
        self.record = folder.read_study()

    def study(self, state: schema.State | None) -> None:
        """The parent run: what the study is, and its ledger's statement.

        Args:
            state: None leaves it as MLflow shows it.
        """
        run = self._find(schema.KIND_STUDY) or self._create_study()
        self._describe_study(run)
        self._log_statement(run)
        self._set_state(run, TrialEnd(state=state or _shown_state(run) or self.study_state()), time.time())

    def trial(self, name: str, state: schema.State | None) -> None:
        """A child run: settings, reports, samples, metrics on the test split, and its state.

        Args:
            state: of a trial that has not ended, as its driver knows it; None leaves it as MLflow shows it.
        """
        record, end = self.folder.read_trial(name), self.folder.end_of(name)
        checkpoint = latest_checkpoint(self.folder.run(name))
        saved = read_state(checkpoint) if checkpoint else None
        run = self._find(schema.KIND_TRIAL, name) or self._create_trial(record)
        self._describe_trial(run, record, saved)
        self._log_reports(run, saved.reports if saved else ())
        self._log_test(run, name, saved.step if saved else 0)
        if checkpoint:
            self._log_grid(run, checkpoint / schema.GRID_ARTIFACT)
        if end:
            self._log_config(run, record)
        told = end or TrialEnd(state=state or _shown_state(run) or ("interrupted" if saved else "pending"))
        self._set_state(run, told, _modified(self.folder.trial(name) / "end.json") if end else time.time())

    @cached_property
    def _experiment(self) -> str:
        name = self.record.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            place = _artifact_location(self.client.tracking_uri)
            return self.client.create_experiment(name, artifact_location=place)
        if found.lifecycle_stage != "active":
            raise InputError(f"experiment '{name}' is deleted in MLflow; restore it, or name another")
        return found.experiment_id

    @cached_property
    def _parent(self) -> str:
        return (self._find(schema.KIND_STUDY) or self._create_study()).info.run_id

    def _find(self, kind: str, trial: str | None = None) -> "Run | None":
        wanted = self._identity(kind, trial)
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
        found = self.client.search_runs([self._experiment], query, max_results=1)
        return found[0] if found else None

    def _identity(self, kind: str, trial: str | None = None) -> dict[str, str]:
        """The tags by which a run is found again."""
        tags = {schema.KIND_TAG: kind, schema.STUDY_ID_TAG: self.record.study_id}
        return tags | ({schema.TRIAL_ID_TAG: trial} if trial else {})

    def _create_study(self) -> "Run":
        started = _modified(self.folder.path / "study.json")
        return self._create(self._identity(schema.KIND_STUDY), self.record.name, self.record.target_epsilon, started)

    def _create_trial(self, record: TrialRecord) -> "Run":
        tags = self._identity(schema.KIND_TRIAL, record.name) | {schema.PARENT_TAG: self._parent}
        started = _modified(self.folder.trial(record.name) / "trial.json")
        return self._create(tags, record.name, record.config.privacy.target_epsilon, started)

    def _create(self, tags: dict[str, str], name: str, target_epsilon: float, started: float) -> "Run":
        name = name if math.isfinite(target_epsilon) else f"{name} ({NON_PRIVATE})"
        start = _milliseconds(started)
        return self.client.create_run(self._experiment, start_time=start, tags=tags, run_name=name)

    def study_state(self) -> schema.State:
        """The state of a study at which nobody works, as far as its folder tells."""
        trials = self.folder.trials()
        ended = all(self.folder.end_of(trial.name) for trial in trials)
        return "completed" if self.folder.selected or (trials and ended) else "interrupted"

    def _describe_study(self, run: "Run") -> None:
        facts = flatten(self.record)
        del facts["tracking_uri"]  # may hold a password
        tags = {
            schema.STUDY_NAME_TAG: self.record.name,
            schema.FINGERPRINT_TAG: self.record.data_fingerprint,
            schema.EXTRACTOR_TAG: self.record.extractor,
            schema.PRIVATE_TAG: _private_tag(self.record.target_epsilon),
            schema.FOLDER_TAG: str(self.folder.path.resolve()),
            schema.SPACE_TAG: _space(self.folder),
        }
        self._log(run, {f"{schema.STUDY_PARAM}{name}": value for name, value in facts.items()}, tags)

    def _describe_trial(self, run: "Run", record: TrialRecord, saved: CheckpointState | None) -> None:
        # What the checkpoint says it was trained on, rather than what the study meant it to be.
        fingerprint = saved.data_fingerprint if saved else self.record.data_fingerprint
        images = self.record.extractor.partition("@")[2]
        params = flatten(record.config) | {
            schema.DERIVED_STEPS: record.steps,
            schema.DERIVED_SAMPLE_RATE: record.sample_rate,
            schema.DERIVED_NOISE: record.noise_multiplier,
        }
        tags = {
            schema.STUDY_NAME_TAG: self.record.name,
            schema.ROLE_TAG: record.role,
            schema.CONFIG_ID_TAG: record.config_id,
            schema.CONFIG_SHA_TAG: config_sha256(record.config),
            schema.ACCOUNTANT_TAG: accountant_version("pld"),
            schema.EXTRACTOR_TAG: f"{record.config.evaluation.extractor}@{images}",
            schema.FINGERPRINT_TAG: fingerprint,
            schema.PRIVATE_TAG: _private_tag(record.config.privacy.target_epsilon),
            schema.FOLDER_TAG: str(self.folder.run(record.name).resolve()),
        }
        self._log(run, params, tags)

    def _log(self, run: "Run", params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Params that the run has not and tags that differ; params of MLflow never change."""
        from mlflow.entities import Param, RunTag

        known = run.data
        new_params = [Param(name, str(value)) for name, value in params.items() if name not in known.params]
        new_tags = [RunTag(name, value) for name, value in tags.items() if known.tags.get(name) != value]
        if new_params or new_tags:
            self.client.log_batch(run.info.run_id, params=new_params, tags=new_tags)

    def _log_reports(self, run: "Run", reports: tuple[Report, ...]) -> None:
        """One batch per report, for the steps that are not there yet."""
        if not reports:
            return
        history = self.client.get_metric_history(run.info.run_id, schema.BUDGET_FRACTION)
        logged = {point.step for point in history}
        for report in reports:
            if report.step not in logged:
                values = report.metrics | {
                    schema.EPSILON: report.epsilon,
                    schema.BUDGET_FRACTION: report.budget_fraction,
                    schema.SPEED: report.steps_per_second,
                }
                self._log_metrics(run, values, report.step)

    def _log_test(self, run: "Run", name: str, step: int) -> None:
        told = {schema.TEST_PREFIX + key: value for key, value in self.folder.test_metrics(name).items()}
        known = run.data.metrics
        self._log_metrics(run, {key: value for key, value in told.items() if known.get(key) != value}, step)

    def _log_metrics(self, run: "Run", values: Mapping[str, float], step: int) -> None:
        """Finite values only: MLflow stores infinity, the ε of a run without privacy, as a number."""
        from mlflow.entities import Metric

        now = _milliseconds(time.time())
        points = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        if points:
            self.client.log_batch(run.info.run_id, metrics=points)

    def _log_grid(self, run: "Run", picture: Path) -> None:
        content = picture.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        if run.data.tags.get(schema.GRID_TAG) == digest:
            return
        if len(content) <= LARGEST_GRID:
            self.client.log_artifact(run.info.run_id, str(picture))
        else:
            log.warning("%s is above %d KiB and stays out of MLflow", picture, LARGEST_GRID // 1024)
        self.client.set_tag(run.info.run_id, schema.GRID_TAG, digest)

    def _log_config(self, run: "Run", record: TrialRecord) -> None:
        if _shown_state(run) not in schema.ENDED:
            self.client.log_text(run.info.run_id, dump_config(record.config), schema.CONFIG_ARTIFACT)

    def _log_statement(self, run: "Run") -> None:
        """Whole as an artifact; its single values, without the lists of conditions, as a tag."""
        statement = self.folder.statement()
        single = {key: value for key, value in statement.items() if not isinstance(value, list | dict)}
        short = json.dumps(single)
        if statement and run.data.tags.get(schema.STATEMENT_TAG) != short:
            whole = json.dumps(statement, indent=1)
            self.client.log_text(run.info.run_id, whole, schema.STATEMENT_ARTIFACT)
            self.client.set_tag(run.info.run_id, schema.STATEMENT_TAG, short)

    def _set_state(self, run: "Run", told: TrialEnd, ended: float) -> None:
        run_id, status = run.info.run_id, schema.MLFLOW_STATUS[told.state]
        if told.error:
            self._log(run, {}, {schema.ERROR_TAG: told.error[:1000]})
        elif schema.ERROR_TAG in run.data.tags:  # a failed trial that runs again
            self.client.delete_tag(run_id, schema.ERROR_TAG)
        self._log(run, {}, {schema.STATUS_TAG: told.state})
        if run.info.status == status:
            return
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status, _milliseconds(ended))


class MLflowTracker:
    """Mirrors a study while it runs: a thread that writes, and callers that never wait for it.

    It starts by catching up with all that the folder holds. During an outage the study goes on; what was
    poked is kept and written afterwards.

    Args:
        uri: a tracking URI that passed `check_tracking`.
        folder: of a study that is written already.
    """

    def __init__(self, uri: str, folder: StudyFolder) -> None:
        self.uri, self.folder = uri, folder
        self._mirror: Mirror | None = None
        self._changed = threading.Condition()
        self._pending: dict[str | None, schema.State] = {None: "running"}  # None is the study itself
        self._pending |= dict.fromkeys((trial.name for trial in folder.trials()), "pending")
        self._closing = self._abandoned = self._lost = False
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def poke(self, name: str | None = None, state: schema.State = "running") -> None:
        """Says that a trial's files have changed, or the study's (None). Returns at once.

        Args:
            state: of a trial that has not ended; what the folder says about its end comes first.
        """
        with self._changed:
            self._pending[name] = state
            self._changed.notify()

    def close(
        self,
        states: Mapping[str, schema.State] | None = None,
        *,
        study: schema.State = "interrupted",
        timeout: float = 30.0,
    ) -> bool:
        """Writes what is left and ends the thread.

        Args:
            states: of trials that have not ended; those left out are `interrupted`.
            study: state of the study.
            timeout: seconds to wait at most.

        Returns:
            Whether MLflow has everything.
        """
        for trial in self.folder.trials():
            if self.folder.end_of(trial.name) is None:
                self.poke(trial.name, (states or {}).get(trial.name, "interrupted"))
        self.poke(None, study)
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return self._give_up()

    def _give_up(self) -> bool:
        """Drops what the thread could not write in time; it is in the folder."""
        with self._changed:
            complete = not self._pending and not self._thread.is_alive()
            self._pending.clear()
            self._abandoned = True
        if not complete:
            log.warning("MLflow is behind; `dpsink-tune track %s` writes the rest", self.folder.path)
        return complete

    def _work(self) -> None:
        pause = 0.0
        while item := self._take(pause):
            try:
                self._write(*item)
                pause = 0.0
            except Exception as error:  # whatever happens to MLflow, the study goes on
                self._mirror = None  # what it knows of MLflow may be gone
                self._put_back(*item)
                pause = min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
                self._say_lost(error)

    def _take(self, pause: float) -> tuple[str | None, schema.State] | None:
        """The next thing to write; None when closed and nothing is left. A poke cuts the pause short."""
        with self._changed:
            if pause:
                self._changed.wait(pause)
            self._changed.wait_for(lambda: self._pending or self._closing)
            if not self._pending:
                return None
            name = next(iter(self._pending))
            return name, self._pending.pop(name)

    def _put_back(self, name: str | None, state: schema.State) -> None:
        """To the end of the queue, so that one bad trial does not hold up the others; newer news win."""
        with self._changed:
            if not self._abandoned:
                self._pending.setdefault(name, state)

    def _write(self, name: str | None, state: schema.State) -> None:
        if self._mirror is None:
            self._mirror = Mirror(connect(self.uri), self.folder)
        if name is None:
            self._mirror.study(state)
        else:
            self._mirror.trial(name, state)
        if self._lost and not self._pending:
            self._lost = False
            log.info("MLflow is back and has everything")

    def _say_lost(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            uri = schema.shown_uri(self.uri)
            log.warning("MLflow at %s is lost (%s); the study goes on", uri, schema.mlflow_reason(error, self.uri))


def _check_database(uri: str) -> None:
    path = schema.sqlite_file(uri)
    if path is None:
        raise InputError(f"tracking URI '{uri}' names no file; give sqlite:////absolute/path.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent), closing(sqlite3.connect(path)) as database:
            database.execute("pragma schema_version")
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"tracking URI {uri}: {error}; name a database that can be written") from None


@contextmanager
def _answer_within(seconds: int) -> Iterator[None]:
    """MLflow's client reads its time limit from the environment, at every request."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    schema.quiet_mlflow()
    before, os.environ[name] = os.environ[name], str(seconds)
    try:
        yield
    finally:
        os.environ[name] = before


def _artifact_location(uri: str) -> str | None:
    """Beside an sqlite database, whatever the current directory is; None leaves it to the server."""
    path = schema.sqlite_file(uri)
    return (path.resolve().parent / "mlflow-artifacts").as_uri() if path else None


def _space(folder: StudyFolder) -> str:
    """The search space as the study file writes it; nothing where it is more than a tag can hold."""
    space = read_yaml(folder.path / "study.yaml").get("space") or {}
    given = {path: {key: value for key, value in one.items() if value is not None} for path, one in space.items()}
    text = json.dumps(given)
    return text if len(text) <= LARGEST_TAG else "{}"


def _private_tag(target_epsilon: float) -> str:
    return "true" if math.isfinite(target_epsilon) else NON_PRIVATE


def _shown_state(run: "Run") -> Any:
    """The state that MLflow shows; None before the first."""
    return run.data.tags.get(schema.STATUS_TAG)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
