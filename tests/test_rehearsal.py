"""A study on a cluster of three machines made of namespaces, and the faults that it survives; a cluster that grows."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 600  # after which it has failed

STEPS, POINTS = 400, 3  # of its trials: experiments/clusters/rehearsal/study.yaml

pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(SECONDS + 60),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces with a network of their own need root"),
]


def played(scene: str, out: Path) -> dict[str, Any]:
    """What the script wrote."""
    command = [sys.executable, "-m", "experiments.clusters.rehearsal", "--out", str(out), "--scene", scene]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return json.loads((out / f"{scene}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played("rehearsal", tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two studies on a cluster without workers, which Ray's autoscaler gives it and takes away."""
    return played("growing", tmp_path_factory.mktemp("growing"))["rounds"]


def fault(rehearsal: dict[str, Any], words: str) -> dict[str, Any]:
    """The fault of that name."""
    return next(one for one in rehearsal["faults"] if words in one["name"])


def test_check_found_nothing_wrong_on_any_node(rehearsal: dict[str, Any]) -> None:
    assert len(rehearsal["check"]) >= 9
    assert all(line.startswith("ok ") for line in rehearsal["check"])


def test_every_trial_completed_once_and_its_ledger_agrees_with_its_reports(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["problems"] == []
    assert rehearsal["end"]["ended"] == {"completed": len(rehearsal["trials"])}
    assert rehearsal["mlflow"] == {"FINISHED": len(rehearsal["trials"]) + 1}


def test_machine_that_was_cut_off_and_came_back_was_refused_and_saved_nothing(rehearsal: dict[str, Any]) -> None:
    cut = fault(rehearsal, "is cut from the network")
    assert cut["facts"]["checkpoints by it afterwards"] == []
    # At most the entry that it was about to write when it was stopped: refused once written, and the next before that.
    assert len(cut["facts"]["written by it afterwards"]) <= 1
    assert cut["seconds"]["resumed elsewhere"] <= cut["seconds"]["refused by the ledger"]


def test_trials_of_lost_nodes_were_resumed_by_others(rehearsal: dict[str, Any]) -> None:
    lost = {fault(rehearsal, words)["facts"]["trial"] for words in ("is cut from", "the raylet of")}
    assert all(rehearsal["trials"][name]["attempts"] >= 2 for name in lost)
    # What nobody disturbed was opened once, and lost nothing.
    others = [trial for name, trial in rehearsal["trials"].items() if name not in lost]
    assert others and all((trial["attempts"], trial["lost"]) == (1, 0) for trial in others)


def test_lost_node_costs_a_trial_less_than_the_steps_between_two_checkpoints(rehearsal: dict[str, Any]) -> None:
    interval = math.ceil(STEPS / POINTS)
    assert all(trial["lost"] <= (trial["attempts"] - 1) * interval for trial in rehearsal["trials"].values())


def test_no_fault_takes_a_charge_back(rehearsal: dict[str, Any]) -> None:
    """Entries stay as they were written, of all ledgers, and what they add up to only grows."""
    for one in rehearsal["faults"]:
        assert one["facts"]["entries lost or changed"] == []
        assert all(one["before"][what] <= one["after"][what] for what in ("charged", "attempts", "epsilon"))
        assert one["before"]["ended"].get("completed", 0) <= one["after"]["ended"].get("completed", 0)


def test_no_trial_is_granted_more_than_its_budget(rehearsal: dict[str, Any]) -> None:
    """Its entries add up to no more, but for what was written too late and refused."""
    cut = fault(rehearsal, "is cut from the network")["facts"]
    refused = {cut["trial"]: sum(cut["written by it afterwards"].values())}
    for name, trial in rehearsal["trials"].items():
        assert trial["charged"] <= trial["on record"] <= trial["budget"] + refused.get(name, 0)
        assert trial["budget"] <= STEPS


def test_rehearsal_takes_minutes(rehearsal: dict[str, Any]) -> None:
    assert rehearsal["seconds"] <= 480  # 320 on two cores that had other work


def test_cluster_answers_its_own_machines_and_no_stranger_on_any_port(rehearsal: dict[str, Any]) -> None:
    head, worker = rehearsal["ports"]
    assert {6379, 10002} <= set(head["answer a member"]) and 10002 in worker["answer a member"]
    assert {10007, 44217} <= set(head["listens"]) and 10007 in worker["listens"]  # those that ask for no token
    assert head["answer a stranger"] == worker["answer a stranger"] == []


def test_dashboard_and_mlflow_answer_nobody_beyond_the_head(rehearsal: dict[str, Any]) -> None:
    head, _ = rehearsal["ports"]
    assert {5000, 8265}.isdisjoint(head["answer a member"])


def test_new_machine_joined_while_the_study_ran(rehearsal: dict[str, Any]) -> None:
    assert "a node of the cluster" in fault(rehearsal, "joins")["seconds"]


def test_no_namespace_or_interface_is_left(rehearsal: dict[str, Any]) -> None:
    links = Path("/proc/net/dev").read_text(encoding="ascii")
    assert "to-worker-1" not in links and "wire" not in links
    assert "/mnt/shared" not in Path("/proc/self/mounts").read_text(encoding="utf-8")


def test_cluster_grows_from_no_worker_to_all_and_back_with_each_study(rounds: list[dict[str, Any]]) -> None:
    assert [one["workers before, at most, after"] for one in rounds] == [[0, 2, 0]] * 2


def test_growing_and_shrinking_disturbs_no_trial(rounds: list[dict[str, Any]]) -> None:
    for one in rounds:
        assert one["problems"] == []
        assert all((trial["attempts"], trial["lost"]) == (1, 0) for trial in one["trials"].values())


def test_no_place_for_a_trial_is_lost_when_the_cluster_has_shrunk(rounds: list[dict[str, Any]]) -> None:
    assert [one["trials at a time"] for one in rounds] == [2, 2]
