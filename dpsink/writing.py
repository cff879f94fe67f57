"""A synthetic data set on disk, written as it is drawn: npz, a folder of PNGs, or Parquet, with its privacy card.

NAME.npz       arrays `images`, uint8 (N, H, W, C), and `labels`, int64 (N,)      card: NAME.npz.card.json
NAME.parquet   columns `image`, {bytes: PNG, path: null}, and `label`, int64      card: NAME.parquet.card.json
NAME/          CLASS/NUMBER.png                                                   card: NAME/card.json

A generator that knows no classes writes no labels, and its PNGs lie in NAME/unlabelled/. All three read nothing but the
generator: post-processing.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpsink.data import LabelledImages
from dpsink.disk import CARD, drafted, sync
from dpsink.disk import check_target as check_free
from dpsink.errors import InputError
from dpsink.records import CheckpointState, write_atomically
from dpsink.synthesis import stream

UNLABELLED = "unlabelled"
SUFFIXES = {".npz": "npz", ".parquet": "parquet", "": "png"}
COMPRESSION = 1  # of npz: noise compresses badly at any level, and the first one is fast


@dataclass(frozen=True)
class Samples:
    """What is to be written.

    Attributes:
        batches: drawn as they are read, once.
        total: N, the sum over the batches.
        shape: (C, H, W) of one image.
        num_classes: number of classes; None where there are no labels.
    """

    batches: Iterator[LabelledImages]
    total: int
    shape: tuple[int, int, int]
    num_classes: int | None


def synthesize(
    generator: nn.Module, description: CheckpointState, card: dict[str, Any], *, labels: Tensor, seed: int, out: Path,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[Path, Path]:  # fmt: skip
    """Writes samples in the format that `out` names, and their privacy card; whole, or not at all.

    Args:
        card: the statement that covers the generator.
        labels: int64, (N,), of the samples in their order.
        seed: of the latents: it gives the same images in every format.
        out: NAME.npz, NAME.parquet, or NAME for a folder. What stood there is replaced.
        on_progress: told how many images are written; what it raises ends the writing.

    Returns:
        Paths of the data and of the card.

    Raises:
        InputError: it cannot be written.
    """
    form, classes = format_of(out), description.num_classes
    batches = _counted(stream(generator, labels, num_classes=classes, seed=seed), on_progress)
    samples = Samples(
        batches, len(labels), description.image_shape, classes if is_conditional(description) else None
    )  # fmt: skip
    card = card | {"images": len(labels), "seed": seed}
    with drafted(out) as draft:
        _WRITERS[form](draft, samples)
        if form != "png":  # data never stand without their card, nor with the card of others
            out.unlink(missing_ok=True)
        write_atomically(card_path(draft if form == "png" else out), json.dumps(card, indent=1, default=str) + "\n")
    return out, card_path(out)


def format_of(out: Path) -> str:
    """`npz`, `parquet` or `png`, by the name.

    Raises:
        InputError: another suffix.
    """
    if out.suffix not in SUFFIXES:
        raise InputError(f"{out}: must end in .npz or .parquet, or be the name of a folder of PNGs, without a suffix")
    return SUFFIXES[out.suffix]


def card_path(data: Path) -> Path:
    """Where the privacy card of a written data set stands: in its folder, or beside its file."""
    return data / CARD if data.is_dir() else data.with_name(f"{data.name}.{CARD}")


def check_target(out: Path, *, force: bool) -> None:
    """Refuses what exists, unless it is told to replace it, and a folder that is no synthetic data set always.

    Raises:
        InputError: so it is, or the name is of no format.
    """
    form = format_of(out)
    check_free(out, force=force)
    if out.exists() and out.is_dir() != (form == "png"):
        raise InputError(f"{out}: cannot be written (is of another format, and is not replaced); choose another --out")


def is_conditional(description: CheckpointState) -> bool:
    """Whether the generator makes the class that it is asked for."""
    return getattr(description.config.generator, "conditional", True)


def _write_npz(path: Path, samples: Samples) -> None:
    channels, height, width = samples.shape
    written = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (samples.total, height, width, channels)}
            np.lib.format.write_array_header_1_0(member, header)
            for batch in samples.batches:
                member.write(pixels(batch).tobytes())
                written.append(batch.labels)
        if samples.num_classes is not None:
            with archive.open("labels.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, torch.cat(written).numpy(), allow_pickle=False)
    sync(path)


def _write_folder(path: Path, samples: Samples) -> None:
    """CLASS/NUMBER.png, padded with zeros, so that the order of the names is that of the classes and of the draws."""
    digits, number = len(str(samples.total - 1)), 0
    names = [UNLABELLED]
    if samples.num_classes is not None:
        names = [str(label).zfill(len(str(samples.num_classes - 1))) for label in range(samples.num_classes)]
    path.mkdir()
    for name in names:
        (path / name).mkdir()
    for batch in samples.batches:
        for image, label in zip(pixels(batch), batch.labels.tolist(), strict=True):
            name = names[label] if samples.num_classes is not None else UNLABELLED
            (path / name / f"{number:0{digits}d}.png").write_bytes(png(image))
            number += 1
    for name in names:  # a class of which none was asked for
        if not any((path / name).iterdir()):
            (path / name).rmdir()


def _write_parquet(path: Path, samples: Samples) -> None:
    """As the `datasets` library keeps images: each batch is a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps what is freed: 4 GB after a million images
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if samples.num_classes is not None:
        features["label"] = {"_type": "Value", "dtype": "int64"}
        columns.append(("label", pa.int64()))
    schema = pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    # Encoded images do not compress again.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for batch in samples.batches:
            rows: dict[str, Any] = {"image": [{"bytes": png(image), "path": None} for image in pixels(batch)]}
            if samples.num_classes is not None:
                rows["label"] = batch.labels.numpy()
            writer.write_table(pa.table(rows, schema=schema))
    sync(path)


_WRITERS: dict[str, Callable[[Path, Samples], None]] = {
    "npz": _write_npz,
    "png": _write_folder,
    "parquet": _write_parquet,
}


def _counted(batches: Iterator[LabelledImages], on_progress: Callable[[int], None]) -> Iterator[LabelledImages]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        on_progress(done)


def pixels(batch: LabelledImages) -> np.ndarray:
    """Images as arrays are usually laid out: uint8, (n, H, W, C)."""
    return np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy())


def png(image: np.ndarray) -> bytes:
    """One image, uint8 (H, W, C), as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
