"""Samples: what the file and its card hold, that they never part, and pictures that a browser can show."""

import io
import json
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from dpsink.config import ClassMeanConfig, ConvCondConfig, TrialConfig, load_config
from dpsink.errors import InputError
from dpsink.generators import ClassMean, ConvCond
from dpsink.judging import privacy_card, privacy_line
from dpsink.privacy.accounting import epsilon
from dpsink.records import CheckpointState
from dpsink.synthesis import balanced_labels, encode_png, generate, labels_of, sample_grid, stream, tile
from dpsink.writing import card_path, synthesize

SHAPE = (1, 8, 8)
OUTS = ("set.npz", "set.parquet", "set")  # one name a format
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
    card = privacy_card(out.parent, description)
    data, card = synthesize(conv(), description, card, labels=balanced_labels(count, 10), seed=seed, out=out)
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
        flat(levels), described(num_classes=3), {}, labels=balanced_labels(12, 3), seed=0, out=tmp_path / "set.npz"
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


def test_counts_of_classes_are_kept_and_take_turns() -> None:
    assert labels_of([3, 0, 1, 2]).tolist() == [0, 2, 3, 0, 3, 0]
    assert torch.equal(labels_of([4, 4, 4]), balanced_labels(12, 3))


# The formats.


def in_format(out: Path, *, shape: tuple[int, int, int] = SHAPE, count: int = 1203, seed: int = 3) -> Path:
    """A set of 1,203 samples, more than two batches, in the format of the name."""
    data, _ = synthesize(
        conv(shape), described(image_shape=shape), {"epsilon": 1}, labels=balanced_labels(count, 10), seed=seed, out=out
    )  # fmt: skip
    return data


def read_back(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels in the order in which they were drawn, by other libraries' readers."""
    if data.suffix == ".npz":
        with np.load(data, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    if data.suffix == ".parquet":
        frame = pd.read_parquet(data)
        pictures = [Image.open(io.BytesIO(image["bytes"])) for image in frame["image"]]
        labels = frame["label"].to_numpy()
    else:
        files = sorted(data.rglob("*.png"), key=lambda path: path.name)
        pictures, labels = [Image.open(path) for path in files], np.array([int(path.parent.name) for path in files])
    images = np.stack([np.asarray(picture) for picture in pictures])
    return images.reshape(*images.shape[:3], -1), labels


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize("name", OUTS)
def test_seed_gives_the_same_images_in_every_format(name: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    expected = generate(conv(shape), balanced_labels(1203, 10), num_classes=10, seed=3)
    images, labels = read_back(in_format(tmp_path / name, shape=shape))
    assert (images == expected.images.permute(0, 2, 3, 1).numpy()).all()
    assert (labels == expected.labels.numpy()).all()


def test_latents_do_not_depend_on_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = balanced_labels(60, 10)
    whole = generate(conv(), labels, num_classes=10, seed=0).images
    monkeypatch.setattr("dpsink.synthesis.BATCH", 7)
    parts = list(stream(conv(), labels, num_classes=10, seed=0))
    assert len(parts) == 9
    assert (torch.cat([part.images for part in parts]).int() - whole.int()).abs().max() <= 1  # one grey level


@pytest.mark.parametrize("name", OUTS)
def test_samples_are_written_as_they_are_drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time more than a few batches are alive: a million images need no more memory than a thousand."""
    drawn, most, batches = [], [0], stream

    def watched(*words, **more):
        for batch in batches(*words, **more):
            drawn.append(weakref.ref(batch.images))
            most[0] = max(most[0], sum(image() is not None for image in drawn))
            yield batch

    monkeypatch.setattr("dpsink.writing.stream", watched)
    monkeypatch.setattr("dpsink.synthesis.BATCH", 50)
    in_format(tmp_path / name)
    assert most[0] <= 3


GROWTH = """
import sys
from pathlib import Path
from tests.test_synthesis import peak

place = Path(sys.argv[1])
peaks = [peak(place.with_name(f"{count}-{place.name}"), count) for count in (10_000, 40_000)]
print(peaks[1] - peaks[0])
"""


def peak(out: Path, count: int) -> int:
    """Bytes of this process' largest resident memory, ever, once so many 28×28 samples are written."""
    in_format(out, shape=(1, 28, 28), count=count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTS)
def test_peak_memory_does_not_grow_with_the_number_of_samples(name: str, tmp_path: Path) -> None:
    """30,000 images more are 24 MB of pixels, none of which is held; an allocator that warms up takes some."""
    words = [sys.executable, "-c", GROWTH, str(tmp_path / name)]
    told = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(told.stdout) < 15e6


def test_parquet_says_what_it_holds_as_the_datasets_library_does(tmp_path: Path) -> None:
    schema = pq.read_schema(in_format(tmp_path / "set.parquet", count=20))
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"


@pytest.mark.parametrize("name", OUTS)
def test_generator_without_classes_writes_no_labels(name: str, tmp_path: Path) -> None:
    description = described(load_config(None, ["generator.conditional=false"]))
    labels = balanced_labels(20, 10)
    data, _ = synthesize(conv(), description, {}, labels=labels, seed=0, out=tmp_path / name)
    if data.suffix == ".npz":
        assert np.load(data).files == ["images"]
    elif data.suffix == ".parquet":
        assert pq.read_schema(data).names == ["image"]
    else:
        assert {path.parent.name for path in data.rglob("*.png")} == {"unlabelled"}


@pytest.mark.parametrize("name", OUTS)
def test_card_tells_the_number_of_images_and_the_seed(name: str, tmp_path: Path) -> None:
    card = json.loads(card_path(in_format(tmp_path / name)).read_text())
    assert (card["images"], card["seed"], card["epsilon"]) == (1203, 3, 1)


# The card.


def test_card_names_adjacency_and_accountant(tmp_path: Path) -> None:
    card = privacy_card(tmp_path, described())
    assert "adding or removing one record" in card["adjacency"]
    assert card["accountant"].startswith("dp-accounting")


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


def test_card_of_a_checkpoint_carries_the_statement_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "statement.json").write_text('{"policy": "compose_all", "study_epsilon": 30}')
    assert privacy_card(tmp_path / "checkpoint-0000000006", described())["statement"]["study_epsilon"] == 30


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
            seen.append((tmp_path / "set.npz.card.json").exists())
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    written(out)
    assert seen == [True]


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_writing_that_ends_halfway_leaves_nothing(name: str, error: BaseException, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        assert len(list(tmp_path.iterdir())) == 1, "a draft is being written"
        if done >= 1000:
            raise error

    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        synthesize(
            conv(), described(), {}, labels=balanced_labels(1500, 10), seed=0, out=tmp_path / name, on_progress=stop
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OUTS)
def test_failed_card_leaves_no_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsink.writing.write_atomically", crash)
    with pytest.raises(InputError, match="No space"):
        written(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_failed_replacement_of_a_folder_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "set", Path.replace
    in_format(out)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}

    def die(self: Path, target: Path) -> Path:
        return crash() if Path(target) == out else rename(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(InputError, match="No space"):
        in_format(out, seed=1)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
    assert list(tmp_path.iterdir()) == [out]


def test_earlier_data_never_stand_beside_the_card_of_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while a set is replaced may lose data, and never leaves them under another guarantee."""
    out, card, rename = tmp_path / "set.npz", tmp_path / "set.npz.card.json", Path.replace
    written(out)
    before = card.read_text()

    def die(self: Path, target: Path) -> Path:
        if Path(target) == out:
            crash()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(InputError, match="No space"):
        synthesize(conv(), described(), {"epsilon": 0.1}, labels=balanced_labels(5, 10), seed=0, out=out)
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
