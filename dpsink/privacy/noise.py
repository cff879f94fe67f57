"""Gaussian noise whose tail is not cut off, from the operating system's entropy."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dpsink.entropy import Entropy

Noise = Callable[[tuple[int, ...]], Tensor]  # independent standard normal draws of a shape, float64


def fresh_noise(entropy: Entropy, device: torch.device | str = "cpu") -> Noise:
    """Noise that is drawn when it is asked for, on the device.

    A GPU draws with its own generator, in float64: the tail reaches 8.5 standard deviations. It is seeded once, with
    64 bits of the entropy that are never stored, and goes on from draw to draw: a seed for each draw would, over the
    millions of steps of a study, repeat one with a probability that δ does not cover.
    """
    if torch.device(device).type == "cpu":
        return partial(gaussian_noise, entropy=entropy)
    rng = torch.Generator(device).manual_seed(int.from_bytes(entropy.random_bytes(8), "little", signed=True))
    return partial(torch.randn, generator=rng, dtype=torch.float64, device=device)


def gaussian_noise(shape: tuple[int, ...], entropy: Entropy) -> Tensor:
    """Standard normal draws, float64, by Box-Muller on 64-bit uniforms of the entropy itself.

    The tail reaches 9.4 standard deviations (probability 1e-20), where float32 generators stop at 5.77 (probability
    8e-9 a draw, far above δ over a run).
    """
    pairs = (math.prod(shape) + 1) // 2
    words = np.frombuffer(entropy.random_bytes(16 * pairs), dtype=np.uint64)
    uniforms = torch.from_numpy(words.astype(np.float64)).add_(0.5).mul_(2.0**-64)
    radius = uniforms[:pairs].log_().mul_(-2).sqrt_()
    angle = uniforms[pairs:].mul_(2 * math.pi)
    draws = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return draws[: math.prod(shape)].reshape(shape)
