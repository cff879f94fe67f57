"""What a study costs beyond its trials: `python -m experiments.bench.study`.

`scale` runs many trivial trials through the whole path, Ray, search, ledgers, checkpoints and MLflow on sqlite: seconds
a trial, resident memory of the driver on the way, and how long `status` takes on the result. `loop` compares trials of
a minute, one at a time, from the first one's start to the last one's end, with a process that does nothing but train
the same trials; `overhead` the same with two at a time and two such processes, where a machine of two cores has none
left for Ray, the search and MLflow. Such a process is started twice: as a person starts it, the script, and with the
settings of memory that a study gives its workers, the tuned script; what the study costs beyond the second is what it
costs without its better memory. The sides take turns: one has the machine for five seconds while the others stand still
(SIGSTOP), and time is counted only while a side has it. A shared machine's speed changes by more from one minute to the
next than what is to be measured, and so it changes for all. In shorter turns Ray's daemons, whose clocks run on while
they stand still, would be busy with what has fallen due.

The trials are real ones, only small. `--trials N` is the size of the first, `--seconds S` the length of a trial of
the second, `--only KIND` runs one part, `--quick` everything tiny (a smoke test), `--json PATH` keeps the numbers.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from dpsink.data import load_dataset
from dpsink.training import train, use_threads
from experiments.bench.harness import Measurement, Row, measure, report
from tune.own_ray import ENVIRONMENT
from tune.study import load_study

WORKERS = 2
TIMED = 6  # searched trials of the timed parts, for each that runs at a time; the control, a second, comes on top
TURN = 5.0  # seconds that a side has the machine
TRIVIAL_STEPS, TIMED_STEPS = 2, 200
PERIOD, LOOK = 0.5, 0.1  # seconds between two looks at a study that runs, and at one that takes turns
KINDS = ["scale", "loop", "overhead"]
Values = dict[str, float | str]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; see the module."""
    arguments = _arguments(argv)
    if arguments.bare:
        return _bare_loop(arguments.bare, arguments.share)
    chosen = [one for one in _measurements(arguments) if arguments.only in (None, one.kind)]
    report(measure(chosen), arguments.json)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a study costs beyond its trials")
    parser.add_argument("--only", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    parser.add_argument("--trials", type=int, default=1000, help="of the scale part")
    parser.add_argument("--seconds", type=float, default=60, help="length of a trial of the timed parts")
    parser.add_argument("--quick", action="store_true", help="few trials, of a second: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measurements(arguments: argparse.Namespace) -> list[Measurement]:
    trials, timed, seconds = (4, 1, 1.0) if arguments.quick else (arguments.trials, TIMED, arguments.seconds)
    return [
        Measurement("scale", f"{trials} trivial trials", partial(_scale, trials)),
        Measurement("loop", f"{timed} trials of {seconds:g} s", partial(_timed, "loop", timed, seconds, 1)),
        Measurement(
            "overhead",
            f"{timed * WORKERS} trials of {seconds:g} s",
            partial(_timed, "overhead", timed * WORKERS, seconds, WORKERS),
        ),
    ]


def _write_study(place: Path, trials: int, steps: int, workers: int = WORKERS) -> Path:
    tree: dict[str, Any] = {
        "name": "bench",
        "trial": {
            "generator": {"latent_dim": 2, "hidden_dim": 2, "embed_dim": 2},
            "sinkhorn": {"cost": "l2", "gen_batch_size": 10},
            "privacy": {"noise_multiplier": 50, "delta": 5e-5, "batch_size": 100, "step_limit": steps},
            "evaluation": {"points": 1, "samples": 100, "classifiers": ["logreg"]},
        },
        "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
        "algorithm": {"kind": "random", "trials": trials},
        "objectives": ["accuracy_logreg"],
        "test_samples": 100,
        "resources": {"concurrency": workers},
        "storage": str(place),
    }
    path = place / "bench.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


# -- many trivial trials ----------------------------------------------------------------------------------------------


def _scale(trials: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as place:
        study = _write_study(Path(place), trials, TRIVIAL_STEPS)
        values = _run_study(study, marks=sorted({trials // 10, trials // 2, trials}))
        values["s a trial"] = float(values["s"]) / trials
        values["status s"] = _time("tune", "status", str(Path(place) / "bench"))
        values["resumed s"] = _time("tune", "sweep", str(study))
    return [Row("scale", f"{trials} trivial trials", values)]


def _run_study(study: Path, marks: Sequence[int] = ()) -> Values:
    """Runs a study as a person would; the time, and the driver's memory when so many trials had ended."""
    started, values = time.perf_counter(), Values()
    first = 0.0
    with _start("tune", "sweep", str(study)) as sweep:
        while sweep.poll() is None:
            ended = len(list((study.parent / "bench").glob("trials/*/end.json")))
            first = first or (time.perf_counter() - started if ended else 0.0)
            for mark in marks:
                if ended >= mark and f"MB at {mark}" not in values:
                    values[f"MB at {mark}"] = _resident_megabytes(sweep.pid)
            time.sleep(PERIOD)
    if sweep.returncode:
        raise RuntimeError(f"the study ended with exit code {sweep.returncode}; its words are above")
    return {"s": time.perf_counter() - started, "first trial s": first, **values}


def _start(module: str, *arguments: str, settings: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[bytes]:
    """A command with its output thrown away, and with settings in its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.DEVNULL, env=environment)


def _time(module: str, *arguments: str) -> float:
    started = time.perf_counter()
    with _start(module, *arguments) as process:
        process.wait()
    return time.perf_counter() - started


def _resident_megabytes(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# -- against a bare loop ----------------------------------------------------------------------------------------------


class Side:
    """Processes that have the machine now and then, with all that they start; and how long they had it."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.seconds = 0.0
        self._signal(signal.SIGSTOP)

    @property
    def runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def take_turn(self, look: Callable[[], None]) -> None:
        """Lets it run for a turn; `look` is called several times a second, with `seconds` up to date."""
        before, started = self.seconds, time.perf_counter()
        self._signal(signal.SIGCONT)
        while self.runs and self.seconds < before + TURN:
            time.sleep(LOOK)
            self.seconds = before + time.perf_counter() - started
            look()
        self._signal(signal.SIGSTOP)
        self.seconds = before + time.perf_counter() - started

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves none of them behind, stopped as they are, where something went wrong."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for pid in _descendants([process.pid for process in self.processes if process.poll() is None]):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _descendants(pids: Sequence[int]) -> list[int]:
    """The processes and all that came from them, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = status.read_text().rpartition(")")[2].split()[1]
            children[int(parent)].append(int(status.parent.name))
    found = list(pids)
    for pid in found:
        found += children[pid]
    return found


def _timed(kind: str, trials: int, seconds: float, workers: int) -> list[Row]:
    """A study of so many trials, so many at a time, against as many processes with its trials and nothing else."""
    steps = _steps_of(seconds)
    with tempfile.TemporaryDirectory() as place, ExitStack() as started:
        study = _write_study(Path(place), trials, steps, workers)
        script = started.enter_context(_scripts(study, workers, {}))
        tuned = started.enter_context(_scripts(study, workers, ENVIRONMENT))
        ours = started.enter_context(Side([_start("tune", "sweep", str(study))]))
        sides = [ours, script, tuned]
        span = _alternate(sides, study.parent / "bench" / "trials")
        _require_success(sides)
    values: Values = {"study s": span, "script s": script.seconds, "tuned script s": tuned.seconds}
    values |= {"whole command s": ours.seconds, "steps": steps}
    values |= {"extra %": _extra(span, script), "extra % of tuned": _extra(span, tuned)}
    values |= {"s a trial": script.seconds * workers / trials}  # the wish was an estimate
    values |= {"extra s a trial": (span - script.seconds) * workers / (trials + 1)}
    return [Row(kind, f"{trials} trials of {seconds:g} s", values)]


def _scripts(study: Path, workers: int, settings: Mapping[str, str]) -> Side:
    """A process for each worker, with its share of the study's trials."""
    share = ("experiments.bench.study", "--bare", str(study), "--share")
    return Side([_start(*share, str(number), settings=settings) for number in range(workers)])


def _extra(seconds: float, side: Side) -> float:
    """Percent beyond a side's time."""
    return 100 * (seconds / side.seconds - 1)


def _require_success(sides: Sequence[Side]) -> None:
    for process in (process for side in sides for process in side.processes):
        if process.returncode:
            raise RuntimeError(f"{process.args} ended with exit code {process.returncode}; its words are above")


def _alternate(sides: Sequence[Side], trials: Path) -> float:
    """Lets all run to their ends, the study's first; its seconds from its first trial's start to the last one's end."""
    ours = sides[0]
    marks: dict[str, float] = {}  # seconds at which a trial's file was first seen

    def look() -> None:  # finds nothing new in another's turn, and takes as long
        for file in trials.glob("*/*.json"):
            marks.setdefault(str(file), ours.seconds)

    while any(side.runs for side in sides):
        for side in (side for side in sides if side.runs):
            side.take_turn(look)
    started = min(seconds for file, seconds in marks.items() if file.endswith("trial.json"))
    return max(seconds for file, seconds in marks.items() if file.endswith("end.json")) - started


def _bare_loop(path: Path, share: int) -> None:
    """Trains one worker's share of a study's trials."""
    use_threads(1)
    study = load_study(path)
    searched = [study.configure({"optimizer.lr": 3e-3})] * study.configurations
    trials = list(enumerate([*map(study.baseline, study.baselines), *searched]))
    place = Path(tempfile.mkdtemp(dir=path.parent))
    for number, config in trials[share :: study.resources.concurrency]:
        for _ in train(config, load_dataset(config.data), place / str(number)):
            pass


def _steps_of(seconds: float) -> int:
    """How many steps take so long, in a process that has taken some before."""
    use_threads(1)
    with tempfile.TemporaryDirectory() as place:
        config = load_study(_write_study(Path(place), 1, TIMED_STEPS)).configure({})
        for attempt in ("first", "second"):
            reports = list(train(config, load_dataset(config.data), Path(place) / attempt))
    return max(1, round(seconds * reports[-1].steps_per_second))


if __name__ == "__main__":
    main()
