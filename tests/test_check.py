"""What `dpsink-tune check` finds out before a study starts, on made-up clusters and on this machine."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpsink.errors import InputError
from tests.test_study import load, write
from tune import check
from tune.check import Check, Preflight, look
from tune.cli import app, main
from tune.footprint import Footprint, Sketch
from tune.nodes import Node, versions
from tune.room import NoRoom

GIB = 2**30


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a known size: measuring one takes a process and seconds."""
    monkeypatch.setattr(check, "footprint", lambda _: Footprint(memory=GIB, files=2**20))
    monkeypatch.setattr(check, "free_bytes", lambda _: 100 * GIB)


def finding(tmp_path: Path, name: str, *changes: dict[str, Any], study: dict[str, Any] | None = None) -> Any:
    """What one check says of a cluster, each of whose nodes differs from a good one by these changes."""
    preflight = Preflight(load(tmp_path, storage=str(tmp_path / "storage"), **(study or {})), None)
    good = {
        "versions": versions(), "cpus": 4.0, "gpus": 0.0, "cuda": 0, "free_memory": 16 * GIB,
        "tokens": (preflight._token,), "fingerprint": preflight.plan.data.fingerprint,
    }  # fmt: skip
    preflight.__dict__["_cluster"] = [
        Node.model_validate(good | {"name": f"node-{index}"} | change) for index, change in enumerate(changes or ({},))
    ]
    found = {one.name: one for one in look(preflight.thorough())}
    return found[name]


@pytest.mark.parametrize("name", ["nodes", "packages", "data", "shared storage", "memory", "disk"])
def test_a_good_cluster_passes(tmp_path: Path, small: None, name: str) -> None:
    assert finding(tmp_path, name, {}, {}).ok


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("packages", {"versions": {**versions(), "torch": "1.0"}}, "torch is 1.0 on node-1"),
        ("data", {"fingerprint": "other"}, "the data on node-1 are not those here"),
        ("data", {"fingerprint": "", "problem": "no such file"}, "on node-1: no such file"),
        ("shared storage", {"tokens": ()}, "is not seen by node-1"),
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
    found = finding(tmp_path, "nodes", {}, {}, study={"resources": resources})
    assert not found.ok
    assert said in found.text


def test_a_bound_on_concurrency_bounds_the_memory_that_is_needed(tmp_path: Path, small: None) -> None:
    assert finding(tmp_path, "memory", {"free_memory": 3 * GIB}, study={"resources": {"concurrency": 3}}).ok


def test_a_disk_that_the_trials_would_fill_is_found(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "free_bytes", lambda _: 2**20)
    found = finding(tmp_path, "disk")
    assert not found.ok
    assert "make room, or set another storage" in found.text


@pytest.mark.parametrize("problem", [InputError("wrong"), NoRoom("full")])
def test_a_problem_does_not_end_the_other_checks(problem: Exception) -> None:
    def fail() -> str:
        raise problem

    found = list(look([Check("first", fail), Check("second", lambda: "fine")]))
    assert [(one.name, one.ok, one.text) for one in found] == [
        ("first", False, str(problem)), ("second", True, "fine"),
    ]  # fmt: skip


def test_a_trial_is_sketched_at_the_largest_of_what_is_searched(tmp_path: Path) -> None:
    space = {"sinkhorn.gen_batch_size": {"int": [8, 64]}, "generator.hidden_dim": {"choice": [4, 16]}}
    preflight = Preflight(load(tmp_path, space=space), None)
    assert (preflight._largest.sinkhorn.gen_batch_size, preflight._largest.generator.hidden_dim) == (64, 16)  # type: ignore[union-attr]


def test_a_trial_is_sketched_at_the_largest_of_what_is_listed(tmp_path: Path) -> None:
    listed = [{"sinkhorn.gen_batch_size": size} for size in (8, 64, 16)]
    preflight = Preflight(load(tmp_path, space={}, algorithm={"kind": "listed", "configurations": listed}), None)
    assert preflight._largest.sinkhorn.gen_batch_size == 64


@pytest.mark.slow
def test_a_trial_that_needs_more_than_is_free_is_no_crash(tmp_path: Path) -> None:
    study = load(tmp_path)
    sketch = Sketch(
        config=study.configure({}), shape=(1, 8, 8), num_classes=10, records=1437, others=360, limit=GIB // 4
    )
    with pytest.raises(InputError, match=r"needs more than the 0\.2 GiB that are free"):
        check.footprint(sketch)


@pytest.mark.slow
def test_this_machine_is_checked_and_a_study_leaves_no_token(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    path = write(tmp_path, storage=str(storage), tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
                 resources={"concurrency": 1})  # fmt: skip
    result = CliRunner().invoke(app, ["check", str(path), "--json"], standalone_mode=False)
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert set(found) == {
        "settings", "storage", "tracking", "nodes", "GPUs", "packages", "data", "shared storage", "memory", "disk",
    }  # fmt: skip
    assert [one for one in found.values() if not one["ok"]] == []
    assert not list(storage.glob(".token-*"))


def test_a_problem_is_exit_code_2_after_all_checks_were_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Preflight, "thorough", lambda _: (Check("last", lambda: "looked at"),))
    monkeypatch.setattr("tune.nodes.cluster", lambda _: nullcontext())
    (tmp_path / "file").write_text("")
    path = write(tmp_path, storage=str(tmp_path / "file"), tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", "check", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "problem  storage:" in told.out and "ok       last:" in told.out
    assert "1 of 4 checks found a problem" in told.err
