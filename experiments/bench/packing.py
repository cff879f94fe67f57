"""Whole studies whose trials share a device: `python -m experiments.bench.packing`, on a GPU under eight minutes.

The same trials on `digits`, three times: side by side in one engine, each in a process of its own with the whole
device, and in one engine that is killed on the way. Every row says whether each trial was charged exactly its steps.
Without a GPU the two are `slots` and processes on CPUs, a check and no timing. `--quick` does everything tiny.
"""

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpsink.privacy.budget import charged_steps
from experiments.bench.harness import Measurement, Row, measure, report
from tune.folder import StudyFolder
from tune.study import Study
from tune.sweep import run_study

TRIALS, STEPS = 16, 4000


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, prints and writes; see the module."""
    parser = argparse.ArgumentParser(description="studies whose trials share a device")
    parser.add_argument("--quick", action="store_true", help="few and short trials: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    arguments = parser.parse_args(argv)
    trials, steps = (2, 200) if arguments.quick else (TRIALS, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(studies(Path(folder), trials, steps)), arguments.json)


def studies(folder: Path, trials: int, steps: int) -> list[Measurement]:
    """The three studies."""
    gpu = torch.cuda.is_available()
    shared = {"gpu": 1 / trials, "cpu": 0.5} if gpu else {"slots": trials}
    alone = {"gpu": 1} if gpu else {}
    ways: dict[str, tuple[dict[str, Any], Callable[[StudyFolder], None]]] = {
        "one engine": (shared, lambda _: None),
        "a process each": (alone, lambda _: None),
        "one engine, killed": (shared, kill_engine),
    }
    return [
        Measurement("packing", what, partial(run, folder, what, trials, steps, resources, meanwhile))
        for what, (resources, meanwhile) in ways.items()
    ]


def study(folder: Path, name: str, trials: int, steps: int, resources: dict[str, Any]) -> Study:
    """Small trials of one structure that differ in their learning rate."""
    tree = {
        "name": name,
        "trial": {
            "sinkhorn": {"cost": "l2"},
            "privacy": {"noise_multiplier": 8, "delta": 5e-5, "batch_size": 200, "step_limit": steps},
            "evaluation": {"points": 2, "samples": 200, "classifiers": ["logreg"]},
        },
        "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
        "algorithm": {"trials": trials},
        "objectives": ["accuracy_logreg"],
        "test_samples": 200,
        "resources": resources,
        "storage": str(folder),
    }
    return Study.model_validate(tree)


def run(
    folder: Path,
    what: str,
    trials: int,
    steps: int,
    resources: dict[str, Any],
    meanwhile: Callable[[StudyFolder], None],
) -> list[Row]:
    """One study; its time is that of the whole session, Ray's start included."""
    plan = study(folder, what.replace(" ", "-").replace(",", ""), trials, steps, resources)
    place = StudyFolder(plan.storage / plan.name)
    threading.Thread(target=meanwhile, args=(place,), daemon=True).start()
    started = time.perf_counter()
    outcome = run_study(plan)
    seconds = time.perf_counter() - started
    records = place.trials()
    exact = all(charged_steps(place.run(record.name) / "ledger") == record.steps for record in records)
    ended = sum((end := place.end_of(record.name)) is not None and end.state == "completed" for record in records)
    rates = sorted(place.reports(record.name)[-1].steps_per_second for record in records)
    values: dict[str, float | str] = {
        "completed": f"{ended} of {trials}",
        "finished": str(outcome.finished),
        "charges exact": str(exact),
        "s": seconds,
        "trial-steps/s": sum(record.steps for record in records) / seconds,
        "steps/s of a trial": rates[len(rates) // 2],
    }
    return [Row("packing", what, values)]


def kill_engine(place: StudyFolder) -> None:
    """Kills the engine as soon as two trials have reported: its process is named in their ledgers' locks."""
    while True:
        time.sleep(0.1)
        reported = [path for path in (place.path / "trials").glob("*/run") if any(path.glob("checkpoint-*"))]
        if len(reported) >= 2:
            os.kill(int(next((reported[0] / "ledger").glob("lock-*")).read_text().split()[0]), signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
