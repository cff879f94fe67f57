"""Samples: what the file and its card hold, that they never part, and pictures that a browser can show."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpsink.config import ClassMeanConfig, ConvCondConfig, TrialConfig, load_config
from dpsink.generators import ClassMean, ConvCond
from dpsink.judging import privacy_card, privacy_line
from dpsink.privacy.accounting import epsilon
from dpsink.records import CheckpointState
from dpsink.synthesis import balanced_labels, encode_png, generate, sample_grid, synthesize, tile

SHAPE = (1, 8, 8)
PLAN = {
    "mechanism": "record", "records": 1437, "sample_rate": 0.1, "noise_multiplier": 3.0, "clip_norm": 20.0,
    "steps": 100, "target_epsilon": 10.0, "delta": 5e-5,
}  # fmt: skip


def conv(shape: tuple[int, int, int] = SHAPE, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return ConvCond(ConvCondConfig(hidden_dim=4), shape, classes)


def flat(levels: list[float], shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """Every image of class k is the constant levels[k], in [-1, 1]."""
    generator = ClassMean(ClassMeanConfig(noise_std=0), shape, len(levels))
    generator.means += torch.tensor(levels)[:, None, None, None]
    return generator


def described(config: TrialConfig | None = None, **changes) -> CheckpointState:
    """A checkpoint's description: 40 steps kept, 45 charged."""
    facts = {
        "config": config or TrialConfig(), "plan": PLAN, "image_shape": SHAPE, "num_classes": 10,
        "data_fingerprint": "f" * 64, "step": 40, "witness": {"charged": 45},
    }  # fmt: skip
    return CheckpointState(**(facts | changes))


def written(out: Path, *, count: int = 25, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the card of a synthetic set of small digits."""
    description = described()
    data, card = synthesize(
        conv(), description, privacy_card(out.parent, description), count=count, seed=seed, out=out
    )  # fmt: skip
    with np.load(data, allow_pickle=False) as arrays:
        return dict(arrays), json.loads(card.read_text())


def crash(*_, **__):
    raise OSError(28, "No space left on device")


# The file.


def test_file_holds_images_as_uint8_nhwc_and_labels_as_int64(tmp_path: Path) -> None:
    arrays, _ = written(tmp_path / "set.npz")
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "images": ("uint8", (25, 8, 8, 1)),
        "labels": ("int64", (25,)),
    }


@pytest.mark.parametrize(("count", "classes"), [(25, 10), (10, 10), (3, 10), (1001, 7)])
def test_labels_are_balanced_up_to_the_remainder(count: int, classes: int) -> None:
    counts = torch.bincount(balanced_labels(count, classes), minlength=classes)
    assert counts.sum() == count
    assert counts.max() - counts.min() <= 1


def test_images_are_those_of_their_labels(tmp_path: Path) -> None:
    levels = [-1.0, 0.0, 1.0]
    data, _ = synthesize(
        flat(levels), described(num_classes=3), {}, count=12, seed=0, out=tmp_path / "set.npz"
    )  # fmt: skip
    with np.load(data) as arrays:
        assert (arrays["images"].reshape(12, -1) == np.array([0, 128, 255])[arrays["labels"]][:, None]).all()


def test_sampling_is_a_function_of_the_seed(tmp_path: Path) -> None:
    first, again, other = (written(tmp_path / f"{k}.npz", seed=s)[0]["images"] for k, s in enumerate((0, 0, 1)))
    assert (first == again).all()
    assert (first != other).any()


def test_sampling_leaves_the_generator_as_it_was() -> None:
    """Batch statistics move in training only: to sample is post-processing."""
    generator = conv()
    generator.train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generate(generator, balanced_labels(50, 10), num_classes=10, seed=0)
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())


def test_sampling_leaves_the_global_random_state_alone() -> None:
    generator, before = conv(), torch.get_rng_state()
    generate(generator, balanced_labels(10, 10), num_classes=10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_image_of_a_sample_does_not_depend_on_the_others_in_its_batch() -> None:
    """In evaluation mode no statistic is shared, so the size of a forward pass is no setting of the result."""
    labels = balanced_labels(20, 10)
    whole = generate(conv(), labels, num_classes=10, seed=0).images
    few = generate(conv(), labels[:5], num_classes=10, seed=0).images
    assert (whole[:5].int() - few.int()).abs().max() <= 1  # one grey level: sums in another order


# The card.


def test_card_tells_epsilon_of_the_charged_steps_and_not_of_the_kept_ones(tmp_path: Path) -> None:
    _, card = written(tmp_path / "set.npz")
    spent = epsilon(steps=45, delta=5e-5, sample_rate=0.1, noise_multiplier=3.0)
    assert (card["steps_charged"], card["epsilon"], card["delta"]) == (45, spent, 5e-5)


def test_card_tells_the_whole_plan_when_the_checkpoint_saw_no_ledger(tmp_path: Path) -> None:
    """Without a witness nobody knows what was charged: all that the plan allows counts."""
    assert privacy_card(tmp_path, described(witness={}))["steps_charged"] == 100


def test_card_tells_where_the_generator_comes_from(tmp_path: Path) -> None:
    config = load_config(None, ["optimizer.lr=2e-3"])
    card = privacy_card(tmp_path / "run", described(config))
    assert card["source"] == str(tmp_path / "run")
    assert (card["data"], card["data_fingerprint"]) == ("digits", "f" * 64)
    assert TrialConfig.model_validate(card["config"]) == config


def test_card_carries_the_statement_of_the_study(tmp_path: Path) -> None:
    """The best of many is released under the study's promise, not under its own trial's."""
    (tmp_path / "statement.json").write_text('{"policy": "compose_all", "study_epsilon": 30}')
    assert privacy_card(tmp_path, described())["statement"]["study_epsilon"] == 30


def test_card_of_a_single_trial_promises_its_own_epsilon_for_all_that_was_made(tmp_path: Path) -> None:
    card = privacy_card(tmp_path, described())
    assert card["statement"]["study_epsilon"] == card["epsilon"]


def test_line_for_people_gives_epsilon_delta_and_adjacency(tmp_path: Path) -> None:
    card = privacy_card(tmp_path, described())
    assert f"({card['epsilon']:.4g}, 5e-05), add/remove one record" in privacy_line(card)


# The two together.


def test_card_stands_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename, seen = tmp_path / "set.npz", Path.replace, []

    def watch(self: Path, target: Path) -> Path:
        if Path(target) == out:
            seen.append((tmp_path / "set.card.json").exists())
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    written(out)
    assert seen == [True]


@pytest.mark.parametrize("failing", ["numpy.savez_compressed", "dpsink.synthesis.write_atomically"])
def test_failed_writing_leaves_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing, crash)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "set.npz")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_in_the_middle_of_the_data_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, **_) -> None:
        path.write_bytes(b"PK")
        crash()

    monkeypatch.setattr("numpy.savez_compressed", half)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "set.npz")
    assert list(tmp_path.iterdir()) == []


def test_earlier_data_never_stand_beside_the_card_of_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while a set is replaced may lose data, and never leaves them under another guarantee."""
    out, card, rename = tmp_path / "set.npz", tmp_path / "set.card.json", Path.replace
    written(out)
    before = card.read_text()

    def die(self: Path, target: Path) -> Path:
        if Path(target) == out:
            crash()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="No space"):
        synthesize(conv(), described(), {"epsilon": 0.1}, count=5, seed=0, out=out)
    assert card.read_text() == before or not out.exists()


# Pictures.


def opened(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png))
    picture.load()  # decodes every row, and checks the sums
    return picture


@pytest.mark.parametrize(("shape", "mode"), [((1, 8, 8), "L"), ((1, 28, 28), "L"), ((3, 16, 16), "RGB")])
def test_grid_is_a_whole_png(shape: tuple[int, int, int], mode: str) -> None:
    picture = opened(sample_grid(conv(shape), num_classes=10))
    assert (picture.format, picture.mode) == ("PNG", mode)


def test_grid_of_28_by_28_noise_stays_below_100_kib() -> None:
    """Noise is what compresses worst: no generator's grid is larger."""
    noise = torch.randint(256, (100, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(encode_png(tile(noise, columns=10))) <= 100 * 1024


def test_grid_shows_one_class_a_column() -> None:
    levels = np.linspace(-1, 1, 10)
    picture = np.asarray(opened(sample_grid(flat(levels.tolist(), (1, 28, 28)), num_classes=10)))
    centres = picture[14::30, 14::30]  # tiles of 28 pixels, 2 between them
    assert centres.shape == (10, 10)
    assert (centres == np.round((levels + 1) * 127.5)).all()


def test_grid_of_many_classes_shows_the_first_ten() -> None:
    picture = opened(sample_grid(conv((1, 28, 28), classes=26), num_classes=26))
    assert picture.size == (298, 298)


def test_small_images_are_enlarged_without_smoothing() -> None:
    image = torch.randint(256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(tile(image, columns=1))
    assert (shown == image[0, 0].numpy().repeat(4, 0).repeat(4, 1)).all()
