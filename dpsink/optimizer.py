"""Adam over a stack: one matrix of weights, a row per trial, each with its own rates."""

import torch
from torch import Tensor

EPSILON = 1e-8  # of the denominator, Adam's default


class StackedAdam:
    """Adam (Kingma & Ba 2015) on K rows at once.

    Args:
        weights: (K, P), updated in place.

    Attributes:
        moments: the two averages, (2, K, P).
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.moments = torch.zeros(2, *weights.shape, dtype=weights.dtype, device=weights.device)
        # Rates of a row that is not updated: step 0, both averages kept.
        self._stay = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64, device=weights.device)

    @torch.no_grad()
    def step(self, gradient: Tensor, rates: Tensor, updated: Tensor) -> None:
        """One update of some of the rows.

        Args:
            gradient: (K, P), finite in the rows that are not updated; overwritten.
            rates: learning rate, β₁, β₂, 1 − β₁ᵗ and √(1 − β₂ᵗ), (K, 5).
            updated: bool, (K,); the other rows stay as they are.
        """
        # All in place: fresh memory for P numbers costs more than the sums.
        rate, beta1, beta2, bias1, bias2 = torch.where(updated[:, None], rates, self._stay).unbind(1)
        first, second = self.moments
        first.mul_(_rows(beta1, first)).add_(gradient.mul(_rows(1 - beta1, first)))
        second.mul_(_rows(beta2, second)).add_(gradient.square_().mul_(_rows(1 - beta2, second)))
        size = torch.sqrt(second, out=gradient).div_(_rows(bias2, second)).add_(EPSILON)
        self.weights.sub_(torch.div(first, size, out=size).mul_(_rows(rate / bias1, first)))


def _rows(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.dtype)[:, None]
