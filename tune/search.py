"""The searcher: decides trials, writes each into the study folder before it starts, learns from its end.

Ray asks `suggest`; unfinished trials of an earlier session and baselines come first, then `tune.memory` proposes.
What is decided lives in the study folder and in Optuna's journal, so that a study can be rebuilt at any time
without Ray's own state.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from dpsink.config import TrialConfig, config_sha256
from dpsink.errors import InputError
from dpsink.privacy.accounts import SCORES, TRAINING, StudyAccounts, TrialCosts
from dpsink.privacy.budget import charged_steps
from dpsink.privacy.ledger import BudgetExhausted
from dpsink.privacy.plan import derive_plan
from dpsink.training import LEDGER, RUNNING, SCORE_LEDGER
from tune import schema
from tune.choice import means
from tune.folder import StudyFolder, TrialEnd, TrialRecord
from tune.memory import SearchMemory
from tune.room import told_when_full
from tune.study import Study

log = logging.getLogger("dpsink")

MOST_SKIPS = 50  # proposals in a row that afford no step, before the study ends


class StudySearcher(Searcher):
    """Proposes trial names to Ray; the configuration itself stays in the study folder.

    Args:
        study: the checked study.
        folder: where its trials are recorded and run.
        accounts: admit each trial before it starts, or end the study.
        records: N, public.
        worker: what each worker process needs besides the trial's name.
        on_change: told the name of each trial that is about to start, or has ended.

    Raises:
        InputError: the folder has lost trials that the accounts have admitted.
    """

    def __init__(
        self,
        study: Study,
        folder: StudyFolder,
        accounts: StudyAccounts,
        records: int,
        worker: Mapping[str, Any],
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(metric=study.objective, mode=schema.mode_of(study.objective))
        self.study, self.folder, self.accounts, self.records = study, folder, accounts, records
        self.worker, self.on_change = dict(worker), on_change
        self.refused: str | None = None  # why no further trial starts, where the study ends early
        self.names: dict[str, str] = {}  # Ray's trial id to our trial name
        self._searched = accounts.trials or study.configurations  # the number of a selection's trials is secret
        self._running: set[str] = set()
        self._paused = False
        self._held: TrialRecord | None = None  # decided, and waiting for room in the accounts
        self._lock = threading.Lock()
        self._refuse_losses()
        self._memory = SearchMemory(study, folder)
        self._waiting = self._unfinished()
        self._memory.forget_orphans({record.number for record in folder.trials()})

    @property
    def remaining(self) -> int:
        """Trials still to be started, unfinished ones included."""
        return len(self._waiting) + max(0, self._planned - len(self.folder.trials()))

    @property
    def unfinished(self) -> bool:
        """Whether there are trials that were decided and have not ended, or that are still to be decided."""
        decided = self.folder.trials()
        if any(self.folder.end_of(record.name) is None for record in decided):
            return True
        # A selection that is short of trials has another distribution than the one that was accounted.
        ends_early = self.refused is not None and not self.study.sealed
        return not ends_early and len(decided) < self._planned

    @property
    def _planned(self) -> int:
        return (len(self.study.baselines) + self._searched) * self.study.seeds

    def suggest(self, trial_id: str) -> Any:
        """Ray's question: a configuration, None for not now, or that there is none left."""
        with self._lock, told_when_full(self.folder.path):
            record = None if self._paused else self._next_record()
        if record is None:
            return None if self._held or self._paused else Searcher.FINISHED
        self.names[trial_id] = record.name
        self._running.add(record.name)
        self.on_change(record.name)
        return {**self.worker, "folder": str(self.folder.path), "trial": record.name}

    def should_stop(self, name: str) -> bool:
        """Whether the scheduler stops a trial after what it has reported; a baseline, or a trial run again, never."""
        if self.study.scheduler.kind == "none":
            return False
        record = self.folder.read_trial(name)
        return record.number is not None and self._memory.should_stop(record.number, self.folder.reports(name))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ray's message that a trial has ended; settles the ledger and tells Optuna."""
        name = self.names.get(trial_id)
        if name is None:
            return
        # Of a failure the session hears too, with the reason, and whose fault it was.
        if not error and not (self._paused and self._halfway(name)):
            with told_when_full(self.folder.path):
                self.finish(name, failed=False)
        self._running.discard(name)

    def pause(self) -> None:
        """Starts no more trials; one that comes back without its last report has only been stopped, to go on later."""
        self._paused = True

    def _halfway(self, name: str) -> bool:
        reports = self.folder.reports(name)
        return not reports or reports[-1].status == RUNNING

    def save(self, checkpoint_path: str) -> None:
        """Leaves a word where Ray expects its copy of the searcher: ours is the study folder."""
        Path(checkpoint_path).write_text("the state of this search is in the study folder\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to do: a searcher is built from the study folder."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles a searcher to restore it; this one is rebuilt instead, and holds locks and open files."""
        return {"study": self.study, "metric": self._metric, "mode": self._mode}

    def finish(self, name: str, *, failed: bool, error: str | None = None) -> None:
        """Brings ledger, Optuna and last the folder up to a trial's end; safe to repeat.

        A driver that dies on the way leaves the trial without its end, and the next session repeats the rest.
        """
        self._end(name, failed=failed, error=error)
        self.on_change(name)

    def _end(self, name: str, *, failed: bool, error: str | None = None) -> None:
        reports = self.folder.reports(name)
        last = reports[-1] if reports else None
        state: schema.State = "failed"
        if not failed and last is not None:
            state = "stopped_early" if last.status == "running" else last.status  # type: ignore[assignment]
        record = self.folder.read_trial(name)
        # A failed trial may be tried again, so it stays charged with its worst case.
        if state != "failed":
            self.accounts.settle(name, self._charged(record))
        if record.number is not None:
            self._tell(record.number, {name: state})
        self.folder.end_trial(name, TrialEnd(state=state, error=error))

    def _tell(self, number: int, ending: Mapping[str, str]) -> None:
        """Tells Optuna of a configuration when the last of its seeds ends, which is not in the folder yet."""
        names = [record.name for record in self.folder.trials() if record.number == number]
        ends = {name: self.folder.end_of(name) for name in names}
        states = [ending.get(name) or (end.state if (end := ends[name]) else None) for name in names]
        if len(names) < self.study.seeds or None in states:
            return
        reports = [self.folder.reports(name) for name in names]
        if all(state in schema.FINAL for state in states):
            mean = means([told[-1].metrics for told in reports])
            self._memory.tell(number, [mean.get(name, math.nan) for name in self.study.objectives])
        elif states == ["stopped_early"]:  # one seed alone: a scheduler serves no others
            self._memory.tell_stopped(number, reports[0])
        else:
            self._memory.give_up(number)

    def _next_record(self) -> TrialRecord | None:
        if self._waiting:
            return self._waiting.pop(0)
        if self.refused is not None:
            return None
        record = self._held or self._next_baseline() or self._next_seed() or self._next_proposal()
        return self._start(record) if record else None

    def _next_baseline(self) -> TrialRecord | None:
        known = self._known()
        new = (
            (name, seed)
            for name in self.study.baselines
            for seed in range(self.study.seeds)
            if self._name(f"baseline-{name}", seed) not in known
        )
        return next((self._baseline_record(name, seed) for name, seed in new), None)

    def _next_seed(self) -> TrialRecord | None:
        """The next seed of a configuration that does not have all of them yet."""
        started: dict[int | None, list[TrialRecord]] = {}
        for record in self.folder.trials() if self.study.seeds > 1 else ():
            if record.role == schema.ROLE_SEARCH:
                started.setdefault(record.number, []).append(record)
        short = (group for group in started.values() if len(group) < self.study.seeds)
        return next((self._seeded(group[0], len(group)) for group in short), None)

    def _seeded(self, first: TrialRecord, seed: int) -> TrialRecord:
        """A configuration's first trial with another seed."""
        config = first.config.model_copy(update={"seed": first.config.seed + seed})
        return first.model_copy(update={"name": self._name(first.label, seed), "config": config})

    def _name(self, label: str, seed: int) -> str:
        return f"{label}-{seed + 1}" if self.study.seeds > 1 else label

    def _next_proposal(self) -> TrialRecord | None:
        searched = len({record.number for record in self.folder.trials() if record.role == schema.ROLE_SEARCH})
        if searched >= self._searched:
            return None
        for _ in range(MOST_SKIPS):
            if record := self._propose(searched):
                return record
        self._refuse(f"{MOST_SKIPS} proposals in a row could not be afforded; narrow the space to what can")
        return None

    def _propose(self, index: int) -> TrialRecord | None:
        number, params = self._memory.ask(index)
        try:
            config = self.study.configure(params)
            record = self._make_record(f"trial-{index + 1:04d}", schema.ROLE_SEARCH, config, params, number)
            if self.accounts.covers(cost_of(record)):
                return record
            self._say("skipped a proposal: it costs more than what was planned")
        except InputError as error:
            # A corner of the space where no step is affordable: it costs nothing, and Optuna learns to avoid it.
            self._say(f"skipped a proposal: {error}")
        self._memory.give_up(number)
        return None

    def _make_record(
        self, label: str, role: Any, config: TrialConfig, params: dict[str, Any], number: int | None
    ) -> TrialRecord:
        """A configuration's first trial."""
        first = make_record(self._name(label, 0), role, config, self.records, params, number)
        return first.model_copy(update={"configuration": label}) if self.study.seeds > 1 else first

    def _start(self, record: TrialRecord) -> TrialRecord | None:
        """Records and admits a trial; one without room is held as long as others, which may leave some, run."""
        self._held = None
        try:
            self.accounts.check(record.name, cost_of(record))
        except BudgetExhausted as refusal:
            if self._running:
                self._held = record
                return None
            self._refuse(str(refusal))
            if record.number is not None:
                self._memory.give_up(record.number)
            return None
        # In this order a driver that dies in between leaves a trial that was decided, and is admitted when it is found.
        self.folder.add_trial(record)
        self.accounts.admit(record.name, cost_of(record))
        return record

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        self._say(f"no further trial starts: {reason}")

    def _say(self, text: str) -> None:
        """Tells a person, unless every word about a trial is secret."""
        if not self.study.sealed:
            log.warning(text)

    def _baseline_record(self, name: str, seed: int) -> TrialRecord:
        config = self.study.baseline(name)
        return self._seeded(self._make_record(f"baseline-{name}", schema.ROLE_BASELINE, config, {}, None), seed)

    def _unfinished(self) -> list[TrialRecord]:
        """Trials to go on with. One whose charge is final has ended, and only its driver did not live to say so."""
        settled = self.accounts.settled
        for record in self._without_end():
            if record.name in settled:
                self._end(record.name, failed=False)
        found = self._without_end()
        for record in found:
            self.accounts.admit(record.name, cost_of(record))
        return found

    def _without_end(self) -> list[TrialRecord]:
        return [record for record in self.folder.trials() if self.folder.end_of(record.name) is None]

    def _refuse_losses(self) -> None:
        """A trial that the accounts have admitted and nobody remembers would run twice, and be charged once."""
        if self.accounts.admitted - self._known():
            raise InputError(
                f"study {self.study.name}: trials that its ledger admitted are gone from {self.folder.path}; restore "
                "them from a backup, or give the study another name"
            )

    def _charged(self, record: TrialRecord) -> dict[str, int]:
        """What a trial was charged, by account, from its own ledgers; an account that cannot be known is left out."""
        ledgers = {TRAINING: LEDGER} | ({SCORES: SCORE_LEDGER} if record.score_releases else {})
        charged: dict[str, int] = {}
        for account, ledger in ledgers.items():
            try:
                charged[account] = charged_steps(self.folder.run(record.name) / ledger)
            except InputError as error:
                self._say(f"{record.name} stays charged with its worst case: {error}")
        return charged

    def _known(self) -> set[str]:
        return {record.name for record in self.folder.trials()}


def make_record(
    name: str, role: Any, config: TrialConfig, records: int, params: dict[str, Any], number: int | None
) -> TrialRecord:
    """A trial with its derived plan; raises InputError where the budget allows no step."""
    plan = derive_plan(config, records)
    return TrialRecord(
        name=name, role=role, config=config, params=params, number=number, config_id=config_id(config),
        steps=plan.steps, sample_rate=plan.sample_rate, noise_multiplier=plan.noise_multiplier,
        score_noise=plan.score_noise, score_releases=plan.score_releases,
    )  # fmt: skip


def config_id(config: TrialConfig) -> str:
    """Name of a configuration without its seed, so that repetitions share it."""
    return config_sha256(config.model_copy(update={"seed": 0}))[:12]


def cost_of(record: TrialRecord) -> TrialCosts:
    """A trial's worst case for the study's accounts."""
    return TrialCosts.make(
        record.sample_rate, record.noise_multiplier, record.steps, record.score_noise, record.score_releases
    )
