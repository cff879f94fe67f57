"""A step as a GPU likes it: fixed addresses, recorded once per shape, replayed without the host."""

from collections.abc import Callable
from typing import Any

import torch

EAGER_RUNS = 3  # calls of a new shape before it is recorded: CUDA's libraries set themselves up in them


class StaticStep:
    """A function of a named tuple of tensors, run on copies that keep their addresses.

    Every call runs the function exactly once. On a CUDA device a set of shapes is recorded as a graph after its first
    calls (recording executes nothing) and replayed from then on. Elsewhere each call works on the same copies: the
    same numbers, without a recording.

    Args:
        function: works in place; reads no value on the host and draws nothing.
        device: where it runs.
    """

    def __init__(self, function: Callable[[Any], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self._shapes: dict[tuple[torch.Size | None, ...], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # all shapes share memory

    def __call__(self, inputs: Any) -> None:
        shapes = tuple(None if one is None else one.shape for one in inputs)
        if shapes not in self._shapes:
            self._shapes[shapes] = _Shape(self.function, inputs, self.device, self._pool)
        self._shapes[shapes].run(inputs)

    def forget(self) -> None:
        """Drops the recordings: what they read besides their inputs has moved."""
        self._shapes.clear()


class _Shape:
    """The copies of one set of shapes, and the recording made on them."""

    def __init__(self, function: Callable[[Any], None], inputs: Any, device: torch.device, pool: Any) -> None:
        self.function, self.device, self.pool = function, device, pool
        self.copies = type(inputs)(*(None if one is None else torch.empty_like(one) for one in inputs))
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, inputs: Any) -> None:
        for copy, one in zip(self.copies, inputs, strict=True):
            if one is not None:
                copy.copy_(one, non_blocking=True)
        if self.device.type == "cuda" and self.calls >= EAGER_RUNS:
            self._replay()
        else:
            self.function(self.copies)
        self.calls += 1

    def _replay(self) -> None:
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.function(self.copies)
            self.graph = graph  # not before it is whole
        self.graph.replay()
