"""K generators of one architecture whose weights are the rows of one matrix."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class StackedGenerator:
    """K copies of a module, run side by side; a row of `weights` holds all parameters of one of them.

    On a CPU the copies run one after another, which is faster there than one grouped convolution (measured in
    experiments/bench); on a GPU they run as one vectorised call, whose convolutions are grouped.

    Args:
        template: any generator; its parameters and buffers give shapes, type and device.
        slots: K.

    Attributes:
        weights: (K, P), the parameters in their order.
    """

    def __init__(self, template: nn.Module, slots: int, *, vectorised: bool | None = None) -> None:
        first = next(template.parameters())
        size = sum(parameter.numel() for parameter in template.parameters())
        self.latent_dim = int(template.latent_dim)  # pyright: ignore[reportArgumentType]
        self.weights = torch.zeros(slots, size, dtype=first.dtype, device=first.device)
        self.vectorised = first.device.type == "cuda" if vectorised is None else vectorised
        self.modules = [copy.deepcopy(template).train() for _ in range(slots)]
        self.buffers = {name: torch.stack([value] * slots) for name, value in template.named_buffers()}
        self.parameters = self._views(template)
        self._before: dict[str, Tensor] = {}  # the buffers before a vectorised run
        for slot, module in enumerate(self.modules):
            self._bind(module, slot)

    def __call__(self, latents: Tensor, labels: Tensor, occupied: Sequence[bool]) -> Tensor:
        """Images of all slots.

        Args:
            latents: (K, B, L).
            labels: int64, (K, B).
            occupied: which slots have to be run at all; a vectorised call runs them all.

        Returns:
            (K, B, C, H, W).
        """
        if self.vectorised:
            return self._run_vectorised(latents, labels)
        images = [
            module(latents[slot], labels[slot]) if occupied[slot] else None for slot, module in enumerate(self.modules)
        ]
        shape = next(one for one in images if one is not None)
        return torch.stack([torch.zeros_like(shape) if one is None else one for one in images])

    def backward(self, images: Tensor, gradient: Tensor, updated: Tensor) -> Tensor:
        """Gradients in the weights from those in the images; ends a step.

        Args:
            images, gradient: (K, B, C, H, W).
            updated: bool, (K,), on the device: slots whose batch statistics have moved; the others' are put back.

        Returns:
            (K, P); zero for slots that were not run.
        """
        if self.vectorised:
            found = torch.autograd.grad(images, list(self.parameters.values()), gradient)
            self._put_back(~updated)
            return torch.cat([one.flatten(1) for one in found], dim=1)
        leaves = [parameter for module in self.modules for parameter in module.parameters()]
        found = torch.autograd.grad(images, leaves, gradient, allow_unused=True, materialize_grads=True)
        return torch.cat([one.reshape(-1) for one in found]).reshape(self.weights.shape)

    @torch.no_grad()
    def load(self, slot: int, generator: nn.Module) -> None:
        """Copies a generator's weights and statistics into a slot."""
        self.modules[slot].load_state_dict(generator.state_dict())

    @torch.no_grad()
    def save(self, slot: int, generator: nn.Module) -> None:
        """Copies a slot's weights and statistics into a generator."""
        generator.load_state_dict(self.modules[slot].state_dict())

    def finite(self, slot: int) -> bool:
        """Whether a slot holds finite numbers only."""
        own = (self.weights[slot], *(buffer[slot] for buffer in self.buffers.values()))
        return all(bool(torch.isfinite(value).all()) for value in own)

    def _run_vectorised(self, latents: Tensor, labels: Tensor) -> Tensor:
        self._before = {name: buffer.clone() for name, buffer in self.buffers.items()}

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], z: Tensor, label: Tensor) -> Tensor:
            return functional_call(self.modules[0], (parameters, buffers), (z, label))

        return torch.vmap(one)(self.parameters, self.buffers, latents, labels)

    def _put_back(self, slots: Tensor) -> None:
        """Undoes the last run's statistics: by a mask and not by a branch, since a recorded step has to serve
        whatever slots are occupied later; and after the gradient, which still reads them."""
        for name, buffer in self.buffers.items():
            rows = slots.reshape(-1, *[1] * (buffer.ndim - 1))
            buffer.copy_(torch.where(rows, self._before[name], buffer))

    def _views(self, template: nn.Module) -> dict[str, Tensor]:
        """The columns of each parameter, in its shape: (K, *shape), sharing the memory of `weights`."""
        views, start = {}, 0
        for name, parameter in template.named_parameters():
            columns = self.weights[:, start : start + parameter.numel()]
            views[name] = columns.unflatten(1, parameter.shape).requires_grad_()
            start += parameter.numel()
        return views

    def _bind(self, module: nn.Module, slot: int) -> None:
        """Makes a copy's parameters and buffers views of the stack's."""
        for name, parameter in module.named_parameters():
            parameter.data = self.parameters[name].data[slot]
        for name, _ in list(module.named_buffers()):
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, self.buffers[name][slot])
