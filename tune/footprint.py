"""Memory of a trial's process: `python -m tune.footprint` reads a `Sketch` and takes two steps on random images."""

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpsink.config import Strict, TrialConfig
from dpsink.errors import InputError

if TYPE_CHECKING:  # it takes seconds
    from dpsink.data import LabelledImages

STEPS = 2


class Sketch(Strict):
    """A trial and the size of its data: all that its memory depends on. No image is looked at."""

    config: TrialConfig
    shape: tuple[int, int, int]
    num_classes: int
    records: int
    others: int  # validation and test images
    limit: int  # bytes that the process may take at most: it is to find out, not to bring the machine down


@dataclass(frozen=True)
class Footprint:
    """What a trial takes, in bytes: memory of its process at most, and on the disk."""

    memory: int
    files: int


def footprint(sketch: Sketch) -> Footprint:
    """Measures a trial in a process of its own.

    Raises:
        InputError: the trial cannot take a step.
    """
    command = [sys.executable, "-m", "tune.footprint"]
    done = subprocess.run(command, input=sketch.model_dump_json(), capture_output=True, text=True)
    if done.returncode:
        # Some libraries do not look whether they were given memory: they end by a signal, of a negative number.
        if done.returncode < 0 or "llocate memory" in done.stderr or "MemoryError" in done.stderr:
            raise InputError(
                f"a trial needs more than the {sketch.limit / 2**30:.1f} GiB that are free; make it smaller"
            )
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"a trial cannot take a step: {last}; make it smaller")
    memory, checkpoint = done.stdout.split()
    return Footprint(int(memory), int(checkpoint))


def _measure(sketch: Sketch) -> Footprint:
    """Takes steps here; the process is used up by that."""
    from dpsink.data import ImageData
    from dpsink.training import train, use_threads

    resource.setrlimit(resource.RLIMIT_DATA, (sketch.limit, sketch.limit))  # loading fails with other words
    use_threads(1)
    others = _random_images(sketch, sketch.others)
    data = ImageData("random", _random_images(sketch, sketch.records), others, others, "random")
    asked = iter(range(STEPS))
    with tempfile.TemporaryDirectory() as place:
        for _ in train(sketch.config, data, Path(place), should_stop=lambda: next(asked, None) is None):
            pass
        written = sum(path.stat().st_size for path in Path(place).rglob("*"))
    return Footprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, written)


def _random_images(sketch: Sketch, count: int) -> "LabelledImages":
    import torch

    from dpsink.data import LabelledImages

    images = torch.randint(0, 256, (count, *sketch.shape), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % sketch.num_classes, sketch.num_classes)


if __name__ == "__main__":
    found = _measure(Sketch.model_validate_json(sys.stdin.read()))
    print(found.memory, found.files)
