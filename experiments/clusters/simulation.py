"""What a study's driver takes with many trials in flight: `python -m experiments.clusters.simulation --in-flight 64`.

The driver is the real one: session, searcher, both ledgers, study folder, board, and MLflow's tracker on sqlite. In
Ray's place stands a loop that asks and tells as Tune does, and in the trials' place one process that writes, when they
are due, the reservations, checkpoints and reports that trials would write. So Ray's own work (placing actors, starting
processes, its messages) is not in these figures: it cannot be had at this size on one machine.

Measured: the driver's memory; from a slot's becoming free to the next trial's being decided and admitted; from a
trial's report to its being handled, and to its being in MLflow.
"""

import argparse
import heapq
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any, ClassVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import tune.session
from dpsink.config import TrialConfig
from dpsink.generators import build_generator
from dpsink.privacy.budget import BudgetTerms, TrialBudget
from dpsink.records import CheckpointState, Report
from dpsink.synthesis import sample_grid
from tune import cluster
from tune.folder import StudyFolder
from tune.schema import State
from tune.study import Study, load_study
from tune.sweep import run_study
from tune.tracking import MLflowTracker

RANGE, FEW = "{log_uniform: [3.0, 5.0]}", "{choice: [3.0, 3.5, 4.0, 4.5]}"
SPREAD = 0.2  # of trials' durations around their mean, so that they do not all end at once
PLACE = Path(__file__).parent


@dataclass(frozen=True)
class Load:
    """A study's trials: how many at a time, how many in all, and how long each takes, in seconds."""

    in_flight: int
    trials: int
    seconds: float
    points: int  # reports of each
    noises: str = RANGE  # of the search, as in a study file


@dataclass
class Measured:
    """Times in seconds; `samples` are of the driver: time, memory in MiB, runs that MLflow waits for."""

    load: Load
    decided: list[float] = field(default_factory=list)
    handled: list[float] = field(default_factory=list)
    tracked: list[float] = field(default_factory=list)
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    total: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The figures of a table's row."""
        row: dict[str, Any] = {"in flight": self.load.in_flight, "trials": self.load.trials}
        row["reports a second, ideal"] = round(self.load.in_flight * self.load.points / self.load.seconds, 1)
        row["memory MiB"] = round(max(memory for _, memory, _ in self.samples))
        for name, times in (("decided", self.decided), ("handled", self.handled), ("in MLflow", self.tracked)):
            row[f"{name} s, median"] = round(statistics.median(times), 2)
            row[f"{name} s, 99 %"] = round(statistics.quantiles(times, n=100)[-1], 2)
        ideal = self.load.trials / self.load.in_flight * self.load.seconds
        row["efficiency"] = round(ideal / self.total, 3)
        return row


class Timed(MLflowTracker):
    """The tracker, which tells how long each run's news waited."""

    measured: Measured
    waiting: ClassVar[dict[str | None, float]] = {}  # runs that MLflow waits for, since when

    def poke(self, name: str | None = None, state: State = "running") -> None:
        self.waiting.setdefault(name, time.monotonic())
        super().poke(name, state)

    def _write(self, name: str | None, state: State) -> None:
        since = self.waiting.pop(name, None)
        super()._write(name, state)
        if since is not None:
            self.measured.tracked.append(time.monotonic() - since)


class Ticking:
    """In Ray's place: keeps so many trials in flight, and tells of their reports and ends, one at a time."""

    def __init__(self, load: Load, measured: Measured) -> None:
        self.load, self.measured, self.jitter = load, measured, random.Random(0)

    def __call__(self, study: Study, folder: StudyFolder, searcher: Any, listener: Any) -> None:
        context = multiprocessing.get_context("spawn")
        orders, news = context.Queue(), context.Queue()
        worker = context.Process(target=work, args=(str(folder.path), orders, news), daemon=True)
        worker.start()
        news.get()  # it is ready
        started, free = time.monotonic(), deque([time.monotonic()] * self.load.in_flight)
        running: dict[str, str] = {}
        exhausted = False
        while running or not exhausted:
            if free and not exhausted:
                exhausted = not self._start(searcher, free, running, orders)
            self._hear(news, searcher, listener, running, free, wait=not free or exhausted)
        self.measured.total = time.monotonic() - started
        orders.put(None)
        worker.join()

    def _start(self, searcher: Any, free: deque[float], running: dict[str, str], orders: Any) -> bool:
        """Asks for the next trial; whether there was one."""
        identity = f"{len(searcher.names):08d}"
        suggestion = searcher.suggest(identity)
        if not isinstance(suggestion, dict):
            return False
        self.measured.decided.append(time.monotonic() - free.popleft())
        running[suggestion["trial"]] = identity
        seconds = self.load.seconds * self.jitter.uniform(1 - SPREAD, 1 + SPREAD)
        orders.put((time.monotonic(), suggestion["trial"], seconds))
        return True

    def _hear(
        self, news: Any, searcher: Any, listener: Any, running: dict[str, str], free: deque[float], *, wait: bool
    ) -> None:
        try:
            told, name, values, ended = news.get(timeout=1.0) if wait else news.get_nowait()
        except Empty:
            return
        listener.progressed(name, values)
        self.measured.handled.append(time.monotonic() - told)
        if ended:
            searcher.on_trial_complete(running.pop(name))
            free.append(told)


def work(place: str, orders: "Queue[Any]", news: "Queue[Any]") -> None:
    """In the trials' place: writes what each would write, when it is due."""
    torch.set_num_threads(1)
    folder, due = StudyFolder(Path(place)), []
    writers: dict[str, Writer] = {}
    news.put("ready")
    while True:
        try:
            wait = max(0.0, due[0][0] - time.monotonic()) if due else 1.0
            order = orders.get(timeout=wait) if wait else orders.get_nowait()
        except Empty:
            order = ()
        if order is None:
            return
        if order:
            started, name, seconds = order
            writers[name] = Writer(folder, name)
            reports = writers[name].reports
            for k in range(1, reports + 1):
                heapq.heappush(due, (started + seconds * k / reports, name))
        while due and due[0][0] <= time.monotonic():
            _, name = heapq.heappop(due)
            report = writers[name].report()
            ended = report.status == "completed"
            news.put((time.monotonic(), name, {**report.model_dump(exclude={"metrics"}), **report.metrics}, ended))
            if ended:
                writers.pop(name).budget.close()


class Writer:
    """Writes one trial's run folder without training it."""

    picture: bytes = b""  # of samples, the same for all

    def __init__(self, folder: StudyFolder, name: str) -> None:
        self.run, self.record = folder.run(name), folder.read_trial(name)
        self.config = self.record.config
        self.reports = min(self.config.evaluation.points, self.record.steps)
        self.budget = TrialBudget.open(self.run / "ledger", self._terms())
        self.told: list[Report] = []
        Writer.picture = Writer.picture or picture(self.config)

    def report(self) -> Report:
        """Reserves, and writes the next checkpoint."""
        self.budget.reserve(self.record.steps // self.reports)
        done = len(self.told) + 1
        last = done == self.reports
        metrics = {"accuracy_logreg": 0.5, "fid": 1.0, "kid": 0.1, "precision": 0.5, "recall": 0.5, "variety": 0.5}
        report = Report(
            step=done, charged=self.budget.charged, epsilon=1.0, budget_fraction=done / self.reports,
            steps_per_second=1.0, status="completed" if last else "running", metrics=metrics,
        )  # fmt: skip
        self.told.append(report)
        state = CheckpointState(
            config=self.config, plan={}, image_shape=(1, 8, 8), num_classes=10,
            data_fingerprint="simulated", step=done, witness=self.budget.witness(), reports=tuple(self.told),
        )  # fmt: skip
        checkpoint = self.run / f"checkpoint-{done:010d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "samples.png").write_bytes(self.picture)
        (checkpoint / "state.json").write_text(state.model_dump_json(indent=1), encoding="utf-8")
        return report

    def _terms(self) -> BudgetTerms:
        record, privacy = self.record, self.config.privacy
        return BudgetTerms(
            mechanism=privacy.mechanism, noise_multiplier=record.noise_multiplier, sample_rate=record.sample_rate,
            clip_norm=1.0, records=1437, delta=5e-5, target_epsilon=10, steps_allowed=record.steps,
            data_fingerprint="simulated",
        )  # fmt: skip


def picture(config: TrialConfig) -> bytes:
    """A grid of samples of an untrained generator."""
    return sample_grid(build_generator(config, (1, 8, 8), 10), num_classes=10)


def simulated_study(
    place: Path, name: str, *, trials: int, points: int, noises: str = RANGE, concurrency: int = 0
) -> Path:
    """Writes a study whose trials are to be simulated; its file."""
    path = place / f"{name}.yaml"
    path.write_text(f"""
name: {name}
trial:
  data: {{name: digits}}
  generator: {{kind: conv_cond, hidden_dim: 8}}
  privacy: {{mechanism: record, target_epsilon: 10, delta: 5.0e-5, step_limit: {10 * points}}}
  evaluation: {{points: {points}, samples: 200, classifiers: [logreg]}}
space:
  privacy.noise_multiplier: {noises}
algorithm: {{kind: random, trials: {trials}}}
objectives: [accuracy_logreg]
resources: {{concurrency: {concurrency}}}
storage: {place}/studies
""")
    return path


def measure(load: Load, place: Path) -> Measured:
    """One study of that load, in this process."""
    path = simulated_study(place, "simulated", trials=load.trials, points=load.points, noises=load.noises)
    measured = Measured(load)
    Timed.measured = measured
    cluster.run_on_ray = Ticking(load, measured)  # type: ignore[assignment]
    tune.session.MLflowTracker = Timed  # type: ignore[misc]
    tune.session.chosen_trials = lambda *_: []  # type: ignore[assignment]  # nobody judges them
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(measured, over), daemon=True)
    watcher.start()
    outcome = run_study(load_study(path))
    over.set()
    watcher.join()
    assert outcome.finished, outcome.problem
    return measured


def watch(measured: Measured, over: threading.Event) -> None:
    """Looks at this process once a second."""
    started = time.monotonic()
    while not over.wait(1.0):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        memory = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
        measured.samples.append((time.monotonic() - started, memory, len(Timed.waiting)))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Memory, queue and delays of all loads, as one picture."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for result in results:
        label = f"{result['summary']['in flight']} in flight"
        times, memory, waiting = zip(*result["samples"], strict=True)
        axes[0][0].plot(times, memory, label=label)
        axes[0][1].plot(times, waiting, label=label)
        for axis, name in ((axes[1][0], "decided"), (axes[1][1], "tracked")):
            values = sorted(result[name])
            axis.plot(values, [(k + 1) / len(values) for k in range(len(values))], label=label)
    titles = (
        ("driver's memory, MiB", "seconds of the study"), ("runs that wait for MLflow", "seconds of the study"),
        ("from a free slot to the next trial: share within", "seconds"), 
        ("from a report to MLflow: share within", "seconds"),
    )  # fmt: skip
    for axis, (title, below) in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel(below)
        axis.legend()
    for axis in axes[1]:
        axis.set_xscale("symlog", linthresh=0.1)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures each load in a process of its own, and draws what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=float, default=2, help="trials of the study over those in flight")
    parser.add_argument("--seconds", type=float, default=60, help="mean duration of a trial")
    parser.add_argument("--points", type=int, default=3, help="reports of a trial")
    parser.add_argument(
        "--few-noises", action="store_true", help="σ from four values: a plan for each is worked out once"
    )
    parser.add_argument("--out", type=Path, default=PLACE)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        [count] = options.in_flight
        load = Load(count, round(count * options.rounds), options.seconds, options.points, _noises(options))
        with tempfile.TemporaryDirectory() as place:
            measured = measure(load, Path(place))
        options.one.write_text(json.dumps(asdict(measured) | {"summary": measured.summary()}), encoding="utf-8")
        return
    results = [one_load(count, options) for count in options.in_flight]
    plot(results, options.out / "simulation.png")
    table = [result["summary"] for result in results]
    (options.out / "simulation.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(map(str, row.values())) + " |")


def _noises(options: argparse.Namespace) -> str:
    return FEW if options.few_noises else RANGE


def one_load(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own has measured."""
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        words = ["--in-flight", count, "--rounds", options.rounds, "--seconds", options.seconds]
        words += ["--few-noises"] * options.few_noises + ["--points", options.points, "--one", answer]
        subprocess.run([sys.executable, "-m", "experiments.clusters.simulation", *map(str, words)], check=True)
        return json.loads(answer.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
