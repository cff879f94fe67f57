"""Whole studies: through Ray to their end, and through every way of being interrupted.

The slow tests share two studies. `finished` ran undisturbed; `stormy` lost its driver, then a worker, then one more
after a warning, and was then stopped by hand, before it was let finish.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import RaySystemError
from ray.tune import TuneError

from dpsink.config import DataConfig
from dpsink.console import metric_text
from dpsink.data import load_dataset
from dpsink.errors import InputError
from dpsink.privacy.accounts import StudyAccounts
from dpsink.privacy.budget import charged_steps
from dpsink.privacy.ledger import PrivacyStatement, TrialCost, planned_epsilon
from dpsink.records import CheckpointState, latest_state
from dpsink.training import train
from tune import cli, cluster, schema
from tune.choice import CHOSEN_BY, select_best
from tune.cluster import Crashed, Interrupted
from tune.folder import StudyFolder
from tune.lock import only_one
from tune.memory import SearchMemory, open_optuna
from tune.preflight import check_study
from tune.repeat import repetition
from tune.study import Study, load_study
from tune.summary import print_summary, summarise
from tune.sweep import Outcome, run_study
from tune.tracking import connect
from tune.trainable import load_same

SLOW = pytest.mark.slow
TRIALS = ["baseline-control", "trial-0001", "trial-0002"]
MOMENT = 3  # seconds in which what was told to end does
PATIENCE = 240  # seconds after which something that should happen has not


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of all studies here; they share a database, which takes seconds to make."""
    return tmp_path_factory.mktemp("storage")


def write_study(root: Path, name: str, *, steps: int = 20, points: int = 2, trials: int = 2, **changes: Any) -> Path:
    """The file of a small study: a control, and a search over the learning rate."""
    tree: dict[str, Any] = {
        "name": name,
        "trial": {
            "generator": {"latent_dim": 4, "hidden_dim": 4, "embed_dim": 4},
            "sinkhorn": {"cost": "l2", "gen_batch_size": 10},
            "privacy": {"noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": steps},
            "evaluation": {"points": points, "samples": 100, "classifiers": ["logreg"]},
        },
        "baselines": {
            "control": {
                "generator": {"kind": "class_mean"},
                "privacy": {"noise_multiplier": None, "step_limit": None},
            },
        },
        "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
        "algorithm": {"kind": "optuna", "trials": trials},
        "objectives": ["accuracy_logreg"],
        "test_samples": 100,
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
        "storage": str(root),
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")
    return path


def without_control(path: Path) -> Study:
    """A study whose account is as small as its search: a control spends its whole target."""
    return load_study(path).model_copy(update={"baselines": {}})


def folder_of(path: Path) -> StudyFolder:
    study = load_study(path)
    return StudyFolder(study.storage / study.name)


def states(folder: StudyFolder) -> dict[str, str | None]:
    ends = {record.name: folder.end_of(record.name) for record in folder.trials()}
    return {name: end.state if end else None for name, end in ends.items()}


def attempts(folder: StudyFolder, name: str) -> int:
    """How often a trial was started."""
    return len(list((folder.run(name) / "ledger").glob("[0-9][0-9][0-9][0-9][0-9][0-9].json")))


def step_of(folder: StudyFolder, name: str) -> int:
    """Step of a trial's last report, 0 before the first."""
    reports = folder.reports(name)
    return reports[-1].step if reports else 0


def runs_of(folder: StudyFolder, kind: str = schema.KIND_TRIAL) -> list[Any]:
    """The study's runs in MLflow."""
    record = folder.read_study()
    client = connect(record.tracking_uri)
    experiment = client.get_experiment_by_name(record.experiment)
    assert experiment
    query = f"tags.`{schema.KIND_TAG}` = '{kind}' and tags.`{schema.STUDY_ID_TAG}` = '{record.study_id}'"
    return list(client.search_runs([experiment.experiment_id], query))


def statuses(folder: StudyFolder) -> dict[str, str]:
    """Trial to MLflow's status; fails where a trial has two runs."""
    runs = runs_of(folder)
    told = {run.data.tags[schema.TRIAL_ID_TAG]: run.info.status for run in runs}
    assert len(told) == len(runs)
    return told


def study_status(folder: StudyFolder) -> str:
    (run,) = runs_of(folder, schema.KIND_STUDY)
    return run.info.status


def files_of(folder: StudyFolder) -> dict[str, str]:
    """Content of all that a study's trials left behind."""
    files = (
        path for path in (folder.path / "trials").rglob("*") if path.is_file() and not path.name.startswith("lock-")
    )
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sweep(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`dpsink-tune sweep` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", "sweep", str(path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    told = capsys.readouterr()
    return int(caught.value.code or 0), told.out, told.err


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a sweep is refused."""
    monkeypatch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
    code, out, err = sweep(path, monkeypatch, capsys)
    assert (code, out) == (2, "")
    *before, line = err.splitlines()
    assert all("working out" in told for told in before)  # of a selection, which takes a while
    return line


def no_judge(*_: Any, **__: Any) -> dict[str, Any]:
    """Takes the place of the last word on the test split, which takes seconds."""
    return {"metrics": {"accuracy_logreg": 0.5}, "floor": {"fid": 0.1, "kid": 0.0, "of": "real against real"}}


@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[Path, Outcome]:
    """A study that ran undisturbed."""
    path = write_study(root, "finished")
    return path, run_study(load_study(path))


@SLOW
def test_every_trial_of_a_study_is_completed_once(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    assert states(folder) == dict.fromkeys(TRIALS, "completed")
    assert [attempts(folder, name) for name in TRIALS] == [1, 1, 1]
    assert finished[1].finished


@SLOW
def test_mlflow_shows_every_trial_once_and_finished(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    assert statuses(folder) == dict.fromkeys(states(folder), "FINISHED")
    assert study_status(folder) == "FINISHED"


@SLOW
def test_no_trial_spends_more_than_its_target(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    spent = [folder.reports(name)[-1].epsilon for name in states(folder)]
    assert all(0 < epsilon <= 10 for epsilon in spent)


@SLOW
def test_the_statement_bounds_the_whole_study(finished: tuple[Path, Outcome]) -> None:
    statement = json.loads((finished[1].folder.path / "statement.json").read_text())
    assert statement == finished[1].statement
    assert 10 < statement["spent"] <= statement["study_epsilon"]


@SLOW
def test_every_generator_carries_the_statement_of_its_study(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    texts = [(folder.run(name) / "statement.json").read_text() for name in states(folder)]
    assert [json.loads(text) for text in texts] == [finished[1].statement] * 3


@SLOW
def test_the_baselines_and_what_is_best_alone_are_judged_on_the_test_split(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    best = [select_best(folder, metric) for metric in ("accuracy_logreg", *CHOSEN_BY)]
    judged = {name for name in states(folder) if folder.test_metrics(name)}
    assert judged == {"baseline-control", *(trial.name for trial in best if trial)}


@SLOW
def test_what_real_images_score_is_measured_and_told_beside_the_best(
    finished: tuple[Path, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    path, outcome = finished
    floor = outcome.folder.floor()
    assert floor["of"] == "validation (180 images) against test (180 images)"
    print_summary(summarise(outcome, load_study(path)))
    assert f"FID {metric_text(floor['fid'])}" in capsys.readouterr().out
    (run,) = runs_of(outcome.folder, schema.KIND_STUDY)
    assert json.loads(run.data.tags[schema.FLOOR_TAG]) == floor


@SLOW
def test_the_best_has_the_best_objective_of_the_searched_trials(finished: tuple[Path, Outcome]) -> None:
    folder, best = finished[1].folder, finished[1].best
    scores = {name: folder.reports(name)[-1].metrics["accuracy_logreg"] for name in states(folder) if "trial-" in name}
    assert best
    assert scores[best.name] == max(scores.values())


@SLOW
def test_optuna_knows_the_result_of_every_searched_trial(finished: tuple[Path, Outcome]) -> None:
    folder = finished[1].folder
    records = [record for record in folder.trials() if record.role == schema.ROLE_SEARCH]
    told = {trial.number: trial.value for trial in open_optuna(load_study(finished[0]), folder).trials}
    assert told == {
        record.number: folder.reports(record.name)[-1].metrics["accuracy_logreg"] for record in records
    }  # fmt: skip


@SLOW
def test_a_finished_study_run_again_starts_nothing_and_changes_nothing(
    finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, outcome = finished
    monkeypatch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
    before = files_of(outcome.folder), [run.to_dictionary() for run in runs_of(outcome.folder)]
    again = run_study(load_study(path))
    assert (again.finished, again.statement, again.best) == (True, outcome.statement, outcome.best)
    assert (files_of(outcome.folder), [run.to_dictionary() for run in runs_of(outcome.folder)]) == before
    assert study_status(outcome.folder) == "FINISHED"


@SLOW
def test_other_settings_under_the_same_name_are_refused(
    finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, outcome = finished
    before, text = files_of(outcome.folder), path.read_text()
    try:
        write_study(path.parent, "finished", trials=4)
        message = refused(path, monkeypatch, capsys)
    finally:
        path.write_text(text)
    assert "settings differ" in message
    assert files_of(outcome.folder) == before


@SLOW
def test_a_study_whose_ledger_vanished_is_refused(
    finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, outcome = finished
    outcome.folder.ledger.rename(tmp_path / "away")
    try:
        message = refused(path, monkeypatch, capsys)
    finally:
        for left in outcome.folder.ledger.glob("*"):
            left.unlink()
        outcome.folder.ledger.rmdir()
        (tmp_path / "away").rename(outcome.folder.ledger)
    assert "what was spent is no longer known" in message


@SLOW
def test_a_trial_that_the_scheduler_stops_ends_at_its_report_and_is_charged_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.choice.judge", no_judge)
    monkeypatch.setattr(SearchMemory, "should_stop", lambda _self, number, _reports: number == 0)
    path = write_study(root, "halved", scheduler={"kind": "asha", "grace": 0.5})
    outcome = run_study(load_study(path))
    folder = outcome.folder
    assert states(folder) == {"baseline-control": "completed", "trial-0001": "stopped_early", "trial-0002": "completed"}
    assert (step_of(folder, "trial-0001"), charged_steps(folder.run("trial-0001") / "ledger")) == (10, 10)
    assert [trial.state.name for trial in open_optuna(load_study(path), folder).trials] == ["PRUNED", "COMPLETE"]
    assert statuses(folder)["trial-0001"] == "FINISHED"
    assert outcome.best
    assert outcome.best.name == "trial-0002"


# A failure.


@pytest.fixture(scope="module")
def retried(root: Path) -> tuple[StudyFolder, dict[str, Any], Outcome, Outcome]:
    """A study whose first searched trial found its place taken; then the same without the obstacle, with
    --retry-failed. What was told between the two, and both outcomes."""
    path = write_study(root, "retried")
    folder = folder_of(path)
    obstacle = folder.run("trial-0001") / "config.yaml"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("of another trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.choice.judge", no_judge)
        first = run_study(load_study(path))
        between = summarise(first, load_study(path))
        obstacle.unlink()
        return folder, between, first, run_study(load_study(path), retry_failed=True)


@SLOW
def test_a_failed_trial_is_told_with_its_reason_and_the_study_goes_on(retried: Any) -> None:
    _, between, first, _ = retried
    assert between["trials"] == {"baseline-control": "completed", "trial-0001": "failed", "trial-0002": "completed"}
    assert "holds another trial" in between["failed"]["trial-0001"]
    assert first.finished


@SLOW
def test_retrying_runs_the_failures_again_and_nothing_else(retried: Any) -> None:
    folder, *_ = retried
    assert states(folder) == dict.fromkeys(TRIALS, "completed")
    assert [attempts(folder, name) for name in TRIALS] == [1, 1, 1]


@SLOW
def test_a_trial_that_was_retried_is_charged_once_and_known_to_the_search(retried: Any) -> None:
    folder, _, first, second = retried
    assert second.statement["study_epsilon"] == first.statement["study_epsilon"]
    told = open_optuna(load_study(folder.path / "study.yaml"), folder).trials
    assert sorted(trial.state.name for trial in told) == ["COMPLETE", "COMPLETE", "FAIL"]  # the last was run again


@SLOW
def test_mlflow_shows_a_retried_trial_once_finished_and_without_its_error(retried: Any) -> None:
    folder, *_ = retried
    assert statuses(folder) == dict.fromkeys(TRIALS, "FINISHED")
    assert not [run for run in runs_of(folder) if schema.ERROR_TAG in run.data.tags]


# Once more.


@pytest.fixture(scope="module")
def repeated(finished: tuple[Path, Outcome]) -> Outcome:
    """The best configuration of the finished study, trained twice more."""
    return run_study(repetition(str(finished[1].folder.path), top=1, seeds=2))


@SLOW
def test_a_repetition_trains_the_best_configuration_with_each_seed(
    finished: tuple[Path, Outcome], repeated: Outcome
) -> None:
    best, trials = (
        finished[1].best,
        [f"{name}-{seed}" for name in ("baseline-control", "trial-0001") for seed in (1, 2)],
    )
    assert states(repeated.folder) == dict.fromkeys(trials, "completed")
    assert best
    assert {repeated.folder.read_trial(name).config_id for name in trials[2:]} == {best.config_id}


@SLOW
def test_a_repetition_claims_the_first_study_too_and_leaves_it_as_it_was(
    finished: tuple[Path, Outcome], repeated: Outcome
) -> None:
    first, both = finished[1].statement, repeated.statement
    assert both["earlier"]["epsilon"] == first["study_epsilon"]
    assert both["study_epsilon"] > first["study_epsilon"] + 10  # two controls of ε 10, and more
    assert both["study_delta"] == pytest.approx(first["study_delta"] + 5e-5)
    assert finished[1].folder.statement() == first


@SLOW
def test_mlflow_shows_which_study_is_repeated(finished: tuple[Path, Outcome], repeated: Outcome) -> None:
    (run,) = runs_of(repeated.folder, schema.KIND_STUDY)
    assert run.data.tags[schema.REPEATS_TAG] == finished[1].folder.read_study().study_id


@SLOW
def test_a_repetition_asked_for_again_starts_nothing(
    finished: tuple[Path, Outcome], repeated: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
    again = run_study(repetition(str(finished[1].folder.path), top=1, seeds=2))
    assert (again.finished, again.statement) == (True, repeated.statement)


# A storm.


def identity(pid: int) -> tuple[int, str] | None:
    """A process that cannot be mistaken for a later one of the same number: its id and its start time."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":
            return pid, fields[19]
    return None


def family(pid: int) -> set[tuple[int, str]]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {known for member in found if (known := identity(member))}


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:.0f} s for {what}")


class Command:
    """`python -m tune sweep` in a process of its own, with whatever Ray starts for it."""

    def __init__(self, path: Path) -> None:
        self.log = path.with_suffix(".log").open("w+")
        command = [sys.executable, "-m", "tune", "sweep", str(path), "--json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )
        self.members: set[tuple[int, str]] = set()

    def look(self) -> None:
        """Takes down which processes belong to it, while their parents are there to tell."""
        self.members |= family(self.process.pid)

    def kill(self, pid: int) -> None:
        """kill -9, of one of its own processes only."""
        if not self._knows(pid):
            self.look()
        assert self._knows(pid)
        os.kill(pid, signal.SIGKILL)

    def _knows(self, pid: int) -> bool:
        return pid in {member for member, _ in self.members}

    def kill_all(self) -> None:
        """kill -9 of all of its processes at once."""
        for pid, _ in self._alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def left(self) -> list[str]:
        """Its processes that still run after a moment and could touch a study; Ray's agents take their time."""
        deadline = time.monotonic() + MOMENT
        while (found := self._at_work()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _at_work(self) -> list[str]:
        names = []
        for pid, _ in self._alive():
            with suppress(OSError):
                names.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        return [name for name in names if name and not name.endswith("Agent")]

    def _alive(self) -> list[tuple[int, str]]:
        return [member for member in self.members if identity(member[0]) == member]

    def errors(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # for whoever reads why a test has failed
            print(self.errors(), file=sys.stderr)
        self.look()
        self.kill_all()
        self.process.communicate()
        self.log.close()


@dataclass
class Storm:
    """What was seen on the way."""

    folder: StudyFolder
    outcome: Outcome | None = None
    second_sweep: str = ""
    survivors: list[str] = field(default_factory=list)  # of the driver's death
    ended_before: list[str] = field(default_factory=list)  # trials that had ended when the driver died
    resumed: list[int] = field(default_factory=list)  # step of the trial whenever it was started again
    stop: tuple[int, float, str] = (0, 0.0, "")  # exit code, seconds, stderr
    shown_after_stop: dict[str, str] = field(default_factory=dict)
    study_after_stop: str = ""
    left_after_stop: list[str] = field(default_factory=list)
    charged_after_stop: int = 0
    saved_after_stop: CheckpointState | None = None


RUNNER = "trial-0001"  # who is hit each time
STEPS, POINTS = 800, 8


@pytest.fixture(scope="module")
def stormy(root: Path) -> Storm:
    """A study that lost its driver, then two workers, was then stopped by hand, and finished."""
    path = write_study(root, "stormy", steps=STEPS, points=POINTS)
    storm = Storm(folder_of(path))
    with Command(path) as first:
        lose_the_driver(first, path, storm)
        with Command(path) as second:  # at once, while what the first left behind may still be dying
            lose_a_worker(second, storm)
            take_a_machine_away(second, storm)
            stop_by_hand(second, storm)
        storm.survivors = first.left()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.choice.judge", no_judge)
        storm.outcome = run_study(load_study(path))
    return storm


def lose_the_driver(command: Command, path: Path, storm: Storm) -> None:
    wait_for(lambda: storm.folder.exists, "the study's folder")
    with pytest.raises(InputError) as refusal:
        run_study(load_study(path))
    storm.second_sweep = str(refusal.value)
    wait_for(lambda: step_of(storm.folder, RUNNER), "a first checkpoint")
    command.kill(command.process.pid)
    command.process.wait()
    storm.ended_before = [name for name, state in states(storm.folder).items() if state]


def lose_a_worker(command: Command, storm: Storm) -> None:
    go_on(storm)
    command.look()
    wait_for(lambda: in_between(storm), "steps that are charged and not saved")
    command.kill(holder(storm))
    go_on(storm)


def take_a_machine_away(command: Command, storm: Storm) -> None:
    """As a cloud takes a spot machine: a warning, and death soon after."""
    pid = holder(storm)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    if identity(pid):
        command.kill(pid)
    go_on(storm)


def holder(storm: Storm) -> int:
    """The process that has the trial."""
    return int(next((storm.folder.run(RUNNER) / "ledger").glob("lock-*")).read_text().split()[0])


def in_between(storm: Storm) -> bool:
    """Whether the trial has been charged for more steps than its last checkpoint has."""
    charged = charged_steps(storm.folder.run(RUNNER) / "ledger")
    return charged > storm.folder.reports(RUNNER)[-1].charged


def go_on(storm: Storm) -> None:
    """Waits until the trial has been started again and has got further."""
    before = 1 + len(storm.resumed)
    wait_for(lambda: attempts(storm.folder, RUNNER) > before, "the trial to start again")
    storm.resumed.append(step_of(storm.folder, RUNNER))
    wait_for(lambda: step_of(storm.folder, RUNNER) > storm.resumed[-1], "the trial to go on")


def stop_by_hand(command: Command, storm: Storm) -> None:
    command.look()
    started = time.monotonic()
    command.process.send_signal(signal.SIGINT)
    command.process.wait(PATIENCE)
    storm.stop = command.process.returncode, time.monotonic() - started, command.errors()
    storm.shown_after_stop = statuses(storm.folder)
    storm.study_after_stop = study_status(storm.folder)
    storm.left_after_stop = command.left()
    storm.charged_after_stop = charged_steps(storm.folder.run(RUNNER) / "ledger")
    _, storm.saved_after_stop = latest_state(storm.folder.run(RUNNER)) or (None, None)


@SLOW
def test_a_second_sweep_of_a_running_study_is_refused_in_one_line(stormy: Storm) -> None:
    assert "already being run by process" in stormy.second_sweep
    assert "\n" not in stormy.second_sweep


@SLOW
def test_no_worker_outlives_a_driver_that_was_killed(stormy: Storm) -> None:
    assert stormy.survivors == []


@SLOW
def test_a_trial_goes_on_from_its_checkpoint_when_its_driver_or_its_worker_was_killed(stormy: Storm) -> None:
    after_driver, after_worker, after_warning = stormy.resumed
    assert 0 < after_driver < after_worker < after_warning


@SLOW
def test_a_worker_that_was_killed_is_told_of_in_one_line(stormy: Storm) -> None:
    told = [line for line in stormy.stop[2].splitlines() if f"{RUNNER} goes on from its checkpoint" in line]
    assert len(told) == 2  # once killed, once warned first
    assert "Traceback" not in stormy.stop[2]


@SLOW
def test_ctrl_c_ends_a_sweep_soon_and_says_how_to_go_on(stormy: Storm) -> None:
    code, seconds, err = stormy.stop
    assert code == 130
    assert seconds < 10
    assert "run the same command again to go on" in err.splitlines()[-1]


@SLOW
def test_ctrl_c_costs_no_step(stormy: Storm) -> None:
    saved = stormy.saved_after_stop
    assert saved
    lost_before = saved.reports[-1].charged - saved.reports[-1].step
    assert stormy.charged_after_stop - saved.step == lost_before


@SLOW
def test_ctrl_c_leaves_no_process_behind(stormy: Storm) -> None:
    assert stormy.left_after_stop == []


@SLOW
def test_mlflow_shows_a_stopped_study_as_killed(stormy: Storm) -> None:
    assert stormy.study_after_stop == "KILLED"
    assert stormy.shown_after_stop[RUNNER] == "KILLED"
    assert set(stormy.shown_after_stop.values()) <= {"KILLED", "FINISHED"}


@SLOW
def test_the_same_command_finishes_what_was_interrupted(stormy: Storm) -> None:
    assert stormy.outcome and stormy.outcome.finished
    assert states(stormy.folder) == dict.fromkeys(TRIALS, "completed")


@SLOW
def test_a_trial_that_had_ended_is_not_run_again(stormy: Storm) -> None:
    assert "baseline-control" in stormy.ended_before
    assert {attempts(stormy.folder, name) for name in stormy.ended_before} == {1}


@SLOW
def test_a_storm_leaves_one_finished_run_for_each_trial(stormy: Storm) -> None:
    assert statuses(stormy.folder) == dict.fromkeys(states(stormy.folder), "FINISHED")
    assert study_status(stormy.folder) == "FINISHED"


@SLOW
def test_no_metric_is_logged_twice_and_none_is_lost(stormy: Storm) -> None:
    client = connect(stormy.folder.read_study().tracking_uri)
    for run in runs_of(stormy.folder):
        history = client.get_metric_history(run.info.run_id, schema.EPSILON)
        reports = stormy.folder.reports(run.data.tags[schema.TRIAL_ID_TAG])
        assert [(point.step, point.value) for point in history] == [(one.step, one.epsilon) for one in reports]


@SLOW
def test_a_trial_reports_each_point_once_however_often_it_was_interrupted(stormy: Storm) -> None:
    steps = [report.step for report in stormy.folder.reports(RUNNER)]
    expected = [STEPS * point // POINTS for point in range(1, POINTS + 1)]
    assert steps[:-1] == expected[: len(steps) - 1]
    # Replayed steps are charged again, so that the budget may end before the last point.
    assert expected[len(steps) - 2] < steps[-1] <= expected[len(steps) - 1]


@SLOW
def test_every_step_is_charged_and_none_beyond_the_budget(stormy: Storm) -> None:
    for name in states(stormy.folder):
        charged = charged_steps(stormy.folder.run(name) / "ledger")
        assert step_of(stormy.folder, name) <= charged <= stormy.folder.read_trial(name).steps


@SLOW
def test_steps_that_a_kill_made_run_twice_are_charged_twice(stormy: Storm) -> None:
    """Killed in the middle of a reservation, the trial has spent its budget before its last step."""
    assert charged_steps(stormy.folder.run(RUNNER) / "ledger") > step_of(stormy.folder, RUNNER)


@SLOW
def test_each_loss_costs_a_trial_less_than_the_steps_between_two_checkpoints(stormy: Storm) -> None:
    lost = charged_steps(stormy.folder.run(RUNNER) / "ledger") - step_of(stormy.folder, RUNNER)
    assert lost <= (attempts(stormy.folder, RUNNER) - 1) * STEPS / POINTS


@SLOW
def test_no_trial_of_a_storm_spends_more_than_its_target(stormy: Storm) -> None:
    assert all(stormy.folder.reports(name)[-1].epsilon <= 10 for name in states(stormy.folder))


# Without Ray.


def test_other_data_on_a_node_are_found_before_a_step_is_charged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are not those of the study here; copy them"):
        load_same(DataConfig(), tmp_path, "hmac:of-other-data")
    data = load_dataset(DataConfig())
    assert load_same(DataConfig(), tmp_path, data.fingerprint).fingerprint == data.fingerprint


class Inline:
    """Ray's place taken by a loop in this process, which may fall over."""

    def __init__(self, *faults: BaseException) -> None:
        self.faults = list(faults)  # one for each time it is started, raised after one trial
        self.starts = 0

    def __call__(self, study: Study, folder: StudyFolder, searcher: Any, listener: Any) -> None:
        self.starts += 1
        for number in range(searcher.remaining):
            suggestion = searcher.suggest(str(number))
            if suggestion == "FINISHED":
                return
            if number and self.faults:
                raise self.faults.pop(0)
            record = folder.read_trial(suggestion["trial"])
            for report in train(record.config, load_dataset(record.config.data), folder.run(record.name)):
                listener.progressed(record.name, report.metrics)
            searcher.on_trial_complete(str(number))


def in_place_of_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inline]:
    """Puts it there, and no judge behind it."""
    monkeypatch.setattr("tune.choice.judge", no_judge)

    def place(*faults: BaseException) -> Inline:
        made = Inline(*faults)
        monkeypatch.setattr(cluster, "run_on_ray", made)
        return made

    return place


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inline]:
    """A loop in this process in Ray's place."""
    return in_place_of_ray(monkeypatch)


@pytest.fixture
def signals() -> Iterator[None]:
    """Leaves the handlers of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_crash_of_ray_is_taken_up_again(root: Path, inline: Callable[..., Inline]) -> None:
    ray_place = inline(Crashed("out of memory"))
    outcome = run_study(load_study(write_study(root, "crashed", steps=4, points=1, trials=2)))
    assert (outcome.finished, ray_place.starts) == (True, 2)
    assert set(states(outcome.folder).values()) == {"completed"}


def test_a_study_of_several_objectives_and_seeds_ends_with_its_front(
    root: Path,
    inline: Callable[..., Inline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inline()
    algorithm = {"kind": "optuna", "trials": 2, "seeds_per_configuration": 2}
    objectives = ["accuracy_logreg", "fid"]
    path = write_study(root, "front", steps=4, points=1, algorithm=algorithm, objectives=objectives)
    outcome = run_study(load_study(path))
    document = summarise(outcome, load_study(path))
    assert len(document["trials"]) == 6
    assert document["runs"][0]["label"] == "control (2 seeds)"
    assert outcome.record.objectives == tuple(objectives)
    best = document["runs"][-1]
    told = [outcome.folder.reports(name)[-1].metrics["accuracy_logreg"] for name in best["trials"]]
    assert best["validation"]["accuracy_logreg"] == pytest.approx(sum(told) / 2)
    assert document["front"][0]["metrics"]["accuracy_logreg"] == best["validation"]["accuracy_logreg"]
    print_summary(document)
    assert "Pareto front" in capsys.readouterr().out


def test_when_ray_keeps_crashing_the_sweep_fails_and_says_how_to_go_on(
    root: Path,
    inline: Callable[..., Inline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray_place = inline(*[Crashed("out of memory")] * 9)
    path = write_study(root, "crashing", steps=4, points=1, trials=8)
    code, _, err = sweep(path, monkeypatch, capsys)
    assert (code, ray_place.starts) == (1, 3)
    assert "3 of 9 trials have ended; run the same command again to go on" in err.splitlines()[-1]
    assert study_status(folder_of(path)) == "KILLED"


def test_a_study_stopped_between_two_trials_is_not_finished(
    root: Path,
    inline: Callable[..., Inline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All trials were decided, none is judged, and the study run does not look complete."""
    inline(Interrupted())
    path = write_study(root, "stopped", steps=4, points=1, trials=1)
    code, _, err = sweep(path, monkeypatch, capsys)
    folder = folder_of(path)
    assert code == 130
    assert "stopped: 1 of 2 trials have ended" in err.splitlines()[-1]
    assert study_status(folder) == "KILLED"
    assert statuses(folder) == {"baseline-control": "FINISHED", "trial-0001": "KILLED"}
    assert not folder.test_metrics("baseline-control")


def test_a_bug_leaves_nothing_running_in_mlflow_and_is_on_record(root: Path, inline: Callable[..., Inline]) -> None:
    inline(ValueError("a bug"))
    path = write_study(root, "fault", steps=4, points=1, trials=1)
    with pytest.raises(ValueError, match="a bug"):
        run_study(load_study(path))
    outcome = folder_of(path).outcome()
    assert outcome and "an error: a bug" in outcome.problem
    assert_killed(path)


def test_a_driver_that_was_replaced_writes_nothing_more_about_the_study(
    root: Path, monkeypatch: pytest.MonkeyPatch, inline: Callable[..., Inline]
) -> None:
    """Its machine was cut off, the same command was run on another, and it comes back."""
    path = write_study(root, "replaced", steps=4, points=1, trials=1)
    study, folder, one_by_one = load_study(path), folder_of(path), inline()

    def taken_over(study: Study, folder: StudyFolder, searcher: Any, listener: Any) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: "another machine")
        plan = check_study(study, None)
        with StudyAccounts.open(folder.ledger, plan.terms, witness=folder.witness()):
            folder.write_statement({"by": "the other driver"})
            one_by_one(study, folder, searcher, listener)

    monkeypatch.setattr(cluster, "run_on_ray", taken_over)
    outcome = run_study(study)
    assert not outcome.finished
    assert outcome.problem == "another sweep, on another machine, has taken the study over"
    assert folder.statement() == {"by": "the other driver"}
    assert folder.outcome() is None
    assert set(states(folder).values()) <= {None}


def test_ctrl_c_outside_of_the_trials_stops_the_study_too(root: Path, inline: Callable[..., Inline]) -> None:
    """While Ray starts, or while the best are judged."""
    inline(KeyboardInterrupt())
    path = write_study(root, "stopped-early", steps=4, points=1, trials=1)
    outcome = run_study(load_study(path))
    assert (outcome.interrupted, outcome.finished, outcome.problem) == (True, False, "stopped")
    assert_killed(path)


def assert_killed(path: Path) -> None:
    assert study_status(folder_of(path)) == "KILLED"
    assert statuses(folder_of(path)) == {"baseline-control": "FINISHED", "trial-0001": "KILLED"}


def test_the_ledger_ends_a_study_and_the_summary_says_so(
    root: Path, inline: Callable[..., Inline], capsys: pytest.CaptureFixture[str]
) -> None:
    inline()
    path = write_study(root, "bounded", steps=4, points=1, trials=6, ledger={"study_epsilon": 0.3})
    study = without_control(path)
    outcome = run_study(study)
    print_summary(summarise(outcome, study))
    assert outcome.finished
    assert 1 <= len(states(outcome.folder)) < 6
    assert outcome.statement["spent"] <= 0.3
    assert "ended early: " in capsys.readouterr().out
    assert study_status(outcome.folder) == "FINISHED"


def noisy_trial(steps: int, score_noise: float) -> dict[str, Any]:
    """A small trial that is scored by private validation images."""
    return {
        "data": {"name": "digits", "validation": "private"},
        "generator": {"latent_dim": 4, "hidden_dim": 4, "embed_dim": 4},
        "sinkhorn": {"cost": "l2", "gen_batch_size": 10},
        "privacy": {
            "noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": steps, "score_noise": score_noise,
        },
        "evaluation": {"points": 2, "samples": 100, "classifiers": ["logreg"]},
    }  # fmt: skip


def test_a_study_on_private_validation_images_costs_the_larger_of_its_accounts(
    root: Path, inline: Callable[..., Inline]
) -> None:
    inline()
    trial = noisy_trial(steps=4, score_noise=5)
    outcome = run_study(without_control(write_study(root, "noisy", trials=3, trial=trial)))
    training = planned_epsilon([TrialCost(100 / 1437, 3.0, 4)] * 3, 5e-5, adaptive=False)
    scores = planned_epsilon([TrialCost(1.0, 5.0, 2)] * 3, 5e-5, adaptive=False)
    assert outcome.statement["study_epsilon"] == scores == outcome.statement["spent"]
    assert (training or 0) < (scores or 0)
    assert outcome.best and set(outcome.folder.reports(outcome.best.name)[-1].metrics) == {"accuracy_logreg"}


def test_scores_on_private_validation_images_end_a_study(root: Path, inline: Callable[..., Inline]) -> None:
    """The training of all six would fit."""
    inline()
    trial = noisy_trial(steps=4, score_noise=5)
    path = write_study(root, "loud", trials=6, trial=trial, ledger={"study_epsilon": 1.8})
    outcome = run_study(without_control(path))
    assert outcome.finished and outcome.ended_early
    assert 1 <= len(states(outcome.folder)) < 6
    assert outcome.statement["spent"] <= 1.8


def test_a_sweep_ends_with_the_whole_statement(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline()
    path = write_study(root, "stated", steps=4, points=1, trials=1, baselines={})
    _, out, _ = sweep(path, monkeypatch, capsys)
    assert PrivacyStatement.from_dict(folder_of(path).statement()).text() in out


def test_a_study_without_privacy_says_so_at_its_end(
    root: Path, inline: Callable[..., Inline], capsys: pytest.CaptureFixture[str]
) -> None:
    inline()
    trial = {
        "generator": {"latent_dim": 4, "hidden_dim": 4, "embed_dim": 4},
        "sinkhorn": {"cost": "l2", "gen_batch_size": 10},
        "privacy": {"target_epsilon": float("inf"), "noise_multiplier": 0, "steps": 4, "batch_size": 100},
        "evaluation": {"points": 1, "samples": 100, "classifiers": ["logreg"]},
    }
    study = load_study(write_study(root, "free", trials=1, trial=trial, baselines={}))
    outcome = run_study(study)
    print_summary(summarise(outcome, study))
    assert "NON-PRIVATE" in capsys.readouterr().out
    assert outcome.statement["non_private"]


def test_a_study_whose_trials_all_failed_has_failed_and_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_all(study: Study, folder: StudyFolder, searcher: Any, listener: Any) -> None:
        for number in range(searcher.remaining):
            name = searcher.suggest(str(number))["trial"]
            searcher.on_trial_complete(str(number), error=True)
            listener.failed(name, "the disk is full")

    monkeypatch.setattr(cluster, "run_on_ray", fail_all)
    path = write_study(root, "failing", steps=4, points=1, trials=1)
    code, out, err = sweep(path, monkeypatch, capsys)
    assert code == 1
    assert "failed: trial-0001: the disk is full" in out
    assert "no searched trial completed" in err.splitlines()[-1]
    assert statuses(folder_of(path)) == {"baseline-control": "FAILED", "trial-0001": "FAILED"}


@pytest.mark.parametrize("error", [TuneError("x\ny: the reason"), RaySystemError("y: the reason")])
def test_an_error_of_ray_is_a_crash_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path, signals: None
) -> None:
    class Falling:
        def fit(self) -> None:
            raise error

    monkeypatch.setattr(cluster, "_start", lambda _: 1)
    monkeypatch.setattr(cluster, "_tuner", lambda *_: Falling())
    anything: Any = None
    with pytest.raises(Crashed, match=r"^[^\n]*y: the reason$"):
        cluster.run_on_ray(Study(name="any"), StudyFolder(tmp_path), anything, anything)


def test_a_trial_that_needs_more_than_the_machine_has_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would wait for ever."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    path = write_study(root, "greedy", resources={"cpu": 64})
    code, out, err = sweep(path, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "resources.cpu=64 must be at most the 2 CPUs of a node" in err
    assert study_status(folder_of(path)) == "KILLED"


def test_a_tracking_uri_that_does_not_answer_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, "lost", tracking={"uri": "http://127.0.0.1:9"}, storage=str(tmp_path / "new"))
    assert "tracking URI http://127.0.0.1:9 does not answer" in refused(path, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_storage_that_is_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    path = write_study(tmp_path, "blocked", storage=str(tmp_path / "file"))
    assert "cannot be written" in refused(path, monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bound_that_no_trial_fits_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, "tight", ledger={"study_epsilon": 1e-6}, storage=str(tmp_path / "new"))
    assert "study_epsilon" in refused(path, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_a_study_that_another_process_runs_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(root, "busy")
    with only_one(folder_of(path)):
        message = refused(path, monkeypatch, capsys)
    assert f"already being run by process {os.getpid()}" in message
    assert not folder_of(path).exists
