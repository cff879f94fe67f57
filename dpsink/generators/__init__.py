"""Generators by `kind`: modules that map latents and labels to images in [-1, 1]."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpsink.config import TrialConfig
from dpsink.errors import InputError
from dpsink.generators.biggan import CondBiggan
from dpsink.generators.class_mean import ClassMean
from dpsink.generators.conv import ConvCond

__all__ = ["ClassMean", "CondBiggan", "ConvCond", "Generator", "build_generator", "draw_latents"]


class Generator(Protocol):
    """What training, evaluation and synthesis need of a generator (an `nn.Module`)."""

    latent_dim: int

    def __call__(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Latents (B, latent_dim) in [0, 1] and int64 labels (B,) to images (B, C, H, W) in [-1, 1]."""
        ...


def build_generator(config: TrialConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A generator with the initial weights of the trial's public seed.

    Args:
        shape: (C, H, W) of one image; H = W divisible by 4.

    Raises:
        InputError: a size that the generator cannot make.
    """
    _, height, width = shape
    if height != width or height % 4:
        raise InputError(f"image size {height}x{width} must be square and divisible by 4; set data.size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _BUILDERS[config.generator.kind](config.generator, shape, num_classes)


def draw_latents(count: int, dimension: int, rng: torch.Generator) -> Tensor:
    """z ~ U[0, 1]^dimension, (count, dimension), from the public generator."""
    return torch.rand(count, dimension, generator=rng)


_BUILDERS: dict[str, Callable[[Any, tuple[int, int, int], int], nn.Module]] = {
    "conv_cond": ConvCond,
    "cond_biggan": CondBiggan,
    "class_mean": ClassMean,
}
