"""The proof obligations of both mechanisms: sensitivity, bounded answers, public branches, the noise."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpsink.config import SinkhornConfig
from dpsink.data import to_unit
from dpsink.entropy import OsEntropy
from dpsink.privacy.mechanism import (
    BatchMechanism,
    Generated,
    Mechanism,
    RecordMechanism,
    class_means_sensitivity,
    clip,
    release_class_means,
    sanitize,
)
from dpsink.privacy.noise import fresh_noise, gaussian_noise
from dpsink.privacy.sampling import poisson_batch
from dpsink.sinkhorn import Points, Problem, StackedProblem, cost_gradient, per_slot, record_terms
from tests.conftest import ReplayedEntropy

N, D, C = 12, 16, 0.5
SINKHORN = SinkhornConfig(cost="l1+l2", blur=0.5, gen_batch_size=N)
FRESH = fresh_noise(OsEntropy())
EXTREMES = [0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e19, math.inf, -math.inf, math.nan]


def generated(seed: int = 0) -> Generated:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(N + 3, D, generator=rng) * 2 - 1
    labels = torch.arange(N) % 4
    x, x_tilde = Points(images[:N], labels), Points(images[N:], labels[:3])
    return Generated.of(x, x_tilde, SINKHORN)


def records(count: int, seed: int = 1) -> Points:
    rng = torch.Generator().manual_seed(seed)
    return Points(torch.rand(count, D, generator=rng) * 2 - 1, torch.randint(4, (count,), generator=rng))


def mechanisms() -> list[Mechanism]:
    return [BatchMechanism(C, SINKHORN), RecordMechanism(C, SINKHORN, expected_batch=10.0)]


def with_record(batch: Points, record: Tensor, label: int) -> Points:
    return Points(torch.cat([batch.images, record[None]]), torch.cat([batch.labels, torch.tensor([label])]))


record_strategy = st.lists(
    st.one_of(st.sampled_from(EXTREMES), st.floats(-1, 1, width=32)), min_size=D, max_size=D
).map(lambda values: torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("mechanism", mechanisms(), ids=["batch", "record"])
@settings(max_examples=60, deadline=None)
@given(record=record_strategy, label=st.integers(0, 3), size=st.sampled_from([0, 1, 5]))
def test_adding_one_record_moves_the_answer_by_at_most_the_sensitivity(
    mechanism: Mechanism, record: Tensor, label: int, size: int
) -> None:
    public, batch = generated(), records(size)
    moved = mechanism.query(public, with_record(batch, record, label)) - mechanism.query(public, batch)
    assert moved.norm() <= mechanism.sensitivity  # a NaN fails this too


def test_batch_sensitivity_of_two_clip_norms_is_reached() -> None:
    """One record added to the empty batch turns the clipped gradient around: C instead of 2C is a bug."""
    x = Points(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    public = Generated(x, torch.full((2, 1), 0.4, dtype=torch.float64), torch.zeros(0, 1))
    mechanism = BatchMechanism(0.1, SinkhornConfig(cost="l2"))
    added = mechanism.query(public, Points(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)))
    moved = (added - mechanism.query(public, Points(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))).norm()
    assert moved == pytest.approx(mechanism.sensitivity, rel=1e-9)


def test_record_answer_is_the_sum_of_the_records_own_answers() -> None:
    public, batch = generated(), records(6)
    mechanism = mechanisms()[1]
    single = [mechanism.query(public, Points(batch.images[[j]], batch.labels[[j]])) for j in range(6)]
    torch.testing.assert_close(mechanism.query(public, batch), torch.stack(single).sum(0), atol=1e-6, rtol=1e-5)


def test_column_of_a_record_does_not_move_with_other_records() -> None:
    public, batch = generated(), records(9)
    before = record_terms(public.x, batch, SINKHORN)
    batch.images[4] = torch.rand(D) * 2 - 1
    after = record_terms(public.x, batch, SINKHORN)
    others = [j for j in range(9) if j != 4]
    assert torch.equal(before.coupling[:, others], after.coupling[:, others])
    assert torch.equal(before.norms[others], after.norms[others])


def test_record_answer_is_the_unclipped_gradient_below_the_clip_norm() -> None:
    public, batch = generated(), records(6)
    wide = RecordMechanism(1e6, SINKHORN, expected_batch=10.0)
    expected = cost_gradient(record_terms(public.x, batch, SINKHORN).coupling, public.x, batch, SINKHORN)
    torch.testing.assert_close(wide.query(public, batch).float(), expected)


def test_record_answer_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    public, batch = generated(), records(50)
    whole = mechanisms()[1].query(public, batch)
    monkeypatch.setattr("dpsink.privacy.mechanism.CHUNK", 7)
    torch.testing.assert_close(mechanisms()[1].query(public, batch), whole, atol=1e-5, rtol=1e-5)


def test_thousands_of_clipped_records_stay_within_their_sum_of_bounds() -> None:
    public = generated()
    same = Points(torch.ones(5000, D), torch.zeros(5000, dtype=torch.int64))
    assert mechanisms()[1].query(public, same).norm() <= 5000 * C


def test_one_bad_record_leaves_the_others_answer_alone() -> None:
    public, batch = generated(), records(5)
    mechanism = mechanisms()[1]
    bad = with_record(batch, torch.full((D,), math.nan), 0)
    zero = with_record(batch, torch.zeros(D), 0)
    torch.testing.assert_close(mechanism.query(public, bad), mechanism.query(public, zero))


@pytest.mark.parametrize("mechanism", mechanisms(), ids=["batch", "record"])
def test_empty_batch_has_the_shape_and_noise_of_any_other(mechanism: Mechanism) -> None:
    empty = Points(torch.zeros(0, D), torch.zeros(0, dtype=torch.int64))
    released = sanitize(mechanism, generated(), empty, 50.0, FRESH)
    assert released.shape == (N, D)
    assert float(released.std()) == pytest.approx(50 * mechanism.sensitivity, rel=0.3)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=["batch", "record"])
def test_gradient_of_x_tilde_does_not_move_with_the_real_data(mechanism: Mechanism) -> None:
    public = generated()
    answers = [mechanism.query(public, records(5, seed)) for seed in (1, 2)]
    tildes = [mechanism.loss_gradients(public, answer)[1] for answer in answers]
    assert not torch.equal(*answers)
    assert torch.equal(*tildes)


def test_record_normaliser_is_public() -> None:
    """The released sum is scaled by 2/(qN), whatever the size of the realised batch."""
    public, mechanism = generated(), mechanisms()[1]
    released = torch.ones(N, D, dtype=torch.float64)
    gradient, _ = mechanism.loss_gradients(public, released)
    torch.testing.assert_close(gradient - public.debiasing, torch.full_like(released, 0.2))


@pytest.mark.parametrize("kind", ["batch", "record"])
def test_padded_batches_side_by_side_get_the_answers_of_each_alone(kind: str) -> None:
    """The empty batch among them: F(∅) of `batch` is its data-free part, of `record` zero."""
    configs = [SINKHORN, SINKHORN.model_copy(update={"blur": 5.0}), SINKHORN]
    clips, batches = [C, 2 * C, 0.1], [records(6), records(0), records(3, 4)]
    publics = [Generated.of(*halves(generated(k)), config) for k, config in enumerate(configs)]
    problem = StackedProblem.of(configs, D)
    side_by_side = Generated(
        Points(torch.stack([one.x.images for one in publics]), torch.stack([one.x.labels for one in publics])),
        torch.stack([one.debiasing for one in publics]),
        torch.stack([one.tilde_debiasing for one in publics]),
    )
    answer = mechanism_of(kind, per_slot(clips), problem).query(side_by_side, pad(batches, 8))
    for k, config in enumerate(configs):
        alone = mechanism_of(kind, clips[k], config).query(publics[k], batches[k])
        torch.testing.assert_close(answer[k], alone, atol=1e-6, rtol=1e-5)


def mechanism_of(kind: str, clip_norm: float | Tensor, problem: Problem) -> Mechanism:
    return BatchMechanism(clip_norm, problem) if kind == "batch" else RecordMechanism(clip_norm, problem, 10.0)


def halves(public: Generated) -> tuple[Points, Points]:
    """X, and an X̃ made of its first rows moved a little."""
    return public.x, Points(public.x.images[:3] * 0.9, public.x.labels[:3])


def pad(batches: list[Points], width: int) -> Points:
    images, labels = torch.full((len(batches), width, D), math.nan), torch.zeros(len(batches), width).long()
    present = torch.zeros(len(batches), width, dtype=torch.bool)
    for row, one in enumerate(batches):
        size = len(one.labels)
        images[row, :size], labels[row, :size], present[row, :size] = one.images, one.labels, True
    return Points(images, labels, present)


def test_bytes_are_the_records_that_they_stand_for() -> None:
    """The engine hands over uint8 images; floats of the same pixels get the same answer."""
    pixels = torch.randint(256, (7, D), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(7) % 4
    for mechanism in mechanisms():
        answers = [mechanism.query(generated(), Points(images, labels)) for images in (pixels, to_unit(pixels))]
        assert torch.equal(*answers)


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=8),
    bound=st.floats(1e-6, 1e6),
)
def test_clip_is_finite_and_never_above_its_bound(values: list[float], bound: float) -> None:
    clipped = clip(torch.tensor([values], dtype=torch.float64), bound)
    assert torch.isfinite(clipped).all()
    assert math.sqrt(sum(value**2 for value in clipped[0].tolist())) <= bound


def test_clip_leaves_short_vectors_alone() -> None:
    values = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(clip(values, 1.0), values)


@pytest.mark.parametrize("mechanism", mechanisms(), ids=["batch", "record"])
def test_noise_has_the_standard_deviation_of_sigma_times_sensitivity(mechanism: Mechanism) -> None:
    public, batch = generated(), records(5)
    answer = mechanism.query(public, batch)
    noise = torch.stack([sanitize(mechanism, public, batch, 1.5, FRESH) - answer for _ in range(400)])
    expected = 1.5 * mechanism.sensitivity
    # The standard error of a standard deviation from 76,800 draws is 0.26 %.
    assert float(noise.std()) == pytest.approx(expected, rel=0.015)


def test_noise_is_normal_by_kolmogorov_smirnov() -> None:
    draws = gaussian_noise((200_000,), OsEntropy()).numpy()
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-6


def test_noise_tail_is_not_truncated_where_float32_generators_stop() -> None:
    class Smallest:
        def random_bytes(self, count: int) -> bytes:
            return bytes(count)

    assert gaussian_noise((2,), Smallest()).abs().max() > 9


def test_noise_tail_has_the_mass_of_the_normal_one() -> None:
    draws = gaussian_noise((4_000_000,), OsEntropy()).abs()
    count, expected = int((draws > 4.5).sum()), 4_000_000 * 2 * scipy.stats.norm.sf(4.5)
    assert abs(count - expected) < 6 * math.sqrt(expected)


def test_noise_of_odd_shapes_is_complete() -> None:
    assert gaussian_noise((3, 5), OsEntropy()).shape == (3, 5)
    assert gaussian_noise((0, 5), OsEntropy()).shape == (0, 5)


def test_noise_never_repeats() -> None:
    first, second = (gaussian_noise((100,), OsEntropy()) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 1.0])
def test_membership_has_the_accounted_rate(rate: float) -> None:
    n, draws = 20_000, 50
    total = sum(len(poisson_batch(OsEntropy(), n, rate)) for _ in range(draws))
    deviation = math.sqrt(n * draws * rate * (1 - rate))
    assert abs(total - n * draws * rate) <= 6 * deviation


def test_membership_is_independent_between_records() -> None:
    joined = np.zeros((400, 100))
    for row in joined:
        row[poisson_batch(OsEntropy(), 100, 0.3).numpy()] = 1
    correlation = np.asarray(np.corrcoef(joined.T))[np.triu_indices(100, 1)]
    assert abs(correlation.mean()) < 6 / math.sqrt(400 * len(correlation))


@pytest.mark.parametrize("rate", [1e-9, 50 / 60_000, 0.4])
def test_membership_rate_is_never_above_the_accounted_one(rate: float) -> None:
    """A uniform at the accounted rate leaves the first record out; one just below it, by 2⁻³⁰ of it, takes it in."""

    class Fixed:
        def __init__(self, uniform: float) -> None:
            self.word = int(uniform * 2**64)

        def random_bytes(self, count: int) -> bytes:
            return np.full(count // 8, self.word, dtype=np.uint64).tobytes()

    assert 0 not in poisson_batch(Fixed(rate), 3, rate)
    assert 0 in poisson_batch(Fixed(rate * (1 - 2**-30)), 3, rate)


def test_membership_without_a_rate_is_empty_and_with_certainty_whole() -> None:
    assert len(poisson_batch(OsEntropy(), 50, 0.0)) == 0
    assert poisson_batch(OsEntropy(), 50, 1.0).tolist() == list(range(50))


def test_size_of_the_batch_is_binomial() -> None:
    sizes = np.array([len(poisson_batch(OsEntropy(), 60, 0.2)) for _ in range(4000)])
    expected = scipy.stats.binom.pmf(np.arange(4, 21), 60, 0.2)
    observed = np.array([(sizes == k).mean() for k in range(4, 21)])
    assert np.abs(observed - expected).max() < 6 * math.sqrt(expected.max() / 4000)


def test_bytes_drawn_for_a_batch_are_a_public_number() -> None:
    """As many whatever the batch, up to a chance of 1e-9 of asking again; and proportional to it, not to the data."""

    class Counting(OsEntropy):
        counts: ClassVar[list[int]] = []

        def random_bytes(self, count: int) -> bytes:
            self.counts.append(count)
            return super().random_bytes(count)

    for _ in range(200):
        poisson_batch(Counting(), 1_000_000, 5e-5)
    assert set(Counting.counts) == {8 * 108}


@settings(max_examples=40, deadline=None)
@given(pixel=st.integers(0, 255), label=st.integers(0, 2), clip_norm=st.floats(0.1, 100))
def test_class_sums_move_by_at_most_their_sensitivity(pixel: int, label: int, clip_norm: float) -> None:
    def sums(images: Tensor, labels: Tensor, captured: list[Any]) -> None:
        class Zero:
            def random_bytes(self, count: int) -> bytes:
                # All words at half range: radius·sin(π) = 0 and radius·cos(π) = −radius, the same for both.
                return np.full(count // 8, 2**63, dtype=np.uint64).tobytes()

        original = torch.Tensor.index_add_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "index_add_", lambda *a: captured.append(original(*a).clone()) or captured[-1])
            release_class_means(images, labels, 3, clip_norm, 1.0, Zero())

    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 1, 4, 4), generator=rng).to(torch.uint8)
    labels = torch.randint(3, (6,), generator=rng)
    images[5], labels[5] = pixel, label
    with_it: list[Any] = []
    without: list[Any] = []
    sums(images, labels, with_it)
    sums(images[:5], labels[:5], without)
    assert (with_it[0] - without[0]).norm() <= class_means_sensitivity(clip_norm) * (1 + 1e-12)


def test_class_means_without_noise_are_the_class_means(digits: Any) -> None:
    train = digits.train
    means = release_class_means(train.images, train.labels, 10, 100.0, 0.0, OsEntropy())
    expected = torch.stack([train.images[train.labels == k].double().mean(0) for k in range(10)]) / 127.5 - 1
    torch.testing.assert_close(means.double(), expected, atol=1e-6, rtol=0)


def test_replayed_entropy_repeats_and_the_real_one_does_not() -> None:
    """Equality tests rest on this; nothing outside tests/ can replay."""
    replayed = [gaussian_noise((9,), ReplayedEntropy(7)) for _ in range(2)]
    assert torch.equal(*replayed)
