"""Transport: agreement with geomloss, closed forms, and the semi-dual."""

import pytest
import torch
from torch import Tensor

from dpsink.config import SinkhornConfig
from dpsink.sinkhorn import (
    Annealing,
    Points,
    StackedProblem,
    annealing_schedule,
    comparison_points,
    cost_gradient,
    debiasing_gradients,
    geomloss_cost,
    pairwise_cost,
    potentials,
    record_terms,
    regularisation,
    space_diameter,
    transport_cost,
    transport_gradient,
    transport_gradients,
)

COSTS = [("l1+l2", 1, 1.0), ("l1+l2", 1, 3.0), ("l2", 2, 1.0), ("l1", 1, 1.0), ("l2", 1, 1.0)]
BLURS = [0.05, 0.5, 5.0]


def points(count: int, seed: int, dimension: int = 64) -> Points:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(count, dimension, generator=rng, dtype=torch.float64) * 2 - 1
    return Points(images, torch.randint(10, (count,), generator=rng))


def settings(cost: str, p: int, m: float, blur: float, **more: object) -> SinkhornConfig:
    return SinkhornConfig.model_validate({"cost": cost, "p": p, "l1_weight": m, "blur": blur, **more})


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize(("cost", "p", "m"), COSTS)
def test_gradients_agree_with_geomloss_and_autograd(cost: str, p: int, m: float, blur: float) -> None:
    config = settings(cost, p, m, blur)
    x, y = points(20, 1), points(33, 2)
    ours = transport_gradients(x, y, config)
    reference = transport_gradients(x, y, config.model_copy(update={"backend": "geomloss"}))
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize(("cost", "p", "m"), COSTS)
def test_transport_cost_agrees_with_geomloss(cost: str, p: int, m: float, blur: float) -> None:
    config = settings(cost, p, m, blur)
    x, y = points(20, 1), points(33, 2)
    ours = transport_cost(pairwise_cost(x, y, config), annealing_schedule(64, config))
    torch.testing.assert_close(ours, geomloss_cost(x, y, config), atol=1e-10, rtol=1e-12)


def test_blur_above_the_diameter_agrees_with_geomloss() -> None:
    config = settings("l2", 2, 1.0, 500.0)
    x, y = points(7, 1), points(9, 2)
    torch.testing.assert_close(
        transport_gradients(x, y, config)[0],
        transport_gradients(x, y, config.model_copy(update={"backend": "geomloss"}))[0],
    )


@pytest.mark.parametrize(("cost", "p", "m"), COSTS)
def test_cost_is_that_of_the_joint_points(cost: str, p: int, m: float) -> None:
    config = settings(cost, p, m, 1.0, label_weight=15.0)
    x, y = points(6, 1), points(8, 2)
    joint = [torch.cat([a.images, 15 * torch.nn.functional.one_hot(a.labels, 10)], 1) for a in (x, y)]
    difference = joint[0][:, None] - joint[1][None]
    squared, absolute = difference.square().sum(-1), difference.abs().sum(-1)
    expected = {"l1+l2": squared + m * absolute, "l2": squared, "l1": m * absolute}[cost]
    torch.testing.assert_close(pairwise_cost(x, y, config), expected)


def test_debiasing_gradient_reaches_x_through_both_arguments() -> None:
    config = settings("l1+l2", 1, 1.0, 5.0)
    x = points(10, 1)
    x_tilde = Points(points(3, 2).images, x.labels[:3])
    leaf, tilde = (images.clone().requires_grad_() for images in (x.images, x_tilde.images))
    generated = Points(leaf, x.labels)
    loss = -geomloss_cost(generated, comparison_points(generated, Points(tilde, x_tilde.labels)), config)
    expected = torch.autograd.grad(loss, (leaf, tilde))
    for mine, theirs in zip(debiasing_gradients(x, x_tilde, config), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_biased_loss_is_the_gradient_of_geomloss_debiased_doubled() -> None:
    """geomloss' own debiasing is `debias_ratio: 0` with both terms halved."""
    from geomloss import SamplesLoss

    config = settings("l2", 2, 1.0, 5.0, label_weight=0.0)
    x, y = points(9, 1), points(11, 2)
    leaf = x.images.clone().requires_grad_()

    def cost(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] - b[:, None]).square().sum(-1)

    solver = SamplesLoss(
        "sinkhorn", p=2, blur=5.0, debias=True, cost=cost, diameter=space_diameter(64, config),
        backend="tensorized",
    )  # fmt: skip
    (expected,) = torch.autograd.grad(solver(leaf, y.images), leaf)
    ours = 2 * transport_gradients(x, y, config)[0] + debiasing_gradients(x, points(0, 3), config)[0]
    torch.testing.assert_close(ours, 2 * expected, atol=1e-6, rtol=1e-5)


def test_record_terms_are_the_gradient_of_the_semi_dual() -> None:
    config = settings("l1+l2", 1, 1.0, 5.0)
    x, y = points(12, 1), points(7, 2)
    f = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaf = x.images.clone().requires_grad_()
    scores = (f[:, None] - _autograd_cost(leaf, x.labels, y, config)) / regularisation(config)
    semi_dual = f.mean() - regularisation(config) * torch.logsumexp(scores, 0).mean()
    (expected,) = torch.autograd.grad(semi_dual, leaf)
    coupling = record_terms(x, y, config, potential=f).coupling
    torch.testing.assert_close(cost_gradient(coupling / 7, x, y, config), expected, atol=1e-12, rtol=0)


def test_record_gradient_at_the_optimal_potential_is_the_transport_gradient() -> None:
    config = settings("l2", 1, 1.0, 50.0)
    x, y = points(12, 1), points(7, 2)
    temperatures = [*annealing_schedule(64, config).temperatures, *[50.0] * 500]
    f, _ = potentials(pairwise_cost(x, y, config), Annealing(temperatures, [None] * len(temperatures)))
    f = f[:, 0]
    by_record = cost_gradient(record_terms(x, y, config, potential=f).coupling / 7, x, y, config)
    f_only = torch.softmax((f[:, None] - pairwise_cost(x, y, config)) / 50.0, 0) / 7
    torch.testing.assert_close(f_only.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(by_record, cost_gradient(f_only, x, y, config))


@pytest.mark.parametrize(("cost", "p", "m"), COSTS)
@pytest.mark.parametrize("blur", BLURS)
def test_record_norms_equal_the_true_norms_where_nothing_ties(cost: str, p: int, m: float, blur: float) -> None:
    config = settings(cost, p, m, blur)
    x, y = points(12, 1), points(7, 2)
    terms = record_terms(x, y, config)
    torch.testing.assert_close(terms.norms, _true_norms(terms.coupling, x, y, config), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("cost", "p", "m"), COSTS)
def test_record_norms_are_never_below_the_true_ones_where_coordinates_tie(cost: str, p: int, m: float) -> None:
    config = settings(cost, p, m, 5.0)
    x, y = points(12, 1), points(7, 2)
    y.images[:, ::2] = 1.0
    x.images[:, ::2] = 1.0
    terms = record_terms(x, y, config)
    assert (terms.norms >= _true_norms(terms.coupling, x, y, config) * (1 - 1e-12)).all()


def _true_norms(coupling: Tensor, x: Points, y: Points, config: SinkhornConfig) -> Tensor:
    columns = [
        cost_gradient(coupling[:, [j]], x, Points(y.images[[j]], y.labels[[j]]), config).norm()
        for j in range(y.images.shape[0])
    ]
    return torch.stack(columns)


def _autograd_cost(images: Tensor, labels: Tensor, y: Points, config: SinkhornConfig) -> Tensor:
    difference = images[:, None] - y.images[None]
    image_cost = difference.square().sum(-1) + config.l1_weight * difference.abs().sum(-1)
    w = config.label_weight
    return image_cost + (labels[:, None] != y.labels) * (2 * w**2 + 2 * w * config.l1_weight)


STACKED = [
    settings("l1+l2", 1, 1.0, 5.0),
    settings("l1+l2", 1, 3.0, 0.5, label_weight=2.0),
    settings("l1+l2", 1, 0.5, 0.05, label_weight=0.0),
]


def stack(each: list[Points]) -> Points:
    return Points(torch.stack([one.images for one in each]), torch.stack([one.labels for one in each]))


def padded(each: list[Points], width: int) -> Points:
    """The sets in rows of one width; what fills them up is far from zero."""
    images = torch.full((len(each), width, each[0].images.shape[1]), 7.0, dtype=torch.float64)
    labels, present = torch.zeros(len(each), width, dtype=torch.int64), torch.zeros(len(each), width, dtype=torch.bool)
    for row, one in enumerate(each):
        size = len(one.labels)
        images[row, :size], labels[row, :size], present[row, :size] = one.images, one.labels, True
    return Points(images, labels, present)


def test_stacked_problems_have_the_gradients_of_each_alone() -> None:
    """Different blurs need different numbers of iterations: the short ones are frozen at their end."""
    x, y = [points(12, k) for k in range(3)], [points(17, 10 + k) for k in range(3)]
    both = transport_gradients(stack(x), stack(y), StackedProblem.of(STACKED, 64))
    for k, config in enumerate(STACKED):
        for mine, alone in zip(both, transport_gradients(x[k], y[k], config), strict=True):
            torch.testing.assert_close(mine[k], alone, atol=1e-11, rtol=0)


def test_longer_annealing_than_needed_changes_nothing() -> None:
    x, y = stack([points(12, 1)]), stack([points(17, 2)])
    exact, longer = (StackedProblem.of(STACKED[:1], 64, iterations=length) for length in (0, 40))
    torch.testing.assert_close(
        transport_gradients(x, y, longer)[0], transport_gradients(x, y, exact)[0], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("width", [17, 64])
def test_padding_has_no_weight_in_transport(width: int) -> None:
    x, y = [points(12, k) for k in range(3)], [points(size, 10 + k) for k, size in enumerate((17, 5, 1))]
    gradient = transport_gradient(stack(x), padded(y, width), StackedProblem.of(STACKED, 64))
    for k, config in enumerate(STACKED):
        torch.testing.assert_close(gradient[k], transport_gradient(x[k], y[k], config), atol=1e-11, rtol=0)


def test_stacked_record_terms_are_those_of_each_alone() -> None:
    x, y = [points(12, k) for k in range(3)], [points(17, 10 + k) for k in range(3)]
    together = record_terms(stack(x), stack(y), StackedProblem.of(STACKED, 64))
    for k, config in enumerate(STACKED):
        alone = record_terms(x[k], y[k], config)
        torch.testing.assert_close(together.coupling[k], alone.coupling, atol=1e-14, rtol=1e-9)
        torch.testing.assert_close(together.norms[k], alone.norms, atol=1e-10, rtol=1e-10)
