"""Three ways to run K generators side by side: one by one, by grouped convolutions, by batched products and `fold`.

The first two are `dpsink.stacking`'s, on a CPU and on a GPU. The third is here to be timed against them: it makes the
same images from the same weights, and leaves the running statistics alone.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dpsink.engine import initial_state
from dpsink.generators.conv import SLOPE
from dpsink.stacking import StackedGenerator
from experiments.bench.subjects import CLASSES, Setting, random_images


def generator_passes(setting: Setting, slots: int, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
    """For each way a forward and a backward pass of K generators, which gives the gradient of the weights, (K, P)."""
    template = initial_state(setting.config, random_images(setting.records, setting.shape)).generator.to(device)
    stacks = [StackedGenerator(template, slots, vectorised=kind) for kind in (False, True)]
    for stack in stacks:
        for slot in range(slots):
            stack.load(slot, template)
    rows = setting.n + setting.n // 5  # those of X and of X̃
    latents = torch.rand(slots, rows, stacks[0].latent_dim, device=device)
    labels = torch.randint(CLASSES, (slots, rows), device=device)
    everyone = torch.ones(slots, dtype=torch.bool, device=device)

    def native(stack: StackedGenerator) -> Tensor:
        images = stack(latents, labels, [True] * slots)
        return stack.backward(images, images.detach(), everyone)

    def folded(stack: StackedGenerator) -> Tensor:
        images = folded_images(stack, latents, labels, setting.shape[1])
        found = torch.autograd.grad(images, list(stack.parameters.values()), images.detach())
        return torch.cat([one.flatten(1) for one in found], dim=1)

    one_by_one, grouped = (partial(native, stack) for stack in stacks)
    return {"one by one": one_by_one, "grouped": grouped, "products + fold": partial(folded, stacks[1])}


def folded_images(stack: StackedGenerator, latents: Tensor, labels: Tensor, side: int) -> Tensor:
    """Images (K, B, C, side, side) of latents (K, B, L) and labels (K, B), by the weights of a stack of ConvConds."""
    weights = stack.parameters
    embedding = weights["embedding.weight"]
    embedded = embedding.gather(1, labels[..., None].expand(-1, -1, embedding.shape[-1]))
    stem = torch.cat([latents, embedded], dim=-1) @ weights["stem.weight"].mT
    maps = _normalised(stem.unflatten(2, ((side // 4) ** 2, -1)), weights, "layers.0")
    maps = _normalised(_doubled(maps, weights["layers.2.weight"]), weights, "layers.3")
    maps = _normalised(_doubled(maps, weights["layers.5.weight"]), weights, "layers.6")
    return torch.tanh(_last(maps, weights["layers.8.weight"], weights["layers.8.bias"]))


def _normalised(maps: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Batch norm of each trial and leaky ReLU; maps (K, B, positions, channels)."""
    variance, mean = torch.var_mean(maps, dim=(1, 2), keepdim=True, correction=0)
    scale = weights[f"{name}.weight"][:, None, None] * torch.rsqrt(variance + 1e-5)
    return nn.functional.leaky_relu((maps - mean) * scale + weights[f"{name}.bias"][:, None, None], SLOPE)


def _doubled(maps: Tensor, weight: Tensor) -> Tensor:
    """ConvTranspose 4/2/1: (K, B, s², channels) to (K, B, 4s², fewer)."""
    slots, rows, positions, _ = maps.shape
    side = 2 * math.isqrt(positions)
    columns = (maps.flatten(1, 2) @ weight.flatten(2)).unflatten(1, (rows, positions))
    image = nn.functional.fold(columns.flatten(0, 1).mT, (side, side), 4, padding=1, stride=2)
    return image.unflatten(0, (slots, rows)).flatten(3).mT


def _last(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Conv 3×3: (K, B, s², channels) to images (K, B, C, s, s)."""
    slots, rows, positions, _ = maps.shape
    side = math.isqrt(positions)
    patches = nn.functional.unfold(maps.mT.flatten(0, 1).unflatten(2, (side, side)), 3, padding=1)
    images = weight.flatten(2)[:, None] @ patches.unflatten(0, (slots, rows)) + bias[:, None, :, None]
    return images.unflatten(3, (side, side))
