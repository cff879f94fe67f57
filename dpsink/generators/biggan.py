"""BigGAN's class-conditional generator (Brock, Donahue & Simonyan 2019) at small sizes, without attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpsink.config import CondBigganConfig

EPSILON = 1e-12  # keeps a zero vector from dividing by zero


class CondBiggan(nn.Module):
    """z → side/2^k at 4h channels → k residual blocks, each doubling the side → batch norm, ReLU, 3×3, tanh.

    Every linear map and convolution has a spectral norm of about 1, by one power iteration a step. The label enters
    through the gains and biases of the blocks' batch norms. The layers stand in docs/generators.md.

    Args:
        shape: (C, H, W) of one image; 32 starts at 4×4 with three blocks, 28 at 7×7 with two, 4 at 2×2 with one.
    """

    def __init__(self, config: CondBigganConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, side, _ = shape
        width, self.base, blocks = 4 * config.hidden_dim, *doublings(side)
        self.latent_dim = config.latent_dim
        self.conditional = config.conditional
        self.embedding = nn.Embedding(num_classes if config.conditional else 1, config.embed_dim)
        self.stem = SpectralLinear(config.latent_dim, width * self.base**2)
        self.blocks = nn.ModuleList(UpBlock(width, config.embed_dim) for _ in range(blocks))
        self.norm = nn.BatchNorm2d(width)
        self.image = SpectralConv(width, channels, 3)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        condition = self.embedding(labels if self.conditional else torch.zeros_like(labels))
        maps = self.stem(latents).unflatten(1, (self.base, self.base, -1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            maps = block(maps, condition)
        return torch.tanh(self.image(functional.relu(self.norm(maps))))


def doublings(side: int) -> tuple[int, int]:
    """The side to start from, and how often it is doubled: down to 4 or less, or to an odd number.

    Once at least, so that 4×4 images have a block too: the label enters nowhere else.
    """
    base, count = side // 2, 1
    while base > 4 and base % 2 == 0:
        base, count = base // 2, count + 1
    return base, count


class UpBlock(nn.Module):
    """Residual block that doubles the side: norm, ReLU, up, 3×3, norm, ReLU, 3×3; beside it up and 1×1."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = ConditionalNorm(width, condition), ConditionalNorm(width, condition)
        self.first, self.second = SpectralConv(width, width, 3), SpectralConv(width, width, 3)
        self.shortcut = SpectralConv(width, width, 1)

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        inner = _double(functional.relu(self.first_norm(maps, condition)))
        inner = functional.relu(self.second_norm(self.first(inner), condition))
        # A 1×1 convolution commutes with doubling, and costs a quarter before it.
        return self.second(inner) + _double(self.shortcut(maps))


class ConditionalNorm(nn.Module):
    """Batch norm whose gain, 1 + a linear map, and bias come from the condition."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.gain = SpectralLinear(condition, width, bias=False)
        self.bias = SpectralLinear(condition, width, bias=False)

    def forward(self, maps: Tensor, condition: Tensor) -> Tensor:
        gain, bias = (1 + self.gain(condition))[:, :, None, None], self.bias(condition)[:, :, None, None]
        return self.norm(maps) * gain + bias


class SpectralWeight(nn.Module):
    """A weight over its largest singular value, estimated by power iteration (Miyato et al. 2018).

    torch's own spectral norm writes to `out=` tensors, which a vectorised stack cannot.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.orthogonal_(self.weight)
        self.register_buffer("left", functional.normalize(torch.randn(shape[0]), dim=0, eps=EPSILON))

    left: Tensor

    def forward(self) -> Tensor:
        """The weight, its norm about 1; the estimate moves in training only."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            right = functional.normalize(matrix.T @ self.left, dim=0, eps=EPSILON)
            left = functional.normalize(matrix @ right, dim=0, eps=EPSILON)
            if self.training:
                self.left.copy_(left)
        return self.weight / (left @ (matrix @ right)).clamp_min(EPSILON)


class SpectralLinear(nn.Module):
    """A linear map of spectral norm about 1."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = SpectralWeight(outputs, inputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        return functional.linear(values, self.weight(), self.bias)


class SpectralConv(nn.Module):
    """A convolution that keeps the side, its matrix of spectral norm about 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = SpectralWeight(outputs, inputs, kernel, kernel)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        return functional.conv2d(maps, self.weight(), self.bias, padding="same")


def _double(maps: Tensor) -> Tensor:
    return functional.interpolate(maps, scale_factor=2.0)
