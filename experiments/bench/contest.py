"""Both sides of the contest as functions of nothing: data, accounting, step."""

import tempfile
from collections.abc import Callable

from opacus.accountants import RDPAccountant

from dpsink.privacy.budget import TrialBudget
from experiments.bench.loader import poisson_batches
from experiments.bench.plain import plain_trial
from experiments.bench.subjects import Setting, stack_of

RESERVED = 50  # steps of one reservation: five seconds of them at a tenth of a second each


def our_step(setting: Setting) -> Callable[[], object]:
    """A step of ours with the draw of its batch and, as in training, a durable reservation now and then."""
    return OurTrial(setting).step


class OurTrial:
    """A stack of one trial, and the ledger that its steps are reserved in."""

    def __init__(self, setting: Setting) -> None:
        self.stack, self.granted = stack_of(setting), 0
        self.folder = tempfile.TemporaryDirectory(prefix="dpsink-bench-")  # goes when the trial does
        self.budget = TrialBudget.open(self.folder.name, setting.plan.terms("random images"))

    def step(self) -> None:
        self.granted = self.granted or self.budget.reserve(RESERVED)
        self.stack.step()
        self.granted -= 1


def plain_step(setting: Setting) -> Callable[[], object]:
    """A plain step with its loader and Opacus' accountant, which is told of each step and asked nothing."""
    trial, batches, accountant = plain_trial(setting), poisson_batches(setting), RDPAccountant()

    def step() -> None:
        trial.step(next(batches))
        accountant.step(noise_multiplier=setting.noise_multiplier, sample_rate=setting.plan.sample_rate)

    return step
