"""Our step against the plain one, on one CPU thread: `python -m experiments.bench.step`.

Everything that `experiments/bench/README.md` lists, in turns and in one process, in about a quarter of an hour.
`--only KIND` runs one part, `--quick` everything tiny (a smoke test), `--json PATH` keeps the numbers.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpsink.privacy.mechanism import Generated
from dpsink.sinkhorn import Points
from experiments.bench.agreement import differences, random_case
from experiments.bench.contest import our_step, plain_step
from experiments.bench.convolutions import generator_passes
from experiments.bench.harness import (
    QUICK,
    Effort,
    Measurement,
    Row,
    fitted_exponent,
    measure,
    medians,
    report,
    versus,
)
from experiments.bench.memory import measurable, peak_megabytes
from experiments.bench.plain import Batch, plain_trial
from experiments.bench.subjects import PAPER, PRESET, RECORD, Setting, stack_of
from experiments.bench.unprotected import UnprotectedStack

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
SLOTS = [1, 2, 4, 8, 16]
LONG = Effort(rounds=15, seconds=6, fewest=5)
HEAVY = Effort(rounds=5, seconds=8, fewest=3)  # of steps that take seconds
TARGETS = {16: "≥ 2.5", 64: "≥ 1.25"}  # of the whole step at 28×28, by hidden


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes; see the module."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    chosen = [one for one in measurements(arguments.quick) if arguments.only in (None, one.kind)]
    report(measure(chosen), arguments.json)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="our step against the plain one, on one CPU thread")
    parser.add_argument("--only", metavar="KIND", choices=list(_PARTS), help=f"one of {', '.join(_PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    return parser.parse_args(argv)


def measurements(quick: bool) -> list[Measurement]:
    """All parts, in the order of the README."""
    return [one for part in _PARTS.values() for one in part(quick)]


def _tiny(setting: Setting) -> Setting:
    return replace(setting, shape=(1, 8, 8), hidden=2, n=10, batch=20, records=2000)


def _settings(quick: bool, *settings: Setting) -> list[Setting]:
    return list(dict.fromkeys(_tiny(setting) for setting in settings)) if quick else list(settings)


def _effort(quick: bool, effort: Effort) -> Effort:
    return QUICK if quick else effort


# -- against the plain step -------------------------------------------------------------------------------------------


def _agreement(quick: bool) -> list[Measurement]:
    """Float64, same inputs: what is compared below computes the same."""

    def run(setting: Setting) -> list[Row]:
        found: dict[str, float | str] = {**differences(setting), "target": "loss < 1e-10, gradient < 1e-9"}
        return [Row("agreement", str(setting), found)]

    settings = _settings(quick, PAPER, replace(PAPER, shape=(3, 32, 32)), RECORD, PRESET)
    return [Measurement("agreement", str(setting), partial(run, setting)) for setting in settings]


def _loss(quick: bool) -> list[Measurement]:
    """2·OT(X, Y) − OT(X, X') and its gradients in the images, without the generator."""

    def run(setting: Setting) -> list[Row]:
        found = versus(_our_loss(setting), _plain_loss(setting), _effort(quick, LONG))
        return [Row("loss", str(setting), found | {"target": "≥ 5"})]

    settings = _settings(quick, *(replace(PAPER, shape=shape) for shape in SHAPES), replace(PAPER, cost="l2", blur=5))
    return [Measurement("loss", str(setting), partial(run, setting)) for setting in settings]


def _our_loss(setting: Setting) -> Callable[[], object]:
    case, numbers = random_case(setting).moved("cpu", torch.float32), stack_of(setting).numbers
    assert numbers is not None
    flat, labels, n = case.generator(case.latents, case.labels).detach().flatten(1)[None], case.labels[None], setting.n
    x, x_tilde = Points(flat[:, :n], labels[:, :n]), Points(flat[:, n:], labels[:, n:])
    real = Points(case.real.images[None], case.real.labels[None])
    return lambda: numbers.mechanism.query(Generated.of(x, x_tilde, numbers.problem), real)


def _plain_loss(setting: Setting) -> Callable[[], object]:
    case, loss = random_case(setting).moved("cpu", torch.float32), plain_trial(setting).loss
    flat, n = case.generator(case.latents, case.labels).detach().flatten(1), setting.n
    real = Batch(case.real.images.float() / 127.5 - 1, case.real.labels)
    x, x_tilde = (Batch(flat[rows].requires_grad_(), case.labels[rows]) for rows in (slice(n), slice(n, None)))

    def run() -> object:
        value = 2 * loss.transport(x, real) - loss.debiasing(x, x_tilde)
        return torch.autograd.grad(value, [x.images, x_tilde.images])

    return run


def _step(quick: bool) -> list[Measurement]:
    """Data, accounting and the whole step, for every size, generator width and mechanism."""

    def run(setting: Setting) -> list[Row]:
        found = versus(our_step(setting), plain_step(setting), _effort(quick, LONG))
        aimed = setting.mechanism == "batch" and setting.shape == (1, 28, 28)
        return [Row("step", str(setting), found | ({"target": TARGETS[setting.hidden]} if aimed else {}))]

    all_of_them = [
        replace(kind, shape=shape, hidden=hidden) for kind in (PAPER, RECORD) for shape in SHAPES for hidden in (16, 64)
    ]
    settings = _settings(quick, *all_of_them, PRESET)
    return [Measurement("step", str(setting), partial(run, setting)) for setting in settings]


# -- what protection, stacking and size cost --------------------------------------------------------------------------


def _record(quick: bool) -> list[Measurement]:
    """Clipping each record and drawing the noise, as a factor on the step that does neither."""

    def run(setting: Setting) -> list[Row]:
        ours, bare = stack_of(setting), stack_of(setting, kind=UnprotectedStack)
        found = versus(bare.step, ours.step, _effort(quick, LONG), names=("unprotected", "protected"))
        return [Row("record", str(setting), found | {"target": "≤ 1.3"})]

    settings = _settings(quick, RECORD, PRESET)
    return [Measurement("record", str(setting), partial(run, setting)) for setting in settings]


def _parts(quick: bool) -> list[Measurement]:
    """Where the time of our step goes."""

    def run(setting: Setting) -> list[Row]:
        return [Row("parts", str(setting), medians(_parts_of(setting), _effort(quick, LONG)))]

    settings = _settings(quick, PAPER, RECORD, PRESET)
    return [Measurement("parts", str(setting), partial(run, setting)) for setting in settings]


def _parts_of(setting: Setting) -> dict[str, Callable[[], object]]:
    stack = stack_of(setting)
    inputs, numbers = stack._draw(), stack.numbers
    assert numbers is not None
    flat = stack.generators(inputs.latents, inputs.labels, [True] * stack.slots).detach().flatten(2)
    x, x_tilde = (Points(flat[:, rows], inputs.labels[:, rows]) for rows in (slice(stack.n), slice(stack.n, None)))
    generated, gradient = Generated.of(x, x_tilde, numbers.problem), torch.randn_like(stack.generators.weights)

    def generate() -> torch.Tensor:
        return stack.generators(inputs.latents, inputs.labels, [True] * stack.slots)

    def learn() -> torch.Tensor:
        images = generate()
        return stack.generators.backward(images, images.detach(), inputs.active)

    return {
        "whole": stack.step, "all draws": stack._draw, "noise": lambda: stack._draw_noise(0),
        "forward": generate, "forward + backward": learn,
        "public OT": lambda: Generated.of(x, x_tilde, numbers.problem),
        "private query": lambda: numbers.mechanism.query(generated, stack._members(inputs)),
        "Adam": lambda: stack.adam.step(gradient, inputs.rates, inputs.active),
    }  # fmt: skip


def _stack(quick: bool) -> list[Measurement]:
    """K trials on one stack against K stacks of one; a ratio below 1 says that stacking does not pay here."""

    def run(setting: Setting, slots: int) -> list[Row]:
        stacked, singles = stack_of(setting, slots), [stack_of(setting) for _ in range(slots)]
        found = versus(
            stacked.step, lambda: [one.step() for one in singles], _effort(quick, HEAVY), names=("stacked", "singles")
        )
        rate = {"trial-steps/s": slots * 1000 / float(found["stacked ms"])}
        return [Row("stack", f"{setting} K {slots}", found | rate)]

    settings = _settings(quick, *(replace(kind, shape=shape) for kind in (PAPER, RECORD) for shape in SHAPES))
    plan = [(setting, slots) for setting in settings for slots in (SLOTS[:2] if quick else SLOTS)]
    wide = [] if quick else [(replace(kind, hidden=64), slots) for kind in (PAPER, RECORD) for slots in SLOTS[:3]]
    return [
        Measurement("stack", f"{setting} K {slots}", partial(run, setting, slots)) for setting, slots in plan + wide
    ]


def _generators(quick: bool) -> list[Measurement]:
    """Forward and backward pass of K generators: one by one, one grouped convolution, batched products and fold."""

    def run(setting: Setting, slots: int) -> list[Row]:
        found = medians(generator_passes(setting, slots), _effort(quick, HEAVY))
        return [Row("generators", f"{setting} K {slots}", found)]

    (setting,) = _settings(quick, PAPER)
    plan = [(setting, slots) for slots in (SLOTS[:2] if quick else SLOTS)]
    wide = [] if quick else [(replace(setting, hidden=64), slots) for slots in SLOTS[:3]]
    return [
        Measurement("generators", f"{setting} K {slots}", partial(run, setting, slots))
        for setting, slots in plan + wide
    ]


def _growth(quick: bool) -> list[Measurement]:
    """Time of our step over n, B and N; the exponent is that of the best fitting power."""

    def run(kind: str, settings: Sequence[Setting], sizes: Sequence[int]) -> list[Row]:
        found = medians(
            {str(one): stack_of(setting).step for one, setting in zip(sizes, settings, strict=True)}, effort
        )
        exponent = fitted_exponent(sizes, [float(ms) for ms in found.values()])
        return [Row(kind, settings[0].mechanism, {"exponent": exponent, **found})]

    effort = _effort(quick, LONG)

    plan: list[Measurement] = []
    for base, field, sizes in _GROWTHS:
        (setting,), sizes = _settings(quick, base), ([20, 40] if quick else sizes)
        settings = [replace(setting, **{field: size}) for size in sizes]
        kind = f"growth with {field}"
        plan.append(Measurement("growth", f"{base.mechanism} over {field}", partial(run, kind, settings, sizes)))
    return plan


_GROWTHS = [
    (PAPER, "n", [25, 50, 100, 200, 400]),
    (RECORD, "n", [25, 50, 100, 200, 400]),
    (PAPER, "batch", [25, 50, 100, 200, 400]),
    (RECORD, "batch", [250, 500, 1000, 2000, 4000]),
    (replace(PAPER, hidden=4), "records", [10_000, 100_000, 1_000_000]),
    (replace(RECORD, hidden=4), "records", [10_000, 100_000, 1_000_000]),
]


def _memory(quick: bool) -> list[Measurement]:
    """Peak of one step beyond model, optimiser and data; n·m·d and n·m + n·d are in float32 numbers."""

    def run(setting: Setting) -> list[Row]:
        n, m, d = setting.n, setting.batch, int(np.prod(setting.shape))
        ours, plain = (peak_megabytes(who, setting) for who in ("ours", "plain"))
        bounds = {"n·m·d MB": 4e-6 * n * m * d, "n·m + n·d MB": 4e-6 * n * (m + d)}
        return [Row("memory", str(setting), {"ours MB": ours, "plain MB": plain, **bounds})]

    sizes = [(8, 400), (16, 400), (28, 400), (40, 400), (28, 100), (28, 200), (28, 800)]
    settings = [
        replace(kind, shape=(1, side, side), batch=m, n=100, hidden=4) for kind in (PAPER, RECORD) for side, m in sizes
    ]
    settings = [_tiny(PAPER)] if quick else settings
    return [Measurement("memory", str(setting), partial(run, setting), measurable()) for setting in settings]


_PARTS: dict[str, Callable[[bool], list[Measurement]]] = {
    "agreement": _agreement, "loss": _loss, "step": _step, "record": _record, "parts": _parts, "stack": _stack,
    "generators": _generators, "growth": _growth, "memory": _memory,
}  # fmt: skip

if __name__ == "__main__":
    main()
