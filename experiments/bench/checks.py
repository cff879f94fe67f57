"""What has to hold on any device before its speed is worth a word. Each check gives the rows of a table.

Steps are compared through `StepInputs`: drawn once, by one stack, and given to another, moved or sliced. So the noise
is the same on both sides, and no source of entropy has to be replaced.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dpsink.config import Performance
from dpsink.engine import StepInputs, TrialStack, bucket
from dpsink.entropy import OsEntropy
from dpsink.graphs import StaticStep
from dpsink.privacy.noise import fresh_noise
from experiments.bench.agreement import our_gradients, random_case
from experiments.bench.harness import Measurement, Row
from experiments.bench.subjects import PAPER, RECORD, Setting, stack_of

STEPS = 16  # so that, whatever widths the batches have, one of at most five is met often enough to be recorded
TAIL = 5.77  # where float32 generators stop
TAIL_PROBABILITY = math.erfc(TAIL / math.sqrt(2))
CHUNK = 10**8  # draws at once: 0.8 GB
EXACT, SINGLE = 1e-10, 5e-4


def checks(device: str, quick: bool) -> list[Measurement]:
    """All checks; those that need a GPU are not possible without one."""
    gpu = device != "cpu"
    small = {"shape": (1, 8, 8), "hidden": 4, "n": 20, "batch": 60, "records": 2000}
    shapes = [replace(kind, **small) for kind in (PAPER, RECORD)]
    if gpu and not quick:  # on a CPU, where nothing is recorded, they would take minutes
        shapes += [PAPER, replace(PAPER, cost="l2"), RECORD, replace(RECORD, shape=(3, 32, 32), batch=1500)]
    draws = 10**6 if quick or not gpu else 5 * 10**9
    found: list[Measurement] = []
    for setting in shapes:
        found += [
            _check(f"CPU = device, float64, {setting}", partial(devices_differ, setting, device), EXACT, gpu),
            _check(f"recorded = eager, float64, {setting}", partial(recording_differs, setting, device), EXACT),
            _check(f"K 3 = singles, float64, {setting}", partial(stacking_differs, setting, device), EXACT),
            _check(f"float32 = float64, TF32 off, {setting}", partial(precision_differs, setting, device), SINGLE, gpu),
        ]
    noise = Measurement("checks", "noise", partial(noise_is_normal, device, draws))
    return [*found, Measurement("checks", "buckets", bucket_count), noise]


def _check(what: str, difference: Callable[[], float], bound: float, possible: bool = True) -> Measurement:
    return Measurement("checks", what, lambda: [_verdict(what, difference(), 0, bound)], possible)


def _verdict(what: str, value: float, low: float, high: float) -> Row:
    passed = low <= value <= high  # False for a NaN
    return Row("checks", what, {"value": value, "allowed": f"{low:.4g} to {high:.4g}", "passed": str(passed)})


def devices_differ(setting: Setting, device: str) -> float:
    """Weights and statistics after steps on the CPU and on the device."""
    here, there = (stack_of(setting, 2, Performance(device=one, precision="double")) for one in ("cpu", device))
    for inputs in drawn_steps(here):
        here._pure_step(inputs)
        there._pure_step(_each(inputs, lambda one: one.to(device)))
    return _distance(here, there)


def recording_differs(setting: Setting, device: str) -> float:
    """The same steps through `StaticStep`, which records them on a GPU, and without it."""
    performance = Performance(device=device, precision="double", graphs="on")
    recorded, eager = stack_of(setting, 2, performance), stack_of(setting, 2, performance)
    for inputs in drawn_steps(recorded):
        recorded._step(inputs)
        eager._pure_step(inputs)
    assert isinstance(recorded._step, StaticStep)
    graphs = [shape.graph for shape in recorded._step._shapes.values()]
    if device != "cpu" and not any(graphs):
        raise RuntimeError("no step was recorded: the batches had too many widths")
    return _distance(recorded, eager)


def stacking_differs(setting: Setting, device: str) -> float:
    """Three trials on a stack, and the same three alone."""
    performance = Performance(device=device, precision="double")
    together = stack_of(setting, 3, performance)
    alone = [stack_of(setting, 1, performance) for _ in range(3)]
    for slot, stack in enumerate(alone):
        stack.generators.weights.copy_(together.generators.weights[slot])
    for inputs in drawn_steps(together):
        together._pure_step(inputs)
        for slot, stack in enumerate(alone):
            stack._pure_step(_each(inputs, lambda one, slot=slot: one[slot : slot + 1]))
    return max(_distance(stack, together, slot) for slot, stack in enumerate(alone))


def precision_differs(setting: Setting, device: str) -> float:
    """Relative distance of a step's weight gradient on the device in float32 from the CPU's in float64."""
    case = random_case(setting)
    exact = our_gradients(setting, case).weights
    single = our_gradients(setting, case.moved(device, torch.float32)).weights.cpu().double()
    return float((single - exact).norm() / exact.norm())


def bucket_count() -> list[Row]:
    """Shapes, each a recording, that batches within six standard deviations of their mean meet."""
    shapes = {
        batch: len({bucket(rows) for rows in range(*_six_deviations(batch))}) for batch in (50, 600, 2000, 10_000)
    }
    return [_verdict(f"recordings at B {batch}", count, 1, 6) for batch, count in shapes.items()]


def _six_deviations(batch: int) -> tuple[int, int]:
    spread = 6 * math.sqrt(batch)
    return max(0, int(batch - spread)), int(batch + spread)


def noise_is_normal(device: str, draws: int) -> list[Row]:
    """Standard deviation, Kolmogorov-Smirnov distance and tail of the mechanism's noise."""
    entropy = OsEntropy()
    sample = fresh_noise(entropy, device)((10**6,))
    rows = [
        # Five and 1.95 standard errors: a false alarm in a million, and in a thousand.
        _verdict("noise, standard deviation", float(sample.std()), 1 - 5 / math.sqrt(2e6), 1 + 5 / math.sqrt(2e6)),
        _verdict("noise, Kolmogorov-Smirnov · √n", _kolmogorov_smirnov(sample), 0, 1.95),
    ]
    what, expected = f"noise, draws beyond {TAIL} of {draws:.0e}", draws * TAIL_PROBABILITY
    if expected < 10:
        return [*rows, Row("checks", what, {})]
    noise = fresh_noise(entropy, device)
    chunks = (noise((CHUNK,)) for _ in range(draws // CHUNK))
    beyond, spread = sum(int((chunk.abs() > TAIL).sum()) for chunk in chunks), 5 * math.sqrt(expected)
    return [*rows, _verdict(what, beyond, expected - spread, expected + spread)]


def _kolmogorov_smirnov(sample: Tensor) -> float:
    expected = torch.special.ndtr(sample.sort().values)
    steps = torch.arange(len(sample) + 1, dtype=sample.dtype, device=sample.device) / len(sample)
    return float(torch.maximum((expected - steps[:-1]).max(), (steps[1:] - expected).max())) * math.sqrt(len(sample))


def drawn_steps(stack: TrialStack, count: int = STEPS) -> Iterable[StepInputs]:
    """Inputs of the steps ahead of a stack, which takes none of them itself."""
    for _ in range(count):
        yield stack._draw()
        for trial in stack._present():
            trial.state.step += 1  # the schedule's position, which Adam's corrections depend on


def _each(inputs: StepInputs, function: Callable[[Tensor], Tensor]) -> StepInputs:
    return StepInputs(*(None if one is None else function(one) for one in inputs))  # pyright: ignore[reportArgumentType]


def _distance(one: TrialStack, other: TrialStack, slot: int | None = None) -> float:
    """Largest difference of weights and statistics; of one slot of the other, where given."""
    rows = slice(None) if slot is None else slice(slot, slot + 1)
    pairs = [(one.generators.weights, other.generators.weights[rows])]
    pairs += [(mine, other.generators.buffers[name][rows]) for name, mine in one.generators.buffers.items()]
    return max(float((a.detach().cpu().double() - b.detach().cpu().double()).abs().max()) for a, b in pairs)
