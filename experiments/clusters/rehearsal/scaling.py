"""Run on the head: how a study's throughput grows with the nodes it may use; prints a line of JSON for each number.

The trials sleep, and write what trials write: two cores cannot train on three machines at a time, but show what Ray,
the driver, the ledgers and the folder cost.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune

import tune.session
from experiments.clusters.simulation import Writer, simulated_study
from tune import cluster, nodes
from tune.folder import StudyFolder
from tune.study import load_study
from tune.sweep import run_study
from tune.trainable import flat
from tune.wire import packed

SECONDS, EACH = 20.0, 3  # of a trial; trials of each node


def sleep_through(config: dict[str, Any], device: str) -> None:
    """A trial that sleeps."""
    writer = Writer(StudyFolder(Path(config["folder"])), config["trial"])
    for _ in range(writer.reports):
        time.sleep(SECONDS / writer.reports)
        ray_tune.report(packed(flat(writer.report())))
    writer.budget.close()


def measure(count: int, place: Path) -> dict[str, float]:
    """One study on so many nodes, each of which has room for one trial."""
    trials = EACH * count
    path = simulated_study(place, f"nodes-{count}", trials=trials - 1, points=3, concurrency=count)  # and the control
    started = time.monotonic()
    outcome = run_study(load_study(path))
    seconds = time.monotonic() - started
    assert outcome.finished, outcome.problem
    return {
        "nodes": count,
        "trials a minute": round(60 * trials / seconds, 2),
        "efficiency": round(EACH * SECONDS / seconds, 3),
    }


def main() -> None:
    """Measures 1, 2, … nodes; the argument is the folder that all nodes share."""
    cluster.run_trial = sleep_through
    tune.session.chosen_trials = lambda *_: []  # nobody judges them
    place = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    with nodes.cluster("auto"):
        workers = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        for count in range(1, workers + 1):
            print("scaling", json.dumps(measure(count, place)), flush=True)


if __name__ == "__main__":
    main()
