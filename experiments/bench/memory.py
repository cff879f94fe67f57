"""Peak memory of one step, in a process of its own: `python -m experiments.bench.memory ours '{"n": 100}'`.

Counted is what the process grows by while it takes one step, by the kernel's high-water mark of resident memory:
tensors, NumPy arrays and the scratch space of the convolutions alike (PyTorch's own profiler misses the last two).
Model, optimiser, data and everything that the first steps leave behind are there before and do not count.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from experiments.bench.subjects import Setting

# Freed blocks of more than 64 KiB go back to the kernel at once, so that they cannot hide the next step's.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM_STEPS, COUNTED_STEPS = 3, 3


def measurable() -> bool:
    """Whether the system has a high-water mark that can be reset: Linux."""
    return CLEAR.exists()


def peak_megabytes(who: str, setting: Setting) -> float:
    """What a step of ours, or of plain's, takes beyond what was there before it, in MB."""
    command = [sys.executable, "-m", "experiments.bench.memory", who, json.dumps(asdict(setting))]
    answer = subprocess.run(command, env={**os.environ, **GIVE_BACK}, capture_output=True, text=True, check=True)
    return float(answer.stdout)


def _growth_of(step: Callable[[], object]) -> int:
    """Bytes between the resident memory before a step and its peak in it; the largest of some steps."""
    for _ in range(WARM_STEPS):
        step()
    return max(_one(step) for _ in range(COUNTED_STEPS))


def _one(step: Callable[[], object]) -> int:
    CLEAR.write_text("5")  # sets the high-water mark to the present size
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _stepper(who: str, setting: Setting) -> Callable[[], object]:
    from experiments.bench.contest import our_step, plain_step

    return our_step(setting) if who == "ours" else plain_step(setting)


if __name__ == "__main__":
    fields = json.loads(sys.argv[2])
    print(_growth_of(_stepper(sys.argv[1], Setting(**{**fields, "shape": tuple(fields["shape"])}))) / 1e6)
