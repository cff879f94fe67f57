"""What is measured: a setting, and our trials on random images of its shape."""

import functools
from dataclasses import dataclass

import torch

from dpsink.config import Performance, TrialConfig, load_config
from dpsink.data import LabelledImages
from dpsink.engine import Trial, TrialStack, initial_state
from dpsink.entropy import OsEntropy
from dpsink.privacy.plan import PrivacyPlan

CLASSES, DELTA = 10, 1e-7
FOREVER = 10**9  # steps: no trial of a benchmark ends


@dataclass(frozen=True)
class Setting:
    """A trial's shape. Defaults are the paper's MNIST trial at a smaller generator.

    Attributes:
        shape: (C, H, W) of one image.
        hidden: h, channels of the generator's last layer.
        n: generated points.
        batch: B, expected size of the Poisson batch.
        records: N.
    """

    mechanism: str = "batch"
    cost: str = "l1+l2"
    shape: tuple[int, int, int] = (1, 28, 28)
    hidden: int = 16
    n: int = 50
    batch: int = 50
    records: int = 60_000
    blur: float = 0.05
    clip_norm: float = 0.5
    noise_multiplier: float = 1.1

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape if self.shape[0] > 1 else self.shape[1:]))
        return f"{self.mechanism} {self.cost} {size} hidden {self.hidden} n {self.n} B {self.batch}"

    @property
    def config(self) -> TrialConfig:
        """The settings; the data set that they name is never loaded."""
        # The plan is written down below rather than derived: finding a budget takes longer than a benchmark.
        values = {
            "data.name": "mnist",
            "generator.hidden_dim": self.hidden,
            "sinkhorn.cost": self.cost,
            "sinkhorn.blur": self.blur,
            "sinkhorn.gen_batch_size": self.n,
            "privacy.mechanism": self.mechanism,
            "privacy.delta": DELTA,
            "privacy.batch_size": self.batch,
            "privacy.clip_norm": self.clip_norm,
            "privacy.noise_multiplier": self.noise_multiplier,
        }
        return load_config(None, [f"{path}={value}" for path, value in values.items()])

    @property
    def plan(self) -> PrivacyPlan:
        """q, σ and C of the setting, with steps without end."""
        return PrivacyPlan(
            self.mechanism, self.records, self.batch / self.records, self.noise_multiplier, self.clip_norm, FOREVER,
            10.0, DELTA,
        )  # fmt: skip


PAPER = Setting()
"""Mechanism `batch` as published."""
RECORD = Setting("record", n=100, batch=600, blur=5, clip_norm=30)
"""Mechanism `record` on MNIST's shape."""
PRESET = Setting("record", "l2", n=100, batch=2000, blur=5, clip_norm=15, noise_multiplier=4.9)
"""`experiments/presets/mnist_record_eps1.yaml`."""


@functools.lru_cache(maxsize=2)
def random_images(records: int, shape: tuple[int, int, int]) -> LabelledImages:
    """A private set of noise: the time of a step does not depend on what the images show."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (records, *shape), dtype=torch.uint8, generator=rng)
    return LabelledImages(images, torch.randint(CLASSES, (records,), generator=rng), CLASSES)


def stack_of(
    setting: Setting, slots: int = 1, performance: Performance | None = None, kind: type[TrialStack] = TrialStack
) -> TrialStack:
    """A stack whose slots all hold a fresh trial."""
    data = random_images(setting.records, setting.shape)
    stack = kind(setting.config, data, performance or Performance(), slots)
    for seed in range(slots):
        config = setting.config.model_copy(update={"seed": seed})
        stack.join(Trial(config, setting.plan, initial_state(config, data), OsEntropy()))
    return stack
