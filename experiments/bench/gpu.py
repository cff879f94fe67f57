"""Checks and timings on a CUDA GPU: `python -m experiments.bench.gpu`, under eight minutes.

Without a GPU every row that needs one says "not measured"; the checks that do not are run on the CPU.
`--quick` does everything tiny (a smoke test), `--json PATH` keeps the numbers.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dpsink.config import Performance
from dpsink.data import to_unit
from dpsink.graphs import EAGER_RUNS, StaticStep
from experiments.bench.checks import checks
from experiments.bench.convolutions import generator_passes
from experiments.bench.harness import QUICK, Effort, Measurement, Row, measure, medians, report, versus
from experiments.bench.plain import Batch, plain_trial
from experiments.bench.subjects import PAPER, RECORD, Setting, random_images, stack_of

LONG = Effort(rounds=25, seconds=3, fewest=5)
SLOTS = 16  # of the stack that is held against processes
PROCESSES = 4  # eager ones, side by side: the GPU slices its time between them
WARM_STEPS = 60  # the usual widths of the batch are recorded in them
RATE_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; see the module."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    use_tf32(False)
    if arguments.eager_process:
        return eager_process(_settings(arguments.quick)[arguments.eager_process])
    report(measure([*checks(_device(), arguments.quick), *timings(arguments.quick)]), arguments.json)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="checks and timings on a CUDA GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--eager-process", choices=["batch", "record"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_tf32(on: bool) -> None:
    """Short products in matrix products and convolutions, as `dpsink.training` sets it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def _settings(quick: bool) -> dict[str, Setting]:
    tiny = {"shape": (1, 8, 8), "hidden": 4, "n": 20, "batch": 60, "records": 2000} if quick else {}
    return {setting.mechanism: replace(setting, **tiny) for setting in (PAPER, RECORD)}


def timings(quick: bool) -> list[Measurement]:
    """All timings; none is possible without a GPU."""
    effort, found = (QUICK if quick else LONG), []
    for narrow in _settings(quick).values():
        for setting in (narrow, replace(narrow, hidden=64)):
            found += [
                _timing("one trial", setting, partial(one_trial, setting, effort)),
                _timing("pieces", setting, partial(pieces, setting, effort)),
                _timing("rate", setting, partial(rates, setting, effort)),
                _timing("memory", setting, partial(memory, setting)),
            ]
        found.append(_timing("processes", narrow, partial(against_processes, narrow, effort, quick)))
    for hidden in (16, 64):
        setting = replace(_settings(quick)["batch"], hidden=hidden)
        found.append(_timing("generators", setting, partial(generators, setting, effort)))
    return found


def _timing(kind: str, setting: Setting, values: Callable[[], dict[str, dict[str, float | str]]]) -> Measurement:
    """A measurement that gives the values of one or more variants of a setting."""

    def run() -> list[Row]:
        return [Row(kind, f"{setting} {variant}".strip(), found) for variant, found in values().items()]

    return Measurement(kind, str(setting), run, torch.cuda.is_available())


def _warm_stack(setting: Setting, slots: int = 1, precision: str = "single") -> "Warm":
    return Warm(setting, slots, Performance.model_validate({"device": "cuda", "precision": precision}))


class Warm:
    """A stack on the GPU whose steps are recorded."""

    def __init__(self, setting: Setting, slots: int, performance: Performance) -> None:
        gc.collect()  # stacks before this one, whose recordings hold memory
        torch.cuda.empty_cache()
        self.stack = stack_of(setting, slots, performance)
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        for _ in range(WARM_STEPS):
            self.stack.step()
        torch.cuda.synchronize()
        self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()


def one_trial(setting: Setting, effort: Effort) -> dict[str, dict[str, float | str]]:
    """A recorded trial against the plain one, whose batch is already on the GPU: it gets its data for nothing."""
    ours, theirs = _warm_stack(setting).stack.step, _plain_on_gpu(setting)
    found = versus(ours, theirs, effort, synchronise=torch.cuda.synchronize)
    return {"": found | {"target": "≥ 10"}}


def _plain_on_gpu(setting: Setting) -> Callable[[], object]:
    data, trial = random_images(setting.records, setting.shape), plain_trial(setting, "cuda")
    images = to_unit(data.images[: setting.batch].flatten(1)).cuda()
    batch = Batch(images, data.labels[: setting.batch].cuda())
    return lambda: trial.step(batch)


def pieces(setting: Setting, effort: Effort) -> dict[str, dict[str, float | str]]:
    """The host's draws, the recording, and both: whichever is longer bounds a loop that overlaps them."""
    found = {}
    for slots in (1, SLOTS):
        stack = _warm_stack(setting, slots).stack
        inputs = stack._draw()
        for _ in range(EAGER_RUNS + 1):
            stack._step(inputs)
        parts = {"draw": stack._draw, "recording": partial(stack._step, inputs), "step": stack.step}
        found[f"K {slots}"] = medians(parts, effort, torch.cuda.synchronize)
    return found


def rates(setting: Setting, effort: Effort) -> dict[str, dict[str, float | str]]:
    """Trial-steps a second with and without TF32."""
    found = {}
    for slots in (1, SLOTS):
        steps = {"float32": _recorded_with(setting, slots, False), "tf32": _recorded_with(setting, slots, True)}
        taken = medians(steps, effort, torch.cuda.synchronize)
        per_second = {f"{name} trial-steps/s": slots * 1000 / float(taken[f"{name} ms"]) for name in steps}
        found[f"K {slots}"] = taken | per_second
    return found


def _recorded_with(setting: Setting, slots: int, tf32: bool) -> Callable[[], object]:
    """A warm stack's step; which kernels it uses was settled when it was recorded."""
    use_tf32(tf32)
    step = _warm_stack(setting, slots, "tf32" if tf32 else "single").stack.step
    use_tf32(False)
    return step


def memory(setting: Setting) -> dict[str, dict[str, float | str]]:
    """Peak of a step beyond model, optimiser and data, and everything that PyTorch holds, recordings included."""
    found = {}
    for slots in (1, SLOTS):
        warm = _warm_stack(setting, slots)
        n, m, d = setting.n, setting.batch, setting.shape[0] * setting.shape[1] * setting.shape[2]
        bounds = {"K·n·m·d MB": 4e-6 * slots * n * m * d, "K·(n·m + n·d) MB": 4e-6 * slots * n * (m + d)}
        found[f"K {slots}"] = {"step MB": (warm.peak - warm.before) / 1e6, "held MB": warm.reserved / 1e6, **bounds}
    return found


def against_processes(setting: Setting, effort: Effort, quick: bool) -> dict[str, dict[str, float | str]]:
    """Trial-steps a second of one stack, and of eager processes that share the GPU, one trial each."""
    taken = medians({"stack": _warm_stack(setting, SLOTS).stack.step}, effort, torch.cuda.synchronize)
    ours, theirs = SLOTS * 1000 / float(taken["stack ms"]), _rate_of_processes(setting, quick)
    values: dict[str, float | str] = {f"stack of {SLOTS}, per s": ours, f"{PROCESSES} processes, per s": theirs}
    return {"": values | {"ratio": ours / theirs, "target": "≥ 20"}}


def _rate_of_processes(setting: Setting, quick: bool) -> float:
    """Starts them, waits until all are warm, and lets them run at once."""
    command = [sys.executable, "-m", "experiments.bench.gpu", "--eager-process", setting.mechanism]
    command += ["--quick"] if quick else []
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    return sum(float(told) for told in _let_go(workers))


def _let_go(workers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Sends each the line that it waits for, before any is read: they run at the same time."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return [worker.communicate()[0] for worker in workers]


def eager_process(setting: Setting) -> None:
    """One process of the above: says that it is ready, waits for a line, and prints its steps a second."""
    step = _plain_on_gpu(setting)
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < RATE_SECONDS:
        step()
        steps += 1
    torch.cuda.synchronize()
    print(steps / (time.perf_counter() - started), flush=True)


def generators(setting: Setting, effort: Effort) -> dict[str, dict[str, float | str]]:
    """Forward and backward pass of K generators, each way recorded as a graph."""
    found = {}
    for slots in (1, 4, SLOTS):
        ways = {name: _recorded(one) for name, one in generator_passes(setting, slots, "cuda").items()}
        found[f"K {slots}"] = medians(ways, effort, torch.cuda.synchronize)
    return found


def _recorded(function: Callable[[], object]) -> Callable[[], object]:
    """Replays of a function without inputs."""
    step = StaticStep(lambda _: (function(), None)[1], torch.device("cuda"))
    for _ in range(EAGER_RUNS + 1):
        step(())
    return partial(step, ())


if __name__ == "__main__":
    main()
