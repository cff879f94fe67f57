"""Memory of a trial's process: `python -m tune.footprint` reads a `Sketch`, and trains a little on random images."""

import math
import resource
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpsink.config import Strict, TrialConfig
from dpsink.errors import InputError
from tune.study import Resources

if TYPE_CHECKING:  # it takes seconds
    from dpsink.data import ImageData, LabelledImages

STEPS = 2
STARVED = ("llocate memory", "MemoryError", "could not create a primitive")  # words of PyTorch, Python and oneDNN
CLIENT = 200 * 2**20  # bytes of the process of a trial that an engine trains: 180 MB were measured
CONTEXT = 700 * 2**20  # bytes of a GPU that a process takes for CUDA's context and libraries: assumed, not measured


class Sketch(Strict):
    """Trials and the size of their data: all that their memory depends on. No image is looked at."""

    configs: tuple[TrialConfig, ...]  # one after the other, the largest counts; the last is evaluated, too
    slots: int  # trials of each, side by side in the process
    padded: bool  # whether steps have fixed shapes, as on a GPU
    shape: tuple[int, int, int]
    num_classes: int
    records: int
    validation: int
    test: int
    limit: int  # bytes that the process may take at most: it is to find out, not to bring the machine down


@dataclass(frozen=True)
class Footprint:
    """What a process that trains takes, in bytes.

    Attributes:
        memory: at most.
        tensors: the part of it that images, weights, steps and scores take; on a GPU they lie in its memory.
        files: on the disk, of one trial.
    """

    memory: int
    tensors: int
    files: int


def host_need(taken: Footprint, resources: Resources, trials: int) -> int:
    """Bytes of a node's memory that so many trials at a time need."""
    if resources.sharing == 1:
        return trials * taken.memory
    engines = math.ceil(trials / resources.per_gpu) if resources.gpu else min(trials, 1)
    return engines * taken.memory + trials * CLIENT


def gpu_need(taken: Footprint, resources: Resources) -> int:
    """Bytes of one GPU's memory that the trials on it need: in one engine, or each in a process of its own."""
    at_once = min(resources.per_gpu, resources.concurrency or resources.per_gpu)
    processes = 1 if resources.sharing > 1 else at_once
    return processes * (CONTEXT + taken.tensors)


def footprint(sketch: Sketch) -> Footprint:
    """Measures a trial in a process of its own.

    Raises:
        InputError: the trial cannot take a step.
    """
    command = [sys.executable, "-m", "tune.footprint"]
    done = subprocess.run(command, input=sketch.model_dump_json(), capture_output=True, text=True)
    if done.returncode:
        # Some libraries do not look whether they were given memory: they end by a signal, of a negative number.
        if done.returncode < 0 or any(words in done.stderr for words in STARVED):
            raise InputError(
                f"a trial needs more than the {sketch.limit / 2**30:.1f} GiB that are free; make it smaller"
            )
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"a trial cannot take a step: {last}; make it smaller")
    return Footprint(*map(int, done.stdout.split()))


def _measure(sketch: Sketch) -> Footprint:
    """Takes steps here; the process is used up by that."""
    import dpsink.privacy.bounds  # noqa: F401 (of a trial whose accounting is not on its node's disk)
    import tune.trainable  # noqa: F401 (a trial's process holds it too)
    from dpsink.data import ImageData
    from dpsink.training import use_threads

    resource.setrlimit(resource.RLIMIT_DATA, (sketch.limit, sketch.limit))  # loading fails with other words
    use_threads(1)
    before = _peak()
    train, validation, test = (_random_images(sketch, n) for n in (sketch.records, sketch.validation, sketch.test))
    data = ImageData("random", train, validation, test, "random")
    last = sketch.configs[-1]
    written = max(_train(config, sketch, data, evaluate=config == last) for config in sketch.configs)
    return Footprint(_peak(), _peak() - before, written)


def _train(config: TrialConfig, sketch: Sketch, data: "ImageData", *, evaluate: bool) -> int:
    """Takes the first steps of trials side by side, and may evaluate one; returns the bytes that one wrote."""
    from dpsink.config import Performance
    from dpsink.training import TrialRun, train_together

    performance = Performance(threads=1, slots=sketch.slots, graphs="on" if sketch.padded else "auto")
    asked = iter(range(STEPS))
    with tempfile.TemporaryDirectory() as place, ExitStack() as opened:
        folders = [Path(place) / str(slot) for slot in range(sketch.slots)]
        runs = [opened.enter_context(TrialRun.open(config, data, folder)) for folder in folders]
        for _ in train_together(runs, performance=performance, should_stop=lambda: next(asked, None) is None):
            pass
        if evaluate:  # takes more than a step, in memory and in time; one at a time
            runs[0].report()
        return sum(path.stat().st_size for path in folders[0].rglob("*"))


def _peak() -> int:
    """Bytes of memory that this process has had at most; what `getrusage` tells is also of who started it."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _random_images(sketch: Sketch, count: int) -> "LabelledImages":
    """The same ones each time, so that what is kept of them in caches is kept once."""
    import torch

    from dpsink.data import LabelledImages

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *sketch.shape), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(count) % sketch.num_classes, sketch.num_classes)


if __name__ == "__main__":
    found = _measure(Sketch.model_validate_json(sys.stdin.read()))
    print(found.memory, found.tensors, found.files)
