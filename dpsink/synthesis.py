"""Synthetic images: drawn from a trained generator, as tensors and as a grid."""

import io
import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpsink.data import LabelledImages, to_uint8
from dpsink.generators import draw_latents

BATCH = 500  # images per forward pass
GRID_COLUMNS = 10


def stream(generator: nn.Module, labels: Tensor, *, num_classes: int, seed: int) -> Iterator[LabelledImages]:
    """Samples with the given labels, batch by batch, from the generator in evaluation mode and on its own device.

    Latents are drawn on the CPU in the order of the labels: what is read of the stream, and how, changes no image.

    Args:
        labels: int64, (N,).
        seed: of the latents; public.

    Yields:
        Images on the CPU with their labels, 500 at a time.
    """
    rng, device = torch.Generator().manual_seed(seed), device_of(generator)
    generator.eval()
    for part in labels.split(BATCH):
        latents = draw_latents(len(part), _latent_dim(generator), rng).to(device)
        with torch.no_grad():
            images = to_uint8(generator(latents, part.to(device))).cpu()
        yield LabelledImages(images, part, num_classes)


def generate(generator: nn.Module, labels: Tensor, *, num_classes: int, seed: int) -> LabelledImages:
    """All samples of `stream` at once."""
    parts = stream(generator, labels, num_classes=num_classes, seed=seed)
    return LabelledImages(torch.cat([part.images for part in parts]), labels, num_classes)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, …, K−1, 0, 1, …: equal counts up to a remainder; int64, (count,)."""
    return torch.arange(count) % num_classes


def labels_of(counts: Sequence[int]) -> Tensor:
    """So many labels of each class, in turns while they last; int64, (sum(counts),)."""
    turns = torch.cat([torch.arange(count) for count in counts])
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return classes[turns.argsort(stable=True)]


def device_of(generator: nn.Module) -> torch.device:
    """Where its weights lie; the control has buffers only."""
    return next(chain(generator.parameters(), generator.buffers())).device


def sample_grid(generator: nn.Module, *, num_classes: int, seed: int = 0, rows: int = 10) -> bytes:
    """A PNG with one column per class (the first ten), `rows` samples each."""
    labels = torch.arange(min(num_classes, GRID_COLUMNS)).repeat(rows)
    samples = generate(generator, labels, num_classes=num_classes, seed=seed)
    return encode_png(tile(samples.images, columns=min(num_classes, GRID_COLUMNS)))


def tile(images: Tensor, *, columns: int, gap: int = 2, enlarge_to: int = 28) -> Image.Image:
    """Images (N, C, H, W) uint8 in rows of `columns` on white; small ones are enlarged without smoothing."""
    _, channels, height, width = images.shape
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
    factor = max(1, math.ceil(enlarge_to / height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def encode_png(picture: Image.Image) -> bytes:
    """The PNG bytes of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _latent_dim(generator: nn.Module) -> int:
    return int(generator.latent_dim)  # pyright: ignore[reportArgumentType]  # every generator has one
