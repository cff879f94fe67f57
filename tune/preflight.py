"""Checks and plans of a study, made before anything starts and before any private record is used."""

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dpsink.config import TrialConfig
from dpsink.data import ImageData, load_dataset, private_records
from dpsink.errors import InputError
from dpsink.privacy.ledger import TrialCost, planned_epsilon
from dpsink.privacy.plan import PrivacyPlan, derive_plan
from tune.study import Study


@dataclass(frozen=True)
class StudyPlan:
    """What a study will do and may cost at worst.

    Attributes:
        data: the loaded data set, the same for all trials.
        baselines: name to plan.
        worst_trial: the searched trial that costs the study most, over the corners of the space; None without
            searched trials.
        costs: worst case of every trial, in the order of the study.
        extractor: FID extractor with its number of images.
    """

    data: ImageData
    baselines: dict[str, PrivacyPlan]
    worst_trial: PrivacyPlan | None
    costs: tuple[TrialCost, ...]
    extractor: str
    delta: float
    target_epsilon: float

    @property
    def private(self) -> bool:
        return math.isfinite(self.target_epsilon)


def check_study(study: Study, data_root: Path | None) -> StudyPlan:
    """Loads the data, derives every plan, and finds what would fail later.

    Raises:
        InputError: the first thing that is wrong, in one line.
    """
    configs = {name: study.baseline(name) for name in study.baselines}
    corners = _corners(study)
    common = _common_settings([*configs.values(), *corners])
    if common.data.validation == "private":
        raise InputError(
            f"study {study.name}: data.validation=private is for single trials; a study selects on public images"
        )
    data = load_dataset(common.data, root=data_root)
    if data.validation is None:
        raise InputError(
            f"study {study.name}: data.validation_size=0 leaves nothing to select on; set it (mnist: 5000)"
        )
    baselines = {name: derive_plan(config, len(data.train)) for name, config in configs.items()}
    worst = _worst_plan(corners, len(data.train))
    searched = [worst] * study.algorithm.trials if worst else []
    costs = tuple(cost_of_plan(plan) for plan in [*baselines.values(), *searched])
    return StudyPlan(
        data=data,
        baselines=baselines,
        worst_trial=worst,
        costs=costs,
        extractor=f"{common.evaluation.extractor}@{len(data.validation)}",
        delta=common.privacy.delta,
        target_epsilon=common.privacy.target_epsilon,
    )


def cost_of_plan(plan: PrivacyPlan) -> TrialCost:
    """A plan's worst case for the study's ledger."""
    return TrialCost(sample_rate=plan.sample_rate, noise_multiplier=plan.noise_multiplier, steps=plan.steps)


def check_storage(folder: Path) -> None:
    """Raises InputError where the study's folder cannot be made or written; leaves nothing behind."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"storage {folder} cannot be written ({error.strerror}); set another storage") from None


def _corners(study: Study) -> list[TrialConfig]:
    """Trials at the corners of the dimensions that decide what a trial costs."""
    if study.algorithm.trials == 0 or not study.space:
        return [study.configure({})]
    first = {path: space.extremes[0] for path, space in study.space.items()}
    costly = [path for path in study.space if path.startswith("privacy.") and path != "privacy.clip_norm"]
    values = itertools.product(*(study.space[path].extremes for path in costly))
    return [study.configure({**first, **dict(zip(costly, corner, strict=True))}) for corner in values]


def _common_settings(configs: list[TrialConfig]) -> TrialConfig:
    """One trial to stand for all: data, target, δ and extractor must be the same throughout a study."""
    first = configs[0]
    for config in configs[1:]:
        for path, mine, other in (
            ("data", first.data, config.data),
            ("privacy.target_epsilon", first.privacy.target_epsilon, config.privacy.target_epsilon),
            ("privacy.delta", first.privacy.delta, config.privacy.delta),
            ("evaluation.extractor", first.evaluation.extractor, config.evaluation.extractor),
        ):
            if mine != other:
                raise InputError(f"{path} must be the same in all trials of a study, not {mine} and {other}")
    private_records(first.data)
    return first


def _worst_plan(corners: list[TrialConfig], records: int) -> PrivacyPlan | None:
    """The most expensive corner that affords a step.

    Raises:
        InputError: no corner affords one.
    """
    plans, errors = [], []
    for config in corners:
        try:
            plans.append(derive_plan(config, records))
        except InputError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return max(plans, key=_cost_of_ten)


def _cost_of_ten(plan: PrivacyPlan) -> float:
    """What ten such trials cost together, to compare plans by; without privacy all are alike."""
    return planned_epsilon([cost_of_plan(plan)] * 10, delta=plan.delta) or 0.0
