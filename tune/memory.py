"""What a search has proposed and learnt: an Optuna study, in a journal of the study folder that outlives any driver."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from dpsink.records import Report
from dpsink.training import RUNNING
from tune import schema
from tune.folder import StudyFolder
from tune.space import Distribution, holds, ordered
from tune.study import Study

STOPPED = "stopped"  # attribute of a configuration that the scheduler has given up
RERUN = "rerun_of"  # attribute of a configuration that failed and was run again: the number that had failed


class SearchMemory:
    """Proposes configurations by number, and takes in how they ended; every call can be repeated.

    A scheduler is Optuna's `SuccessiveHalvingPruner` (Li et al. 2020, "A system for massively parallel hyperparameter
    tuning"): what a configuration scored at each rung is kept in the journal, so that a new driver decides as the old.
    """

    def __init__(self, study: Study, folder: StudyFolder) -> None:
        self.study = study
        self.optuna = open_optuna(study, folder)
        self._path = ordered(study.space)
        self._points = study.points
        scheduler = study.scheduler
        self._pruner = SuccessiveHalvingPruner(
            min_resource=round(100 * scheduler.grace), reduction_factor=scheduler.reduction
        )

    def ask(self, index: int) -> tuple[int, dict[str, Any]]:
        """A new configuration: its number and its searched values.

        Args:
            index: how many have been recorded before it; decides the point of a grid or a list.
        """
        if self._points is not None:
            return self._take(self._points[index])
        if self.study.sealed:  # a sequence that anybody can repeat would tell the winner's place in it
            self.optuna.sampler.reseed_rng()
        trial, values = self.optuna.ask(), {}
        for path in self._path:
            if holds(self.study.space, path, values):
                values[path] = draw(trial, path, self.study.space[path])
        return trial.number, values

    def tell(self, number: int, values: Sequence[float]) -> None:
        """A configuration ran to its end, with this mean of each objective; not a number is a failure."""
        if any(math.isnan(value) for value in values):
            self.give_up(number)
        else:
            self._conclude(number, TrialState.COMPLETE, list(values))

    def tell_stopped(self, number: int, reports: Sequence[Report]) -> None:
        """A configuration was stopped: what it scored on the way is no result."""
        self._take_in(number, reports)
        self._conclude(number, TrialState.PRUNED)

    def give_up(self, number: int) -> None:
        """Nothing will come of a configuration."""
        self._conclude(number, TrialState.FAIL)

    def should_stop(self, number: int, reports: Sequence[Report]) -> bool:
        """Whether others did better with as much of their budget; never of one that failed and is run again."""
        state = self._frozen(number).state
        if state != TrialState.RUNNING or reports[-1].status != RUNNING:
            return state == TrialState.PRUNED  # its driver did not live to end it
        # One after the other: on each rung a trial is judged by what it scored there, however far it has got since.
        return any(self._stops_at(number, report) for report in reports)

    def _stops_at(self, number: int, report: Report) -> bool:
        """The pruner decides on each rung once, so that its word is kept for a driver that comes after."""
        self._take_in(number, [report])
        trial = self._frozen(number)
        if STOPPED in trial.user_attrs:
            return True
        stopped = self._pruner.prune(self.optuna, trial)
        if stopped:
            self.optuna._storage.set_trial_user_attr(trial._trial_id, STOPPED, True)
        return stopped

    def forget_orphans(self, recorded: set[int | None]) -> None:
        """Gives up what a driver proposed that died before it had recorded the trial."""
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in recorded:
                self.give_up(trial.number)

    def _take(self, point: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        space = {path: self._distribution(path) for path in point}
        self.optuna.add_trial(create_trial(state=TrialState.RUNNING, params=point, distributions=space))
        return self.optuna.get_trials(deepcopy=False)[-1].number, dict(point)

    def _distribution(self, path: str) -> BaseDistribution:
        if path in self.study.space:
            return distribution(self.study.space[path])
        return CategoricalDistribution(tuple({point[path]: None for point in self._points or [] if path in point}))

    def _take_in(self, number: int, reports: Sequence[Report]) -> None:
        """Brings the scores on the way up to date; the step is the spent part of the budget in per cent."""
        trial = self._frozen(number)
        for report in reports:
            step, value = math.floor(100 * report.budget_fraction + 1e-6), report.metrics.get(self.study.objective)
            known = trial.state != TrialState.RUNNING or step in trial.intermediate_values
            if value is not None and report.status == RUNNING and not known:
                self.optuna._storage.set_trial_intermediate_value(trial._trial_id, step, value)

    def _conclude(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        failed_before = self._frozen(number).state == TrialState.FAIL
        self.optuna.tell(number, values, state=state, skip_if_finished=True)
        if failed_before and state != TrialState.FAIL and not self._run_again(number):
            first = self._frozen(number)
            again = create_trial(
                state=state, values=values, params=first.params, distributions=first.distributions,
                intermediate_values=first.intermediate_values, user_attrs={RERUN: number},
            )  # fmt: skip
            self.optuna.add_trial(again)

    def _run_again(self, number: int) -> bool:
        return any(trial.user_attrs.get(RERUN) == number for trial in self.optuna.get_trials(deepcopy=False))

    def _frozen(self, number: int) -> FrozenTrial:
        return self.optuna.get_trials(deepcopy=False)[number]


def open_optuna(study: Study, folder: StudyFolder) -> optuna.Study:
    """The study's Optuna study, in a journal file of its folder; the same one on resume."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.search.mkdir(parents=True, exist_ok=True)
    journal = folder.search / "optuna.log"
    # Left by a driver that was killed; Optuna would wait for half a minute. One sweep at a time has the folder.
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    _drop_torn_line(journal)
    modes = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
    opened = optuna.create_study(
        study_name=study.name, storage=JournalStorage(JournalFileBackend(str(journal))), load_if_exists=True,
        directions=[modes[schema.mode_of(objective)] for objective in study.objectives],
    )  # fmt: skip
    # A sampler restarted with the same seed would repeat its first proposals.
    opened.sampler = make_sampler(study, offset=len(opened.trials))
    return opened


def _drop_torn_line(journal: Path) -> None:
    """Cuts off an entry that a full disk or a power cut left half-written: the next would be glued to it."""
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def make_sampler(study: Study, offset: int) -> optuna.samplers.BaseSampler:
    """The sampler of the study's algorithm; a sealed study's is seeded by the operating system."""
    if study.sealed:
        return optuna.samplers.RandomSampler()
    digest = hashlib.sha256(json.dumps([study.algorithm.seed, offset]).encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if study.algorithm.kind != "optuna":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, min(10, study.algorithm.trials // 3))
    conditional = any(dimension.when for dimension in study.space.values())
    with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=conditional, constant_liar=True, n_startup_trials=startup
        )


def draw(trial: optuna.Trial, path: str, space: Distribution) -> Any:
    """One value of one dimension."""
    if space.choice is not None:
        return trial.suggest_categorical(path, space.choice)
    if space.integer is not None:
        return trial.suggest_int(path, *space.integer)
    low, high = space.bounds
    return trial.suggest_float(path, low, high, log=space.log_uniform is not None)


def distribution(space: Distribution) -> BaseDistribution:
    """A dimension in Optuna's words, as `draw` would record it."""
    if space.choice is not None:
        return CategoricalDistribution(space.choice)
    if space.integer is not None:
        return IntDistribution(*space.integer)
    return FloatDistribution(*space.bounds, log=space.log_uniform is not None)
