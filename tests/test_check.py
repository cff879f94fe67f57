"""What `dpsink-tune check` finds out before a study starts, on made-up clusters and on this machine."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpsink.config import TrialConfig
from dpsink.errors import InputError
from tests.test_study import load, write
from tune import check
from tune.check import Check, Preflight, look
from tune.cli import app, main
from tune.footprint import CLIENT, CONTEXT, Footprint, Sketch, gpu_need, host_need
from tune.largest import largest
from tune.nodes import Node, free_gpu_memory
from tune.room import Blocked
from tune.study import Resources
from tune.versions import versions

GIB = 2**30


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a known size: measuring one takes a process and seconds."""
    monkeypatch.setattr(check, "footprint", lambda _: Footprint(memory=GIB, tensors=GIB // 2, files=2**20))
    monkeypatch.setattr(check, "free_bytes", lambda _: 100 * GIB)


def finding(
    tmp_path: Path,
    name: str,
    *changes: dict[str, Any],
    study: dict[str, Any] | None = None,
    address: str | None = None,
) -> Any:
    """What one check says of a cluster, each of whose nodes differs from a good one by these changes."""
    preflight = Preflight(load(tmp_path, storage=str(tmp_path / "storage"), **(study or {})), None, address=address)
    good = {
        "versions": dict(versions()), "cpus": 4.0, "gpus": 0.0, "cuda": 0, "free_memory": 16 * GIB,
        "fingerprint": preflight.plan.data.fingerprint,
    }  # fmt: skip
    nodes = [
        Node.model_validate(good | {"name": f"node-{index}"} | change) for index, change in enumerate(changes or ({},))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "cluster", lambda _: nullcontext())
        patch.setattr(check, "ask_nodes", lambda *_: nodes)
        found = {one.name: one for one in look(preflight.thorough())}
    return found[name]


GOOD = ["nodes", "room", "GPUs", "packages", "data", "shared storage", "size", "memory", "GPU memory", "disk"]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_cluster_passes(tmp_path: Path, small: None, name: str) -> None:
    assert finding(tmp_path, name, {}, {}).ok


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("packages", {"versions": {**versions(), "torch": "1.0"}}, "node-1: torch 1.0 instead of"),
        ("packages", {"versions": {}}, "node-1: geomloss missing instead of"),
        ("data", {"fingerprint": "other"}, "node-1: other data than here; every node needs"),
        ("data", {"fingerprint": "", "problem": "no such file"}, "node-1: no such file"),
        ("shared storage", {"storage": "cannot lock a file (No locks)"}, "node-1: cannot lock a file (No locks) in /"),
        ("memory", {"free_memory": 3 * GIB}, "need 4.0 GiB on node-1, which has 3.0; set resources.concurrency to 3"),
    ],
)
def test_a_node_that_differs_is_named(
    tmp_path: Path, small: None, name: str, change: dict[str, Any], said: str
) -> None:
    found = finding(tmp_path, name, {}, change)
    assert not found.ok
    assert said in found.text
    assert "\n" not in found.text


def test_all_that_differs_is_told_at_once_each_with_its_nodes(tmp_path: Path) -> None:
    old, other = ({"versions": {**versions(), name: "1.0"}} for name in ("torch", "numpy"))
    text = finding(tmp_path, "packages", old, {}, other, old).text
    assert "node-0, node-3: torch 1.0" in text and "node-2: numpy 1.0" in text


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"gpu": 0.25}, "resources.gpu=0.25 fit on no node (node-0: 4 CPUs and 0 GPUs"),
        ({"cpu": 8}, "resources.cpu=8"),
        ({"concurrency": 9}, "resources.concurrency=9 must be at most 8"),
    ],
)
def test_resources_that_no_cluster_like_this_has_are_found(
    tmp_path: Path, small: None, resources: dict[str, Any], said: str
) -> None:
    found = finding(tmp_path, "room", {}, {}, study={"resources": resources})
    assert not found.ok
    assert said in found.text


def test_a_bound_on_concurrency_bounds_the_memory_that_is_needed(tmp_path: Path, small: None) -> None:
    assert finding(tmp_path, "memory", {"free_memory": 3 * GIB}, study={"resources": {"concurrency": 3}}).ok


def test_a_node_too_small_hides_no_full_disk(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "free_bytes", lambda _: 2**20)
    assert "make room" in finding(tmp_path, "disk", {"free_memory": GIB // 2}).text


def test_a_node_too_small_for_one_trial_is_not_told_to_run_none(tmp_path: Path, small: None) -> None:
    text = finding(tmp_path, "memory", {"free_memory": GIB // 2}).text
    assert "make trials smaller" in text and "concurrency" not in text


def test_trials_that_share_an_engine_need_its_memory_once_and_a_light_client_each(tmp_path: Path, small: None) -> None:
    packed, room = {"resources": {"slots": 4}}, GIB + 4 * CLIENT
    assert finding(tmp_path, "memory", {"free_memory": room}, study=packed).ok
    assert not finding(tmp_path, "memory", {"free_memory": room - 1}, study=packed).ok


TAKEN = Footprint(memory=3 * GIB, tensors=GIB, files=1)


@pytest.mark.parametrize(
    ("resources", "trials", "need"),
    [
        ({}, 4, 4 * 3 * GIB),
        ({"slots": 4}, 0, 0),
        ({"gpu": 0.25}, 8, 2 * 3 * GIB + 8 * CLIENT),  # two engines
        ({"gpu": 0.25, "slots": 1}, 8, 8 * 3 * GIB),
        ({"gpu": 2}, 2, 2 * 3 * GIB),
    ],
)
def test_a_nodes_memory_holds_processes_or_engines_with_clients(
    resources: dict[str, Any], trials: int, need: int
) -> None:
    assert host_need(TAKEN, Resources.model_validate(resources), trials) == need


@pytest.mark.parametrize(
    ("resources", "processes"),
    [
        ({"gpu": 1}, 1),
        ({"gpu": 2}, 1),
        ({"gpu": 0.25}, 1),
        ({"gpu": 0.25, "slots": 1}, 4),
        ({"gpu": 0.25, "slots": 1, "concurrency": 2}, 2),
    ],
)
def test_each_process_on_a_gpu_has_a_context_of_its_own(resources: dict[str, Any], processes: int) -> None:
    assert gpu_need(TAKEN, Resources.model_validate(resources)) == processes * (CONTEXT + GIB)


GPU = {"gpus": 1.0, "cuda": 1}


def test_a_gpu_too_small_for_its_trials_is_found(tmp_path: Path, small: None) -> None:
    found = finding(
        tmp_path, "GPU memory", GPU | {"gpu_memory": (8 * GIB,)}, GPU | {"gpu_memory": (8 * GIB, GIB)},
        study={"resources": {"gpu": 0.25}},
    )  # fmt: skip
    assert not found.ok
    assert "need about 1.2 GiB of its memory, and one has 1.0 on node-1; raise resources.gpu" in found.text


def test_a_gpu_whose_memory_nobody_tells_is_no_problem_and_is_named(tmp_path: Path, small: None) -> None:
    found = finding(tmp_path, "GPU memory", GPU, study={"resources": {"gpu": 0.25}})
    assert found.ok
    assert "nvidia-smi does not tell on node-0" in found.text


@pytest.mark.parametrize(
    ("says", "bytes_free"),
    [("echo 100; echo 200", (100 * 2**20, 200 * 2**20)), ("echo '[N/A]'", ()), ("exit 9", ()), (None, ())],
)
def test_free_memory_of_gpus_is_what_the_driver_tells_and_nothing_where_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None, bytes_free: tuple[int, ...]
) -> None:
    if says:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert free_gpu_memory() == bytes_free


def test_nodes_that_may_join_later_are_said_to_be_unseen(tmp_path: Path, small: None) -> None:
    study = {"resources": {"concurrency": 16}}
    assert "for 4 of 16 trials at a time; nodes that join later are not seen" in finding(
        tmp_path, "room", study=study, address="auto"
    ).text  # fmt: skip


def test_a_selection_is_given_room_for_nearly_as_many_trials_as_it_may_draw(tmp_path: Path, small: None) -> None:
    sealed = {"policy": "release_best", "selection": {"expected_trials": 20}}
    assert "187 trials need at most" in finding(tmp_path, "disk", study={"ledger": sealed}).text


def test_a_disk_that_the_trials_would_fill_is_found(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "free_bytes", lambda _: 2**20)
    found = finding(tmp_path, "disk")
    assert not found.ok
    assert "make room, or set another storage" in found.text


@pytest.mark.parametrize("problem", [InputError("wrong"), Blocked("full")])
def test_a_problem_does_not_end_the_other_checks(problem: Exception) -> None:
    def fail() -> str:
        raise problem

    found = list(look([Check("first", fail), Check("second", lambda: "fine")]))
    assert [(one.name, one.ok, one.text) for one in found] == [
        ("first", False, str(problem)), ("second", True, "fine"),
    ]  # fmt: skip


@pytest.mark.parametrize(("needed", "said"), [(True, "cannot be looked at before first"), (False, "fine")])
def test_what_needs_another_check_is_looked_at_only_after_its_success(needed: bool, said: str) -> None:
    def fail() -> str:
        raise InputError("wrong")

    checks = [Check("first", fail), Check("second", lambda: "fine", needs=("first",) if needed else ())]
    second = list(look(checks))[1]
    assert (second.text, second.made, second.ok) == (said, not needed, not needed)


def searched(tmp_path: Path, **changes: Any) -> list[Any]:
    """The largest trials without the control."""
    return [one for one in largest(load(tmp_path, **changes)) if one.generator.kind != "class_mean"]


def test_the_largest_trial_is_large_in_every_direction_of_the_space(tmp_path: Path) -> None:
    space = {
        "sinkhorn.gen_batch_size": {"int": [8, 64]}, "generator.hidden_dim": {"choice": [4, 16]},
        "privacy.batch_size": {"choice": [100, 50]},
    }  # fmt: skip
    (one,) = searched(tmp_path, space=space)
    assert (one.sinkhorn.gen_batch_size, one.generator.hidden_dim, one.privacy.batch_size) == (64, 16, 100)


def test_of_each_kind_of_generator_that_is_searched_there_is_a_largest_trial(tmp_path: Path) -> None:
    space = {
        "generator.kind": {"choice": ["conv_cond", "cond_biggan"]},
        "generator.hidden_dim": {"choice": [4, 16], "when": {"generator.kind": "cond_biggan"}},
    }
    kinds = {one.generator.kind: one.generator.hidden_dim for one in searched(tmp_path, space=space)}
    assert kinds["cond_biggan"] == 16 and set(kinds) == {"conv_cond", "cond_biggan"}


def test_the_largest_trials_are_of_every_mechanism_and_cost(tmp_path: Path) -> None:
    space = {"privacy.mechanism": {"choice": ["record", "batch"]}, "sinkhorn.cost": {"choice": ["l2", "l1+l2"]}}
    found = {(one.privacy.mechanism, one.sinkhorn.cost) for one in searched(tmp_path, space=space)}
    assert len(found) == 4


def test_a_baseline_may_be_the_largest_trial(tmp_path: Path) -> None:
    wide = searched(tmp_path, baselines={"wide": {"generator": {"hidden_dim": 32}}})
    assert 32 in {one.generator.hidden_dim for one in wide}


def test_the_largest_trial_is_large_in_every_direction_of_a_list(tmp_path: Path) -> None:
    listed = [{"sinkhorn.gen_batch_size": size} for size in (8, 64, 16)]
    (one,) = searched(tmp_path, space={}, algorithm={"kind": "listed", "configurations": listed})
    assert one.sinkhorn.gen_batch_size == 64


@pytest.mark.slow
def test_a_trial_that_needs_more_than_is_free_is_no_crash(tmp_path: Path) -> None:
    study = load(tmp_path)
    sketch = Sketch(
        configs=(study.configure({}),), slots=1, padded=False, shape=(1, 8, 8), num_classes=10, records=1437,
        validation=180, test=180, limit=GIB // 4,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"needs more than the 0\.2 GiB that are free"):
        check.footprint(sketch)


def digits(place: Path, *, slots: int, padded: bool) -> Sketch:
    return Sketch(
        configs=tuple(largest(load(place))), slots=slots, padded=padded, shape=(1, 8, 8), num_classes=10, records=1437,
        validation=180, test=180, limit=8 * GIB,
    )  # fmt: skip


@pytest.mark.slow
def test_an_engines_footprint_is_that_of_its_trials_and_of_an_evaluation(tmp_path: Path) -> None:
    sketch = digits(tmp_path, slots=2, padded=True)
    taken = check.footprint(sketch)
    evaluated = check.footprint(sketch.model_copy(update={"configs": (heavily_judged(sketch.configs[-1]),)}))
    assert 0 < taken.tensors < taken.memory and taken.files > 0
    assert evaluated.memory > taken.memory + 50 * 2**20


@pytest.mark.slow
def test_a_footprint_does_not_count_the_memory_of_who_measures_it(tmp_path: Path) -> None:
    sketch = digits(tmp_path, slots=1, padded=False)
    ballast = b"x" * (2 * GIB)
    assert check.footprint(sketch).memory < len(ballast)


def heavily_judged(config: TrialConfig) -> TrialConfig:
    """The same with so many samples that its evaluation takes more memory than its steps."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"samples": 20_000})})


@pytest.mark.slow
def test_this_machine_is_checked_and_a_study_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    path = write(tmp_path, storage=str(storage), tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
                 resources={"concurrency": 1})  # fmt: skip
    result = CliRunner().invoke(app, ["check", str(path), "--json"], standalone_mode=False)
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert list(found) == ["settings", "storage", "tracking", *GOOD]
    assert [one for one in found.values() if not one["ok"]] == []
    assert not list(storage.glob(".check-*"))


def test_corners_of_a_space_that_afford_no_step_are_counted(tmp_path: Path) -> None:
    space = {"privacy.noise_multiplier": {"uniform": [0.05, 3]}}
    (found, *_) = look(Preflight(load(tmp_path, space=space), None).quick())
    assert "1 of 2 corners of the space afford no step" in found.text


def test_a_problem_is_exit_code_2_after_all_checks_were_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Preflight, "thorough", lambda _: (Check("last", lambda: "looked at"),))
    (tmp_path / "file").write_text("")
    path = write(tmp_path, storage=str(tmp_path / "file"), tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", "check", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "problem  storage:" in told.out and "ok       last:" in told.out
    assert "1 of 4 checks found a problem" in told.err
