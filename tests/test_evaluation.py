"""Evaluation: closed forms, reference libraries, and the cases that must not break a trial."""

import math
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dpsink.config import DataConfig
from dpsink.data import LabelledImages, load_dataset, to_unit
from dpsink.errors import InputError
from dpsink.evaluation import (
    WORST_DISTANCE,
    Extractor,
    build_extractor,
    classifier_accuracies,
    classifier_extractor,
    distance_floor,
    evaluate,
    extractors,
    fidelity,
    inception_extractor,
    variety,
)
from dpsink.evaluation.classifiers import build_classifier, predict
from dpsink.evaluation.fidelity import fid, kid, precision_recall
from dpsink.evaluation.floor import _halves as halves
from dpsink.evaluation.kept import recall
from dpsink.evaluation.reference import reference_features
from dpsink.privacy.release import ReleaseRefused

fidelity_module = sys.modules["dpsink.evaluation.fidelity"]  # the package's name is the function

METRICS = {"fid", "kid", "precision", "recall", "variety", "accuracy"} | {
    f"accuracy_{name}" for name in ("logreg", "mlp", "cnn")
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An extractor cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(extractors, "_built", {})
        yield folder / "dpsink" / "extractors"


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(name="digits", validation_size=180))


@pytest.fixture(scope="module")
def extractor(digits):
    return classifier_extractor(digits.validation)


def shuffled(data: LabelledImages) -> LabelledImages:
    return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(5)))


def constant(data: LabelledImages, value: int = 0) -> LabelledImages:
    return LabelledImages(torch.full_like(data.images, value), data.labels, data.num_classes)


def class_means(data: LabelledImages) -> LabelledImages:
    means = [data.images[data.labels == label].float().mean(0).round() for label in range(data.num_classes)]
    return LabelledImages(torch.stack(means)[data.labels].to(torch.uint8), data.labels, data.num_classes)


def noisy(data: LabelledImages, deviation: float) -> LabelledImages:
    noise = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(3)) * deviation
    return LabelledImages((data.images + noise).clamp(0, 255).to(torch.uint8), data.labels, data.num_classes)


def random_images(shape: tuple[int, int, int], count: int = 40) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(count) % 4, 4)


# Feature distances.


def test_fid_is_the_closed_form_of_two_gaussians():
    # Samples standardised to mean 0 and covariance I, then scaled: FID = |Δμ|² + Σ (s_a - s_b)².
    raw = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    other = white * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, 2.0])
    assert fid(white, other) == pytest.approx(5 + 1 + 0 + 0.25)


def test_fid_of_a_set_with_itself_is_zero(digits, extractor):
    features = extractor.features(digits.test.images).double()
    assert 0 <= fid(features, features) < 1e-6


def test_fid_is_real_and_finite_for_singular_covariances():
    flat = torch.zeros(50, 32, dtype=torch.float64)
    flat[:, :2] = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert fid(flat, torch.zeros(50, 32, dtype=torch.float64)) == pytest.approx(
        (flat.mean(0).square().sum() + torch.cov(flat.T).trace()).item()
    )


@pytest.mark.parametrize("distance", [fid, kid])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e150])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_distance_that_is_not_finite_becomes_the_worst(distance, value):
    features = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert distance(features * value, features) == WORST_DISTANCE


def test_kid_of_a_set_with_itself_is_about_zero(digits, extractor):
    features = extractor.features(digits.train.images[:300]).double()
    assert abs(kid(features, features)) < 0.01 * kid(features, torch.zeros_like(features))


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    a, b = torch.randn(2, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (30 * 29)

    expected = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert kid(a, b) == pytest.approx(expected.item())


def test_distances_grow_with_noise(digits, extractor):
    scores = [fidelity(noisy(digits.train, deviation), digits.test, extractor=extractor) for deviation in (0, 60, 120)]
    for metric in ("fid", "kid"):
        assert scores[0][metric] < scores[1][metric] < scores[2][metric]


def test_precision_and_recall_of_half_the_modes():
    left = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert precision_recall(left, torch.cat([left, left + 100])) == {"precision": 1.0, "recall": 0.5}


def test_order_of_the_images_does_not_matter(digits, extractor):
    first = fidelity(digits.test, digits.validation, extractor=extractor)
    second = fidelity(shuffled(digits.test), shuffled(digits.validation), extractor=extractor)
    assert second == pytest.approx(first, rel=1e-5)


@pytest.mark.slow
def test_order_of_the_images_does_not_matter_to_kid_s_random_subsets():
    a, b = torch.randn(2, 1100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert kid(a.flip(0), b.roll(7, 0)) == pytest.approx(kid(a, b), rel=1e-9)
    assert kid(a, b, seed=1) != pytest.approx(kid(a, b), rel=1e-3), "the subsets are random"


@pytest.mark.parametrize("rows", [1, 7, 360])
def test_precision_and_recall_do_not_depend_on_the_rows_held_at_once(digits, extractor, monkeypatch, rows):
    generated, real = (extractor.features(part.images).double() for part in (digits.validation, digits.test))
    whole = precision_recall(generated, real)
    monkeypatch.setattr(fidelity_module, "DISTANCES", rows * 180)
    assert precision_recall(generated, real) == whole != {"precision": 1.0, "recall": 1.0}


def test_silent_on_stdout_and_stderr(digits, extractor, capfd):
    fidelity(digits.test, digits.validation, extractor=extractor)
    assert capfd.readouterr() == ("", "")


# Variety.


def test_variety_of_class_means_is_zero(digits):
    assert variety(class_means(digits.train), digits.test) == 0


def test_variety_of_the_reference_is_one(digits):
    assert variety(digits.test, digits.test) == 1


def test_variety_of_other_real_images_is_about_one(digits):
    assert variety(digits.train, digits.test) == pytest.approx(1, abs=0.1)


def test_variety_ignores_differences_between_classes(digits):
    shift = (digits.test.labels * 3).to(torch.uint8)[:, None, None, None]
    dim = LabelledImages(digits.test.images // 2, digits.test.labels, 10)
    assert variety(LabelledImages(dim.images + shift, dim.labels, 10), dim) == pytest.approx(1)


def test_variety_of_a_reference_without_variance_is_zero(digits):
    assert variety(digits.test, constant(digits.test)) == 0


# Classifiers.


def test_real_digits_teach_every_classifier(digits):
    scores = classifier_accuracies(digits.train, digits.test)
    assert all(0.92 < score <= 1 for score in scores.values()), scores


def test_accuracy_is_the_mean_of_the_three(digits, extractor):
    scores = evaluate(digits.test, digits.validation, extractor=extractor)
    assert scores["accuracy"] == pytest.approx(np.mean([scores[f"accuracy_{n}"] for n in ("logreg", "mlp", "cnn")]))


def test_accuracy_is_absent_unless_all_three_were_run(digits, extractor):
    scores = evaluate(digits.test, digits.validation, extractor=extractor, classifiers=("mlp",))
    assert set(scores) == METRICS - {"accuracy", "accuracy_logreg", "accuracy_cnn"}


def test_logistic_regression_agrees_with_scikit_learn(digits):
    pixels = [to_unit(part.images).flatten(1).numpy() for part in (digits.train, digits.test)]
    oracle = LogisticRegression(max_iter=1000).fit(pixels[0], digits.train.labels.numpy())
    expected = oracle.score(pixels[1], digits.test.labels.numpy())
    ours = classifier_accuracies(digits.train, digits.test, classifiers=("logreg",))["accuracy_logreg"]
    assert ours == pytest.approx(expected, abs=0.03)


def test_order_of_the_test_images_does_not_matter_to_accuracy(digits):
    scores = [classifier_accuracies(digits.validation, test) for test in (digits.test, shuffled(digits.test))]
    assert scores[0] == scores[1]


def test_predictions_do_not_depend_on_the_batch(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_classifier("cnn", digits.test.shape, 10)
    whole, single = (predict(model, digits.test.images, batch_size=size) for size in (512, 1))
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)


def test_classifiers_learn_the_labels_that_they_are_given(digits):
    wrong = LabelledImages(digits.train.images, (digits.train.labels + 1) % 10, 10)
    scores = classifier_accuracies(wrong, digits.test, classifiers=("logreg", "mlp"))
    assert max(scores.values()) < 0.05


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 64, 64)])
def test_every_image_size_is_evaluated(shape):
    data = random_images(shape)
    scores = evaluate(data, data, extractor=classifier_extractor(data))
    assert set(scores) == METRICS


def test_evaluation_is_a_function_of_the_seed(digits, extractor):
    small = digits.train.take(torch.arange(200))
    first, again, other = (evaluate(small, digits.validation, extractor=extractor, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_global_state_is_left_alone(digits):
    def state():
        return torch.random.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()

    before, small = state(), replace(digits.train.take(torch.arange(100)), private=False)
    evaluate(small, digits.test, extractor=classifier_extractor(small))
    assert state() == before


def test_evaluates_under_no_grad(digits, extractor):
    with torch.no_grad():
        scores = evaluate(digits.test, digits.validation, extractor=extractor, classifiers=("logreg",))
    assert scores["accuracy_logreg"] > 0.7


# Generators that went wrong.


@pytest.mark.parametrize("value", [0, 127, 255])
def test_a_constant_generator_gets_finite_numbers(digits, extractor, value):
    scores = evaluate(constant(digits.test, value), digits.validation, extractor=extractor)
    assert set(scores) == METRICS and all(map(math.isfinite, scores.values()))
    assert scores["accuracy"] < 0.2 and scores["precision"] == scores["recall"] == scores["variety"] == 0


def test_a_missing_class_gets_finite_numbers_and_is_never_predicted(digits, extractor):
    without = digits.train.take(digits.train.labels != 3)
    scores = evaluate(without, digits.test, extractor=extractor)
    assert all(map(math.isfinite, scores.values()))
    assert 0.8 < scores["accuracy"] < 0.93 and scores["variety"] < variety(digits.train, digits.test)


def test_one_class_only_gets_finite_numbers(digits, extractor):
    scores = evaluate(digits.train.take(digits.train.labels == 3), digits.test, extractor=extractor)
    assert all(map(math.isfinite, scores.values()))
    assert scores["accuracy"] == pytest.approx((digits.test.labels == 3).double().mean().item(), abs=0.01)


def test_a_collapsed_generator_has_neither_variety_nor_recall(digits, extractor):
    scores = evaluate(class_means(digits.train), digits.test, extractor=extractor, classifiers=("logreg",))
    assert scores["variety"] == scores["recall"] == 0
    assert scores["accuracy_logreg"] > 0.7, "accuracy alone does not show the collapse"


def test_equal_samples_have_no_extent_far_from_the_origin():
    # Every real image is 0.03 away from the one generated image, at norm 800: float32 cannot tell them apart.
    black = constant(random_images((1, 8, 8)))
    far = Extractor("far", "far", lambda images: 100 + images.flatten(1) / 255)
    assert fidelity(black, constant(black, 1), extractor=far)["recall"] == 0


@pytest.mark.parametrize(
    ("synthetic", "named"),
    [
        (random_images((1, 8, 8), 9), "9 images"),
        (random_images((3, 8, 8)), "(3, 8, 8)"),
        (
            LabelledImages(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64), 2),
            "2 classes",
        ),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(synthetic, named):
    reference = random_images((1, 8, 8))
    with pytest.raises(InputError) as error:
        evaluate(synthetic, reference, extractor=Extractor("classifier", "classifier@40", lambda x: x.flatten(1)))
    assert named in str(error.value)


def test_an_unknown_classifier_is_refused(digits, extractor):
    with pytest.raises(InputError, match="'svm'"):
        evaluate(digits.test, digits.validation, extractor=extractor, classifiers=("svm",))


@pytest.mark.parametrize("use", [evaluate, fidelity, reference_features, classifier_extractor])
def test_private_images_are_never_the_reference(digits, extractor, cache, use):
    """Figures on them carry no noise, and what is kept under a plain hash of them would be a release."""
    before = {path.name for path in cache.parent.rglob("*")}
    arguments = {
        evaluate: lambda: evaluate(digits.test, digits.train, extractor=extractor),
        fidelity: lambda: fidelity(digits.test, digits.train, extractor=extractor),
        reference_features: lambda: reference_features(extractor, digits.train),
        classifier_extractor: lambda: classifier_extractor(digits.train.take(torch.arange(50))),
    }
    with pytest.raises(ReleaseRefused, match="private"):
        arguments[use]()
    assert {path.name for path in cache.parent.rglob("*")} == before


def test_private_validation_images_are_never_the_reference(extractor):
    hidden = load_dataset(DataConfig(validation="private"))
    assert hidden.validation is not None
    with pytest.raises(ReleaseRefused):
        evaluate(hidden.test, hidden.validation, extractor=extractor)


# The floor.


def test_floor_is_validation_against_test(digits, extractor):
    features = [extractor.features(part.images).double() for part in (digits.validation, digits.test)]
    floor = distance_floor(digits, extractor)
    assert (floor.fid, floor.kid) == pytest.approx((fid(*features), kid(*features)))
    assert floor.of == "validation (180 images) against test (180 images)"


@pytest.mark.parametrize("changes", [{"validation": None}, {"validation_is_public": False}])
def test_floor_without_public_validation_images_is_of_the_test_images_halves(digits, extractor, changes):
    floor = distance_floor(replace(digits, **changes), extractor)
    assert floor.of == "one half of test (90 images) against the other (90 images)"
    assert 0 < floor.fid < fidelity(noisy(digits.train, 60), digits.test, extractor=extractor)["fid"]


def test_halves_are_disjoint_whole_and_stratified(digits):
    first, second = halves(digits.test)
    assert len(first) + len(second) == len(digits.test)
    together = torch.cat([first.images, second.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.test.images.flatten(1).unique(dim=0))
    counts = [part.labels.bincount(minlength=10) for part in (first, second)]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_floor_is_computed_once(digits, extractor, monkeypatch):
    first = distance_floor(digits, extractor)
    monkeypatch.setattr("dpsink.evaluation.floor.fid", None)
    assert distance_floor(digits, extractor) == first


# Devices. No GPU is at hand: tensors on `meta` stand for those of another device. Torch refuses to mix them with the
# CPU's, and what is copied back from there is zero.


class OtherDevice(TorchDispatchMode):
    """Lets results leave `meta`, and notes where each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in tensors}
        self.seen |= {(op.overloadpacket.__name__, place) for place in places}
        if op is aten._local_scalar_dense.default and places == {"meta"}:
            return 0.5
        if op is aten._to_copy.default and places == {"meta"} and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return op(*args, **kwargs)

    def ran_on(self, *operations: str) -> set[str]:
        """Devices that any of these ran on."""
        return {place for name, place in self.seen if name in operations}


HEAVY = ("convolution", "convolution_backward", "addmm", "mm", "_fused_adam_", "nll_loss_forward")


def test_classifiers_are_trained_and_asked_on_the_device(digits, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with OtherDevice() as watch:
        classifier_accuracies(digits.validation, digits.test, device="meta")
    assert watch.ran_on(*HEAVY) == {"meta"}


def test_the_extractor_computes_on_the_device_and_hands_features_back(digits, extractor):
    with OtherDevice() as watch:
        features = classifier_extractor(digits.validation, device="meta").features(digits.test.images)
    assert watch.ran_on(*HEAVY) == {"meta"}
    assert (features.device.type, features.shape) == ("cpu", (180, 32))


def test_evaluation_hands_the_device_to_its_classifiers(digits, extractor, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with OtherDevice() as watch:
        evaluate(digits.validation, digits.test, extractor=extractor, device="meta", classifiers=("cnn",))
    assert watch.ran_on("convolution_backward", "_fused_adam_") == {"meta"}


# Extractors.


def test_classifier_features_are_narrow_and_tagged(digits, extractor):
    features = extractor.features(digits.test.images)
    assert (extractor.name, extractor.tag) == ("classifier", "classifier@180")
    assert features.shape == (180, 32) and features.dtype == torch.float32


def test_features_do_not_depend_on_order_or_batch(digits, extractor):
    images = digits.train.images[:150]
    one_by_one = torch.cat([extractor.features(image) for image in images.flip(0).split(1)]).flip(0)
    torch.testing.assert_close(one_by_one, extractor.features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_extractor_does_not_depend_on_the_number_of_threads(digits, monkeypatch, tmp_path):
    threads, trained = torch.get_num_threads(), []
    for count in (1, 2):
        monkeypatch.setattr(extractors, "_built", {})
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(count)))
        torch.set_num_threads(count)
        try:
            trained.append(classifier_extractor(digits.validation))
        finally:
            torch.set_num_threads(threads)
    first, second = (extractor.features(digits.test.images) for extractor in trained)
    torch.testing.assert_close(first, second, rtol=0, atol=3e-7)  # trained in float32: 1e-6


def test_the_extractor_is_built_once_per_process(digits, extractor):
    assert build_extractor("classifier", digits.validation) is extractor


def test_other_data_or_another_seed_gives_another_extractor(digits, extractor):
    fewer = digits.validation.take(torch.arange(60))
    assert classifier_extractor(fewer).tag == "classifier@60"
    assert classifier_extractor(fewer, seed=1) is not classifier_extractor(fewer)


def rebuilt(data: LabelledImages, monkeypatch) -> tuple[Extractor, int]:
    """The extractor of a new process, and how often it was trained."""
    trainings = []

    def fit(*arguments, **keywords):
        trainings.append(1)
        return original(*arguments, **keywords)

    original = extractors.fit
    with monkeypatch.context() as patch:
        patch.setattr(extractors, "_built", {})
        patch.setattr(extractors, "fit", fit)
        return classifier_extractor(data), len(trainings)


def test_a_cached_extractor_is_read_and_not_trained_again(digits, extractor, monkeypatch):
    again, trainings = rebuilt(digits.validation, monkeypatch)
    assert trainings == 0
    assert torch.equal(again.features(digits.test.images), extractor.features(digits.test.images))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b[:-1] + bytes([b[-1] ^ 64])])
def test_a_damaged_cache_entry_is_rebuilt(digits, cache, monkeypatch, damage):
    data = digits.validation.take(torch.arange(50))
    first, _ = rebuilt(data, monkeypatch)
    entry = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    again, trainings = rebuilt(data, monkeypatch)
    assert trainings == 1 and entry.read_bytes() == whole
    assert torch.equal(again.features(data.images), first.features(data.images))


def test_the_cache_holds_whole_entries_only(cache, extractor):
    assert {path.suffix for path in cache.iterdir()} == {".safetensors"}


def test_an_unwritable_cache_does_not_stop_a_trial(digits, monkeypatch, tmp_path, caplog):
    (tmp_path / "dpsink").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, trainings = rebuilt(digits.validation.take(torch.arange(40)), monkeypatch)
    assert trainings == 1 and "not cached" in caplog.text


def test_an_entry_that_is_not_written_whole_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    kept = recall(tmp_path / "entry", lambda: {"features": torch.ones(3)})
    assert torch.equal(kept["features"], torch.ones(3)) and "not cached (No space" in caplog.text
    assert not list(tmp_path.iterdir())


AT_ONCE = """
import hashlib, sys
from pathlib import Path
from dpsink.config import DataConfig
from dpsink.data import load_dataset
from dpsink.evaluation import classifier_extractor
from dpsink.evaluation.reference import reference_features

print("ready", flush=True)
sys.stdin.readline()
own = DataConfig(name="folder:pets", test="public", validation="public", test_size=400)
data = load_dataset(own, root=Path(sys.argv[1]))
features = reference_features(classifier_extractor(data.test), data.test)
print(data.fingerprint, hashlib.sha256(features.numpy()).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_fill_the_caches_at_once_get_the_same_and_leave_whole_entries(tmp_path, monkeypatch):
    """Decoded images, the extractor and features of real images; a third process makes none of them again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = random_images((1, 8, 8), 800)
    for number, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        folder = tmp_path / "pets" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number}.png")

    def begin() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", AT_ONCE, str(tmp_path)]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(running: list[subprocess.Popen[str]]) -> list[str]:
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        return [one.communicate("\n", timeout=120)[0] for one in running]

    first, second = end([begin(), begin()])
    assert first == second != ""
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*") if path.is_file()}
    assert sorted(path.suffix for path in entries) == [".lock", ".npz", ".safetensors", ".safetensors"]
    assert end([begin()]) == [first]
    assert entries == {path: path.stat().st_mtime_ns for path in entries}


def test_an_unknown_extractor_is_refused(digits):
    with pytest.raises(InputError, match="'vgg'"):
        build_extractor("vgg", digits.validation)


class Payload:
    """Unpickles by making a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_weights_file_that_carries_code_is_refused_unrun(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(InputError, match=r"w\.pth"):
        inception_extractor(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"fc.bias": torch.zeros(1008)}, [1, 2], {}])
def test_other_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not torch-fidelity's") as error:
        inception_extractor(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut"])
def test_a_damaged_weights_file_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="not torch-fidelity's"):
        inception_extractor(tmp_path / "w.pth")


def test_the_published_weights_are_torch_fidelity_s():
    assert extractors.INCEPTION_URL == URL_INCEPTION_V3


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> tuple[Path, FeatureExtractorInceptionV3]:
    """A file of the true layout with random weights, and the network that they came from."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        untrained = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="any")
    path = tmp_path_factory.mktemp("inception") / "w.pth"
    torch.save(untrained.state_dict(), path)
    return path, untrained


@pytest.fixture
def any_weights(monkeypatch):
    """Weights other than the published ones are read."""
    monkeypatch.setattr(extractors, "INCEPTION_SHA256_PREFIX", "")


@pytest.mark.slow
def test_other_weights_of_the_true_layout_are_refused(inception_weights):
    """Their FID would pass for one by the published weights."""
    with pytest.raises(InputError, match=r"w\.pth: not torch-fidelity's .*SHA-256 does not begin with 6726825d"):
        inception_extractor(inception_weights[0])


@pytest.mark.slow
@pytest.mark.usefixtures("any_weights")
def test_inception_weights_are_read_from_their_file(inception_weights):
    path, untrained = inception_weights
    grey = random_images((1, 28, 28), 3).images
    inception = inception_extractor(path)
    assert (inception.name, inception.features(grey).shape) == ("inception", (3, 2048))
    assert torch.allclose(inception.features(grey), untrained(grey.expand(-1, 3, -1, -1))[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("any_weights")
def test_inception_s_features_of_the_reference_are_kept_on_disk(inception_weights, monkeypatch):
    """By another process too: what is in memory is dropped, and the network then refuses to run."""
    inception, real = inception_extractor(inception_weights[0]), random_images((1, 28, 28), 4)
    first = reference_features(inception, real)

    def refuse(_):
        raise AssertionError("the network ran on the reference")

    reference_features.cache_clear()
    assert torch.equal(reference_features(replace(inception, network=refuse), real), first)
    for other in (real.take(torch.arange(3)), random_images((1, 28, 28), 5)):  # another number, other images
        with pytest.raises(AssertionError, match="the network ran"):
            reference_features(replace(inception, network=refuse), other)


@pytest.mark.slow
@pytest.mark.usefixtures("any_weights")
def test_other_inception_weights_have_other_features_on_disk(inception_weights, tmp_path):
    path, untrained = inception_weights
    state = untrained.state_dict()
    torch.save({name: tensor * 1.5 for name, tensor in state.items()}, tmp_path / "w.pth")
    assert inception_extractor(tmp_path / "w.pth").digest != inception_extractor(path).digest


# MNIST and Fashion-MNIST.


REAL = pytest.mark.skipif("DPSINK_DATA_ROOT" not in os.environ, reason="DPSINK_DATA_ROOT is unset: no real images")


@pytest.mark.slow
@REAL
def test_ten_thousand_real_fashion_images_teach_every_classifier():
    """The paper's real data, six times as many, give 84.5 / 88.2 / 90.8 %."""
    data = load_dataset(DataConfig(name="fashion_mnist"))
    scores = classifier_accuracies(data.train.take(torch.arange(10_000)), data.test)
    assert 0.80 < scores["accuracy_logreg"] < scores["accuracy_mlp"] < scores["accuracy_cnn"] < 0.93
    assert scores["accuracy_mlp"] > 0.82 and scores["accuracy_cnn"] > 0.85


@pytest.mark.slow
@REAL
def test_ten_thousand_real_mnist_images_get_good_figures_in_two_cpu_minutes():
    """All that a trial's evaluation measures; only the extractor is there, which a study trains once."""
    data = load_dataset(DataConfig(name="mnist", validation_size=5000))
    features = classifier_extractor(data.public_reference)
    started = time.process_time()
    scores = evaluate(data.train.take(torch.arange(10_000)), data.public_reference, extractor=features)
    assert time.process_time() - started < 120
    assert 0.89 < scores["accuracy_logreg"] < scores["accuracy_mlp"] < scores["accuracy_cnn"] < 0.995
    assert scores["accuracy_mlp"] > 0.925 and scores["accuracy_cnn"] > 0.975
    assert scores["recall"] > 0.8 and scores["precision"] > 0.8 and scores["variety"] == pytest.approx(1, abs=0.05)
