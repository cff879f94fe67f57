"""The searcher: decides trials, writes each into the study folder before it starts, learns from its end.

Ray asks `suggest`; baselines and unfinished trials of an earlier session come first, then Optuna proposes.
What is decided lives in the study folder and in Optuna's journal, so that a study can be rebuilt at any time
without Ray's own state.
"""

import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.search import Searcher

from dpsink.config import TrialConfig, config_sha256
from dpsink.errors import InputError
from dpsink.privacy.accounts import SCORES, TRAINING, StudyAccounts, TrialCosts
from dpsink.privacy.budget import charged_steps
from dpsink.privacy.ledger import BudgetExhausted
from dpsink.privacy.plan import derive_plan
from dpsink.training import LEDGER, SCORE_LEDGER
from tune import schema
from tune.folder import StudyFolder, TrialEnd, TrialRecord
from tune.room import told_when_full
from tune.study import Distribution, Study

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
        self._searched = accounts.trials or study.algorithm.trials  # the number of a selection's trials is secret
        self._running: set[str] = set()
        self._held: TrialRecord | None = None  # decided, and waiting for room in the accounts
        self._lock = threading.Lock()
        self._refuse_losses()
        self._optuna = open_optuna(study, folder)
        self._waiting = self._unfinished()
        self._forget_orphans()

    @property
    def remaining(self) -> int:
        """Trials still to be started, unfinished ones included."""
        new_baselines = [name for name in self.study.baselines if f"baseline-{name}" not in self._known()]
        searched = sum(record.role == schema.ROLE_SEARCH for record in self.folder.trials())
        return len(self._waiting) + len(new_baselines) + max(0, self._searched - searched)

    @property
    def unfinished(self) -> bool:
        """Whether there are trials that were decided and have not ended, or that are still to be decided."""
        decided = self.folder.trials()
        if any(self.folder.end_of(record.name) is None for record in decided):
            return True
        # A selection that is short of trials has another distribution than the one that was accounted.
        ends_early = self.refused is not None and not self.study.sealed
        return not ends_early and len(decided) < len(self.study.baselines) + self._searched

    def suggest(self, trial_id: str) -> Any:
        """Ray's question: a configuration, None for not now, or that there is none left."""
        with self._lock, told_when_full(self.folder.path):
            record = self._next_record()
        if record is None:
            return None if self._held else Searcher.FINISHED
        self.names[trial_id] = record.name
        self._running.add(record.name)
        self.on_change(record.name)
        return {**self.worker, "folder": str(self.folder.path), "trial": record.name}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ray's message that a trial has ended; settles the ledger and tells Optuna."""
        name = self.names.get(trial_id)
        if name is None:
            return
        if not error:  # of a failure the session hears too, with the reason, and whose fault it was
            with told_when_full(self.folder.path):
                self.finish(name, failed=False)
        self._running.discard(name)

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
        reports = self.folder.reports(name)
        last = reports[-1] if reports else None
        state: schema.State = "failed"
        if not failed and last is not None:
            state = "stopped_early" if last.status == "running" else last.status  # type: ignore[assignment]
        record = self.folder.read_trial(name)
        # A failed trial may be tried again, so it stays charged with its worst case.
        if state != "failed":
            self.accounts.settle(name, self._charged(record))
        self._tell(record, state, last.metrics.get(self.study.objective) if last else None)
        self.folder.end_trial(name, TrialEnd(state=state, error=error))
        self.on_change(name)

    def _tell(self, record: TrialRecord, state: str, value: float | None) -> None:
        if record.number is None:
            return
        outcome = optuna.trial.TrialState.COMPLETE
        if state == "stopped_early":
            outcome, value = optuna.trial.TrialState.PRUNED, None
        elif state == "failed" or value is None or math.isnan(value):
            outcome, value = optuna.trial.TrialState.FAIL, None
        self._optuna.tell(record.number, value, state=outcome, skip_if_finished=True)

    def _next_record(self) -> TrialRecord | None:
        if self._waiting:
            return self._waiting.pop(0)
        if self.refused is not None:
            return None
        record = self._held or self._next_baseline() or self._next_proposal()
        return self._start(record) if record else None

    def _next_baseline(self) -> TrialRecord | None:
        known = self._known()
        new = (name for name in self.study.baselines if f"baseline-{name}" not in known)
        return next((self._baseline_record(name) for name in new), None)

    def _next_proposal(self) -> TrialRecord | None:
        searched = sum(record.role == schema.ROLE_SEARCH for record in self.folder.trials())
        if searched >= self._searched:
            return None
        for _ in range(MOST_SKIPS):
            if record := self._propose(f"trial-{searched + 1:04d}"):
                return record
        self._refuse(f"{MOST_SKIPS} proposals in a row could not be afforded; narrow the space to what can")
        return None

    def _propose(self, name: str) -> TrialRecord | None:
        if self.study.sealed:  # a sequence that anybody can repeat would tell the winner's place in it
            self._optuna.sampler.reseed_rng()
        trial = self._optuna.ask()
        params = {path: draw(trial, path, space) for path, space in self.study.space.items()}
        config = self.study.configure(params)
        try:
            record = make_record(name, schema.ROLE_SEARCH, config, self.records, params, trial.number)
            if self.accounts.covers(cost_of(record)):
                return record
            self._say("skipped a proposal: it costs more than what was planned")
        except InputError as error:
            # A corner of the space where no step is affordable: it costs nothing, and Optuna learns to avoid it.
            self._say(f"skipped a proposal: {error}")
        self._give_up(trial.number)
        return None

    def _give_up(self, number: int) -> None:
        """Tells Optuna that nothing will come of what it proposed."""
        self._optuna.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)

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
                self._give_up(record.number)
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

    def _baseline_record(self, name: str) -> TrialRecord:
        return make_record(f"baseline-{name}", schema.ROLE_BASELINE, self.study.baseline(name), self.records, {}, None)

    def _unfinished(self) -> list[TrialRecord]:
        found = [record for record in self.folder.trials() if self.folder.end_of(record.name) is None]
        for record in found:
            self.accounts.admit(record.name, cost_of(record))
        return found

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

    def _forget_orphans(self) -> None:
        """Proposals whose driver died before it had recorded their trial."""
        recorded = {record.number for record in self.folder.trials()}
        for trial in self._optuna.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if trial.number not in recorded:
                self._give_up(trial.number)

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


def open_optuna(study: Study, folder: StudyFolder) -> optuna.Study:
    """The study's Optuna study, in a journal file of its folder; the same one on resume."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.search.mkdir(parents=True, exist_ok=True)
    journal = folder.search / "optuna.log"
    # Left by a driver that was killed; Optuna would wait for half a minute. One sweep at a time has the folder.
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    opened = optuna.create_study(
        study_name=study.name, storage=storage, load_if_exists=True,
        direction="minimize" if schema.mode_of(study.objective) == "min" else "maximize",
    )  # fmt: skip
    # A sampler restarted with the same seed would repeat its first proposals.
    opened.sampler = make_sampler(study, offset=len(opened.trials))
    return opened


def make_sampler(study: Study, offset: int) -> optuna.samplers.BaseSampler:
    """The sampler of the study's algorithm; a sealed study's is seeded by the operating system."""
    if study.sealed:
        return optuna.samplers.RandomSampler()
    digest = hashlib.sha256(json.dumps([study.algorithm.seed, offset]).encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if study.algorithm.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, min(10, study.algorithm.trials // 3))
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup)


def draw(trial: optuna.Trial, path: str, space: Distribution) -> Any:
    """One value of one dimension."""
    if space.choice is not None:
        return trial.suggest_categorical(path, space.choice)
    if space.integer is not None:
        return trial.suggest_int(path, *space.integer)
    low, high = space.bounds
    return trial.suggest_float(path, low, high, log=space.log_uniform is not None)
