"""Many trials in one process: leases, what a client that dies leaves behind, and whole studies on shared engines.

The engine itself is tested in this process; what needs Ray shares one cluster with a GPU that is only said to be there.
"""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray import tune

from dpsink.config import DataConfig, TrialConfig, load_config
from dpsink.data import load_dataset
from dpsink.privacy.budget import charged_steps
from dpsink.privacy.storage import InUse
from dpsink.records import latest_checkpoint, read_state
from tests.test_sweep import Command, folder_of, wait_for, write_study
from tune import cluster, schema
from tune.cluster import TooLarge
from tune.folder import StudyFolder
from tune.own_ray import leave_ray
from tune.packing import GpuEngine, LeaseLost, LeaseRanOut, News, Packing, closing_engines, run_packed
from tune.search import make_record
from tune.study import Resources, Study, load_study
from tune.sweep import run_study
from tune.versions import deciding_versions
from tune.wire import unpacked

SLOW = pytest.mark.slow
PATIENCE = 120  # seconds after which something that should happen has not
SMALL = [
    "generator={latent_dim: 4, hidden_dim: 4, embed_dim: 4}", "sinkhorn.gen_batch_size=10", "sinkhorn.cost=l2",
    "privacy.noise_multiplier=3", "privacy.delta=5e-5", "privacy.batch_size=100", "privacy.step_limit=6",
    "evaluation.points=2", "evaluation.samples=40", "evaluation.classifiers=[logreg]",
]  # fmt: skip
LONG = "privacy.step_limit=100000"
OTHER = "generator.hidden_dim=8"  # of another structure
NOWHERE = "/nowhere"  # where digits need no files


def small(*overrides: str) -> TrialConfig:
    return load_config(None, [*SMALL, *overrides])


def study_of(path: Path, **trials: Sequence[str]) -> StudyFolder:
    """A folder with trials to run: name to what is special about each."""
    folder = StudyFolder(path)
    for name, overrides in trials.items():
        folder.add_trial(make_record(name, schema.ROLE_SEARCH, small(*overrides), 1437, {}, None))
    return folder


def charged(folder: StudyFolder, name: str) -> int:
    return charged_steps(folder.run(name) / "ledger")


def steps_on(folder: StudyFolder, name: str) -> list[int]:
    return [report.step for report in folder.reports(name)]


def saved_step(folder: StudyFolder, name: str) -> int:
    checkpoint = latest_checkpoint(folder.run(name))
    return read_state(checkpoint).step if checkpoint else 0


def attempts(folder: StudyFolder, name: str) -> int:
    """How often a trial was opened."""
    return len(list((folder.run(name) / "ledger").glob("[0-9][0-9][0-9][0-9][0-9][0-9].json")))


def reservations(folder: StudyFolder, name: str) -> int:
    return len(list((folder.run(name) / "ledger").glob("*-*-*.json")))


def has_reserved(folder: StudyFolder, name: str) -> bool:
    return reservations(folder, name) > 0


# The engine, in this process.


class Engine(GpuEngine):
    """An engine without an actor around it: to die is to end its thread."""

    def __init__(self, folder: StudyFolder, slots: int = 2, **times: Any) -> None:
        self.died = threading.Event()
        fingerprint = times.pop("fingerprint", None) or load_dataset(DataConfig()).fingerprint
        super().__init__(Packing("here", slots, **times), str(folder.path), NOWHERE, fingerprint)

    def _die(self) -> None:
        self.died.set()


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Makes engines, which end with the test."""
    made: list[Engine] = []

    def make(folder: StudyFolder, **settings: Any) -> Engine:
        made.append(Engine(folder, **settings))
        return made[-1]

    yield make
    for engine in made:
        if not engine.died.is_set():
            engine.close()


def ask(engine: Engine, name: str, token: str, told: int = 0) -> News:
    """The next news, which the engine has to have within a while."""
    return wait_for(lambda: engine.poll(name, token, told), f"news of {name}")


def follow(engine: Engine, name: str) -> list[dict[str, Any]]:
    """A client's whole life: all reports."""
    token, heard = engine.join(name), []
    while not heard or heard[-1]["status"] == "running":
        heard.append(ask(engine, name, token, heard[-1]["step"] if heard else 0).values)
    engine.leave(name, token)
    return heard


def test_other_data_on_a_node_fail_its_trial_before_a_step_is_charged(
    start: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = study_of(tmp_path, one=())
    engine = start(folder, fingerprint="hmac:of-other-data")
    news = ask(engine, "one", engine.join("one"))
    assert (news.ended, news.kind) == (True, "UnfitNode")
    assert "are not those of the study here" in news.error
    assert not (folder.run("one") / "ledger").exists()


def together(engine: Engine, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The lives of several clients at the same time."""
    heard: dict[str, list[dict[str, Any]]] = {}
    threads = [threading.Thread(target=lambda name=name: heard.update({name: follow(engine, name)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return heard


def test_more_trials_than_slots_all_end_with_every_report_once_and_in_order(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[], b=["seed=1"], c=[OTHER], d=["optimizer.lr=1e-2"])
    heard = together(start(folder), list("abcd"))
    assert sorted(heard) == list("abcd")
    assert all([report["step"] for report in told] == [3, 6] for told in heard.values())
    assert [charged(folder, name) for name in "abcd"] == [6, 6, 6, 6]
    assert all(told[-1]["status"] == "completed" for told in heard.values())


def test_no_step_is_charged_before_the_report_has_found_its_answer(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[], b=[LONG])
    engine = start(folder)
    token = engine.join("a")
    engine.join("b")
    ask(engine, "a", token)
    before = reservations(folder, "b")
    wait_for(lambda: reservations(folder, "b") > before + 2, "its neighbour to go on")
    assert charged(folder, "a") == 3
    assert ask(engine, "a", token, 3).values["step"] == 6


def test_trial_that_is_left_pays_for_what_it_ran_and_is_saved(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[LONG])
    engine = start(folder)
    token = engine.join("a")
    wait_for(lambda: has_reserved(folder, "a") and charged(folder, "a") > 5, "some steps")
    engine.leave("a", token)
    assert charged(folder, "a") == saved_step(folder, "a") > 0


def test_lease_that_runs_out_stops_its_trial_cleanly_and_no_other(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, dead=[LONG], alive=[LONG])
    engine = start(folder, lease_seconds=3.0)
    old, token = engine.join("dead"), engine.join("alive")
    wait_for(lambda: engine.poll("alive", token) or saved_step(folder, "dead"), "the dead client's trial to be stopped")
    assert charged(folder, "dead") == saved_step(folder, "dead")
    with pytest.raises(LeaseRanOut):
        engine.poll("dead", old)
    before = charged(folder, "alive")
    wait_for(lambda: engine.poll("alive", token) or charged(folder, "alive") > before, "the other to go on")


def test_lease_is_kept_by_asking(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[LONG])
    engine = start(folder, lease_seconds=2.0)
    token, begun = engine.join("a"), time.monotonic()
    while time.monotonic() - begun < 5:
        engine.poll("a", token)
    assert attempts(folder, "a") == 1


def test_trial_that_another_engine_has_is_in_use_until_that_one_leaves_it(tmp_path: Path, start: Any) -> None:
    """One that an earlier driver left behind, on another GPU of the same machine."""
    folder = study_of(tmp_path, a=[LONG])
    old, new = start(folder), start(folder)
    first, second = old.join("a"), new.join("a")
    wait_for(lambda: has_reserved(folder, "a"), "some steps")
    with pytest.raises(InUse):
        ask(new, "a", second).raise_error()
    new.leave("a", second)
    old.leave("a", first)
    begun, token = saved_step(folder, "a"), new.join("a")
    wait_for(lambda: charged(folder, "a") > begun, "the other to go on")
    new.leave("a", token)


@pytest.mark.parametrize("lease_seconds", [9.0, 0.0])
def test_client_waits_for_a_trial_that_is_in_use_as_long_as_a_lease_may_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lease_seconds: float
) -> None:
    answers = iter([InUse("in use")] * 12 + [None])

    def run(_: Any) -> None:
        if answer := next(answers):
            raise answer

    monkeypatch.setattr("tune.packing._Client.run", run)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    given_up = pytest.raises(InUse) if lease_seconds < 7 else nullcontext()
    with given_up:
        run_packed(
            {"trial": "a", "folder": str(tmp_path), "versions": deciding_versions()},
            Packing("any", 2, lease_seconds=lease_seconds),
        )


def test_second_client_takes_the_lease_over_and_hears_what_the_first_has_not_answered(
    tmp_path: Path, start: Any
) -> None:
    folder = study_of(tmp_path, a=[])
    engine = start(folder)
    old = engine.join("a")
    first = ask(engine, "a", old)
    new = engine.join("a")
    with pytest.raises(LeaseLost):
        engine.poll("a", old, 3)
    engine.leave("a", old)  # says nothing any more
    assert ask(engine, "a", new) == first
    assert ask(engine, "a", new, 3).values["step"] == 6
    assert (attempts(folder, "a"), charged(folder, "a")) == (1, 6)


def test_new_engine_tells_what_the_old_one_had_no_time_to_tell(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=["evaluation.points=3"])
    old = start(folder)
    token = old.join("a")
    ask(old, "a", token)
    ask(old, "a", token, 2)
    old.close()
    new = start(folder)
    token = new.join("a", 2)
    assert [ask(new, "a", token, told).values["step"] for told in (2, 4)] == [4, 6]


def test_trial_that_had_ended_tells_its_last_report_to_who_asks_again(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[])
    engine = start(folder)
    last = follow(engine, "a")[-1]
    assert follow(engine, "a") == [last]
    assert charged(folder, "a") == 6


def test_trial_that_fails_tells_its_own_client_only(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, good=[], bad=["seed=1"])
    folder.run("bad").mkdir(parents=True)
    (folder.run("bad") / "config.yaml").write_text("another trial")
    engine = start(folder)
    token = engine.join("bad")
    assert follow(engine, "good")[-1]["status"] == "completed"
    news = ask(engine, "bad", token)
    assert (news.kind, news.ended) == ("InputError", True)
    assert "holds another trial" in news.error


def test_full_disk_under_one_trial_leaves_the_others(tmp_path: Path, start: Any, monkeypatch: Any) -> None:
    from dpsink import training

    save = training.save_checkpoint

    def full(folder: Path, *rest: Any) -> Path:
        if "bad" in str(folder):
            raise OSError(28, "No space left on device")
        return save(folder, *rest)

    monkeypatch.setattr(training, "save_checkpoint", full)
    folder = study_of(tmp_path, good=[], bad=["seed=1"])
    engine = start(folder)
    token = engine.join("bad")
    assert follow(engine, "good")[-1]["status"] == "completed"
    with pytest.raises(RuntimeError, match=r"OSError.*No space left"):
        ask(engine, "bad", token).raise_error()
    engine.leave("bad", token)
    monkeypatch.setattr(training, "save_checkpoint", save)
    assert follow(engine, "bad")[-1]["charged"] == 6


def test_closed_engine_stops_its_trials_and_takes_no_other(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[LONG], b=[LONG])
    engine = start(folder)
    token = engine.join("a")
    engine.join("b")
    wait_for(lambda: all(has_reserved(folder, name) for name in "ab"), "some steps")
    engine.close()
    assert [charged(folder, name) for name in "ab"] == [saved_step(folder, name) for name in "ab"]
    for call in (partial(engine.join, "a"), partial(engine.poll, "a", token)):
        with pytest.raises(LeaseLost, match="closed"):
            call()


def test_engine_is_not_closed_before_a_client_that_left_first_has_its_trial_stopped(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpsink import training

    save = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda *rest: (time.sleep(1), save(*rest))[1])
    folder = study_of(tmp_path, a=[LONG])
    engine = start(folder)
    token = engine.join("a")
    wait_for(lambda: has_reserved(folder, "a"), "some steps")
    client = threading.Thread(target=engine.leave, args=("a", token))
    client.start()
    wait_for(lambda: not engine._leases, "the client to leave")
    engine.close()
    assert charged(folder, "a") == saved_step(folder, "a") > 0
    client.join()


def test_engine_without_a_lease_ends_itself_and_one_with_a_lease_does_not(tmp_path: Path, start: Any) -> None:
    folder = study_of(tmp_path, a=[LONG])
    engine = start(folder, idle_seconds=0.5)
    token = engine.join("a")
    time.sleep(1.5)
    assert not engine.died.is_set()
    engine.leave("a", token)
    assert engine.died.wait(10)


def test_engine_that_evaluates_for_long_is_not_idle(tmp_path: Path, start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("dpsink.training.evaluate", lambda *_, **__: time.sleep(1) or {})
    engine = start(study_of(tmp_path, a=[]), idle_seconds=0.3)
    assert follow(engine, "a")[-1]["status"] == "completed"


# What a study may ask for.


@pytest.mark.parametrize(
    ("resources", "node", "fitting"),
    [
        ({}, (4, 0), 4),
        ({"cpu": 2}, (5, 0), 2),
        ({"slots": 3}, (8, 0), 3),
        ({"gpu": 0.0625, "cpu": 0.5}, (64, 2), 32),
        ({"gpu": 0.0625}, (8, 1), 8),
        ({"gpu": 0.3}, (8, 1), 3),
        ({"gpu": 1 / 3}, (8, 1), 3),
        ({"gpu": 2}, (8, 3), 1),
        ({"gpu": 1}, (8, 0), 0),
    ],
)
def test_as_many_trials_run_as_find_cpus_and_gpus(
    resources: dict[str, float], node: tuple[int, int], fitting: int
) -> None:
    assert Resources.model_validate(resources).fit_in(*node) == fitting


@pytest.mark.parametrize(
    ("resources", "sharing", "device"),
    [({}, 1, "cpu"), ({"slots": 4}, 4, "cpu"), ({"gpu": 0.0625}, 16, "cuda"), ({"gpu": 0.25, "slots": 2}, 2, "cuda"),
     ({"gpu": 0.5, "slots": 1}, 1, "cuda"), ({"gpu": 1}, 1, "cuda"), ({"gpu": 2}, 1, "cuda")],
)  # fmt: skip
def test_parts_of_a_gpu_are_shared_and_whole_ones_are_not(
    resources: dict[str, float], sharing: int, device: str
) -> None:
    given = Resources.model_validate(resources)
    assert (given.sharing, given.device) == (sharing, device)


@pytest.mark.parametrize(("resources", "rule"), [({"gpu": 1.5}, "whole number"), ({"gpu": 0.5, "slots": 3}, "0.3333")])
def test_gpus_that_cannot_be_had_so_are_refused(resources: dict[str, float], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Resources.model_validate(resources)


@pytest.mark.parametrize(("resources", "there"), [({"gpu": 0.5}, "the 0 GPUs"), ({"cpu": 3}, "the 2 CPUs")])
def test_study_that_asks_for_what_no_node_has_is_refused(
    resources: dict[str, float], there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    with pytest.raises(TooLarge, match=there):
        cluster._start(Study.model_validate({"name": "greedy", "resources": resources}))


# Through Ray, which is told of a GPU that is not there; the engine's own device is the CPU.


@pytest.fixture(scope="module")
def cluster_address() -> Iterator[str]:
    context: Any = ray.init(
        address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=40
    )
    yield context.address_info["gcs_address"]
    leave_ray()


def engines_of(packing: Packing) -> list[str]:
    """Names of the study's engines that are there."""
    there: Any = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in there if one["name"].startswith(packing.prefix)]


def process_of(folder: StudyFolder, name: str) -> int:
    """The process that has a trial open, which its ledger's lock names."""
    return int(next((folder.run(name) / "ledger").glob("lock-*")).read_text().split()[0])


def noted(folder: StudyFolder, name: str, what: str) -> str:
    path = folder.trial(name) / what
    return path.read_text() if path.exists() else ""


@dataclass
class Heard:
    """What Tune heard of a trial: its reports in their order, and why it failed."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    error: Any = None

    @property
    def steps(self) -> list[int]:
        return [report["step"] for report in self.reports]


class Ear(tune.Callback):
    """Takes down what Tune hears."""

    def __init__(self) -> None:
        self.heard: dict[str, Heard] = defaultdict(Heard)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
        self.heard[trial.config["trial"]].reports.append(unpacked(result))


def fit(
    folder: StudyFolder, packing: Packing, *, failures: int = 2, callbacks: Sequence[tune.Callback] = (), **run: Any
) -> dict[str, Heard]:
    """All trials of a folder on one GPU, through Tune; each client leaves a note of its process and of torch in it."""
    ear = Ear()

    def client(config: dict[str, Any]) -> None:  # pickled by value: a worker need not import this module
        place = Path(config["folder"]) / "trials" / config["trial"]
        with (place / "clients").open("a") as file:
            print(os.getpid(), file=file)
        try:
            run_packed(config, packing)
        finally:
            (place / "torch").write_text(str([name for name in sys.modules if name.startswith("torch")]))

    names = [record.name for record in folder.trials()]
    fingerprint = load_dataset(DataConfig()).fingerprint
    given = {
        "folder": str(folder.path), "data_root": NOWHERE, "fingerprint": fingerprint, "versions": deciding_versions()
    }  # fmt: skip
    tuner = tune.Tuner(
        tune.with_resources(client, {"cpu": 1, "gpu": 1 / 4}),
        param_space=given | {"trial": tune.grid_search(names)},
        tune_config=tune.TuneConfig(max_concurrent_trials=4, reuse_actors=True),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(folder.path), verbose=0, failure_config=tune.FailureConfig(failures),
            callbacks=[ear, *callbacks], **run,
        ),
    )  # fmt: skip
    with closing_engines(packing):
        for result in tuner.fit():
            assert result.config
            ear.heard[result.config["trial"]].error = result.error
    return ear.heard


@pytest.fixture(scope="module")
def packed(cluster_address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, dict[str, Heard], Any]:
    """Three trials on one GPU in two slots, one of them of another structure, one that fails; undisturbed."""
    folder = study_of(tmp_path_factory.mktemp("packed"), a=[], b=["seed=1"], c=[OTHER], bad=["seed=2"])
    folder.run("bad").mkdir(parents=True)
    (folder.run("bad") / "config.yaml").write_text("another trial")
    packing = Packing("packed", 2)
    return folder, fit(folder, packing, failures=0), packing


@SLOW
def test_trials_on_one_gpu_share_a_process_and_are_all_completed_once(packed: Any) -> None:
    folder, results, _ = packed
    assert len({process_of(folder, name) for name in "abc"}) == 1
    assert [attempts(folder, name) for name in "abc"] == [1, 1, 1]
    assert [results[name].reports[-1]["status"] for name in "abc"] == ["completed"] * 3
    assert [charged(folder, name) for name in "abc"] == [6, 6, 6]


@SLOW
def test_tune_hears_every_report_once_and_in_order(packed: Any) -> None:
    for name in "abc":
        heard = packed[1][name]
        assert heard.steps == [3, 6]
        assert [told["epsilon"] for told in heard.reports] == [told.epsilon for told in packed[0].reports(name)]


@SLOW
def test_client_never_imports_torch(packed: Any) -> None:
    assert [noted(packed[0], name, "torch") for name in ("a", "b", "c", "bad")] == ["[]"] * 4


@SLOW
def test_failure_of_one_trial_shows_as_in_a_process_of_its_own(packed: Any) -> None:
    assert "InputError" in str(packed[1]["bad"].error)
    assert "holds another trial" in str(packed[1]["bad"].error).splitlines()[-1]


@SLOW
def test_engines_are_gone_with_their_study(packed: Any) -> None:
    assert engines_of(packed[2]) == []


class Busy(tune.Callback):
    """A driver that is busy elsewhere for a while, when a trial reports for the first time."""

    def __init__(self, trial: str, seconds: float) -> None:
        self.trial, self.seconds = trial, seconds

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
        if trial.config["trial"] == self.trial:
            time.sleep(self.seconds)
            self.seconds = 0.0


@pytest.fixture(scope="module")
def unhurried(cluster_address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, dict[str, Heard]]:
    """A trial whose report is heard too late to keep its lease, and one that is stopped at its first report."""
    folder = study_of(tmp_path_factory.mktemp("unhurried"), late=[], stopped=["seed=1"])
    packing = Packing("unhurried", 2, lease_seconds=3.0)

    def stop(_: str, result: dict[str, Any]) -> bool:
        return result["config"]["trial"] == "stopped"

    return folder, fit(folder, packing, failures=0, stop=stop, callbacks=[Busy("late", 8.0)])


@SLOW
def test_trial_that_a_scheduler_stops_pays_for_no_step_after_its_report(unhurried: Any) -> None:
    assert (charged(unhurried[0], "stopped"), steps_on(unhurried[0], "stopped")) == (3, [3])


@SLOW
def test_client_whose_lease_ran_out_meanwhile_joins_again_and_nothing_is_told_twice(unhurried: Any) -> None:
    folder, results = unhurried
    assert attempts(folder, "late") == 2
    assert (charged(folder, "late"), results["late"].steps) == (6, [3, 6])


@SLOW
def test_killed_client_is_replaced_and_a_killed_engine_too_and_nothing_is_lost(
    cluster_address: str, tmp_path: Path
) -> None:
    """A client is killed within its lease: the next one takes the trial over as it runs. Then the engine is killed:
    both trials go on from their checkpoints, and pay for the steps that they take again."""
    names, steps = ("a", "b"), "privacy.step_limit=300"
    folder = study_of(tmp_path, a=[steps, "evaluation.points=6"], b=[steps, "evaluation.points=6", "seed=1"])
    before: dict[str, Any] = {}

    def storm() -> None:
        wait_for(lambda: steps_on(folder, "a"), "a report")
        os.kill(int(noted(folder, "a", "clients").split()[0]), signal.SIGKILL)
        wait_for(lambda: len(noted(folder, "a", "clients").split()) > 1, "another client")
        wait_for(lambda: all(len(steps_on(folder, name)) > 1 for name in names), "two reports")
        before.update(opened=attempts(folder, "a"), engine=process_of(folder, "a"))
        os.kill(before["engine"], signal.SIGKILL)

    threading.Thread(target=storm, daemon=True).start()
    results = fit(folder, Packing("storm", 2))
    assert before["opened"] == 1
    assert [results[name].reports[-1]["status"] for name in names] == ["completed"] * 2
    assert process_of(folder, "a") != before["engine"]
    assert [charged(folder, name) for name in names] == [300, 300]
    told = {name: results[name].steps for name in names}
    for name in names:
        # A killed engine may have had a durable report that it had not told; the one that a killed client had in hand
        # may come a second time, since nobody can know whether Tune had it.
        assert told[name] == sorted(told[name]) and len(told[name]) <= len(set(told[name])) + 1
        assert (
            set(told[name]) <= set(steps_on(folder, name)) and len(set(steps_on(folder, name)) - set(told[name])) <= 1
        )
        assert steps_on(folder, name) == sorted(set(steps_on(folder, name)))


DRIVER = """
    import sys
    from pathlib import Path
    import ray
    from tests.test_packing import fit
    from tune.folder import StudyFolder
    from tune.packing import Packing
    ray.init(address=sys.argv[1], log_to_driver=False)
    fit(StudyFolder(Path(sys.argv[2])), Packing("orphan", 2, lease_seconds=2, idle_seconds=2))
"""


@SLOW
def test_engine_of_a_killed_driver_stops_its_trials_cleanly_and_ends(cluster_address: str, tmp_path: Path) -> None:
    folder = study_of(tmp_path, a=[LONG, "evaluation.points=1"])
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), cluster_address, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            wait_for(lambda: has_reserved(folder, "a") and charged(folder, "a") > 20, "some steps")
        finally:
            driver.kill()
    wait_for(lambda: not engines_of(Packing("orphan", 2)), "the engine to end")
    assert charged(folder, "a") == saved_step(folder, "a") > 20


@SLOW
def test_study_whose_trials_share_a_process_is_a_study_like_any_other(
    cluster_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {
        "name": "whole",
        "trial": yaml.safe_load(yaml.safe_dump(small().model_dump(mode="json"))),
        "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
        "algorithm": {"trials": 3},
        "objectives": ["accuracy_logreg"],
        "test_samples": 100,
        "resources": {"slots": 2},
        "storage": str(tmp_path),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the cluster is shared
    outcome = run_study(load_study(tmp_path / "study.yaml"))
    names = [record.name for record in outcome.folder.trials()]
    assert (outcome.finished, len(names)) == (True, 4)  # and the control
    assert [charged(outcome.folder, name) for name in names] == [1, 6, 6, 6]
    assert len({process_of(outcome.folder, name) for name in names}) == 1
    assert engines_of(Packing(outcome.record.study_id, 2)) == []


@SLOW
@pytest.mark.alone  # a stop has seconds for what it saves: a machine that is busy elsewhere may not have the time
def test_ctrl_c_stops_trials_that_share_a_process_soon_and_costs_them_no_step(tmp_path: Path) -> None:
    resources = {"slots": 2, "concurrency": 2}
    path = write_study(tmp_path, "shared", steps=100_000, points=1, baselines={}, resources=resources)
    folder, names = folder_of(path), ("trial-0001", "trial-0002")
    with Command(path) as command:
        wait_for(lambda: all(has_reserved(folder, name) and charged(folder, name) > 20 for name in names), "some steps")
        command.look()
        started = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        command.process.wait(PATIENCE)
        seconds, left = time.monotonic() - started, command.left()
    assert (command.process.returncode, left) == (130, [])
    assert seconds < 10
    assert all(charged(folder, name) == saved_step(folder, name) > 20 for name in names)
