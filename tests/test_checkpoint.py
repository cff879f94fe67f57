"""Checkpoints: whole or absent after any crash, exact when restored, and nothing in them is ever executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpsink.checkpoint import load_generator, restore_state, save_checkpoint
from dpsink.config import Performance, TrialConfig, load_config
from dpsink.data import ImageData, LabelledImages
from dpsink.engine import Trial, TrialStack, TrialState, initial_state
from dpsink.errors import InputError
from dpsink.generators import draw_latents
from dpsink.privacy.plan import PrivacyPlan
from dpsink.records import CheckpointState, latest_checkpoint, read_json, read_state, write_atomically
from dpsink.training import train
from tests.conftest import ReplayedEntropy

SMALL = [
    "generator.hidden_dim=4", "sinkhorn.gen_batch_size=10", "sinkhorn.cost=l2", "privacy.noise_multiplier=3",
    "privacy.delta=5e-5", "privacy.step_limit=2", "evaluation.samples=40", "evaluation.classifiers=[logreg]",
]  # fmt: skip
CONFIG = load_config(None, SMALL)


class Crash(Exception):
    """The machine dies here."""


def die(*_, **__):
    raise Crash


def described(step: int, config: TrialConfig = CONFIG) -> CheckpointState:
    return CheckpointState(
        config=config, plan={}, image_shape=(1, 8, 8), num_classes=10, data_fingerprint="f" * 64, step=step
    )


def advance(state: TrialState, steps: int = 1) -> None:
    """Steps of the engine on the same records and noise: moves weights, moments, statistics and the random state."""
    records = LabelledImages(torch.arange(640, dtype=torch.uint8).reshape(10, 1, 8, 8), torch.arange(10), 10)
    plan = PrivacyPlan("record", 10, 0.5, 1.0, 1.0, 100, 10.0, 1e-3)
    stack = TrialStack(CONFIG, records, Performance())
    slot = stack.join(Trial(CONFIG, plan, state, ReplayedEntropy(0)))
    for _ in range(steps):
        stack.step()
    stack.leave(slot)


def saved(run: Path, state: TrialState, config: TrialConfig = CONFIG) -> Path:
    return save_checkpoint(run, described(state.step, config), state, b"")


def step_of(run: Path) -> int:
    """The step of what is found and loads: its JSON and its weights belong together."""
    _, description = load_generator(run)
    return description.step


@pytest.fixture
def state(digits: ImageData) -> TrialState:
    state = initial_state(CONFIG, digits.train)
    advance(state, 3)
    return state


# Whole or absent.


@pytest.mark.parametrize("place", ["dpsink.checkpoint.save_file", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_crash_before_the_rename_leaves_the_old_checkpoint(
    place: str, state: TrialState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, state)
    advance(state)
    monkeypatch.setattr(place, die)
    with pytest.raises(Crash):
        saved(tmp_path, state)
    assert step_of(tmp_path) == 3


def test_crash_after_the_rename_leaves_the_new_checkpoint(
    state: TrialState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tmp_path, state)
    advance(state)
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: die() if path == old else remove(path, **more))
    with pytest.raises(Crash):
        saved(tmp_path, state)
    assert step_of(tmp_path) == 4


@pytest.mark.parametrize("survivors", [0, 1])
def test_crash_while_a_step_is_saved_again_leaves_a_checkpoint_of_it(
    survivors: int, state: TrialState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that is stopped twice at the same step replaces its checkpoint by one of the same name."""
    saved(tmp_path, state)
    renames, rename = iter(range(9)), Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: rename(path, to) if next(renames) < survivors else die()
    )  # fmt: skip
    with pytest.raises(Crash):
        saved(tmp_path, state)
    assert step_of(tmp_path) == 3


def test_step_that_is_saved_again_has_one_checkpoint_with_the_new_weights(state: TrialState, tmp_path: Path) -> None:
    saved(tmp_path, state)
    advance(state)
    state.step -= 1  # replayed with fresh noise: the same step, other weights
    final = saved(tmp_path, state)
    assert list(tmp_path.iterdir()) == [final]
    weights = load_file(final / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in state.generator.state_dict().items())


def test_only_the_newest_checkpoint_is_kept(state: TrialState, tmp_path: Path) -> None:
    written = []
    for _ in range(3):
        advance(state)
        written.append(saved(tmp_path, state))
    assert list(tmp_path.iterdir()) == written[-1:]


def test_newest_is_by_number_and_not_by_spelling(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step:010d}").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-0000000100"


def test_draft_is_no_checkpoint(state: TrialState, tmp_path: Path) -> None:
    saved(tmp_path, state).rename(tmp_path / ".draft-1")
    assert latest_checkpoint(tmp_path) is None


def test_drafts_of_dead_processes_are_swept_when_the_trial_goes_on(digits: ImageData, tmp_path: Path) -> None:
    draft = tmp_path / ".draft-1"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    list(train(CONFIG, digits, tmp_path))
    assert not draft.exists()


def test_checkpoint_is_synced_before_it_gets_its_name(
    state: TrialState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, rename, sync = set(), Path.rename, os.fsync

    def watch(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def check(path: Path, to: Path) -> Path:
        assert synced >= {file.name for file in path.iterdir()}
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(Path, "rename", check)
    saved(tmp_path, state)
    assert tmp_path.name in synced  # the name itself is durable too


def test_crash_while_a_text_is_replaced_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(Crash):
        write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "old")]


# Exact.


def test_restored_state_goes_on_exactly_as_the_saved_one(
    state: TrialState, digits: ImageData, tmp_path: Path
) -> None:  # fmt: skip
    """Weights, batch statistics, Adam's moments and the public randomness all take part in the steps that follow."""
    again = initial_state(CONFIG, digits.train)
    restore_state(saved(tmp_path, state), again)
    advance(state, 2)
    advance(again, 2)
    expected = state.generator.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.generator.state_dict().items())


def test_optimizer_is_restored_exactly(state: TrialState, digits: ImageData, tmp_path: Path) -> None:
    again = initial_state(CONFIG, digits.train)
    restore_state(saved(tmp_path, state), again)
    assert state.moments.abs().sum() > 0
    assert torch.equal(again.moments, state.moments)


def test_public_randomness_and_step_are_restored_exactly(
    state: TrialState, digits: ImageData, tmp_path: Path
) -> None:  # fmt: skip
    again = initial_state(CONFIG, digits.train)
    restore_state(saved(tmp_path, state), again)
    assert again.step == 3
    assert torch.equal(draw_latents(5, 16, again.rng), draw_latents(5, 16, state.rng))


def test_control_without_an_optimizer_is_restored(digits: ImageData, tmp_path: Path) -> None:
    config = load_config(None, ["generator.kind=class_mean", "privacy.noise_multiplier=null", "privacy.delta=5e-5"])
    state, again = initial_state(config, digits.train), initial_state(config, digits.train)
    state.generator.load_state_dict({"means": torch.full((10, 1, 8, 8), 0.25)})
    restore_state(saved(tmp_path, state, config), again)
    assert torch.equal(again.generator.state_dict()["means"], state.generator.state_dict()["means"])


def test_description_is_read_back(state: TrialState, tmp_path: Path) -> None:
    assert read_state(saved(tmp_path, state)) == described(3)


def test_run_checkpoint_and_export_folders_give_the_same_generator(state: TrialState, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, state)
    by_run, by_checkpoint = (load_generator(place)[0].state_dict() for place in (tmp_path, checkpoint))
    assert all(torch.equal(value, by_checkpoint[name]) for name, value in by_run.items())


# Refused.


def edit(checkpoint: Path, **changes) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 1}, "format"),
        ({"format": None}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"step": -1}, "step"),
        ({"num_classes": 0}, "num_classes"),
        ({"image_shape": [8, 8]}, "image_shape"),
        ({"config": {"privacy": {"sigma": 1}}}, "sigma"),
    ],
)
def test_description_of_another_format_is_refused_by_the_field(
    changes: dict, named: str, state: TrialState, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, state)
    edit(checkpoint, **changes)
    with pytest.raises(InputError, match=f"state.json.*{named}"):
        read_state(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_damaged_description_is_one_line_that_names_it(content: bytes, state: TrialState, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, state)
    (checkpoint / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=r"state\.json") as caught:
        read_state(checkpoint)
    assert "\n" not in str(caught.value)


def test_weights_of_another_generator_are_refused(state: TrialState, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, state)
    edit(checkpoint, image_shape=[1, 28, 28])
    with pytest.raises(InputError, match="weights do not fit"):
        load_generator(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_tensors_are_refused_by_name(
    name: str, keep: int, state: TrialState, digits: ImageData, tmp_path: Path
) -> None:
    path = saved(tmp_path, state) / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=name):
        restore_state(path.parent, initial_state(CONFIG, digits.train))


@pytest.mark.parametrize(
    ("dropped", "added"),
    [
        ("rng", {}),
        ("step", {}),
        ("rng", {"rng": torch.zeros(3)}),
        ("step", {"step": torch.zeros(2)}),
        ("", {"../../etc/passwd": torch.zeros(1)}),
        ("moments", {}),
        ("moments", {"moments": torch.zeros(2, 3)}),
    ],
)
def test_crafted_optimizer_is_refused(
    dropped: str, added: dict[str, torch.Tensor], state: TrialState, digits: ImageData, tmp_path: Path
) -> None:
    path = saved(tmp_path, state) / "optimizer.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name != dropped}
    save_file(kept | added, path)
    with pytest.raises(InputError, match=r"optimizer\.safetensors: does not fit"):
        restore_state(path.parent, initial_state(CONFIG, digits.train))


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_pickled_content_is_refused_and_executes_nothing(
    name: str, writer: str, state: TrialState, digits: ImageData, tmp_path: Path
) -> None:
    path, mark = saved(tmp_path, state) / name, tmp_path / "executed"
    content = {"weights": Bomb(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=name):
        restore_state(path.parent, initial_state(CONFIG, digits.train))
    assert not mark.exists()


def test_bomb_would_go_off_where_it_is_unpickled(tmp_path: Path) -> None:
    """Keeps the test above honest."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_tensor_names_that_look_like_paths_write_nothing(
    state: TrialState, digits: ImageData, tmp_path: Path
) -> None:  # fmt: skip
    path = saved(tmp_path / "run", state) / "model.safetensors"
    save_file({"../../escaped": torch.zeros(1), "/tmp/dpsink-escaped": torch.zeros(1)}, path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="weights do not fit"):
        restore_state(path.parent, initial_state(CONFIG, digits.train))
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/dpsink-escaped").exists()


def test_header_that_claims_gigabytes_is_refused_without_reading_them(state: TrialState, tmp_path: Path) -> None:
    path = saved(tmp_path, state) / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_generator(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_json_that_is_no_object_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"result\.json"):
        read_json(path)
