"""What a study costs beyond its trials: `python -m experiments.bench.study`.

`scale` runs many trivial trials through the whole path, Ray, search, ledgers, checkpoints and MLflow on sqlite: seconds
a trial, resident memory of the driver on the way, and how long `status` takes on the result. `overhead` compares
trials of a minute, one after the other, from the first one's start to the last one's end, with a script that does
nothing but train the same trials. Both run at the same time, each on a core of its own with all of its processes, and
once more with the cores exchanged: a shared machine's speed changes by more from one minute to the next than what is
to be measured.

The trials are real ones, only small. `--trials N` is the size of the first, `--seconds S` the length of a trial of
the second, `--only KIND` runs one part, `--quick` everything tiny (a smoke test), `--json PATH` keeps the numbers.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dpsink.data import load_dataset
from dpsink.training import train, use_threads
from experiments.bench.harness import Measurement, Row, measure, report
from tune.folder import StudyFolder
from tune.study import load_study

WORKERS = 2  # of the scale part
TIMED = 4  # trials of the overhead part
ENDED = "ended"  # file of the script that does nothing but train
TRIVIAL_STEPS, TIMED_STEPS = 2, 200
PERIOD = 0.5  # seconds between two looks at a study that runs
Values = dict[str, float | str]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; see the module."""
    arguments = _arguments(argv)
    if arguments.bare:
        return _bare_loop(arguments.bare)
    chosen = [one for one in _measurements(arguments) if arguments.only in (None, one.kind)]
    report(measure(chosen), arguments.json)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a study costs beyond its trials")
    parser.add_argument("--only", metavar="KIND", choices=["scale", "overhead"], help="scale or overhead")
    parser.add_argument("--trials", type=int, default=1000, help="of the scale part")
    parser.add_argument("--seconds", type=float, default=60, help="length of a trial of the overhead part")
    parser.add_argument("--quick", action="store_true", help="few trials, of a second: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measurements(arguments: argparse.Namespace) -> list[Measurement]:
    trials, seconds = (4, 1.0) if arguments.quick else (arguments.trials, arguments.seconds)
    return [
        Measurement("scale", f"{trials} trivial trials", partial(_scale, trials)),
        Measurement("overhead", f"{TIMED} trials of {seconds:g} s", partial(_overhead, TIMED, seconds)),
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


def _run_study(study: Path, marks: Sequence[int] = (), core: int | None = None) -> Values:
    """Runs a study as a person would; the time, and the driver's memory when so many trials had ended."""
    started, values = time.perf_counter(), Values()
    first = 0.0
    with _start("tune", "sweep", str(study), core=core) as sweep:
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


def _start(module: str, *arguments: str, core: int | None = None) -> subprocess.Popen[bytes]:
    """A command with its output thrown away, on one core where one is given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    bound = [] if core is None else ["taskset", "--cpu-list", str(core)]
    command = [*bound, sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def _time(module: str, *arguments: str) -> float:
    started = time.perf_counter()
    with _start(module, *arguments) as process:
        process.wait()
    return time.perf_counter() - started


def _resident_megabytes(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# -- against a bare loop ----------------------------------------------------------------------------------------------


def _overhead(trials: int, seconds: float) -> list[Row]:
    steps, cores = _steps_of(seconds), sorted(os.sched_getaffinity(0))[:2]
    pairs = [_side_by_side(trials, steps, *order) for order in (cores, cores[::-1])]
    ours, script = (sum(times) for times in zip(*pairs, strict=True))
    values: Values = {f"{name} s, turn {turn}": value for turn, pair in enumerate(pairs, 1)
                      for name, value in zip(("study", "script"), pair, strict=True)}  # fmt: skip
    values |= {"extra %": 100 * (ours / script - 1), "extra s a trial": (ours - script) / len(pairs) / trials}
    return [Row("overhead", f"{trials} trials of {seconds:g} s", values | {"steps": steps})]


def _side_by_side(trials: int, steps: int, core: int, other: int) -> tuple[float, float]:
    """Seconds of a study's trials on one core, and of a script that trains the same ones on the other meanwhile."""
    with tempfile.TemporaryDirectory() as place:
        study = _write_study(Path(place), trials, steps, workers=1)
        started = time.time()
        with _start("experiments.bench.study", "--bare", str(study), core=other) as script:
            _run_study(study, core=core)
        if script.returncode:
            raise RuntimeError(f"the script ended with exit code {script.returncode}; its words are above")
        return _span(StudyFolder(study.parent / "bench")), (Path(place) / ENDED).stat().st_mtime - started


def _span(folder: StudyFolder) -> float:
    """Seconds from the first trial's start to the last one's end."""
    begun = [(folder.trial(trial.name) / "trial.json").stat().st_mtime for trial in folder.trials()]
    ended = [(folder.trial(trial.name) / "end.json").stat().st_mtime for trial in folder.trials()]
    return max(ended) - min(begun)


def _bare_loop(path: Path) -> None:
    """Trains the trials of a study, and says by a file when it has."""
    use_threads(1)
    study = load_study(path)
    searched = [study.configure({"optimizer.lr": 3e-3})] * study.configurations
    for number, config in enumerate([*map(study.baseline, study.baselines), *searched]):
        for _ in train(config, load_dataset(config.data), path.parent / f"bare-{number}"):
            pass
    (path.parent / ENDED).touch()


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
