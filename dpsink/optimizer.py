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

    @torch.no_grad()
    def step(self, gradient: Tensor, rates: Tensor, updated: Tensor) -> None:
        """One update of some of the rows.

        Args:
            gradient: (K, P).
            rates: learning rate, β₁, β₂, 1 − β₁ᵗ and √(1 − β₂ᵗ), (K, 5).
            updated: bool, (K,); the other rows stay as they are.
        """
        rate, beta1, beta2, bias1, bias2 = rates.to(gradient.dtype)[:, :, None].unbind(1)
        first = torch.lerp(gradient, self.moments[0], beta1)
        second = torch.lerp(gradient.square(), self.moments[1], beta2)
        weights = self.weights - (rate / bias1) * first / (second.sqrt() / bias2 + EPSILON)
        rows = updated[:, None]
        for kept, new in ((self.weights, weights), (self.moments[0], first), (self.moments[1], second)):
            kept.copy_(torch.where(rows, new, kept))
