"""The step as one would write it first: eager PyTorch, geomloss and autograd. The same mathematics as ours.

Nothing here is tuned and nothing is slowed down: it is what the loss, the clipping and the noise of Cao et al. 2021
(and, for mechanism `record`, per-example gradients as in DP-SGD) look like with the libraries people use.
"""

import math
from typing import NamedTuple

import torch
from geomloss import SamplesLoss
from torch import Tensor, nn
from torch.func import grad, vmap

from dpsink.config import SinkhornConfig
from dpsink.engine import debiasing_rows, initial_state
from dpsink.generators import ConvCond
from dpsink.privacy.mechanism import ROUNDING_MARGIN
from experiments.bench.subjects import CLASSES, Setting, random_images

CHUNK = 32  # records whose (n, d) gradients are in memory at once


class Batch(NamedTuple):
    """Images in [-1, 1], flattened, float, (rows, d), and labels, int64, (rows,)."""

    images: Tensor
    labels: Tensor


class PlainGenerator(nn.Module):
    """The paper's conditional convolutional generator, layer by layer as published."""

    def __init__(self, latent: int, embed: int, hidden: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        h = hidden
        self.embedding = nn.Embedding(CLASSES, embed)
        self.stem = nn.ConvTranspose2d(latent + embed, 4 * h, shape[1] // 4, bias=False)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4 * h), nn.LeakyReLU(0.2), nn.ConvTranspose2d(4 * h, 2 * h, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * h), nn.LeakyReLU(0.2), nn.ConvTranspose2d(2 * h, h, 4, 2, 1, bias=False),
            nn.BatchNorm2d(h), nn.LeakyReLU(0.2), nn.Conv2d(h, shape[0], 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        code = torch.cat([latents, self.embedding(labels)], dim=1)
        return self.layers(self.stem(code[:, :, None, None]))

    @torch.no_grad()
    def copy_of(self, ours: ConvCond) -> "PlainGenerator":
        """Takes the weights of our generator, whose stem is a matrix."""
        self.embedding.load_state_dict(ours.embedding.state_dict())
        self.layers.load_state_dict(ours.layers.state_dict())
        self.stem.weight.copy_(ours.stem.weight.unflatten(0, (ours.base, ours.base, -1)).permute(3, 2, 0, 1))
        return self

    def gradient_as_ours(self) -> Tensor:
        """All gradients in the order and layout of our generator's parameters, (P,)."""
        found = {name: parameter.grad for name, parameter in self.named_parameters()}
        stem = found["stem.weight"]
        assert stem is not None
        found["stem.weight"] = stem.permute(2, 3, 1, 0)
        return torch.cat([one.reshape(-1) for one in found.values() if one is not None])


def joint(batch: Batch, label_weight: float) -> Tensor:
    """Images next to scaled one-hot labels, (rows, d + classes)."""
    return torch.cat([batch.images, _scaled_onehot(batch, label_weight)], dim=-1)


def _scaled_onehot(batch: Batch, label_weight: float) -> Tensor:
    return label_weight * nn.functional.one_hot(batch.labels, CLASSES).to(batch.images)


class PlainLoss:
    """2·OT_λ(X, Y) − OT_λ(X, X') by geomloss (paper, equations 8 to 11).

    Its annealing starts from the same diameter as ours, so that both take the same number of iterations.
    """

    def __init__(self, config: SinkhornConfig, dimension: int) -> None:
        self.config = config
        diameter = math.sqrt(4 * dimension + 2 * config.label_weight**2)
        self.solver = SamplesLoss(
            "sinkhorn", p=config.p, blur=config.blur, debias=False, diameter=diameter, cost=self.cost,
            backend="tensorized",
        )  # fmt: skip

    def cost(self, x: Tensor, y: Tensor) -> Tensor:
        """‖x−y‖₂² + m‖x−y‖₁, or one of the two, through (…, n, m, d) differences."""
        difference = x[..., :, None, :] - y[..., None, :, :]
        squared = difference.square().sum(-1) if self.config.cost != "l1" else 0
        absolute = self.config.l1_weight * difference.abs().sum(-1) if self.config.cost != "l2" else 0
        return squared + absolute  # pyright: ignore[reportReturnType]

    def transport(self, x: Batch, y: Batch) -> Tensor:
        """OT_λ, scalar."""
        weight = self.config.label_weight
        return self.solver(joint(x, weight), joint(y, weight))

    def debiasing(self, x: Batch, x_tilde: Batch) -> Tensor:
        """OT_λ(X, X'), scalar."""
        r = len(x_tilde.images)
        comparison = Batch(torch.cat([x.images[r:], x_tilde.images]), torch.cat([x.labels[r:], x_tilde.labels]))
        return self.transport(x, comparison)

    def record_gradients(self, x: Batch, real: Batch) -> Tensor:
        """What each record adds to the gradient in X, (B, n, d), by per-example gradients."""
        weight = self.config.label_weight
        each = vmap(grad(self._record_term), in_dims=(None, None, 0))
        return each(x.images.detach(), _scaled_onehot(x, weight), joint(real, weight))

    def _record_term(self, images: Tensor, labels: Tensor, record: Tensor) -> Tensor:
        """−λ log mean_i exp(−C_i / λ): a record's share of the semi-dual at f = 0 (Genevay et al. 2016)."""
        blur = self.config.blur**self.config.p
        cost = self.cost(torch.cat([images, labels], dim=-1), record[None])[:, 0]
        return -blur * (torch.logsumexp(-cost / blur, dim=0) - math.log(len(cost)))


def clip(gradient: Tensor, bound: float) -> Tensor:
    """Scaled to norm `bound` at most."""
    return gradient * (bound / gradient.norm().clamp_min(1e-12)).clamp_max(1)


class PlainTrial:
    """A trial that steps eagerly, on any device.

    Args:
        generator: our generator; its weights are copied.
    """

    def __init__(
        self, setting: Setting, generator: ConvCond, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        config = setting.config
        self.setting, self.device, self.dtype = setting, device, dtype
        self.n, self.r = setting.n, debiasing_rows(config.sinkhorn)
        plain = PlainGenerator(generator.latent_dim, generator.embedding.embedding_dim, setting.hidden, setting.shape)
        self.latent = generator.latent_dim
        self.generator = plain.copy_of(generator).to(device, dtype)
        self.loss = PlainLoss(config.sinkhorn, math.prod(setting.shape))
        self.optimizer = torch.optim.Adam(self.generator.parameters(), config.optimizer.lr)

    def step(self, real: Batch) -> None:
        """One step with fresh latents and labels."""
        labels = torch.randint(CLASSES, (self.n,), device=self.device)
        latents = torch.rand(self.n + self.r, self.latent, device=self.device)
        self.optimizer.zero_grad()
        self.backward(latents, torch.cat([labels, labels[: self.r]]), real)
        self.optimizer.step()

    def backward(self, latents: Tensor, labels: Tensor, real: Batch, noise_multiplier: float | None = None) -> Tensor:
        """Puts the sanitised gradient on the weights; returns that of the images, (n + r, d)."""
        sigma = self.setting.noise_multiplier if noise_multiplier is None else noise_multiplier
        images = self.generator(latents, labels)
        flat = images.detach().flatten(1)
        x, x_tilde = (Batch(flat[rows].requires_grad_(), labels[rows]) for rows in (slice(self.n), slice(self.n, None)))
        gradient = self.sanitised_gradient(x, x_tilde, real, sigma)
        images.backward(gradient.reshape(images.shape))
        return gradient

    def sanitised_gradient(self, x: Batch, x_tilde: Batch, real: Batch, sigma: float) -> Tensor:
        """Gradient of the loss in X and X̃, clipped and noised as the mechanism says, (n + r, d)."""
        if self.setting.mechanism == "batch":
            return self._batch_gradient(x, x_tilde, real, sigma)
        return self._record_gradient(x, x_tilde, real, sigma)

    def _batch_gradient(self, x: Batch, x_tilde: Batch, real: Batch, sigma: float) -> Tensor:
        loss = 2 * self.loss.transport(x, real) - self.loss.debiasing(x, x_tilde)
        in_x, in_tilde = torch.autograd.grad(loss, [x.images, x_tilde.images])
        bound = self.setting.clip_norm
        noise = sigma * 2 * bound * torch.randn_like(in_x)
        return torch.cat([clip(in_x, bound) + noise, clip(in_tilde, bound)])

    def _record_gradient(self, x: Batch, x_tilde: Batch, real: Batch, sigma: float) -> Tensor:
        in_x, in_tilde = torch.autograd.grad(-self.loss.debiasing(x, x_tilde), [x.images, x_tilde.images])
        total = torch.zeros_like(in_x)
        for images, labels in zip(real.images.split(CHUNK), real.labels.split(CHUNK), strict=True):
            total += self._clipped_sum(x, Batch(images, labels))
        noise = sigma * self.setting.clip_norm * torch.randn_like(total)
        return torch.cat([in_x + 2 / self.setting.batch * (total + noise), in_tilde])

    def _clipped_sum(self, x: Batch, real: Batch) -> Tensor:
        """Per-record gradients (chunk, n, d), each clipped, summed."""
        gradients = self.loss.record_gradients(x, real)
        # The margin is ours, against rounding; it is here so that the two agree to the last digits.
        bound = self.setting.clip_norm * (1 - ROUNDING_MARGIN)
        scale = (bound / gradients.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
        return torch.einsum("b,bnd->nd", scale, gradients)


def plain_trial(setting: Setting, device: str = "cpu") -> PlainTrial:
    """A plain trial with the weights that ours would start from."""
    generator = initial_state(setting.config, random_images(setting.records, setting.shape)).generator
    assert isinstance(generator, ConvCond)
    return PlainTrial(setting, generator, device)
