"""Synthetic images: drawn from a trained generator, as tensors, as a grid, as a labelled data set on disk."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpsink.data import LabelledImages, to_uint8
from dpsink.generators import draw_latents
from dpsink.records import CheckpointState, write_atomically

BATCH = 500  # images per forward pass
GRID_COLUMNS = 10


def generate(generator: nn.Module, labels: Tensor, *, num_classes: int, seed: int) -> LabelledImages:
    """Samples with the given labels, from the generator in evaluation mode.

    Args:
        labels: int64, (N,).
        seed: of the latents; public.
    """
    rng = torch.Generator().manual_seed(seed)
    generator.eval()
    with torch.no_grad():
        parts = [
            to_uint8(generator(draw_latents(len(part), _latent_dim(generator), rng), part))
            for part in labels.split(BATCH)
        ]
    return LabelledImages(torch.cat(parts), labels, num_classes)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, …, K−1, 0, 1, …: equal counts up to a remainder; int64, (count,)."""
    return torch.arange(count) % num_classes


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


def synthesize(
    generator: nn.Module, description: CheckpointState, card: dict[str, Any], *, count: int, seed: int, out: Path
) -> tuple[Path, Path]:
    """Writes `count` labelled samples as npz (`images` uint8 NHWC, `labels` int64) and their privacy card.

    Args:
        card: the statement that covers the generator; stands beside the data as `NAME.card.json`.
        out: path of the npz; its folder must exist.

    Returns:
        Paths of the npz and of the card.
    """
    classes = description.num_classes
    samples = generate(generator, balanced_labels(count, classes), num_classes=classes, seed=seed)
    card_path = out.with_name(f"{out.stem}.card.json")
    draft = out.with_name(f".{out.name}.part.npz")
    try:
        np.savez_compressed(draft, images=samples.images.permute(0, 2, 3, 1).numpy(), labels=samples.labels.numpy())
        # Data never stand without their card, nor with the card of others.
        out.unlink(missing_ok=True)
        write_atomically(card_path, json.dumps(card, indent=1, default=str) + "\n")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return out, card_path


def _latent_dim(generator: nn.Module) -> int:
    return int(generator.latent_dim)  # pyright: ignore[reportArgumentType]  # every generator has one
