"""The control that every study needs: released class means under public white noise."""

import torch
from torch import Tensor, nn

from dpsink.config import ClassMeanConfig


class ClassMean(nn.Module):
    """Image of label k = mean_k + noise_std · white noise, clamped to [-1, 1].

    A classifier trained on it scores as well as on samples of a real generator at small ε, without any variety:
    accuracy alone says nothing. The latents are one uniform per pixel, so sampling needs no other randomness.

    Args:
        shape: (C, H, W) of one image.
    """

    means: Tensor

    def __init__(self, config: ClassMeanConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.noise_std = config.noise_std
        self.latent_dim = shape[0] * shape[1] * shape[2]
        self.register_buffer("means", torch.zeros(num_classes, *shape))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        # torch.special.ndtri maps a uniform to a standard normal; its argument must stay inside (0, 1).
        noise = torch.special.ndtri(latents.clamp(1e-6, 1 - 1e-6)).reshape(-1, *self.means.shape[1:])
        return (self.means[labels] + self.noise_std * noise).clamp(-1, 1)
