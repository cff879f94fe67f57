"""Checks and plans of a study, made before anything starts and before any private record is used."""

import itertools
import logging
import math
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpsink import console
from dpsink.config import TrialConfig
from dpsink.data import ImageData, load_dataset
from dpsink.errors import InputError
from dpsink.evaluation import require_extractor
from dpsink.privacy.accounts import AccountTerms, TrialCosts
from dpsink.privacy.ledger import FEW, TrialCost, composed_epsilon, planned_epsilon
from dpsink.privacy.plan import PrivacyPlan, derive_plan
from tune.space import active, conditions
from tune.study import Study

log = logging.getLogger("dpsink")

# Searched paths that decide what a trial costs, in training and in scores; with none of them costs are fixed.
COSTLY = frozenset({"privacy.noise_multiplier", "privacy.batch_size", "privacy.steps", "privacy.step_limit"})
SCORE_NOISE = "privacy.score_noise"

# Between the corners of a space a trial may cost a little more than at any of them, at some Rényi orders: by 4 % where
# that was measured. A selection covers no trial that does, so its plan looks inside too, and adds a margin.
PROBES = 12
MARGIN = 1.02


@dataclass(frozen=True)
class StudyPlan:
    """What a study will do and may cost at worst.

    Attributes:
        data: the loaded data set, the same for all trials.
        terms: what the study asks of its privacy accounts.
        baselines: the plan of each.
        searched: plans that a searched trial may have: all of a grid or a list, else those at the corners of the space.
        without_a_step: of the corners of the space, those where a trial affords none: proposals there are skipped.
        extractor: FID extractor with its number of images.
    """

    data: ImageData
    terms: AccountTerms
    baselines: Mapping[str, PrivacyPlan]
    searched: Sequence[PrivacyPlan]
    without_a_step: int
    extractor: str
    delta: float
    target_epsilon: float

    @property
    def private(self) -> bool:
        return math.isfinite(self.target_epsilon)


def check_study(study: Study, data_root: Path | None) -> StudyPlan:
    """Loads the data, derives every plan, and finds what would fail later. A grid and a list have to afford all.

    Raises:
        InputError: the first thing that is wrong, in one line.
    """
    configs = {name: study.baseline(name) for name in study.baselines}
    points = study.points
    searched_configs = _corners(study) if points is None else [study.configure(point) for point in points]
    common = _common_settings([*configs.values(), *searched_configs])
    data = load_dataset(common.data, root=data_root)
    if data.validation is None:
        raise InputError(
            f"study {study.name}: data.validation_size=0 leaves nothing to select on; set it (mnist: 5000)"
        )
    if data.validation_is_public:
        require_extractor(common.evaluation.extractor)
    records = len(data.train)
    baselines = {name: derive_plan(config, records) for name, config in configs.items()}
    searched = (_affordable if points is None else _plans)(searched_configs, records)
    _check_room(study, baselines.values(), searched)
    inside = _affordable(_probes(study), records, needed=False) if study.sealed and len(searched_configs) > 1 else []
    return StudyPlan(
        data=data,
        terms=_account_terms(study, list(baselines.values()), [*searched, *inside]),
        baselines=baselines,
        searched=searched,
        without_a_step=len(searched_configs) - len(searched),
        extractor=f"{common.evaluation.extractor}@{len(data.public_reference)}",
        delta=common.privacy.delta,
        target_epsilon=common.privacy.target_epsilon,
    )


def _check_room(study: Study, baselines: Iterable[PrivacyPlan], searched: Sequence[PrivacyPlan]) -> None:
    """A bound under which no searched trial ever starts is a mistake; no accountant gets below this sum."""
    bound = study.ledger.study_epsilon
    if bound is None or not searched[0].private:
        return
    first, delta = [TrialCosts.of(plan).training for plan in baselines] * study.seeds, searched[0].delta
    needed = min(composed_epsilon([*first, TrialCosts.of(plan).training], delta) for plan in set(searched))
    if bound < needed:
        raise InputError(
            f"ledger.study_epsilon={bound:g} leaves no room for a searched trial beside the baselines, which takes "
            f"{needed:.4g}; raise it, or lower privacy.target_epsilon"
        )


def _account_terms(study: Study, baselines: Sequence[PrivacyPlan], searched: Sequence[PrivacyPlan]) -> AccountTerms:
    """What the accounts are asked to hold; `searched` has the plans that a searched trial may have.

    A scheduler makes no cost adaptive: where a run stops may depend on all results, since it has then published a part
    of what the planned run publishes (`ledger.composed_epsilon`); with fixed costs no other trial gets the rest.
    """
    delta, private = searched[0].delta, searched[0].private
    first = [TrialCosts.of(plan) for plan in baselines]
    rest = [TrialCosts.of(plan) for plan in searched]
    scores = [one.scores for one in rest if one.scores]
    fixed = study.points is not None
    return AccountTerms(
        planned=_planned(study, [one.training for one in first], [one.training for one in rest], delta),
        planned_scores=_planned(study, [one.scores for one in first if one.scores], scores, delta),
        adaptive=not fixed and not COSTLY.isdisjoint(study.space),
        adaptive_scores=not fixed and (SCORE_NOISE in study.space or len(set(scores)) > 1),
        common={
            "delta": delta,
            "policy": study.ledger.policy,
            "study_epsilon": study.ledger.study_epsilon if private else math.inf,
            "selection": study.ledger.drawn,
        },
    )


def _planned(study: Study, first: list[TrialCost], rest: list[TrialCost], delta: float) -> tuple[TrialCost, ...]:
    """Worst cases on one account: of each trial in turn, or of all that the one trial of a selection may cost."""
    if not rest:
        return ()
    if study.sealed:
        kinds = sorted(set(rest), key=lambda cost: (cost.sample_rate, cost.noise_multiplier, cost.steps))
        return tuple(kinds if len(kinds) == 1 else [_with_margin(cost) for cost in kinds])
    if study.points is None:
        rest = [max(rest, key=lambda cost: _cost_of_ten(cost, delta))] * study.configurations
    return tuple(cost for cost in (*first, *rest) for _ in range(study.seeds))


def _with_margin(cost: TrialCost) -> TrialCost:
    return replace(cost, steps=math.ceil(cost.steps * MARGIN))


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
    deciding = [path for path in study.space if path in _deciding(study)]
    corners = itertools.product(*(study.space[path].extremes for path in deciding))
    values = [_searched(study, dict(zip(deciding, corner, strict=True))) for corner in corners]
    return [study.configure(one) for index, one in enumerate(values) if one not in values[:index]]


def _probes(study: Study) -> list[TrialConfig]:
    """Trials inside the space, the same ones each time: what is planned may not depend on chance."""
    spread = random.Random(0)
    paths = [path for path in study.space if path in _deciding(study)]
    return [
        study.configure(_searched(study, {path: study.space[path].at(spread.random()) for path in paths}))
        for _ in range(PROBES)
    ]


def _deciding(study: Study) -> set[str]:
    """Dimensions that decide what a trial costs, and those that decide whether they are searched."""
    costly = {path for path in study.space if path.startswith("privacy.") and path != "privacy.clip_norm"}
    return costly.union(*(conditions(study.space, path) for path in costly))


def _searched(study: Study, values: dict[str, Any]) -> dict[str, Any]:
    """What is searched with these values, the others at their first."""
    return active(study.space, {path: space.extremes[0] for path, space in study.space.items()} | values)


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
    return first


def _plans(configs: Sequence[TrialConfig], records: int) -> list[PrivacyPlan]:
    """Their plans; what a budget affords takes seconds to find for each mechanism that is new to this machine."""
    privacy = [config.privacy for config in configs]
    different = len({(one.noise_multiplier, one.batch_size, one.steps) for one in privacy})
    if different > FEW:
        log.info("working out what a trial may cost in %d settings: seconds for each, the first time", different)
    with console.progress("settings", transient=True) as bar:
        return [derive_plan(config, records) for config in bar.track(configs, description="what a trial may cost")]


def _affordable(configs: Sequence[TrialConfig], records: int, *, needed: bool = True) -> list[PrivacyPlan]:
    """The plans of those trials that afford a step.

    Raises:
        InputError: none does, and one is needed.
    """
    plans, errors = [], []
    for config in configs:
        try:
            plans.append(derive_plan(config, records))
        except InputError as error:
            errors.append(error)
    if needed and not plans:
        raise errors[0]
    return plans


def _cost_of_ten(cost: TrialCost, delta: float) -> float:
    """What ten such trials cost together, to compare costs by; without privacy all are alike."""
    return planned_epsilon([cost] * 10, delta=delta) or 0.0
