"""On a cluster nodes come and go: how many trials run at a time, what a lost node costs, what `check` says of nodes."""

import errno
import gc
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.tune.experiment import Trial

from dpsink.config import DataConfig, TrialConfig
from dpsink.data import ImageData, load_dataset
from dpsink.errors import InputError
from dpsink.privacy.storage import FencedError
from dpsink.training import Ensemble, TrialRun
from tests.test_tracking import Fake, make_study
from tune import cluster
from tune.check import Preflight
from tune.cluster import NODE_LOSSES, Interrupted, TooLarge, _Following, _is_memory, _Limited, _Relay, run_on_ray
from tune.fitness import UnfitNode
from tune.folder import StudyFolder
from tune.nodes import Node
from tune.own_ray import leave_ray
from tune.room import Blocked
from tune.search import StudySearcher
from tune.study import Resources, Study
from tune.trainable import run_trial
from tune.versions import deciding_versions
from tune.wire import packed

CPU, GPU = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The resources of the living nodes, to be changed."""
    there: list[dict[str, float]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in there])
    return there


class Proposing(StudySearcher):
    """Proposes without end."""

    def __init__(self) -> None:
        self._metric, self._mode = "accuracy", "max"

    def suggest(self, trial_id: str) -> Any:
        return {"trial": trial_id}


def asked(limiter: _Following, count: int) -> int:
    """How many of the next proposals are granted."""
    return sum(limiter.suggest(f"{len(limiter.live_trials)}") is not None for _ in range(count))


def test_concurrency_follows_the_cluster_up_and_down(
    nodes: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "LOOK_SECONDS", -1.0)
    limiter = _Following(Proposing(), Resources(cpu=2))
    assert asked(limiter, 10) == 1  # it waits, so that an autoscaler sees it
    nodes += [CPU, CPU]
    assert asked(limiter, 10) == 4
    nodes.clear()
    assert asked(limiter, 10) == 0


def test_study_on_a_cluster_without_room_is_refused_unless_it_says_how_far_that_may_grow(
    nodes: list[dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    nodes.append(CPU)
    wanting: dict[str, Any] = {"name": "any", "resources": {"gpu": 1}}
    with pytest.raises(TooLarge, match=r"gpu=1 must be at most the 0 GPUs.*resources\.concurrency"):
        cluster._start(Study.model_validate(wanting))
    wanting["resources"]["concurrency"] = 8
    assert cluster._start(Study.model_validate(wanting)) == 0
    assert "waits for the cluster to grow" in caplog.text


class Lost:
    """A trial of Ray's whose process ended with the given words."""

    def __init__(self, words: str, folder: Path) -> None:
        self.config, self.error_file = {"trial": "any"}, str(folder / "error.txt")
        Path(self.error_file).write_text(f"Failure # 1\n{words}\n")
        self.run_metadata = self
        self.num_failures = 1


class Silent:
    """A listener, and a searcher, that do nothing."""

    def recovered(self, name: str, error: str) -> None:
        pass

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        pass

    def waiting(self) -> None:
        pass

    def spared(self, name: str, error: str) -> None:
        pass

    def failed(self, name: str, error: str) -> None:
        pass

    def pause(self) -> None:
        pass


def relay_in(place: Path, should_stop: Callable[[], bool] = lambda: False) -> _Relay:
    silent: Any = Silent()
    return _Relay(silent, should_stop, StudyFolder(place), silent)


def test_node_that_lacks_what_all_trials_need_stops_the_study_and_fails_none(tmp_path: Path) -> None:
    """Else they would fail there one after the other, as fast as they start."""
    words = "tune.fitness.UnfitNode: node gpu-7: it has torch 2.0 instead of 2.14, which the study's driver has"
    with pytest.raises(Blocked, match=r"^node gpu-7: it has torch 2\.0"):
        relay_in(tmp_path).on_trial_error(0, [], Lost(words, tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "1.0"}}, "it has torch"),
        ({"fingerprint": "hmac:of-other-data"}, "are not those of the study"),
        ({"folder": "/nowhere/study"}, "/nowhere/study is not there; mount"),
    ],
)
def test_node_that_lacks_something_is_named_before_a_step_is_paid_for(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = make_study(tmp_path / "study", [Fake("one", state=None, epsilons=())], "")
    config = {
        "folder": str(folder.path), "trial": "one", "data_root": "/nowhere", "versions": deciding_versions(),
        "fingerprint": load_dataset(DataConfig()).fingerprint, "threads": 1,
    }  # fmt: skip
    with pytest.raises(UnfitNode, match=f"^node {socket.gethostname()}: .*{words}"):
        run_trial(config | change)
    assert not (folder.run("one") / "ledger").exists()


def test_node_without_its_gpu_is_named_before_a_step_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_study(tmp_path / "study", [Fake("one", state=None, epsilons=())], "")
    config = {"folder": str(folder.path), "trial": "one", "versions": deciding_versions(), "threads": 1}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnfitNode, match="device=cuda must be cpu, or one of the 0 CUDA devices"):
        run_trial(config, device="cuda")


class Tuner:
    """Tune with one trial that has ended, of which nobody has been told yet."""

    def __init__(self, limited: _Limited) -> None:
        self.limited = limited

    def fit(self) -> None:
        with suppress(Exception):  # as Tune does, which then calls the trial a failure
            self.limited.on_trial_complete("ray-1")


def test_error_of_ours_ends_the_session_and_is_no_failure_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(Proposing):
        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            raise FencedError("a newer attempt has opened the ledger")

    study, searcher, silent = Study.model_validate({"name": "any"}), Replaced(), Silent()
    limited = _Limited(searcher, max_concurrent=1)
    limited.live_trials.add("ray-1")
    monkeypatch.setattr(cluster, "_start", lambda _: 1)
    monkeypatch.setattr(cluster, "leave_ray", lambda: None)
    monkeypatch.setattr(cluster, "_tuner", lambda *_: Tuner(limited))
    with pytest.raises(FencedError):
        run_on_ray(study, StudyFolder(tmp_path), searcher, silent)  # pyright: ignore[reportArgumentType]


def test_full_disk_of_a_trial_is_told_without_the_words_of_its_process(tmp_path: Path) -> None:
    """Which name the trial: of a sealed study nobody may know how many there were."""
    words = f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}: 'sealed/trials/trial-0012/run'"
    relay, trial = relay_in(tmp_path), Lost(words, tmp_path)
    with pytest.raises(Blocked) as full:
        relay.on_trial_error(0, [], trial)
    assert "a disk is full" in str(full.value)
    assert "trial-0012" not in str(full.value)


@pytest.mark.parametrize(
    ("words", "counted"),
    [
        ("the actor's node was terminated: missed too many heartbeats", 0),
        ("The actor died because its node has died. Node Id: 1", 0),
        ("The actor 0 is unavailable: RPC error: Socket closed", 0),
        ("Worker exits with an exit code 1. The process receives a SIGTERM.", 0),
        ("Worker exit type: SYSTEM_ERROR: connection error code 2", 1),
    ],
)
def test_lost_node_is_no_failure_of_its_trial(words: str, counted: int, tmp_path: Path) -> None:
    relay, trial = relay_in(tmp_path), Lost(words, tmp_path)
    relay.on_trial_recover(0, [], trial)
    assert trial.num_failures == counted


def test_trial_that_takes_every_node_down_is_given_up_at_last(tmp_path: Path) -> None:
    relay, trial = relay_in(tmp_path), Lost("its node has died", tmp_path)
    for _ in range(NODE_LOSSES):
        trial.num_failures = 1
        relay.on_trial_recover(0, [], trial)
    trial.num_failures = 1
    relay.on_trial_recover(0, [], trial)
    assert trial.num_failures == 1


def test_loss_that_tune_has_forgiven_is_not_forgiven_twice(tmp_path: Path) -> None:
    relay, trial = relay_in(tmp_path), Lost("its node has died", tmp_path)
    trial.num_failures = 0
    relay.on_trial_recover(0, [], trial)
    assert trial.num_failures == 0


@pytest.mark.parametrize(
    ("words", "monitor"),
    [
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", False),
        ("RuntimeError: OutOfMemoryError: CUDA out of memory.", False),  # as an engine tells it
    ],
)
def test_full_gpu_is_a_failure_of_its_trial_and_no_want_of_memory_on_the_node(words: str, monitor: bool) -> None:
    assert _is_memory(words) == monitor


def test_trial_that_gets_on_between_two_crashes_is_not_given_up_for_both(tmp_path: Path) -> None:
    relay, trial = relay_in(tmp_path), Lost("connection error", tmp_path)
    relay.on_trial_result(0, [], trial, packed({"step": 10}))
    assert trial.num_failures == 0
    trial.num_failures = 1
    relay.on_trial_result(0, [], trial, packed({"step": 10}))  # told again, after the crash
    assert trial.num_failures == 1


class Running:
    status = Trial.RUNNING


def test_trials_that_run_are_told_to_stop_and_waited_for_a_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relay_in(tmp_path, lambda: True)
    relay.on_step_begin(0, [Running()])
    assert relay.folder.ordered_to_stop()
    monkeypatch.setattr(cluster.time, "monotonic", lambda: math.inf)
    with pytest.raises(Interrupted):
        relay.on_step_begin(0, [Running()])


def test_study_without_a_running_trial_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        relay_in(tmp_path, lambda: True).on_step_begin(0, [])


@pytest.mark.parametrize("event", ["start", "result", "complete", "recover", "error"])
def test_every_event_of_a_trial_is_followed_by_a_look_without_a_rest(tmp_path: Path, event: str) -> None:
    heard: list[str] = []
    relay, trial = relay_in(tmp_path), Lost("RuntimeError: it broke", tmp_path)
    relay._pace.hear = lambda: heard.append(event)
    told = {"result": packed({"step": 1})} if event == "result" else {}
    getattr(relay, f"on_trial_{event}")(0, [], trial, **told)
    assert heard == [event]


class Handle:
    """Stands for an actor's, which asks Ray to forget it when it is collected."""

    def __init__(self) -> None:
        self.itself = self  # so that only a collection finds it


def test_no_garbage_is_collected_while_ray_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    left = weakref.ref(Handle())
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append((gc.isenabled(), left() is None)))
    leave_ray()
    assert seen == [(False, True)]
    assert gc.isenabled()


def node(name: str, gpus: float, cuda: int) -> Node:
    return Node(name=name, versions={}, cpus=8, gpus=gpus, cuda=cuda, free_memory=2**33, fingerprint="")


def preflight(tmp_path: Path, found: list[Node], grows: bool = False, **resources: float) -> Preflight:
    study = Study.model_validate({"name": "any", "resources": resources, "storage": tmp_path})
    made = Preflight(study, tmp_path, address="auto" if grows else None)
    made._cluster = found
    return made


def test_check_finds_a_node_whose_gpu_has_no_driver(tmp_path: Path) -> None:
    found = [node("good", 1, 1), node("bare", 1, 0)]
    with pytest.raises(InputError, match="bare is said to have 1 GPUs, and PyTorch sees 0 there"):
        preflight(tmp_path, found, gpu=1)._gpus()
    assert preflight(tmp_path, found)._gpus() == "not asked for"


def test_check_names_nodes_that_no_trial_fits_on(tmp_path: Path) -> None:
    assert (
        preflight(tmp_path, [node("head", 0, 0), node("gpu", 1, 1)], gpu=1)._room()
        == "for 1 trials at a time; none on head"
    )


def test_check_lets_a_cluster_grow_from_none_if_the_study_says_how_far(tmp_path: Path) -> None:
    head = [node("head", 0, 0)]
    with pytest.raises(InputError, match=r"set resources\.concurrency to what it may grow to"):
        preflight(tmp_path, head, grows=True, gpu=1)._room()
    assert preflight(tmp_path, head, grows=True, gpu=1, concurrency=8)._room().startswith("for 0 of 8 trials")
    with pytest.raises(InputError, match="fit on no node"):
        preflight(tmp_path, head, gpu=1, concurrency=8)._room()


# A process that was given up, and does not know it.


@pytest.fixture
def taken_over(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrialRun, TrialRun]]:
    """A trial's run on a host that was cut off, after two steps, and the run on the host that has it now."""
    config = TrialConfig.model_validate(
        {
            "generator": {"hidden_dim": 8},
            "privacy": {"noise_multiplier": 3, "delta": 5e-5, "step_limit": 8},
            "evaluation": {"points": 1, "samples": 20, "classifiers": ["logreg"]},
        }
    )
    monkeypatch.setattr(socket, "gethostname", lambda: "cut-off")
    with TrialRun.open(config, digits, tmp_path) as old:
        ensemble = Ensemble()
        ensemble.add(old)
        ensemble.advance()
        ensemble.advance()
        monkeypatch.setattr(socket, "gethostname", lambda: "new")
        with TrialRun.open(config, digits, tmp_path) as new:
            new.save()
            yield old, new


def test_host_that_was_cut_off_keeps_no_other_from_its_trial(taken_over: tuple[TrialRun, TrialRun]) -> None:
    old, new = taken_over
    assert (old.budget.attempt, new.budget.attempt) == (1, 2)


def test_replaced_process_is_granted_no_step_and_saves_nothing(taken_over: tuple[TrialRun, TrialRun]) -> None:
    old, new = taken_over
    before = {path: path.read_bytes() for path in old.folder.rglob("*") if path.is_file()}
    for attempt in (lambda: old.budget.reserve(1), old.save, old.stop):
        with pytest.raises(FencedError):
            attempt()
    assert {path: path.read_bytes() for path in old.folder.rglob("*") if path.is_file()} == before
    assert new.budget.reserve(1) == 1
