"""The training loop. A trial's life: reserve, step, evaluate, checkpoint, report, stop, resume.

`Ensemble` is the loop, over open runs that come and go. `train` yields a report at each evaluation point and knows
neither who listens nor what is searched; it is `train_together` for one trial. To resume, call it again on the same
folder: replayed steps are charged again and drawn with fresh noise.
"""

import copy
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError

from dpsink.checkpoint import restore_state, save_checkpoint
from dpsink.config import Performance, TrialConfig, config_sha256, dump_config
from dpsink.data import ImageData, LabelledImages
from dpsink.engine import Stack, Trial, TrialState, initial_state, open_stack, structure
from dpsink.entropy import Entropy, OsEntropy
from dpsink.errors import InputError
from dpsink.evaluation import (
    CLASSIFIERS,
    WORST_DISTANCE,
    build_extractor,
    classifier_accuracies,
    evaluate,
    require_extractor,
)
from dpsink.privacy.budget import TrialBudget
from dpsink.privacy.mechanism import release_counts
from dpsink.privacy.plan import PrivacyPlan, delta_warning, derive_plan
from dpsink.privacy.release import check_report
from dpsink.records import CheckpointState, Report, latest_checkpoint, read_json, read_state, write_atomically
from dpsink.synthesis import balanced_labels, generate, sample_grid

log = logging.getLogger("dpsink")

RUNNING, COMPLETED, DIVERGED = "running", "completed", "diverged"
LEDGER, SCORE_LEDGER = "ledger", "score-ledger"
RESERVATION_SECONDS = 5.0  # steps lost to a crash, in time
RESERVATION_SHARE = 100  # and at most this part of the budget
CHECKPOINT_SECONDS = 60.0  # between two checkpoints, however far the next report is


DEFAULT_PERFORMANCE = Performance()


@dataclass(frozen=True)
class Progress:
    """Where a trial stands, for a progress bar. `epsilon_bound` is what will be spent at the next report."""

    step: int
    total: int
    epsilon_bound: float


def train(
    config: TrialConfig,
    data: ImageData,
    folder: Path,
    *,
    entropy: Entropy | None = None,
    performance: Performance = DEFAULT_PERFORMANCE,
    inception_weights: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    tell_again: bool = False,
) -> Iterator[Report]:
    """Trains one trial in its folder, from its last checkpoint if there is one.

    Args:
        config: the trial; a folder that holds another one is refused.
        data: the loaded data set of `config.data`.
        folder: the run folder, made if it does not exist.
        entropy: source of noise and membership; the operating system's by default. No setting, file or
            environment variable can replace it.
        performance: where and how fast; changes neither ε nor the number of steps.
        inception_weights: their file, for that extractor; by default at `$DPSINK_INCEPTION_WEIGHTS` or in torch
            hub's cache.
        should_stop: asked after every step; True ends the trial cleanly, to be resumed.
        on_progress: told after every reservation.
        tell_again: whether a trial that goes on first repeats its last report, for a listener who may have died
            before deciding on it.

    Yields:
        A report at each evaluation point, after its checkpoint is durable. The last one's status is
        `completed` or `diverged`; an interrupted trial ends without one.

    Raises:
        InputError: the folder belongs to another trial or process, is damaged, or cannot be written.
    """
    set_up(performance)  # what cannot run is refused before anything is written
    with TrialRun.open(config, data, folder, entropy, inception_weights) as run:
        run.on_progress = on_progress
        if tell_again and run.reports and not run.ended:
            yield run.reports[-1]
        for _, report in train_together([run], performance=performance, should_stop=should_stop):
            yield report


def train_together(
    runs: Sequence["TrialRun"],
    *,
    performance: Performance = DEFAULT_PERFORMANCE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple["TrialRun", Report]]:
    """Advances open runs to their ends, `performance.slots` at a time. Arguments and errors are those of `train`.

    Yields:
        A run and its report.
    """
    left = [run for run in runs if not run.ended or read_result(run.folder) is None]
    ensemble = Ensemble(performance.model_copy(update={"slots": max(1, min(performance.slots, len(left)))}))
    for run in left:
        ensemble.add(run)
    while ensemble.busy:
        if should_stop():
            for run in left:
                ensemble.remove(run)
            return
        for run, told in ensemble.advance():
            if isinstance(told, Exception):
                raise told
            yield run, told
            if not run.ended:
                ensemble.add(run)


class Ensemble:
    """The loop: open runs side by side, on stacks of those that may share one, coming and going between two steps.

    A run that has something to tell leaves, and takes no further step until it is added again: whoever listens can
    decide before anything more is charged. What goes wrong with one run ends that run only; a step that fails ends all
    that were in it. A run's reports and weights are those that it would have alone. Used by one thread.

    Args:
        performance: `slots` of it bounds the runs that step at a time, over all stacks; the others wait.

    Raises:
        InputError: there is no such device.
    """

    def __init__(self, performance: Performance = DEFAULT_PERFORMANCE) -> None:
        set_up(performance)
        self._performance = performance
        self._waiting: list[TrialRun] = []
        self._running: list[TrialRun] = []
        self._stacks: dict[tuple[object, ...], Stack] = {}

    @property
    def busy(self) -> bool:
        """Whether a run waits or steps."""
        return bool(self._waiting or self._running)

    def add(self, run: "TrialRun") -> None:
        """Lets an open run go on, as soon as there is a slot."""
        run.device = self._performance.device
        self._waiting.append(run)

    def remove(self, run: "TrialRun") -> None:
        """Stops a run, if it is here: gives back what is not used, and makes its state durable."""
        if run in self._waiting:
            self._waiting.remove(run)
        elif run in self._running:
            self._running.remove(run)
            run.stop()

    def advance(self) -> list["Told"]:
        """One step of every run that has a slot and nothing to tell.

        Returns:
            Runs that have left, each with its report, or with what went wrong: of such a run nothing was saved, and
            what it had reserved stays charged.
        """
        told = [*self._fill_slots(), *self._collect()]
        for stack in {id(run.stack): run.stack for run in self._running}.values():
            assert stack is not None  # who has none has told
            told += self._step(stack)
        return told

    def _fill_slots(self) -> Iterator["Told"]:
        for run in list(self._waiting):
            try:
                if not self._seat(run):
                    continue
                self._running.append(run)
            except Exception as error:
                yield run, error
            self._waiting.remove(run)

    def _seat(self, run: "TrialRun") -> bool:
        """Whether a run found a slot; one that has ended needs none."""
        if run.ended:
            return True
        if len(self._running) >= self._performance.slots:
            return False
        stack = self._stack_for(run)
        if stack.free:
            run.join(stack)
        return run.stack is not None

    def _stack_for(self, run: "TrialRun") -> Stack:
        """The stack of a run's structure: made when the first one comes, and replaced by a wider one when it is full,
        so that few of a kind do not pay for many slots. The control's has one slot for ever."""
        kind = run.kind
        stack = self._stacks.get(kind)
        if stack is not None and (stack.free or run.config.generator.kind == "class_mean"):
            return stack
        there = [other for other in self._running if stack is not None and other.stack is stack]
        coming = sum(other.kind == kind for other in self._waiting)
        width = min(self._performance.slots, max(2 * len(there), len(there) + coming))
        used = {id(other.stack) for other in self._running}
        self._stacks = {key: one for key, one in self._stacks.items() if id(one) in used}  # memory for the new one
        self._stacks[kind] = open_stack(run.config, run.data.train, self._performance, width)
        for other in there:
            other.leave()
            other.join(self._stacks[kind])
        return self._stacks[kind]

    def _collect(self) -> Iterator["Told"]:
        for run in list(self._running):
            try:
                if run.may_step():
                    continue
                told = run.report()
            except Exception as error:
                run.leave()
                told = error
            self._running.remove(run)
            yield run, told

    def _step(self, stack: Stack) -> list["Told"]:
        runs = [run for run in self._running if run.stack is stack]
        started = time.perf_counter()
        try:
            stack.step()
        except Exception as error:
            return self._abandon(stack, runs, error)
        elapsed = time.perf_counter() - started
        for run in runs:
            run.took_step(elapsed)
        return []

    def _abandon(self, stack: Stack, runs: Sequence["TrialRun"], error: Exception) -> list["Told"]:
        """Gives up a stack whose step has failed: what is in it can no longer be trusted."""
        self._stacks = {kind: other for kind, other in self._stacks.items() if other is not stack}
        for run in runs:
            run.stack = None
            self._running.remove(run)
        return [(run, error) for run in runs]


@dataclass(eq=False)
class TrialRun:
    """One trial between its boundaries: owns the state, the budget and the folder; steps in a slot of a stack."""

    config: TrialConfig
    data: ImageData
    folder: Path
    entropy: Entropy
    plan: PrivacyPlan
    budget: TrialBudget
    state: TrialState
    scores: TrialBudget | None = None  # of a private validation split
    reports: list[Report] = field(default_factory=list)
    seconds: float = 0.0  # spent in steps, over all attempts
    on_progress: Callable[[Progress], None] = lambda _: None
    device: str = "cpu"  # where it is evaluated
    inception_weights: Path | None = None
    stack: Stack | None = None
    slot: int = -1
    granted: int = 0  # steps that are reserved and not yet taken
    reserved: int = 0  # steps of the last reservation
    saved: float = field(default_factory=time.monotonic)  # when the state was made durable last

    def __post_init__(self) -> None:
        self.trial = Trial(self.config, self.plan, self.state, self.entropy)

    @classmethod
    def open(
        cls, config: TrialConfig, data: ImageData, folder: Path, entropy: Entropy | None = None,
        inception_weights: Path | None = None,
    ) -> "TrialRun":  # fmt: skip
        """Opens a run folder, restoring the last checkpoint and taking the next attempt at the ledger."""
        plan = derive_plan(config, len(data.train))
        if warning := delta_warning(config, len(data.train)):
            log.warning(warning)
        if data.public_validation is not None:
            require_extractor(config.evaluation.extractor, weights=inception_weights)
        _claim_folder(folder, config)
        checkpoint = latest_checkpoint(folder)
        state = initial_state(config, data.train)
        saved = read_state(checkpoint) if checkpoint else None
        budget = TrialBudget.open(
            folder / LEDGER, plan.terms(data.fingerprint), witness=saved.witness if saved else None
        )
        run = cls(
            config, data, folder, entropy or OsEntropy(), plan, budget, state, inception_weights=inception_weights
        )
        try:
            run._restore(checkpoint, saved)
        except BaseException:
            run.__exit__()
            raise
        return run

    def __enter__(self) -> "TrialRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.budget.close()
        if self.scores is not None:
            self.scores.close()

    def _restore(self, checkpoint: Path | None, saved: CheckpointState | None) -> None:
        if self.plan.score_releases:
            self.scores = TrialBudget.open(
                self.folder / SCORE_LEDGER,
                self.plan.score_terms(self.data.fingerprint),
                witness=saved.score_witness if saved else None,
            )
        if checkpoint is None or saved is None:
            return
        restore_state(checkpoint, self.state)
        self.reports, self.seconds = list(saved.reports), saved.seconds
        log.info("resuming at step %d of %d; %d charged", self.state.step, self.plan.steps, self.budget.charged)

    @property
    def ended(self) -> bool:
        """Whether the last report was the final one."""
        return bool(self.reports) and self.reports[-1].status != RUNNING

    @property
    def kind(self) -> tuple[object, ...]:
        """What runs on one stack have in common."""
        return (self.data.fingerprint, *structure(self.config))

    @property
    def boundary(self) -> int:
        """The step after which the next report is due: T is cut into equal parts."""
        points = min(self.config.evaluation.points, self.plan.steps)
        reported = self.reports[-1].step if self.reports else 0
        ahead = (math.ceil(self.plan.steps * k / points) for k in range(1, points + 1))
        return next((step for step in ahead if step > reported), self.plan.steps)

    def join(self, stack: Stack) -> None:
        """Takes a slot."""
        self.stack = stack
        self.slot = stack.join(self.trial)

    def leave(self) -> None:
        """Gives the slot up, if there is one, and brings the state up to date."""
        if self.stack is not None:
            self.stack.leave(self.slot)
            self.stack = None

    def may_step(self) -> bool:
        """Whether a step is reserved, after reserving where none is left; False when a report is due: at a boundary,
        when the budget is spent, or when the weights are no longer finite."""
        if self.ended:
            return False
        if self.granted:
            return True
        wanted = min(self._reservation(), self.boundary - self.state.step)
        if wanted <= 0 or not self.finite:
            return False
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self._save_on_the_way()
        self.granted = self.reserved = self.budget.reserve(wanted)
        if self.granted:
            self.on_progress(Progress(self.state.step, self.plan.steps, self._epsilon_at(self.boundary)))
        return bool(self.granted)

    def took_step(self, seconds: float) -> None:
        """A step was taken, and took so long."""
        self.granted -= 1
        self.seconds += seconds

    def stop(self) -> None:
        """Gives back what is not used and makes the state durable, to be resumed."""
        self.leave()
        if self.granted:
            self.budget.settle(self.reserved - self.granted)
            self.granted = 0
        self.save()

    @property
    def finite(self) -> bool:
        """Whether every weight and statistic is a finite number."""
        if self.stack is not None:
            return self.stack.finite(self.slot)
        return all(bool(torch.isfinite(value).all()) for value in self.state.generator.state_dict().values())

    def report(self) -> Report:
        """Leaves its slot, evaluates on public data, checkpoints, and tells; the last report can be told again."""
        self.leave()
        if self.ended:
            _write_result(self, self.reports[-1])
            return self.reports[-1]
        metrics = self._evaluate()
        charged = self.budget.charged
        report = Report(
            step=self.state.step,
            charged=charged,
            epsilon=self.plan.trial_epsilon(charged, self.scores.charged if self.scores else 0),
            budget_fraction=charged / self.plan.steps,
            steps_per_second=self.state.step / max(self.seconds, 1e-9),
            status=self._status(),
            metrics=metrics,
        )
        check_report(report.model_dump())
        self.reports.append(report)
        self.save()
        if report.status != RUNNING:
            _write_result(self, report)
        return report

    def save(self) -> None:
        """Makes the state durable; it is up to date outside a slot, or after the stack's `update`.

        Raises:
            FencedError: another process has taken the trial over; its checkpoints stay as they are.
        """
        self.budget.refuse_if_fenced()
        description = CheckpointState(
            config=self.config,
            plan=asdict(self.plan),
            image_shape=self.data.train.shape,
            num_classes=self.data.train.num_classes,
            data_fingerprint=self.data.fingerprint,
            step=self.state.step,
            seconds=self.seconds,
            witness=self.budget.witness(),
            score_witness=self.scores.witness() if self.scores else None,
            reports=tuple(self.reports),
        )
        grid = sample_grid(self.state.generator, num_classes=self.data.train.num_classes)
        save_checkpoint(self.folder, description, self.state, grid)
        self.saved = time.monotonic()

    def _save_on_the_way(self) -> None:
        """Makes the state durable between two reports: what is lost is paid for again."""
        if self.stack is not None:
            self.stack.update(self.slot)
        self.save()

    def _reservation(self) -> int:
        """About five seconds of steps, at most a hundredth of the budget; one step while the speed is unknown."""
        rate = self.state.step / self.seconds if self.seconds else 0.0
        return max(1, min(int(RESERVATION_SECONDS * rate), self.plan.steps // RESERVATION_SHARE))

    def _status(self) -> str:
        if not self.finite:
            return DIVERGED
        return COMPLETED if self.state.step >= self.plan.steps or self.budget.remaining == 0 else RUNNING

    def _evaluate(self) -> dict[str, float]:
        reference = self.data.validation
        if reference is None:
            return {}
        settings = self.config.evaluation
        public = self.data.validation_is_public
        if not self.finite:
            return worst_metrics(settings.classifiers, distances=public)
        labels = balanced_labels(settings.samples, reference.num_classes)
        generator = copy.deepcopy(self.state.generator).to(self.device)
        samples = generate(generator, labels, num_classes=reference.num_classes, seed=self.config.seed + 1)
        if not public:
            return self._private_scores(samples, reference)
        extractor = build_extractor(settings.extractor, reference, weights=self.inception_weights, device=self.device)
        return evaluate(samples, reference, extractor=extractor, classifiers=settings.classifiers, device=self.device)

    def _private_scores(self, samples: LabelledImages, reference: LabelledImages) -> dict[str, float]:
        """Noisy accuracies, the only thing that leaves a private validation split; charged before they are drawn."""
        names = self.config.evaluation.classifiers
        if self.scores is not None and self.scores.reserve(1) == 0:
            # Replays have spent the releases: what was told last stands.
            return self.reports[-1].metrics if self.reports else worst_metrics(names, distances=False)
        exact = classifier_accuracies(samples, reference, classifiers=names, device=self.device)
        counts = torch.tensor([exact[f"accuracy_{name}"] * len(reference) for name in names], dtype=torch.float64)
        noisy = release_counts(counts, self.plan.score_noise, self.entropy) / len(reference)
        told = {f"accuracy_{name}": value for name, value in zip(names, noisy.clamp(0, 1).tolist(), strict=True)}
        return told | ({"accuracy": sum(told.values()) / len(told)} if set(names) == set(CLASSIFIERS) else {})

    def _epsilon_at(self, boundary: int) -> float:
        return self.plan.epsilon(min(self.budget.charged + boundary - self.state.step, self.plan.steps))


Told = tuple[TrialRun, Report | Exception]


def worst_metrics(classifiers: tuple[str, ...], *, distances: bool = True) -> dict[str, float]:
    """The finite values that a diverged trial reports, so that a searcher can learn from it."""
    metrics = {"fid": WORST_DISTANCE, "kid": WORST_DISTANCE, "precision": 0.0, "recall": 0.0, "variety": 0.0}
    metrics = metrics if distances else {}
    accuracies = {f"accuracy_{name}": 0.0 for name in classifiers}
    return metrics | accuracies | ({"accuracy": 0.0} if set(classifiers) == set(CLASSIFIERS) else {})


def read_result(folder: Path) -> Report | None:
    """The final report of a run that has ended, None otherwise."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        return Report.model_validate(read_json(path).get("report"))
    except ValidationError:
        raise InputError(f"{path}: not the result of a run; remove it and run the same command again") from None


def _write_result(run: TrialRun, report: Report) -> None:
    result = {"report": report.model_dump(mode="json"), "config_sha256": config_sha256(run.config)}
    write_atomically(run.folder / "result.json", json.dumps(result, indent=1) + "\n")


def _claim_folder(folder: Path, config: TrialConfig) -> None:
    """Makes the run folder, or recognises it as this trial's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        if not path.exists():
            write_atomically(path, dump_config(config))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from None
    if path.read_bytes() != dump_config(config).encode():
        raise InputError(
            f"{folder}: holds another trial (see its config.yaml); choose another --out, or its own settings"
        )
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def set_up(performance: Performance) -> None:
    """Prepares this process for a device; refuses one that is not there."""
    device, there = torch.device(performance.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise InputError(f"performance.device={device} must be cpu, or one of the {there} CUDA devices of this machine")
    use_threads(performance.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = performance.precision == "tf32"


def use_threads(threads: int) -> None:
    """Sets the tensor library's CPU threads; 0 keeps its default."""
    if threads:
        torch.set_num_threads(threads)
