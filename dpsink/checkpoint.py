"""Atomic checkpoint folders: safetensors and JSON, no pickle. A run folder holds at most one that counts.

RUN/config.yaml             the trial, for people
RUN/ledger/                 reservations (`dpsink.privacy.budget`)
RUN/checkpoint-0000000123/  model, optimiser, public randomness, reports so far, sample grid
RUN/result.json             written once, when the trial has ended
RUN/statement.json          the privacy statement of the study that the trial belongs to, if any
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpsink.disk import sync
from dpsink.engine import TrialState
from dpsink.errors import InputError
from dpsink.generators import build_generator
from dpsink.privacy.release import check_checkpoint, check_files
from dpsink.records import PREFIX, CheckpointState, checkpoints, latest_checkpoint, read_state


def save_checkpoint(run: Path, description: CheckpointState, state: TrialState, grid: bytes) -> Path:
    """Writes a checkpoint so that a crash leaves either the old or the new one, and drops the old.

    Args:
        grid: a PNG of samples.
    """
    check_checkpoint(description.model_dump())
    final = run / f"{PREFIX}{description.step:010d}"
    draft = run / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(_contiguous(state.generator.state_dict()), draft / "model.safetensors")
    save_file(_optimizer_tensors(state), draft / "optimizer.safetensors")
    (draft / "state.json").write_text(description.model_dump_json(indent=1), encoding="utf-8")
    (draft / "samples.png").write_bytes(grid)
    check_files(path.name for path in draft.iterdir())
    _replace_folder(draft, final)
    for old in checkpoints(run):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def restore_state(checkpoint: Path, state: TrialState) -> None:
    """Fills a freshly built `TrialState` from a checkpoint, in place.

    Raises:
        InputError: damaged files, or those of another generator.
    """
    load_weights(checkpoint, state.generator)
    path = checkpoint / "optimizer.safetensors"
    tensors = _load(path)
    try:
        _restore_optimizer(state, tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit the trial: {' '.join(str(error).split())[:200]}") from None


def _restore_optimizer(state: TrialState, tensors: dict[str, Tensor]) -> None:
    if tensors.keys() != {"rng", "step", "moments"} or tensors["moments"].shape != state.moments.shape:
        raise ValueError(f"holds {', '.join(sorted(tensors))}, or moments of another shape")
    state.rng.set_state(tensors["rng"])
    state.step = int(tensors["step"])
    state.moments = tensors["moments"]


def load_weights(checkpoint: Path, generator: nn.Module) -> None:
    """Loads the generator's weights.

    Raises:
        InputError: damaged file, or weights of another generator.
    """
    tensors = _load(checkpoint / "model.safetensors")
    try:
        generator.load_state_dict(tensors)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{checkpoint}: weights do not fit the generator of its config: {line}") from None


def load_generator(place: Path) -> tuple[nn.Module, CheckpointState]:
    """The trained generator of a run, checkpoint or export folder, in evaluation mode, with its description."""
    checkpoint = place if (place / "state.json").exists() else latest_checkpoint(place)
    if checkpoint is None:
        raise InputError(f"{place}: holds no checkpoint; give the folder of a run, or train it first")
    description = read_state(checkpoint)
    generator = build_generator(description.config, description.image_shape, description.num_classes)
    load_weights(checkpoint, generator)
    return generator.eval(), description


def _replace_folder(draft: Path, final: Path) -> None:
    for path in (*draft.iterdir(), draft):
        sync(path)
    if final.exists():  # the same step again: until the new one stands, the old one counts under a lower name
        lower = final.with_name(final.name.replace(PREFIX, f"{PREFIX}-"))
        shutil.rmtree(lower, ignore_errors=True)
        final.rename(lower)
    draft.rename(final)
    sync(final.parent)


def _optimizer_tensors(state: TrialState) -> dict[str, Tensor]:
    return {"rng": state.rng.get_state(), "step": torch.tensor(state.step), "moments": state.moments.contiguous()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
