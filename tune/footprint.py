"""Memory of a trial's process: `python -m tune.footprint` reads a `Sketch` and takes two steps on random images."""

import resource
import subprocess
import sys
from dataclasses import dataclass

from dpsink.config import Strict, TrialConfig
from dpsink.errors import InputError

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
    """What a trial takes, in bytes: memory of its process at most, and of its checkpoint."""

    memory: int
    checkpoint: int


def footprint(sketch: Sketch) -> Footprint:
    """Measures a trial in a process of its own.

    Raises:
        InputError: the trial cannot take a step.
    """
    command = [sys.executable, "-m", "tune.footprint"]
    done = subprocess.run(command, input=sketch.model_dump_json(), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"a trial cannot take a step: {last}; make it smaller")
    memory, checkpoint = done.stdout.split()
    return Footprint(int(memory), int(checkpoint))


def _measure(sketch: Sketch) -> Footprint:
    """Takes steps here; the process is used up by that."""
    import torch

    from dpsink.config import Performance
    from dpsink.data import LabelledImages
    from dpsink.engine import Trial, initial_state, open_stack
    from dpsink.entropy import OsEntropy
    from dpsink.privacy.plan import derive_plan
    from dpsink.training import use_threads

    use_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (sketch.limit, sketch.limit))

    def random_images(count: int) -> LabelledImages:
        images = torch.randint(0, 256, (count, *sketch.shape), dtype=torch.uint8)
        return LabelledImages(images, torch.arange(count) % sketch.num_classes, sketch.num_classes)

    data, others = random_images(sketch.records), random_images(sketch.others)
    state = initial_state(sketch.config, data)
    stack = open_stack(sketch.config, data, Performance(), 1)
    stack.join(Trial(sketch.config, derive_plan(sketch.config, len(data)), state, OsEntropy()))
    for _ in range(STEPS):
        stack.step()
    weights = sum(tensor.nbytes for tensor in state.generator.state_dict().values())
    del others
    return Footprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, weights + state.moments.nbytes)


if __name__ == "__main__":
    found = _measure(Sketch.model_validate_json(sys.stdin.read()))
    print(found.memory, found.checkpoint)
