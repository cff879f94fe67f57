"""MLflow as the mirror of a study folder: complete, once only, and never in the way."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsink.checkpoint import save_checkpoint
from dpsink.config import TrialConfig, config_sha256, flatten, load_config
from dpsink.engine import TrialState
from dpsink.errors import InputError
from dpsink.generators import build_generator
from dpsink.privacy.plan import NON_PRIVATE, PrivacyPlan
from dpsink.records import CheckpointState, Report
from dpsink.synthesis import sample_grid
from tune import schema, tracking
from tune.folder import StudyFolder, StudyRecord, TrialEnd, TrialRecord
from tune.tracking import Mirror, MLflowTracker, check_tracking, connect, rebuild

FINGERPRINT, EXTRACTOR, TARGET = "hmac:ours", "classifier@180", 10.0
FLOOR = {"fid": 0.1234, "kid": 0.0012, "of": "validation (180 images) against test (180 images)"}
STATEMENT = {"policy": "compose_all", "study_epsilon": 31.4159, "study_delta": 1e-5, "assumptions": ["one", "two"]}


@dataclass
class Fake:
    """A trial as its files will tell it; the generator is real and tiny."""

    name: str
    state: schema.State | None = "completed"  # None has not ended
    role: Any = "search"
    epsilons: tuple[float, ...] = (5.0, 9.5)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last report
    overrides: tuple[str, ...] = ()
    fingerprint: str = FINGERPRINT
    test: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    config_id: str | None = None

    @property
    def config(self) -> TrialConfig:
        small = ("generator.latent_dim=2", "generator.hidden_dim=2", "generator.embed_dim=2")
        return load_config(None, (*small, *self.overrides))


def make_study(path: Path, fakes: list[Fake], uri: str, **changes: Any) -> StudyFolder:
    """A study folder as a driver would have left it."""
    record = StudyRecord(
        study_id=f"id-{path.name}", name="digits-study", experiment="dpsink", tracking_uri=uri, created="today",
        version="0.1.0", target_epsilon=TARGET, delta=1e-5, data_name="digits", data_fingerprint=FINGERPRINT,
        extractor=EXTRACTOR, objectives=("accuracy",), searched=("optimizer.lr", "privacy.noise_multiplier"),
    )  # fmt: skip
    folder = StudyFolder(path)
    folder.write_study(record.model_copy(update=changes), "name: digits-study\n")
    folder.write_statement(STATEMENT)
    folder.write_floor(FLOOR)
    for fake in fakes:
        write_trial(folder, fake)
    return folder


def write_trial(folder: StudyFolder, fake: Fake) -> None:
    """Writes, or writes on, what a trial leaves behind."""
    record = TrialRecord(
        name=fake.name, role=fake.role, config_id=fake.config_id or f"c-{fake.name}", config=fake.config, steps=100,
        sample_rate=0.1, noise_multiplier=3.0,
    )  # fmt: skip
    folder.add_trial(record)
    if fake.epsilons:
        write_checkpoint(folder.run(fake.name), fake)
    if fake.state:
        folder.end_trial(fake.name, TrialEnd(state=fake.state, error=fake.error))
    if fake.test:
        folder.write_test(fake.name, fake.test)


def write_checkpoint(run: Path, fake: Fake) -> None:
    config = fake.config
    plan = PrivacyPlan("record", 1437, 0.1, 3.0, 20.0, 100, config.privacy.target_epsilon, 1e-5)
    generator = build_generator(config, (1, 8, 8), 10)
    reports = tuple(report_of(fake, index) for index in range(len(fake.epsilons)))
    description = CheckpointState(
        config=config, plan=asdict(plan), image_shape=(1, 8, 8), num_classes=10, step=reports[-1].step,
        data_fingerprint=fake.fingerprint, reports=reports,
    )  # fmt: skip
    state = TrialState(generator, torch.zeros(2, 0), public_rng(), reports[-1].step)
    save_checkpoint(run, description, state, sample_grid(generator, num_classes=10, seed=len(reports)))


def report_of(fake: Fake, index: int) -> Report:
    step = 10 * (index + 1)
    usual = {"fid": 50.0 - index, "variety": 0.9, "accuracy": 0.7, "accuracy_logreg": 0.71, "accuracy_cnn": 0.69}
    metrics = usual | fake.metrics
    return Report(
        step=step, charged=step, epsilon=fake.epsilons[index], budget_fraction=step / 100, steps_per_second=8.0,
        status="running", metrics=metrics,
    )  # fmt: skip


def public_rng() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def study(tmp_path: Path, uri: str) -> StudyFolder:
    return make_study(tmp_path / "study", [Fake("one")], uri)


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the tracker logs, whatever other tests did to the loggers."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("dpsink.tracking")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def mirror_of(study: StudyFolder) -> Mirror:
    return Mirror(connect(study.read_study().tracking_uri), study)


def runs_of(study: StudyFolder, kind: str = schema.KIND_TRIAL) -> list[Any]:
    record = study.read_study()
    client = connect(record.tracking_uri)
    experiment = client.get_experiment_by_name(record.experiment)
    assert experiment
    return list(client.search_runs([experiment.experiment_id], f"tags.`{schema.KIND_TAG}` = '{kind}'"))


def only_run(study: StudyFolder, kind: str = schema.KIND_TRIAL) -> Any:
    (run,) = runs_of(study, kind)
    return run


def everything(study: StudyFolder) -> Any:
    """All that MLflow holds of a study, with the length of each metric's history."""
    client = connect(study.read_study().tracking_uri)
    return [
        (
            run.to_dictionary(),
            {key: len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics},
            sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        )
        for kind in (schema.KIND_STUDY, schema.KIND_TRIAL)
        for run in runs_of(study, kind)
    ]


def test_mirroring_twice_changes_nothing(study: StudyFolder) -> None:
    write_trial(study, Fake("two", state=None))
    rebuild(study)
    before = everything(study)
    rebuild(study)
    assert everything(study) == before


def test_params_are_the_flat_config_and_what_was_derived(study: StudyFolder) -> None:
    rebuild(study)
    derived = {schema.DERIVED_STEPS: 100, schema.DERIVED_SAMPLE_RATE: 0.1, schema.DERIVED_NOISE: 3.0}
    expected = flatten(study.read_trial("one").config) | derived
    assert only_run(study).data.params == {name: str(value) for name, value in expected.items()}


def test_every_report_becomes_one_point_of_each_metric(study: StudyFolder) -> None:
    rebuild(study)
    client, run = connect(study.read_study().tracking_uri), only_run(study)
    for metric in (schema.EPSILON, schema.BUDGET_FRACTION, schema.SPEED, "fid", "accuracy_cnn"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in history] == [10, 20]
    assert run.data.metrics[schema.EPSILON] == 9.5


def test_the_objective_is_the_first_metric_that_mlflow_is_told(study: StudyFolder) -> None:
    rebuild(study)
    assert next(iter(only_run(study).data.metrics)) == "accuracy"


def test_metrics_on_the_test_split_carry_their_prefix(study: StudyFolder) -> None:
    study.write_test("one", {"fid": 12.0, "accuracy": 0.8})
    rebuild(study)
    metrics = only_run(study).data.metrics
    assert (metrics["test_fid"], metrics["test_accuracy"]) == (12.0, 0.8)


def test_tags_identify_the_trial(study: StudyFolder) -> None:
    rebuild(study)
    tags, parent = only_run(study).data.tags, only_run(study, schema.KIND_STUDY)
    assert tags[schema.PARENT_TAG] == parent.info.run_id
    assert tags[schema.TRIAL_ID_TAG] == "one"
    assert tags[schema.CONFIG_SHA_TAG] == config_sha256(study.read_trial("one").config)
    assert tags[schema.FINGERPRINT_TAG] == FINGERPRINT
    assert tags[schema.EXTRACTOR_TAG] == EXTRACTOR
    assert tags[schema.PRIVATE_TAG] == "true"
    assert tags[schema.FOLDER_TAG] == str(study.run("one"))
    assert tags[schema.ACCOUNTANT_TAG]


def test_the_fingerprint_is_that_of_the_data_which_was_trained_on(study: StudyFolder) -> None:
    write_trial(study, Fake("one", fingerprint="hmac:theirs"))
    rebuild(study)
    assert only_run(study).data.tags[schema.FINGERPRINT_TAG] == "hmac:theirs"


@pytest.mark.parametrize(
    ("state", "status"), [("completed", "FINISHED"), ("stopped_early", "FINISHED"), ("diverged", "FINISHED")]
)
def test_an_end_is_told_in_both_vocabularies(study: StudyFolder, state: schema.State, status: str) -> None:
    study.end_trial("one", TrialEnd(state=state))
    rebuild(study)
    run = only_run(study)
    assert (run.data.tags[schema.STATUS_TAG], run.info.status) == (state, status)


def test_a_failed_trial_that_runs_again_loses_its_error(study: StudyFolder) -> None:
    study.end_trial("one", TrialEnd(state="failed", error="out of memory"))
    rebuild(study)
    failed = only_run(study)
    study.forget_end("one")
    mirror_of(study).trial("one", "running")
    assert (failed.info.status, failed.data.tags[schema.ERROR_TAG]) == ("FAILED", "out of memory")
    assert only_run(study).info.status == "RUNNING"
    assert schema.ERROR_TAG not in only_run(study).data.tags


def test_a_run_without_privacy_is_labelled_and_has_no_epsilon(tmp_path: Path, uri: str) -> None:
    overrides = ("privacy.target_epsilon=.inf", "privacy.noise_multiplier=0", "privacy.steps=100")
    fake = Fake("free", overrides=overrides, epsilons=(math.inf,))
    study = make_study(tmp_path / "study", [fake], uri)
    rebuild(study)
    run = only_run(study)
    assert run.data.tags[schema.PRIVATE_TAG] == NON_PRIVATE
    assert NON_PRIVATE in run.info.run_name
    assert schema.EPSILON not in run.data.metrics
    assert "fid" in run.data.metrics


def test_metrics_that_are_not_numbers_stay_out(tmp_path: Path, uri: str) -> None:
    study = make_study(tmp_path / "study", [Fake("one", metrics={"kid": math.nan})], uri)
    rebuild(study)
    assert "kid" not in only_run(study).data.metrics


def test_a_resumed_trial_stays_one_run(study: StudyFolder) -> None:
    study.forget_end("one")
    uri = study.read_study().tracking_uri
    tracker = MLflowTracker(uri, study)
    tracker.poke("one")
    assert tracker.close()
    killed = only_run(study)
    write_trial(study, Fake("one", state=None, epsilons=(5.0, 9.5, 9.7)))
    tracker = MLflowTracker(uri, study)
    tracker.poke("one")
    study.end_trial("one", TrialEnd(state="completed"))
    tracker.poke("one")
    assert tracker.close(study="completed")
    history = connect(uri).get_metric_history(killed.info.run_id, schema.EPSILON)
    assert (killed.info.status, only_run(study).info.status) == ("KILLED", "FINISHED")
    assert killed.data.tags[schema.STATUS_TAG] == "interrupted"
    assert [point.step for point in history] == [10, 20, 30]


def test_the_study_run_carries_its_facts_and_the_statement(study: StudyFolder) -> None:
    rebuild(study)
    run = only_run(study, schema.KIND_STUDY)
    client = connect(study.read_study().tracking_uri)
    text = Path(client.download_artifacts(run.info.run_id, schema.STATEMENT_ARTIFACT)).read_text()
    assert run.info.status == "FINISHED"
    assert json.loads(text) == STATEMENT
    assert json.loads(run.data.tags[schema.STATEMENT_TAG])["study_epsilon"] == 31.4159
    assert run.data.params["study.target_epsilon"] == "10.0"
    assert run.data.params["study.searched"] == "optimizer.lr,privacy.noise_multiplier"


def test_samples_are_logged_when_they_change_and_the_config_at_the_end(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, logged = mirror_of(study), []
    log_artifact = mirror.client.log_artifact

    def count(run_id: str, path: str, *rest: Any) -> None:
        logged.append(Path(path).name)
        log_artifact(run_id, path, *rest)

    monkeypatch.setattr(mirror.client, "log_artifact", count)
    first = Fake("one", state=None, epsilons=(5.0,))
    second = replace(first, epsilons=(5.0, 9.5))
    for fake in (first, first, second, replace(second, state="completed")):
        study.forget_end("one")
        write_trial(study, fake)
        mirror.trial("one", "running")
    assert logged == [schema.GRID_ARTIFACT, schema.GRID_ARTIFACT, schema.CONFIG_ARTIFACT]


def test_large_pictures_stay_out(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LARGEST_GRID", 10)
    rebuild(study)
    client = connect(study.read_study().tracking_uri)
    assert [file.path for file in client.list_artifacts(only_run(study).info.run_id)] == [schema.CONFIG_ARTIFACT]


def test_artifacts_lie_beside_the_database(study: StudyFolder, tmp_path: Path) -> None:
    rebuild(study)
    run = only_run(study)
    place = tmp_path / "mlflow-artifacts" / run.info.run_id / "artifacts"
    assert (place / schema.GRID_ARTIFACT).exists()


def test_a_rebuilt_mirror_shows_when_trials_began_and_ended(study: StudyFolder) -> None:
    rebuild(study)
    info = only_run(study).info
    began, ended = (study.trial("one") / name for name in ("trial.json", "end.json"))
    assert info.start_time == int(began.stat().st_mtime * 1000)
    assert info.end_time == int(ended.stat().st_mtime * 1000)


def test_a_poke_never_waits_for_mlflow(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(tracking, "connect", lambda uri: hang.wait(20))
    tracker = MLflowTracker(study.read_study().tracking_uri, study)
    started = time.perf_counter()
    for _ in range(1000):
        tracker.poke("one")
    elapsed = time.perf_counter() - started
    tracker.close(patience=0.01)
    hang.set()
    assert elapsed < 0.5


def test_what_an_outage_held_up_is_written_after_it(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    outage = Outage(monkeypatch)
    tracker = MLflowTracker(study.read_study().tracking_uri, study)
    write_trial(study, Fake("two", state=None))
    tracker.poke("two")
    outage.wait_for_attempts(4)
    outage.over = True
    assert tracker.close({"two": "interrupted"})
    assert {run.data.tags[schema.TRIAL_ID_TAG] for run in runs_of(study)} == {"one", "two"}
    lost, back = log_lines
    assert ("is lost" in lost, "is back" in back) == (True, True)


class Outage:
    """MLflow that cannot be reached until it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over, self.attempts = False, 0
        monkeypatch.setattr(tracking, "connect", self.connect)
        monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.01)
        monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.02)

    def connect(self, uri: str) -> Any:
        self.attempts += 1
        if not self.over:
            raise ConnectionError("no route")
        return connect(uri)

    def wait_for_attempts(self, count: int) -> None:
        while self.attempts < count:
            time.sleep(0.01)


def test_close_gives_up_in_time_and_says_what_to_do(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    Outage(monkeypatch)
    tracker = MLflowTracker(study.read_study().tracking_uri, study)
    started = time.perf_counter()
    assert not tracker.close(patience=0.2)
    assert time.perf_counter() - started < 1
    assert "dpsink-tune track" in log_lines[-1]


def test_one_bad_trial_does_not_hold_up_the_others(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trial(study, Fake("two"))
    uri, describe = study.read_study().tracking_uri, Mirror.trial

    def refuse_one(mirror: Mirror, name: str, state: schema.State | None) -> None:
        if name == "one":
            raise ValueError("bad")
        describe(mirror, name, state)

    monkeypatch.setattr(Mirror, "trial", refuse_one)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.01)
    assert not MLflowTracker(uri, study).close(patience=3)
    assert only_run(study).data.tags[schema.TRIAL_ID_TAG] == "two"


def test_the_study_brings_its_view_of_the_runs(study: StudyFolder, uri: str) -> None:
    rebuild(study)
    experiment = connect(uri).get_experiment_by_name("dpsink")
    assert experiment is not None
    view = json.loads(experiment.tags["mlflow.sharedViewState.id-study"])
    assert "params.`optimizer.lr`" in view["selectedColumns"]
    assert view["compareRunCharts"][0]["selectedParams"] == ["optimizer.lr", "privacy.noise_multiplier"]


def test_a_new_database_is_made_in_silence(empty_database: tuple[Path, str]) -> None:
    assert empty_database[1] == ""


def refused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_server_that_refuses_is_told_in_one_line() -> None:
    port = refused_port()
    with pytest.raises(InputError, match=rf"http://127.0.0.1:{port} does not answer") as caught:
        check_tracking(f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


def test_a_uri_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check_tracking("http://user:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_a_server_that_says_nothing_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CHECK_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.perf_counter()
        with pytest.raises(InputError, match="does not answer"):
            check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://host", "sqlite:", "sqlite:///"])
def test_other_kinds_of_uri_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="tracking URI"):
        check_tracking(uri)


def test_a_database_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be written"):
        check_tracking(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but text" * 100)
    with pytest.raises(InputError, match="not a database"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_study_that_has_ended_is_shown_finished_when_it_is_rebuilt(study: StudyFolder) -> None:
    rebuild(study, unfinished="interrupted")
    assert only_run(study, schema.KIND_STUDY).info.status == "FINISHED"


def test_a_sealed_study_is_shown_finished_only_when_its_winner_is_out(tmp_path: Path, uri: str) -> None:
    """It looks empty until then."""
    study = make_study(tmp_path / "sealed", [], uri)
    rebuild(study, unfinished="interrupted")
    before = only_run(study, schema.KIND_STUDY).info.status
    write_trial(study, Fake("winner"))
    study.write_selection("winner")
    rebuild(study, unfinished="interrupted")
    assert (before, only_run(study, schema.KIND_STUDY).info.status) == ("KILLED", "FINISHED")
