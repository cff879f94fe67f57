"""A Ray of this process's own."""

import json
import subprocess
import sys

import pytest

OWN = """
import json, os, ray
from pathlib import Path
from tune.own_ray import leave_ray, start_own_ray

def children(parent):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
            yield (stat.parent / "cmdline").read_text().replace(chr(0), " ")

start_own_ray()
running = list(children(os.getpid()))
answer = ray.get(ray.remote(lambda: 6 * 7).remote())
pages = ray.get(ray.remote(lambda: os.environ["GLIBC_TUNABLES"]).remote())
leave_ray()
print(json.dumps({"running": running, "answer": answer, "pages": pages, "left": list(children(os.getpid()))}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, object]:
    """What a process told that started a Ray of its own, had a task done and left."""
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["log_monitor.py", "dashboard.py", "monitor.py"])
def test_daemon_without_work_does_not_run(told: dict[str, object], daemon: str) -> None:
    assert daemon not in str(told["running"])


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["gcs_server", "raylet"])
def test_daemon_with_work_runs(told: dict[str, object], daemon: str) -> None:
    assert daemon in str(told["running"])


@pytest.mark.slow
def test_tasks_are_done(told: dict[str, object]) -> None:
    assert told["answer"] == 42


@pytest.mark.slow
def test_workers_ask_for_huge_pages(told: dict[str, object]) -> None:
    assert told["pages"] == "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"


@pytest.mark.slow
def test_nothing_of_it_is_left_behind(told: dict[str, object]) -> None:
    assert told["left"] == []
