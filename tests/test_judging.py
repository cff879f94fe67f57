"""The last word: generators and images of anybody, several seeds, the control beside them, what is said of privacy."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dpsink.checkpoint import load_generator
from dpsink.config import DataConfig, load_config
from dpsink.control import control_command
from dpsink.data import ImageData
from dpsink.errors import InputError
from dpsink.judging import _CARD_FIELDS, UNKNOWN, half_width, judge, privacy_card
from dpsink.synthesis import balanced_labels
from dpsink.training import train
from dpsink.writing import card_path, synthesize

SMALL = (
    "generator.hidden_dim=4", "sinkhorn.gen_batch_size=10", "sinkhorn.cost=l2", "privacy.noise_multiplier=3",
    "privacy.delta=5e-5", "privacy.step_limit=3", "evaluation.samples=40", "evaluation.classifiers=[logreg]",
)  # fmt: skip
FEW = {"samples": 40, "data": DataConfig()}
DISTANCES = {"fid", "kid", "precision", "recall"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    """`run`, three steps on digits; `control`, class means at its ε; `other`, at half of it; `free`, no classes."""
    folder = tmp_path_factory.mktemp("runs")
    list(train(load_config(None, SMALL), digits, folder / "run"))
    list(train(load_config(None, [*SMALL, "generator.conditional=false"]), digits, folder / "free"))
    card = privacy_card(folder / "run", load_generator(folder / "run")[1])
    words = shlex.split(str(control_command(card)))[2:]
    list(train(load_config(None, words), digits, folder / "control"))
    list(train(load_config(None, [*words, f"privacy.target_epsilon={card['epsilon'] / 2}"]), digits, folder / "other"))
    return folder


@pytest.fixture
def images(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """40 samples of the run, with their card, under a name."""

    def write(name: str, run: str = "run") -> Path:
        generator, description = load_generator(runs / run)
        card, labels = privacy_card(runs / run, description), balanced_labels(40, 10)
        return synthesize(generator, description, card, labels=labels, seed=0, out=tmp_path / name)[0]

    return write


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


# Images of anybody.


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_written_samples_score_as_the_generator_that_made_them(
    name: str, runs: Path, images: Callable[..., Path]
) -> None:
    """An npz keeps their order, a folder sorts them: the classifiers' batches differ, all else agrees."""
    expected, found = judge(runs / "run", samples=40), judge(images(name), **FEW)
    ordered = expected["metrics"].keys() if name == "set.npz" else DISTANCES | {"variety"}
    assert {key: found["metrics"][key] for key in ordered} == pytest.approx(
        {key: expected["metrics"][key] for key in ordered}, rel=1e-5, abs=1e-6
    )
    assert (found["samples"], found["reference_images"]) == (40, 180)


def test_real_images_are_as_good_as_the_floor(digits: ImageData, tmp_path: Path) -> None:
    real = digits.train
    np.savez(tmp_path / "real.npz", images=real.images[:, 0].numpy(), labels=real.labels.numpy())
    answer = judge(tmp_path / "real.npz", samples=1437, data=DataConfig())
    assert answer["metrics"]["fid"] < 2 * answer["floor"]["fid"]
    assert answer["metrics"]["accuracy"] > 0.9
    assert answer["metrics"]["variety"] == pytest.approx(1, abs=0.1)


def test_more_images_than_asked_for_are_a_part_that_the_seed_chooses(digits: ImageData, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=digits.train.images[:, 0].numpy(), labels=digits.train.labels.numpy())
    answer = judge(tmp_path / "set.npz", samples=60, seeds=2, data=DataConfig())
    assert answer["samples"] == 60
    assert len(set(answer["values"]["variety"])) == 2


def write_folder(place: Path, names: list[str], mode: str = "L", side: int = 8) -> Path:
    for name in names:
        (place / name).mkdir(parents=True)
        for index in range(3):
            pixels = np.random.default_rng(index).integers(256, size=(side, side), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(place / name / f"{index}.png")
    return place


def test_folders_named_by_number_are_those_classes_though_some_are_missing(tmp_path: Path) -> None:
    answer = judge(write_folder(tmp_path / "set", ["3", "07", "9", "0"]), **FEW)
    assert answer["samples"] == 12


def test_colour_files_of_grey_images_are_read_as_grey(tmp_path: Path) -> None:
    grey, colour = (write_folder(tmp_path / mode, [str(k) for k in range(10)], mode) for mode in ("L", "RGB"))
    assert judge(grey, **FEW)["metrics"] == judge(colour, **FEW)["metrics"]


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["cat", "dog"], "holds 2 classes, the real images 10"),
        (["0", "10"], "classes of the real images are 0 to 9"),
        (["0", "10", "9"], "/10: classes of the real images are 0 to 9"),
    ],
)
def test_folder_of_other_classes_is_refused(names: list[str], named: str, tmp_path: Path) -> None:
    assert named in refused(lambda: judge(write_folder(tmp_path / "set", names), **FEW))


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "set", [str(k) for k in range(10)], side=12)
    assert "images are 1×12×12, the real ones 1×8×8" in refused(lambda: judge(place, **FEW))


@pytest.mark.parametrize("label", [-1, 10])
def test_label_outside_the_classes_is_refused_or_skipped(label: int, tmp_path: Path) -> None:
    labels = np.arange(40) % 10
    labels[7] = label
    np.savez(tmp_path / "set.npz", images=np.zeros((40, 8, 8), np.uint8), labels=labels)
    assert f"label {label} of image 7" in refused(lambda: judge(tmp_path / "set.npz", **FEW))
    assert judge(tmp_path / "set.npz", skip_bad=True, **FEW)["samples"] == 39


def test_image_that_cannot_be_read_is_named_or_skipped(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "set", [str(k) for k in range(10)])
    (place / "4" / "1.png").write_bytes(b"")
    line = refused(lambda: judge(place, **FEW))
    assert str(place / "4" / "1.png") in line and "--skip-bad" in line
    assert judge(place, skip_bad=True, **FEW)["samples"] == 29


def test_card_of_more_images_than_lie_there_is_refused_whatever_is_skipped(tmp_path: Path) -> None:
    place = write_folder(tmp_path / "set", [str(k) for k in range(10)])
    (place / "4" / "1.png").write_bytes(b"")
    fields = dict.fromkeys(_CARD_FIELDS, 1) | {"private": True, "images": 31}
    card_path(place).write_text(json.dumps(fields))
    assert "holds 30 images, its card is of 31" in refused(lambda: judge(place, skip_bad=True, **FEW))


def test_images_without_a_data_set_are_refused(images: Callable[..., Path]) -> None:
    assert "give --data" in refused(lambda: judge(images("set.npz"), samples=40))


# Without classes.


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_images_without_classes_get_distances_only(name: str, images: Callable[..., Path]) -> None:
    assert judge(images(name, "free"), **FEW)["metrics"].keys() == DISTANCES


def test_generator_without_classes_gets_distances_only(runs: Path) -> None:
    assert judge(runs / "free", samples=40)["metrics"].keys() == DISTANCES


# What is said of privacy.


def test_nothing_is_claimed_for_images_without_a_card(tmp_path: Path) -> None:
    answer = judge(write_folder(tmp_path / "set", [str(k) for k in range(10)]), **FEW)
    assert (answer["privacy"], answer["epsilon"], answer["delta"]) == (UNKNOWN, None, None)
    assert "no ε is claimed" in UNKNOWN


@pytest.mark.parametrize("name", ["set.npz", "set"])
def test_card_beside_images_is_told_as_its_word(name: str, images: Callable[..., Path]) -> None:
    answer = judge(images(name), **FEW)
    assert answer["epsilon"] > 0
    assert "add/remove one record" in answer["privacy"] and "card.json" in answer["privacy"]


def test_card_of_other_data_is_told(images: Callable[..., Path]) -> None:
    data = images("set.npz")
    card = data.with_name("set.npz.card.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"data_fingerprint": "0" * 64}))
    assert "made from other data" in judge(data, **FEW)["privacy"]


def test_card_of_another_number_of_images_is_refused(images: Callable[..., Path]) -> None:
    """A competitor's images under our file's name do not take our guarantee over."""
    data = images("set.npz")
    np.savez(data, images=np.zeros((30, 8, 8), np.uint8), labels=np.arange(30) % 10)
    assert "holds 30 images, its card is of 40" in refused(lambda: judge(data, **FEW))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"private": true, "epsilon": "none"}'])
def test_card_that_is_none_is_refused(text: str, images: Callable[..., Path]) -> None:
    data = images("set.npz")
    data.with_name("set.npz.card.json").write_text(text)
    assert "set.npz.card.json" in refused(lambda: judge(data, **FEW))


# Several seeds.


def test_seeds_follow_each_other_and_give_means(runs: Path) -> None:
    whole = judge(runs / "run", samples=40, seed=3, seeds=2)
    single = [judge(runs / "run", samples=40, seed=seed) for seed in (3, 4)]
    assert whole["seeds"] == [3, 4] and single[0]["intervals"] == {}
    for name, values in whole["values"].items():
        assert values == [answer["metrics"][name] for answer in single]
        assert whole["metrics"][name] == pytest.approx(np.mean(values))
    assert whole["floor"] == single[0]["floor"] == single[1]["floor"]


def test_interval_is_student_s() -> None:
    values = [0.1, 0.4, 0.35, 0.2]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)


# The control.


def test_control_is_judged_beside_the_run(runs: Path) -> None:
    answer = judge(runs / "run", samples=40, control=runs / "control")
    assert answer["control"]["metrics"] == judge(runs / "control", samples=40)["metrics"]


def test_control_is_judged_on_as_many_images_as_a_set_holds(runs: Path, images: Callable[..., Path]) -> None:
    answer = judge(images("set.npz"), samples=10_000, data=DataConfig(), control=runs / "control")
    assert answer["control"]["metrics"] == judge(runs / "control", samples=answer["samples"])["metrics"]


def test_judging_spends_nothing(runs: Path) -> None:
    """The control is a release: evaluation reads one, and never makes one."""
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    judge(runs / "run", samples=40, control=runs / "control")
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_control_at_another_epsilon_is_refused(runs: Path) -> None:
    line = refused(lambda: judge(runs / "run", samples=40, control=runs / "other"))
    assert "its ε is" in line and "privacy.target_epsilon=" in line


def test_run_that_is_no_control_is_refused(runs: Path) -> None:
    assert "class_mean" in refused(lambda: judge(runs / "run", samples=40, control=runs / "run"))


@pytest.mark.parametrize(("field", "value"), [("data_fingerprint", "0" * 64), ("plan", None)])
def test_control_of_other_data_or_delta_is_refused(field: str, value: Any, runs: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(runs / "control", tmp_path / "control"))
    (state,) = place.glob("checkpoint-*/state.json")
    content = json.loads(state.read_text())
    content[field] = value or content[field] | {"delta": 1e-5}
    state.write_text(json.dumps(content))
    named = "delta" if field == "plan" else "fingerprint"
    assert named in refused(lambda: judge(runs / "run", samples=40, control=place))


def test_images_of_unknown_privacy_have_no_control(runs: Path, tmp_path: Path) -> None:
    place = write_folder(tmp_path / "set", [str(k) for k in range(10)])
    assert "claims no ε" in refused(lambda: judge(place, control=runs / "control", **FEW))


@pytest.mark.parametrize(
    "data",
    [
        {"name": "digits", "validation_size": 0},
        {"name": "mnist"},
        {"name": "celeba", "attribute": "Smiling"},
        {"name": "folder:my pets", "validation": "public", "test": "public", "test_size": 20, "size": 32},
        {"name": "npz:mine.npz", "classes": 3, "validation": "public", "test": "public", "test_size": 9},
    ],
)
def test_control_s_command_trains_on_the_same_data(data: dict[str, Any]) -> None:
    settings = load_config(None, SMALL).model_dump(mode="json")
    settings["data"] = DataConfig.model_validate(data).model_dump(mode="json")
    card = {
        "private": True, "mechanism": "record", "epsilon": 1.2345678, "delta": 1e-6, "image_shape": [1, 28, 28],
        "config": settings,
    }  # fmt: skip
    words = shlex.split(str(control_command(card)))
    config = load_config(None, words[2:])
    assert words[:2] == ["dpsink", "train"]
    assert config.data == DataConfig.model_validate(data)
    assert (config.generator.kind, config.privacy.target_epsilon, config.privacy.clip_norm) == ("class_mean", 1.235, 14)


def test_run_without_privacy_has_no_control() -> None:
    assert control_command({"private": False, "mechanism": "record"}) is None


# Devices.


def test_device_reaches_generator_extractor_and_classifiers(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("dpsink.judging.build_extractor", lambda *_, **more: seen.update(extractor=more["device"]))
    monkeypatch.setattr("dpsink.judging.generate", lambda generator, *_, **__: seen.update(
        generator={tensor.device.type for tensor in generator.state_dict().values()}
    ) or torch.zeros(1))  # fmt: skip

    def stop(*_: Any, **more: Any) -> None:
        seen["classifiers"] = more["device"]
        raise KeyboardInterrupt

    monkeypatch.setattr("dpsink.judging.evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        judge(runs / "run", samples=40, device="meta")
    assert seen == {"extractor": "meta", "generator": {"meta"}, "classifiers": "meta"}
