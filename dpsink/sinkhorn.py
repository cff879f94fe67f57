"""Entropic optimal transport between labelled images: costs, potentials, couplings and gradients.

No function here knows about privacy. Points are an image, flattened, in [-1, 1]^d, next to a label; the
label's one-hot vector, scaled by `label_weight`, is part of the point, and its share of the cost is written in
closed form. Gradients are taken over image coordinates, analytically, at the final potentials: no tensor of
shape (n, m, d) is ever built.

Every function solves one problem, described by a `SinkhornConfig`, or K at once: tensors then have a leading
axis K, and the numbers of a `Problem` are tensors (K, 1, 1). A problem's answer does not depend on the others.

Sources: Cao et al. 2021 (DP-Sinkhorn), Feydy 2020 (annealed symmetric Sinkhorn iterations, as in geomloss),
Genevay, Cuturi, Peyré, Bach 2016 (semi-dual).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dpsink.config import SinkhornConfig

NEGLIGIBLE = 1e-30  # a coupling's entry that no sum of pixels can see
MOST_ELEMENTS = 2**27  # of a GPU's (K, n, m, d) buffer, half a gigabyte
ANNEALING = 0.5  # factor on the blur from one iteration to the next, geomloss' default


class Problem(Protocol):
    """What a transport problem is made of; `SinkhornConfig` describes one, `StackedProblem` K."""

    @property
    def cost(self) -> Literal["l1+l2", "l2", "l1"]: ...
    @property
    def p(self) -> int: ...
    @property
    def backend(self) -> Literal["analytic", "geomloss"]: ...
    @property
    def l1_weight(self) -> float | Tensor: ...
    @property
    def label_weight(self) -> float | Tensor: ...
    @property
    def blur(self) -> float | Tensor: ...


class Annealing(NamedTuple):
    """Temperatures of the Sinkhorn iterations; the last one is λ.

    Attributes:
        temperatures: floats, or tensors (K, 1, 1).
        running: per iteration, bool (K, 1, 1), which problems are not at their end yet; None: all of them.
    """

    temperatures: Sequence[float | Tensor]
    running: Sequence[Tensor | None]


@dataclass(frozen=True)
class StackedProblem:
    """K problems of one kind of cost, each with its own numbers; float64, (K, 1, 1).

    Attributes:
        configs: the K descriptions; they agree in `cost`, `p` and `backend`.
        annealing: as long as the longest of the K schedules; the others are frozen at their own end.
    """

    configs: tuple[SinkhornConfig, ...]
    cost: Literal["l1+l2", "l2", "l1"]
    p: int
    backend: Literal["analytic", "geomloss"]
    l1_weight: Tensor
    label_weight: Tensor
    blur: Tensor
    annealing: Annealing

    @classmethod
    def of(
        cls, configs: Sequence[SinkhornConfig], dimension: int, device: torch.device | str = "cpu", iterations: int = 0
    ) -> "StackedProblem":
        """The problems side by side.

        Args:
            dimension: d, number of image coordinates.
            iterations: of the annealing, at least.
        """
        first = configs[0]
        return cls(
            configs=tuple(configs), cost=first.cost, p=first.p, backend=first.backend,
            l1_weight=per_slot([one.l1_weight for one in configs], device),
            label_weight=per_slot([one.label_weight for one in configs], device),
            blur=per_slot([one.blur for one in configs], device),
            annealing=_stack_schedules([_temperatures(dimension, one) for one in configs], iterations, device),
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All numbers, in a fixed order."""
        masks = (mask for mask in self.annealing.running if mask is not None)
        return [self.l1_weight, self.label_weight, self.blur, *self.annealing.temperatures, *masks]  # pyright: ignore[reportReturnType]


def per_slot(values: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    """One number per trial, to go with tensors of K trials; float64, (K, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None, None]


class Points(NamedTuple):
    """Labelled points.

    Attributes:
        images: float, ([K,] n, d), in [-1, 1]; uint8 stands for x / 127.5 − 1.
        labels: int64, ([K,] n).
        present: bool, ([K,] n); False marks padding, which has no weight. None: all are there.
    """

    images: Tensor
    labels: Tensor
    present: Tensor | None = None


class Distances(NamedTuple):
    """Image distances that costs, gradients and norms share; float64, ([K,] n, m)."""

    squared: Tensor  # ‖x_i − y_j‖₂²
    absolute: Tensor | None  # ‖x_i − y_j‖₁; None where the cost has no L1 part


class RecordTerms(NamedTuple):
    """What each real record adds to the gradient, without the (n, m, d) tensor of the terms themselves.

    Attributes:
        coupling: P, float64, ([K,] n, m); column j is a softmax over generated points and depends on record j,
            on X and on the potential only.
        norms: upper bounds of ‖v_j‖₂, float64, ([K,] m), where v_j[i] = P_ij ∇₁c(x_i, y_j).
    """

    coupling: Tensor
    norms: Tensor


def has_squared(problem: Problem) -> bool:
    """Whether ‖x−y‖₂² is part of the cost."""
    return problem.cost != "l1"


def has_absolute(problem: Problem) -> bool:
    """Whether m‖x−y‖₁ is part of the cost."""
    return problem.cost != "l2"


def regularisation(problem: Problem) -> float | Tensor:
    """λ = blur ** p, the entropic regularisation."""
    return problem.blur**problem.p


def distances(x: Points, y: Points, problem: Problem) -> Distances:
    """Pairwise image distances, ([K,] n, m)."""
    # One float64 product is cheaper than differences, and exact enough to subtract: ‖x‖² + ‖y‖² − 2⟨x, y⟩.
    a, b = x.images.double(), y.images.double()
    norms = _squared_norms(a)[..., :, None] + _squared_norms(b)[..., None, :]
    squared = norms.sub_(a @ b.mT, alpha=2).clamp_min_(0)
    if not has_absolute(problem):
        return Distances(squared, None)
    return Distances(squared, torch.cdist(x.images, y.images, p=1).double())


def _squared_norms(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images, dim=-1).square()


def pairwise_cost(x: Points, y: Points, problem: Problem) -> Tensor:
    """C_ij = ‖x_i−y_j‖₂² + m·‖x_i−y_j‖₁ over image and scaled one-hot label; float64, ([K,] n, m)."""
    return cost_of(distances(x, y, problem), x, y, problem)


def cost_of(parts: Distances, x: Points, y: Points, problem: Problem) -> Tensor:
    """The cost matrix from its image distances; float64, ([K,] n, m)."""
    w, m = problem.label_weight, problem.l1_weight
    different = x.labels[..., :, None] != y.labels[..., None, :]
    # Two different one-hot vectors differ in two coordinates, each by w.
    label_cost = (2 * w**2 if has_squared(problem) else 0) + (2 * m * w if parts.absolute is not None else 0)
    cost = different.double().mul_(label_cost)
    if has_squared(problem):
        cost.add_(parts.squared)
    return cost if parts.absolute is None else cost.add_(parts.absolute * m)


def cost_gradient(weights: Tensor, x: Points, y: Points, problem: Problem) -> Tensor:
    """Σ_j W_ij ∇₁c(x_i, y_j) over image coordinates: the gradient in x of Σ_ij W_ij C_ij; ([K,] n, d)."""
    # Entries far below rounding would become subnormal numbers, on which a product runs ten times slower.
    weights = weights.masked_fill(weights < NEGLIGIBLE, 0).to(x.images.dtype)
    gradient = torch.zeros_like(x.images)
    if has_squared(problem):
        gradient = (weights.sum(-1, keepdim=True) * x.images).sub_(weights @ y.images).mul_(2)
    if has_absolute(problem):
        signs = _sign_sums(weights, x.images, y.images)
        gradient.add_(signs.mul_(_as(problem.l1_weight, signs)))
    return gradient


def _sign_sums(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ_j W_ij sign(x_i − y_j), ([K,] n, d): the kernel behind torch.cdist's backward pass.

    On a CPU it reduces on the fly. On a GPU it fills an (n, m, d) buffer, so it is given few columns at a time.
    """
    backward = torch.ops.aten._cdist_backward
    if x.device.type == "cpu":
        return backward(weights, x, y, 1.0, weights)
    width = max(1, MOST_ELEMENTS // max(1, x.numel()))
    sums = torch.zeros_like(x)
    for some, rows in zip(weights.split(width, dim=-1), y.split(width, dim=-2), strict=True):
        sums.add_(backward(some.contiguous(), x.contiguous(), rows.contiguous(), 1.0, some))
    return sums


def _as(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def annealing_schedule(dimension: int, problem: Problem) -> Annealing:
    """Temperatures of the Sinkhorn iterations, from the diameter of the space down to λ.

    The diameter is that of the cube of all possible points, a public constant: the number of iterations does
    not depend on the data.

    Args:
        dimension: d, number of image coordinates.
    """
    if isinstance(problem, StackedProblem):
        return problem.annealing
    temperatures = _temperatures(dimension, problem)
    return Annealing(temperatures, [None] * len(temperatures))


def _temperatures(dimension: int, problem: Problem) -> list[float]:
    p, blur, diameter = problem.p, float(problem.blur), space_diameter(dimension, problem)
    steps = max(0, math.ceil((math.log(blur) - math.log(diameter)) / math.log(ANNEALING)))
    cooling = [(diameter * ANNEALING**k) ** p for k in range(steps)]
    return [diameter**p, *cooling, blur**p]


def _stack_schedules(each: Sequence[Sequence[float]], iterations: int, device: torch.device | str) -> Annealing:
    length = max(iterations, *map(len, each))
    padded = [[*one, *[one[-1]] * (length - len(one))] for one in each]
    temperatures = [per_slot(column, device) for column in zip(*padded, strict=True)]
    if len(each) == 1 and length == len(each[0]):
        return Annealing(temperatures, [None] * length)
    running = [torch.tensor([k < len(one) for one in each], device=device)[:, None, None] for k in range(length)]
    return Annealing(temperatures, running)


def space_diameter(dimension: int, problem: Problem) -> float:
    """Largest Euclidean distance of two labelled points: images in [-1, 1]^d, labels one-hot times w."""
    return math.sqrt(4 * dimension + 2 * float(problem.label_weight) ** 2)


def potentials(cost: Tensor, annealing: Annealing, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dual potentials of OT_λ between uniform measures by annealed symmetric Sinkhorn iterations.

    Args:
        cost: float64, ([K,] n, m).
        present: bool, ([K,] m): which points of the second measure are there; None: all.

    Returns:
        f ([K,] n, 1) and g ([K,] 1, m), before the extrapolation that makes either of them exact given the other.
    """
    log_a, log_b = -math.log(cost.shape[-2]), _log_weights(cost, present)
    start = annealing.temperatures[0]
    f, g = _softmin(cost, log_b, start, dim=-1), _softmin(cost, log_a, start, dim=-2)
    for temperature, running in zip(annealing.temperatures, annealing.running, strict=True):
        # Feydy 2020, Fig. 3.25: averaging both half-steps keeps the iteration symmetric.
        f_next = (f + _softmin(cost - g, log_b, temperature, dim=-1)) / 2
        g_next = (g + _softmin(cost - f, log_a, temperature, dim=-2)) / 2
        f, g = (f_next, g_next) if running is None else (f_next.where(running, f), g_next.where(running, g))
    return f, g


def _log_weights(cost: Tensor, present: Tensor | None) -> float | Tensor:
    """Logarithms of the second measure's weights; −∞ for padding. An empty measure has to be masked by the caller."""
    if present is None:
        return -math.log(cost.shape[-1])
    counts = present.sum(-1, keepdim=True)
    weights = torch.where(present | (counts == 0), 1 / counts.clamp_min(1).double(), 0.0)
    return weights.log()[..., None, :]


def _softmin(cost: Tensor, log_weights: float | Tensor, temperature: float | Tensor, dim: int) -> Tensor:
    return -temperature * torch.logsumexp(log_weights - cost / temperature, dim=dim, keepdim=True)


def transport_cost(cost: Tensor, annealing: Annealing) -> Tensor:
    """OT_λ of one problem (dual value at the extrapolated potentials), scalar float64."""
    f, g = potentials(cost, annealing)
    last = annealing.temperatures[-1]
    f_last = _softmin(cost - g, -math.log(cost.shape[1]), last, dim=-1)
    g_last = _softmin(cost - f, -math.log(cost.shape[0]), last, dim=-2)
    return f_last.mean() + g_last.mean()


def transport_gradients(x: Points, y: Points, problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of OT_λ(x, y) in the images of x, ([K,] n, d), and of y, ([K,] m, d)."""
    if problem.backend == "geomloss":
        return _geomloss_gradients(x, y, problem)
    rows, columns = _couplings(x, y, problem)
    return cost_gradient(rows, x, y, problem), cost_gradient(columns.mT, y, x, problem)


def transport_gradient(x: Points, y: Points, problem: Problem) -> Tensor:
    """Gradient of OT_λ(x, y) in the images of x only, ([K,] n, d)."""
    if problem.backend == "geomloss":
        return _geomloss_gradients(x, y, problem)[0]
    return cost_gradient(_couplings(x, y, problem)[0], x, y, problem)


def _couplings(x: Points, y: Points, problem: Problem) -> tuple[Tensor, Tensor]:
    """Couplings whose row sums, and whose column sums, are exact; float64, ([K,] n, m)."""
    annealing = annealing_schedule(x.images.shape[-1], problem)
    cost, last = pairwise_cost(x, y, problem), annealing.temperatures[-1]
    f, g = potentials(cost, annealing, y.present)
    # ∂OT/∂x_i = a_i Σ_j P_ij ∇₁c(x_i, y_j): the last half-step's softmax is the coupling.
    rows = torch.softmax(_log_weights(cost, y.present) + (g - cost) / last, dim=-1) / cost.shape[-2]
    columns = torch.softmax((f - cost) / last, dim=-2) / cost.shape[-1]
    return rows, columns


def comparison_points(x: Points, x_tilde: Points) -> Points:
    """X' = X[r:] ∪ X̃, the semi-debiased comparison set of n rows (paper, section 3.2)."""
    r = x_tilde.images.shape[-2]
    images = torch.cat([x.images[..., r:, :], x_tilde.images], dim=-2)
    return Points(images, torch.cat([x.labels[..., r:], x_tilde.labels], dim=-1))


def debiasing_gradients(x: Points, x_tilde: Points, problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of −OT_λ(X, X') in the images of X, ([K,] n, d), through both arguments, and of X̃, ([K,] r, d).

    Public: no real record enters.
    """
    n, r = x.images.shape[-2], x_tilde.images.shape[-2]
    first, second = transport_gradients(x, comparison_points(x, x_tilde), problem)
    gradient = -first
    gradient[..., r:, :] -= second[..., : n - r, :]  # rows r.. of X are the first n − r rows of X'
    return gradient, -second[..., n - r :, :]


def record_terms(x: Points, y: Points, problem: Problem, potential: Tensor | None = None) -> RecordTerms:
    """Column couplings of the semi-dual and the norms of the records' gradient terms.

    OT_λ(X, Y) ≥ mean(f) − (λ/m) Σ_j log mean_i exp((f_i − C_ij)/λ) for every f (Genevay et al. 2016); for a
    fixed f its gradient in X is a sum of one term per record. For c = a‖·‖₂² + m‖·‖₁

        ‖v_j‖² ≤ Σ_i P_ij² (4a²‖x_i−y_j‖₂² + 4am‖x_i−y_j‖₁ + m²d),

    with equality where no coordinates of x_i and y_j coincide.

    Args:
        potential: f, ([K,] n), must be public; zero if None.
    """
    parts = distances(x, y, problem)
    scores = -cost_of(parts, x, y, problem)
    if potential is not None:
        scores = scores + potential[..., :, None]
    coupling = torch.softmax(scores / regularisation(problem), dim=-2)
    squared_norms = _squared_term_norms(parts, x.images.shape[-1], problem)
    return RecordTerms(coupling, (coupling.square() * squared_norms).sum(-2).sqrt())


def _squared_term_norms(parts: Distances, dimension: int, problem: Problem) -> Tensor:
    """‖∇₁c(x_i, y_j)‖² or more, ([K,] n, m)."""
    m, total = problem.l1_weight, 4 * parts.squared if has_squared(problem) else torch.zeros_like(parts.squared)
    if parts.absolute is None:
        return total
    return (total.add_(parts.absolute * (4 * m)) if has_squared(problem) else total).add_(m**2 * dimension)


def _geomloss_gradients(x: Points, y: Points, problem: Problem) -> tuple[Tensor, Tensor]:
    """The reference: geomloss and autograd, with its (n, m, d) tensors; of K problems one after another."""
    if isinstance(problem, StackedProblem):
        each = [_geomloss_gradients(_slot(x, k), _slot(y, k), one) for k, one in enumerate(problem.configs)]
        return torch.stack([first for first, _ in each]), _pad_rows([second for _, second in each], y)
    if not y.labels.numel():
        return torch.zeros_like(x.images), torch.zeros_like(y.images)
    left, right = (points.images.detach().clone().requires_grad_() for points in (x, y))
    with torch.enable_grad():
        loss = geomloss_cost(Points(left, x.labels), Points(right, y.labels), problem)
        gradients = torch.autograd.grad(loss, (left, right))
    return gradients[0], gradients[1]


def _slot(points: Points, slot: int) -> Points:
    """The points of one of K problems, without padding."""
    images, labels = points.images[slot], points.labels[slot]
    if points.present is None:
        return Points(images, labels)
    return Points(images[points.present[slot]], labels[points.present[slot]])


def _pad_rows(gradients: Sequence[Tensor], like: Points) -> Tensor:
    padded = torch.zeros_like(like.images)
    for slot, gradient in enumerate(gradients):
        padded[slot, : len(gradient)] = gradient
    return padded


def geomloss_cost(x: Points, y: Points, problem: Problem) -> Tensor:
    """OT_λ(x, y) of one problem by geomloss on the same annealing path; differentiable, scalar."""
    from geomloss import SamplesLoss

    def cost(left: Tensor, right: Tensor) -> Tensor:
        difference = left[:, :, None, :] - right[:, None, :, :]
        total = difference.new_zeros(())
        if has_squared(problem):
            total = total + difference.square().sum(-1)
        return total + problem.l1_weight * difference.abs().sum(-1) if has_absolute(problem) else total

    diameter = space_diameter(x.images.shape[1], problem)
    solver = SamplesLoss(
        "sinkhorn", p=problem.p, blur=float(problem.blur), debias=False, diameter=diameter,
        scaling=ANNEALING, cost=cost, backend="tensorized",
    )  # fmt: skip
    return solver(_joint(x, y, problem), _joint(y, x, problem))


def _joint(points: Points, other: Points, problem: Problem) -> Tensor:
    classes = 1 + max(int(labels.max()) for labels in (points.labels, other.labels))
    onehot = torch.nn.functional.one_hot(points.labels, classes).to(points.images)
    return torch.cat([points.images, problem.label_weight * onehot], dim=1)
