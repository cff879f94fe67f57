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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpsink.config import config_sha256, dump_config, flatten, read_yaml
from dpsink.errors import InputError
from dpsink.privacy.accounting import accountant_version
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.records import CheckpointState, Report, latest_state
from tune import schema
from tune.folder import StudyFolder, TrialEnd, TrialRecord
from tune.links import trials_of, view_of, view_tag, where
from tune.outage import advice_on
from tune.study import Study

if TYPE_CHECKING:  # its import takes seconds
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("dpsink.tracking")

CHECK_SECONDS = 5  # that a tracking server may take to answer before a study starts
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds between attempts during an outage
PAGE = 200  # runs asked for at once
LARGEST_GRID = 100 * 1024  # bytes; more would make the runs table slow
LARGEST_TAG = 8000  # characters, of MLflow


def tracking_uri(study: Study) -> str:
    """Where the study is tracked: its file, else MLflow's environment variable, else sqlite in its storage."""
    default = f"sqlite:///{study.storage.absolute()}/mlflow.db"
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def check_tracking(uri: str) -> None:
    """Makes sure that runs can be written, before a study starts.

    Raises:
        InputError: an unknown kind of URI, a server that does not answer, a database that cannot be written.
    """
    if schema.shown_uri(uri) != uri:
        raise InputError(
            f"tracking URI {schema.shown_uri(uri)} must not hold a user or a password, which would be written down; "
            "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if uri.startswith("sqlite:"):
        _check_database(uri)
    elif not uri.startswith(("http://", "https://")):
        raise InputError(f"tracking URI '{uri}' must be sqlite:///FILE or http(s)://HOST:PORT; correct it")
    try:
        with _answer_within(CHECK_SECONDS):
            connect(uri).search_experiments(max_results=1)
    except Exception as error:
        another = "start the MLflow server, or name another in tracking.uri or MLFLOW_TRACKING_URI"
        reason, advice = schema.mlflow_reason(error, uri), advice_on(error, another)
        raise InputError(f"tracking URI {schema.shown_uri(uri)} does not answer: {reason}; {advice}") from None


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


@dataclass
class Shown:
    """What MLflow holds of a run: asked once, and kept up by the only writer."""

    run_id: str
    status: str
    params: set[str]  # names; their values never change
    tags: dict[str, str]
    metrics: dict[str, float]  # the latest values
    steps: set[int] | None = None  # of its reports; None before they were asked for

    @classmethod
    def of(cls, run: "Run") -> "Shown":
        """A run as MLflow gave it."""
        return cls(run.info.run_id, run.info.status, set(run.data.params), dict(run.data.tags), dict(run.data.metrics))

    @property
    def state(self) -> Any:
        """The state that it shows; None before the first."""
        return self.tags.get(schema.STATUS_TAG)


class Mirror:
    """One study folder and its runs in MLflow. Every method may be repeated: then it changes nothing.

    What it knows of MLflow is right as long as nobody else writes the study's runs and no call has failed; after a
    failure make a new one.
    """

    def __init__(self, client: "MlflowClient", folder: StudyFolder) -> None:
        self.client, self.folder = client, folder
        self.record = folder.read_study()
        self._view = ""  # of the study, as it was written last
        self._runs: dict[str | None, Shown] = {}  # by trial, of those that have not ended; None is the study's

    def study(self, state: schema.State | None) -> None:
        """The parent run: what the study is, and its ledger's statement.

        Args:
            state: None leaves it as MLflow shows it.
        """
        run = self._study
        self._describe_study(run)
        self._share_view()
        self._log_statement(run)
        self._set_state(run, TrialEnd(state=state or run.state or self.study_state()), time.time())

    def trial(self, name: str, state: schema.State | None) -> None:
        """A child run: settings, reports, samples, metrics on the test split, and its state.

        Args:
            state: of a trial that has not ended, as its driver knows it; None leaves it as MLflow shows it.
        """
        record, end = self.folder.read_trial(name), self.folder.end_of(name)
        checkpoint, saved = latest_state(self.folder.run(name)) or (None, None)
        run = self._runs.setdefault(name, self._runs.get(name) or self._find_trial(record))
        self._describe_trial(run, record, saved)
        self._log_reports(run, saved.reports if saved else ())
        self._log_test(run, name, saved.step if saved else 0)
        if checkpoint:
            self._log_grid(run, checkpoint / schema.GRID_ARTIFACT)
        if end:
            self._log_config(run, record)
        told = end or TrialEnd(state=state or run.state or ("interrupted" if saved else "pending"))
        self._set_state(run, told, _modified(self.folder.trial(name) / "end.json") if end else time.time())
        if end:  # seldom needed again: memory stays flat
            del self._runs[name]

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
    def _study(self) -> Shown:
        tags = self._identity(schema.KIND_STUDY)
        started = _modified(self.folder.path / "study.json")
        return self._find(tags) or self._create(tags, {}, self.record.name, self.record.target_epsilon, started)

    @cached_property
    def _found(self) -> dict[str, Shown]:
        """The runs that earlier sessions left, by trial, asked for at once: one by one they take minutes."""
        found: dict[str, Shown] = {}
        token = None
        while token != "":
            query = trials_of(self.record.study_id)
            page = self.client.search_runs([self._experiment], query, max_results=PAGE, page_token=token)
            found |= {run.data.tags[schema.TRIAL_ID_TAG]: Shown.of(run) for run in page}
            token = page.token or ""
        return found

    def _find_trial(self, record: TrialRecord) -> Shown:
        """A trial's run, made where there is none."""
        if found := self._found.pop(record.name, None):
            return found
        tags = self._identity(schema.KIND_TRIAL) | {schema.TRIAL_ID_TAG: record.name}
        parent = {schema.PARENT_TAG: self._study.run_id}
        started = _modified(self.folder.trial(record.name) / "trial.json")
        target = record.config.privacy.target_epsilon
        return self._find(tags) or self._create(tags, parent, record.name, target, started)

    def _identity(self, kind: str) -> dict[str, str]:
        """The tags by which a run is found again."""
        return {schema.KIND_TAG: kind, schema.STUDY_ID_TAG: self.record.study_id}

    def _find(self, identity: Mapping[str, str]) -> Shown | None:
        found = self.client.search_runs([self._experiment], where(identity), max_results=1)
        return Shown.of(found[0]) if found else None

    def _create(
        self, identity: Mapping[str, str], tags: Mapping[str, str], name: str, target_epsilon: float, started: float
    ) -> Shown:
        name = name if math.isfinite(target_epsilon) else f"{name} ({NON_PRIVATE})"
        start = _milliseconds(started)
        run = self.client.create_run(self._experiment, start_time=start, tags={**identity, **tags}, run_name=name)
        return replace(Shown.of(run), steps=set())

    def study_state(self) -> schema.State:
        """The state of a study at which nobody works, as far as its folder tells."""
        outcome, trials = self.folder.outcome(), self.folder.trials()
        if outcome is not None:
            return "completed" if outcome.finished else "interrupted"
        ended = all(self.folder.end_of(trial.name) for trial in trials)
        return "completed" if self.folder.selected or (trials and ended) else "interrupted"

    def _describe_study(self, run: Shown) -> None:
        facts = flatten(self.record.model_copy(update={"repeats": None}))
        del facts["tracking_uri"], facts["repeats"]  # the one may hold a password, the other is a tag
        tags = {
            schema.STUDY_NAME_TAG: self.record.name,
            schema.FINGERPRINT_TAG: self.record.data_fingerprint,
            schema.EXTRACTOR_TAG: self.record.extractor,
            schema.PRIVATE_TAG: _private_tag(self.record.target_epsilon),
            schema.FOLDER_TAG: str(self.folder.path.resolve()),
            schema.SPACE_TAG: _space(self.folder),
        }
        if floor := self.folder.floor():
            tags[schema.FLOOR_TAG] = json.dumps(floor)
        if self.record.repeats:
            tags[schema.REPEATS_TAG] = self.record.repeats.study_id
        self._log(run, {f"{schema.STUDY_PARAM}{name}": value for name, value in facts.items()}, tags)

    def _share_view(self) -> None:
        """Which columns and charts MLflow's pages show of the study."""
        view = view_of(self.record.study_id, self.record.objectives, self.record.searched)
        if view != self._view:
            self.client.set_experiment_tag(self._experiment, view_tag(self.record.study_id), view)
            self._view = view

    def _describe_trial(self, run: Shown, record: TrialRecord, saved: CheckpointState | None) -> None:
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

    def _log(self, run: Shown, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Params that the run has not and tags that differ; params of MLflow never change."""
        from mlflow.entities import Param, RunTag

        new_params = [Param(name, str(value)) for name, value in params.items() if name not in run.params]
        new_tags = [RunTag(name, value) for name, value in tags.items() if run.tags.get(name) != value]
        if new_params or new_tags:
            self.client.log_batch(run.run_id, params=new_params, tags=new_tags)
            run.params.update(params)
            run.tags.update(tags)

    def _log_reports(self, run: Shown, reports: tuple[Report, ...]) -> None:
        """One batch per report, for the steps that are not there yet."""
        if not reports or run.metrics.get(schema.BUDGET_FRACTION) == reports[-1].budget_fraction:
            return  # the last one is there, and so are those before it
        if run.steps is None:
            history = self.client.get_metric_history(run.run_id, schema.BUDGET_FRACTION)
            run.steps = {point.step for point in history}
        for report in reports:
            if report.step not in run.steps:
                # MLflow's page of runs side by side opens with the metric that it was told first.
                main = {name: report.metrics[name] for name in self.record.objectives if name in report.metrics}
                beside = {
                    schema.EPSILON: report.epsilon,
                    schema.BUDGET_FRACTION: report.budget_fraction,
                    schema.SPEED: report.steps_per_second,
                }
                self._log_metrics(run, main | report.metrics | beside, report.step)
                run.steps.add(report.step)

    def _log_test(self, run: Shown, name: str, step: int) -> None:
        told = {schema.TEST_PREFIX + key: value for key, value in self.folder.test_metrics(name).items()}
        self._log_metrics(run, {key: value for key, value in told.items() if run.metrics.get(key) != value}, step)

    def _log_metrics(self, run: Shown, values: Mapping[str, float], step: int) -> None:
        """Finite values only: MLflow stores infinity, the ε of a run without privacy, as a number."""
        from mlflow.entities import Metric

        now = _milliseconds(time.time())
        points = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        if points:
            self.client.log_batch(run.run_id, metrics=points)
            run.metrics.update({point.key: point.value for point in points})

    def _log_grid(self, run: Shown, picture: Path) -> None:
        content = picture.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        if run.tags.get(schema.GRID_TAG) == digest:
            return
        if len(content) <= LARGEST_GRID:
            self.client.log_artifact(run.run_id, str(picture))
        else:
            log.warning("%s is above %d KiB and stays out of MLflow", picture, LARGEST_GRID // 1024)
        self._log(run, {}, {schema.GRID_TAG: digest})

    def _log_config(self, run: Shown, record: TrialRecord) -> None:
        if run.state not in schema.ENDED:
            self.client.log_text(run.run_id, dump_config(record.config), schema.CONFIG_ARTIFACT)

    def _log_statement(self, run: Shown) -> None:
        """Whole as an artifact; its single values, without the lists of conditions, as a tag."""
        statement = self.folder.statement()
        single = {key: value for key, value in statement.items() if not isinstance(value, list | dict)}
        short = json.dumps(single)
        if statement and run.tags.get(schema.STATEMENT_TAG) != short:
            whole = json.dumps(statement, indent=1)
            self.client.log_text(run.run_id, whole, schema.STATEMENT_ARTIFACT)
            self._log(run, {}, {schema.STATEMENT_TAG: short})

    def _set_state(self, run: Shown, told: TrialEnd, ended: float) -> None:
        status = schema.MLFLOW_STATUS[told.state]
        tags = {schema.STATUS_TAG: told.state} | ({schema.ERROR_TAG: told.error[:1000]} if told.error else {})
        if schema.ERROR_TAG in run.tags and not told.error:  # a failed trial that runs again
            self.client.delete_tag(run.run_id, schema.ERROR_TAG)
            del run.tags[schema.ERROR_TAG]
        self._log(run, {}, tags)
        if run.status == status:
            return
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(run.run_id, status)
        else:
            self.client.set_terminated(run.run_id, status, _milliseconds(ended))
        run.status = status


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
        self._written = 0  # runs brought up to date, to see whether there is progress
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
        patience: float = 30.0,
        limit: float = math.inf,
    ) -> bool:
        """Writes what is left and ends the thread.

        Args:
            states: of trials that have not ended; those left out are `interrupted`.
            study: state of the study.
            patience: seconds without progress after which the rest is left.
            limit: seconds after which it is left in any case.

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
        written, deadline = -1, time.monotonic() + limit
        while self._thread.is_alive() and written < self._written and time.monotonic() < deadline:
            written = self._written
            self._thread.join(min(patience, max(0.0, deadline - time.monotonic())))
        return self._give_up()

    def abandon(self) -> None:
        """Writes no more: the study's runs are another process's to write."""
        with self._changed:
            self._pending.clear()
            self._closing = self._abandoned = True
            self._changed.notify()

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
        self._written += 1
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


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
