"""Generators: shapes and parameter counts of the documented tables, conditioning, spectral norms, stacking."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpsink.config import TrialConfig, load_config
from dpsink.data import LabelledImages
from dpsink.engine import Trial, TrialStack, initial_state
from dpsink.generators import ConvCond, build_generator
from dpsink.generators.biggan import SpectralWeight, doublings
from dpsink.privacy.plan import PrivacyPlan
from dpsink.stacking import StackedGenerator
from tests.conftest import ReplayedEntropy
from tests.test_engine import DOUBLE

KINDS = ["conv_cond", "cond_biggan"]
DOCUMENT = Path(__file__).parents[1] / "docs" / "generators.md"


def config(kind: str, **settings: Any) -> TrialConfig:
    overrides = [f"generator.{name}={value}" for name, value in settings.items()]
    return load_config(None, [f"generator.kind={kind}", "privacy.noise_multiplier=2", *overrides])


def generator(kind: str, shape: tuple[int, int, int], classes: int = 10, **settings: Any) -> Any:
    return build_generator(config(kind, **settings), shape, classes)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def documented(kind: str) -> str:
    """The document's section of one kind."""
    return DOCUMENT.read_text(encoding="utf-8").partition(f"## `{kind}`")[2].partition("\n## ")[0]


def number(text: str) -> int:
    return int(text.replace(",", ""))


TABLES = pytest.mark.parametrize(
    ("kind", "shape", "classes"), [("conv_cond", (1, 28, 28), 10), ("cond_biggan", (3, 32, 32), 2)]
)


@TABLES
def test_parameters_are_those_of_the_documented_table(kind: str, shape: tuple[int, int, int], classes: int) -> None:
    section = documented(kind)
    rows = [number(text) for text in re.findall(r"\| ([\d,]+) \|\n", section)]
    total = number(re.search(r"([\d,]+) parameters", section)[1])  # pyright: ignore[reportOptionalSubscript]
    assert count(generator(kind, shape, classes)) == total == sum(rows)


def layers_of(made: Any) -> list[nn.Sequential]:
    """A generator's modules, those of one row of its table together."""
    if isinstance(made, ConvCond):
        inner = [made.layers[:2], made.layers[2], made.layers[3:5], made.layers[5], made.layers[6:8], made.layers[8:]]
    else:
        inner = [*made.blocks, made.norm, made.image]
    return [nn.Sequential(row) for row in (made.embedding, made.stem, *inner)]


@TABLES
def test_each_row_of_the_documented_table_is_a_layer(kind: str, shape: tuple[int, int, int], classes: int) -> None:
    """Its parameters, and the shape that comes out of it; the first maps are unfolded from the linear layer's row."""
    made = generator(kind, shape, classes)
    layers, outputs = layers_of(made), []
    for row in layers:
        list(row.modules())[-1 if kind == "conv_cond" else 1].register_forward_hook(
            lambda _module, _inputs, output: outputs.append(tuple(output.shape[1:]))
        )
    made(torch.rand(3, latents_of(kind)), torch.arange(3) % classes)
    rows = re.findall(r"\| B × ([\d× ]+) \| ([\d,]+) \|\n", documented(kind))
    expected = [tuple(map(int, text.split(" × "))) for text, _ in rows]
    outputs[1] = (outputs[1][0] // math.prod(expected[1][1:]), *expected[1][1:])
    assert outputs == expected
    assert [count(row) for row in layers] == [number(text) for _, text in rows]


def test_documented_parts_of_a_block_are_its_parts() -> None:
    block = generator("cond_biggan", (3, 32, 32), 2).blocks[0]
    assert [count(part) for part in (block.first, block.second, block.shortcut)] == [590_080, 590_080, 65_792]
    assert count(block.first_norm) == 2_048
    assert f"{count(block):,}" in documented("cond_biggan")


@pytest.mark.parametrize("side", [4, 8, 12, 20, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_images_have_the_shape_of_the_data_and_lie_within_one(kind: str, channels: int, side: int) -> None:
    images = generator(kind, (channels, side, side), hidden_dim=2)(torch.rand(5, latents_of(kind)), torch.arange(5))
    assert images.shape == (5, channels, side, side)
    assert images.abs().max() <= 1


@pytest.mark.parametrize(
    ("side", "expected"), [(32, (4, 3)), (28, (7, 2)), (8, (4, 1)), (12, (3, 2)), (64, (4, 4)), (4, (2, 1))]
)
def test_biggan_starts_at_four_or_less_or_an_odd_side_and_doubles_it(side: int, expected: tuple[int, int]) -> None:
    assert doublings(side) == expected


@pytest.mark.parametrize("side", [4, 8, 12, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_label_enters_a_conditional_generator_only(kind: str, side: int) -> None:
    latents = torch.rand(2, latents_of(kind))
    for conditional in (True, False):
        made = generator(kind, (1, side, side), hidden_dim=2, conditional=conditional).eval()
        images = [made(latents, torch.full((2,), label)) for label in (0, 1)]
        assert torch.equal(*images) is not conditional


def test_power_iteration_finds_the_largest_singular_value() -> None:
    weight = SpectralWeight(12, 5, 3, 3)
    weight.weight.data = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    scaled = [weight() for _ in range(200)][-1]
    assert float(torch.linalg.matrix_norm(scaled.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-4)


def test_power_iteration_rests_in_evaluation() -> None:
    weight = SpectralWeight(6, 4).eval()
    before = weight.left.clone()
    weight()
    assert torch.equal(weight.left, before)


def test_gradient_passes_through_the_spectral_norm() -> None:
    """As torch's own: the singular vectors are constants, the singular value is not."""
    ours = SpectralWeight(6, 4)
    reference: Any = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6, bias=False))
    original: Any = reference.get_parameter("parametrizations.weight.original")
    ours.weight.data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    original.data.copy_(ours.weight)
    mine, theirs = [(ours(), reference.weight) for _ in range(200)][-1]
    (gradient,) = torch.autograd.grad(mine.sin().sum(), ours.weight)
    (expected,) = torch.autograd.grad(theirs.sin().sum(), original)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_vectorised_generators_are_the_generators_one_by_one(kind: str) -> None:
    """Images, gradients, batch statistics and the vectors of the power iteration."""
    template = generator(kind, (3, 8, 8), hidden_dim=2).double()
    rng = torch.Generator().manual_seed(0)
    latents = torch.rand(3, 7, latents_of(kind), generator=rng).double()
    labels = torch.randint(10, (3, 7), generator=rng)
    answers = []
    for vectorised in (False, True):
        stack = StackedGenerator(template, 3, vectorised=vectorised)
        stack.weights.copy_(torch.randn(stack.weights.shape, generator=torch.Generator().manual_seed(1)).double())
        images = stack(latents, labels, [True] * 3)
        answers.append(
            (
                images.detach(),
                stack.backward(images, images.detach().sin(), torch.ones(3, dtype=torch.bool)),
                *stack.buffers.values(),
            )
        )
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def trained_biggans(seeds: list[int]) -> list[nn.Module]:
    """The generators of trials that took three steps on one stack, each with the noise of its seed."""
    settings = config("cond_biggan", hidden_dim=2)
    pixels = torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    records = LabelledImages(pixels, torch.arange(40) % 10, 10)
    plan = PrivacyPlan("record", 40, 0.5, 2.0, 5.0, 10, 10.0, 1e-3)
    stack = TrialStack(settings, records, DOUBLE, len(seeds))
    trials = [Trial(settings, plan, initial_state(settings, records), ReplayedEntropy(seed)) for seed in seeds]
    for trial in trials:
        trial.state.generator.double()
        stack.join(trial)
    for _ in range(3):
        stack.step()
    for slot in range(len(seeds)):
        stack.leave(slot)
    return [trial.state.generator for trial in trials]


# The gradient of a bias that a batch norm takes off again is zero but for rounding, which Adam scales up towards a
# whole step: how far two ways to compute it end from one another is the machine's, and no image shows it.
CANCELLED = re.compile(r"blocks\.\d+\.(first|second|shortcut)\.bias|.*\.running_mean")


def flat_state(biggan: nn.Module, *, cancelled: bool) -> Tensor:
    """Those of its weights and statistics that batch norms take off again, or all others."""
    state = biggan.state_dict().items()
    return torch.cat([value.flatten() for name, value in state if bool(CANCELLED.fullmatch(name)) == cancelled])


def images_of(biggan: nn.Module) -> Tensor:
    """What it makes of a few fixed latents, by the statistics of their own batch."""
    latents = torch.rand(20, latents_of("cond_biggan"), generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        return biggan.train()(latents, torch.arange(20) % 10)


def test_stacked_biggan_trials_have_the_weights_of_the_trials_alone() -> None:
    stacked, alone = trained_biggans([1, 2])[1], trained_biggans([2])[0]
    for cancelled, tolerance in ((False, 1e-10), (True, 1e-6)):
        ours, theirs = (flat_state(biggan, cancelled=cancelled) for biggan in (stacked, alone))
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_stacked_biggan_trials_make_the_images_of_the_trials_alone() -> None:
    stacked, alone = trained_biggans([1, 2])[1], trained_biggans([2])[0]
    torch.testing.assert_close(images_of(stacked), images_of(alone), atol=1e-10, rtol=0)


def latents_of(kind: str) -> int:
    return {"conv_cond": 16, "cond_biggan": 32}[kind]
