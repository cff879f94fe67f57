"""The paper's conditional convolutional generator, for any square image whose side is divisible by 4."""

import torch
from torch import Tensor, nn

from dpsink.config import ConvCondConfig

SLOPE = 0.2  # of the leaky ReLUs


class ConvCond(nn.Module):
    """[z | embedding(label)] → side/4 at 4h channels → side/2 at 2h → side at h → image, tanh.

    Batch norm and leaky ReLU stand between the layers. The first layer is the paper's transposed convolution on
    a 1×1 input, written as the matrix product that it is.

    Args:
        shape: (C, H, W) of one image.
    """

    def __init__(self, config: ConvCondConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, side, _ = shape
        h, self.base = config.hidden_dim, side // 4
        self.latent_dim = config.latent_dim
        self.conditional = config.conditional
        self.embedding = nn.Embedding(num_classes if config.conditional else 1, config.embed_dim)
        self.stem = nn.Linear(config.latent_dim + config.embed_dim, 4 * h * self.base**2, bias=False)
        self.layers = nn.Sequential(
            *_normalised(4 * h),
            nn.ConvTranspose2d(4 * h, 2 * h, 4, stride=2, padding=1, bias=False),
            *_normalised(2 * h),
            nn.ConvTranspose2d(2 * h, h, 4, stride=2, padding=1, bias=False),
            *_normalised(h),
            nn.Conv2d(h, channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        labels = labels if self.conditional else torch.zeros_like(labels)
        stem = self.stem(torch.cat([latents, self.embedding(labels)], dim=1))
        # Channels last, which convolutions on a CPU like best, and without a copy.
        maps = stem.unflatten(1, (self.base, self.base, -1)).permute(0, 3, 1, 2)
        return self.layers(maps)


def _normalised(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE, inplace=True)
