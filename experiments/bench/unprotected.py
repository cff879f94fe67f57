"""The `record` step without clipping and without noise: what protection costs, by difference."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpsink.engine import TrialStack
from dpsink.privacy.mechanism import Generated, RecordMechanism, sanitize_records
from dpsink.sinkhorn import Points, cost_gradient, pairwise_cost, regularisation


@dataclass(frozen=True)
class Unclipped(RecordMechanism):
    """The gradient of the semi-dual, summed over all records at once."""

    def query(self, generated: Generated, real: Points) -> Tensor:
        x, real = generated.x, sanitize_records(real, generated.x.images.dtype)
        coupling = torch.softmax(-pairwise_cost(x, real, self.sinkhorn) / regularisation(self.sinkhorn), dim=-2)
        return cost_gradient(coupling, x, real, self.sinkhorn).double()


class UnprotectedStack(TrialStack):
    """Trials whose private batch is neither clipped nor noised. For timing only: there is no ε."""

    def _set_numbers(self) -> None:
        super()._set_numbers()
        numbers = self.numbers
        assert numbers is not None and isinstance(numbers.mechanism, RecordMechanism)
        self.numbers = replace(numbers, mechanism=Unclipped(**vars(numbers.mechanism)))

    def _draw_noise(self, slot: int) -> Tensor:
        return torch.zeros(()).expand(self.n, self.images.shape[1])
