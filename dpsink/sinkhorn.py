"""Entropic optimal transport between labelled images: costs, potentials, couplings and gradients.

No function here knows about privacy. Points are an image, flattened, in [-1, 1]^d, next to a label; the
label's one-hot vector, scaled by `label_weight`, is part of the point, and its share of the cost is written in
closed form. Gradients are taken over image coordinates, analytically, at the final potentials: no tensor of
shape (n, m, d) is ever built.

Sources: Cao et al. 2021 (DP-Sinkhorn), Feydy 2020 (annealed symmetric Sinkhorn iterations, as in geomloss),
Genevay, Cuturi, Peyré, Bach 2016 (semi-dual).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpsink.config import SinkhornConfig

NEGLIGIBLE = 1e-30  # a coupling's entry that no sum of pixels can see
ANNEALING = 0.5  # factor on the blur from one iteration to the next, geomloss' default


class Points(NamedTuple):
    """Labelled points.

    Attributes:
        images: float, (n, d), in [-1, 1].
        labels: int64, (n,).
    """

    images: Tensor
    labels: Tensor


class Distances(NamedTuple):
    """Image distances that costs, gradients and norms share; float64, (n, m)."""

    squared: Tensor  # ‖x_i − y_j‖₂²
    absolute: Tensor  # ‖x_i − y_j‖₁; zeros where the cost has no L1 part


class RecordTerms(NamedTuple):
    """What each real record adds to the gradient, without the (n, m, d) tensor of the terms themselves.

    Attributes:
        coupling: P, float64, (n, m); column j is a softmax over generated points and depends on record j,
            on X and on the potential only.
        norms: upper bounds of ‖v_j‖₂, float64, (m,), where v_j[i] = P_ij ∇₁c(x_i, y_j).
    """

    coupling: Tensor
    norms: Tensor


def squared_weight(config: SinkhornConfig) -> float:
    """Weight of ‖x−y‖₂² in the cost."""
    return 0.0 if config.cost == "l1" else 1.0


def l1_weight(config: SinkhornConfig) -> float:
    """Weight m of ‖x−y‖₁ in the cost."""
    return 0.0 if config.cost == "l2" else config.l1_weight


def regularisation(config: SinkhornConfig) -> float:
    """λ = blur ** p, the entropic regularisation."""
    return config.blur**config.p


def distances(x: Points, y: Points, config: SinkhornConfig) -> Distances:
    """Pairwise image distances, (n, m)."""
    # One float64 product is cheaper than differences, and exact enough to subtract: ‖x‖² + ‖y‖² − 2⟨x, y⟩.
    a, b = x.images.double(), y.images.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    squared = (norms - 2 * (a @ b.T)).clamp_min(0)
    if l1_weight(config) == 0:
        return Distances(squared, torch.zeros_like(squared))
    return Distances(squared, torch.cdist(x.images, y.images, p=1).double())


def pairwise_cost(x: Points, y: Points, config: SinkhornConfig) -> Tensor:
    """C_ij = ‖x_i−y_j‖₂² + m·‖x_i−y_j‖₁ over image and scaled one-hot label; float64, (n, m)."""
    return cost_of(distances(x, y, config), x, y, config)


def cost_of(parts: Distances, x: Points, y: Points, config: SinkhornConfig) -> Tensor:
    """The cost matrix from its image distances; float64, (n, m)."""
    w, a, m = config.label_weight, squared_weight(config), l1_weight(config)
    # Two different one-hot vectors differ in two coordinates, each by w.
    label_cost = 2 * a * w**2 + 2 * m * w
    different = x.labels[:, None] != y.labels[None, :]
    return a * parts.squared + m * parts.absolute + label_cost * different


def cost_gradient(weights: Tensor, x: Points, y: Points, config: SinkhornConfig) -> Tensor:
    """Σ_j W_ij ∇₁c(x_i, y_j) over image coordinates: the gradient in x of Σ_ij W_ij C_ij; (n, d)."""
    # Entries far below rounding would become subnormal numbers, on which a product runs ten times slower.
    weights = weights.masked_fill(weights < NEGLIGIBLE, 0).to(x.images.dtype)
    gradient = torch.zeros_like(x.images)
    if squared_weight(config):
        gradient += 2 * (weights.sum(1, keepdim=True) * x.images - weights @ y.images)
    if l1_weight(config):
        # The kernel behind torch.cdist's backward pass: Σ_j W_ij sign(x_i − y_j), reduced on the fly.
        signs = torch.ops.aten._cdist_backward(weights, x.images, y.images, 1.0, weights)
        gradient += l1_weight(config) * signs
    return gradient


def annealing_schedule(dimension: int, config: SinkhornConfig) -> list[float]:
    """Temperatures of the Sinkhorn iterations, from the diameter of the space down to λ.

    The diameter is that of the cube of all possible points, a public constant: the number of iterations does
    not depend on the data.

    Args:
        dimension: d, number of image coordinates.
    """
    p, diameter = config.p, space_diameter(dimension, config)
    steps = max(0, math.ceil((math.log(config.blur) - math.log(diameter)) / math.log(ANNEALING)))
    cooling = [(diameter * ANNEALING**k) ** p for k in range(steps)]
    return [diameter**p, *cooling, config.blur**p]


def space_diameter(dimension: int, config: SinkhornConfig) -> float:
    """Largest Euclidean distance of two labelled points: images in [-1, 1]^d, labels one-hot times w."""
    return math.sqrt(4 * dimension + 2 * config.label_weight**2)


def potentials(cost: Tensor, schedule: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Dual potentials of OT_λ between uniform measures by annealed symmetric Sinkhorn iterations.

    Args:
        cost: float64, (n, m).
        schedule: temperatures; the last one is λ.

    Returns:
        f (n,) and g (m,), before the extrapolation that makes either of them exact given the other.
    """
    log_a, log_b = -math.log(cost.shape[0]), -math.log(cost.shape[1])
    f = _softmin(cost, log_b, schedule[0], dim=1)
    g = _softmin(cost, log_a, schedule[0], dim=0)
    for temperature in schedule:
        # Feydy 2020, Fig. 3.25: averaging both half-steps keeps the iteration symmetric.
        f_next = _softmin(cost - g[None, :], log_b, temperature, dim=1)
        g_next = _softmin(cost - f[:, None], log_a, temperature, dim=0)
        f, g = (f + f_next) / 2, (g + g_next) / 2
    return f, g


def transport_cost(cost: Tensor, schedule: Sequence[float]) -> Tensor:
    """OT_λ (dual value at the extrapolated potentials), scalar float64."""
    f, g = potentials(cost, schedule)
    f_last = _softmin(cost - g[None, :], -math.log(cost.shape[1]), schedule[-1], dim=1)
    g_last = _softmin(cost - f[:, None], -math.log(cost.shape[0]), schedule[-1], dim=0)
    return f_last.mean() + g_last.mean()


def transport_gradients(x: Points, y: Points, config: SinkhornConfig) -> tuple[Tensor, Tensor]:
    """Gradients of OT_λ(x, y) in the images of x, (n, d), and of y, (m, d)."""
    if config.backend == "geomloss":
        return _geomloss_gradients(x, y, config)
    schedule = annealing_schedule(x.images.shape[1], config)
    cost = pairwise_cost(x, y, config)
    f, g = potentials(cost, schedule)
    # ∂OT/∂x_i = a_i Σ_j P_ij ∇₁c(x_i, y_j): the last half-step's softmax is the coupling.
    rows = torch.softmax((g[None, :] - cost) / schedule[-1], dim=1) / cost.shape[0]
    columns = torch.softmax((f[:, None] - cost) / schedule[-1], dim=0) / cost.shape[1]
    return cost_gradient(rows, x, y, config), cost_gradient(columns.T, y, x, config)


def comparison_points(x: Points, x_tilde: Points) -> Points:
    """X' = X[r:] ∪ X̃, the semi-debiased comparison set of n rows (paper, section 3.2)."""
    r = x_tilde.images.shape[0]
    return Points(torch.cat([x.images[r:], x_tilde.images]), torch.cat([x.labels[r:], x_tilde.labels]))


def debiasing_gradients(x: Points, x_tilde: Points, config: SinkhornConfig) -> tuple[Tensor, Tensor]:
    """Gradients of −OT_λ(X, X') in the images of X, (n, d), through both arguments, and of X̃, (r, d).

    Public: no real record enters.
    """
    n, r = x.images.shape[0], x_tilde.images.shape[0]
    first, second = transport_gradients(x, comparison_points(x, x_tilde), config)
    gradient = -first
    gradient[r:] -= second[: n - r]  # rows r.. of X are the first n − r rows of X'
    return gradient, -second[n - r :]


def record_terms(x: Points, y: Points, config: SinkhornConfig, potential: Tensor | None = None) -> RecordTerms:
    """Column couplings of the semi-dual and the norms of the records' gradient terms.

    OT_λ(X, Y) ≥ mean(f) − (λ/m) Σ_j log mean_i exp((f_i − C_ij)/λ) for every f (Genevay et al. 2016); for a
    fixed f its gradient in X is a sum of one term per record. For c = a‖·‖₂² + m‖·‖₁

        ‖v_j‖² ≤ Σ_i P_ij² (4a²‖x_i−y_j‖₂² + 4am‖x_i−y_j‖₁ + m²d),

    with equality where no coordinates of x_i and y_j coincide.

    Args:
        potential: f, (n,), must be public; zero if None.
    """
    parts = distances(x, y, config)
    scores = -cost_of(parts, x, y, config)
    if potential is not None:
        scores = scores + potential[:, None]
    coupling = torch.softmax(scores / regularisation(config), dim=0)
    a, m = squared_weight(config), l1_weight(config)
    squared_norms = 4 * a**2 * parts.squared + 4 * a * m * parts.absolute + m**2 * x.images.shape[1]
    return RecordTerms(coupling, (coupling.square() * squared_norms).sum(0).sqrt())


def _softmin(cost: Tensor, log_weight: float, temperature: float, dim: int) -> Tensor:
    return -temperature * (log_weight + torch.logsumexp(-cost / temperature, dim=dim))


def _geomloss_gradients(x: Points, y: Points, config: SinkhornConfig) -> tuple[Tensor, Tensor]:
    """The reference: geomloss and autograd, with its (n, m, d) tensors."""
    left, right = (points.images.detach().clone().requires_grad_() for points in (x, y))
    with torch.enable_grad():
        loss = geomloss_cost(Points(left, x.labels), Points(right, y.labels), config)
        gradients = torch.autograd.grad(loss, (left, right))
    return gradients[0], gradients[1]


def geomloss_cost(x: Points, y: Points, config: SinkhornConfig) -> Tensor:
    """OT_λ(x, y) by geomloss on the same annealing path; differentiable, scalar."""
    from geomloss import SamplesLoss

    def cost(left: Tensor, right: Tensor) -> Tensor:
        difference = left[:, :, None, :] - right[:, None, :, :]
        total = squared_weight(config) * difference.square().sum(-1)
        return total + l1_weight(config) * difference.abs().sum(-1)

    diameter = space_diameter(x.images.shape[1], config)
    solver = SamplesLoss(
        "sinkhorn", p=config.p, blur=config.blur, debias=False, diameter=diameter,
        scaling=ANNEALING, cost=cost, backend="tensorized",
    )  # fmt: skip
    return solver(_joint(x, y, config), _joint(y, x, config))


def _joint(points: Points, other: Points, config: SinkhornConfig) -> Tensor:
    classes = 1 + max(int(labels.max()) for labels in (points.labels, other.labels))
    onehot = torch.nn.functional.one_hot(points.labels, classes).to(points.images)
    return torch.cat([points.images, config.label_weight * onehot], dim=1)
