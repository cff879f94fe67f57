"""Ray: starts it, hands it the study's searcher and trainable, and listens."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

# Ray reads these when it is imported: a quiet console, and no copies of what the study folder already holds.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # files that nobody reads, and a thread for each trial
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # of a report that Tune cannot read: `tune/wire.py`
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # signals are ours
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # and so are the words about a failure

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter

from dpsink import console
from dpsink.errors import InputError
from tune.fitness import UnfitNode
from tune.folder import StudyFolder
from tune.own_ray import leave_ray, start_own_ray
from tune.pace import Pace
from tune.packing import Packing, closing_engines, run_packed
from tune.room import FULL, Blocked, require_room
from tune.search import StudySearcher
from tune.study import Resources, Study
from tune.trainable import run_trial
from tune.wire import unpacked

log = logging.getLogger("dpsink")

NO_MEMORY = "a node ran out of memory; a lower resources.concurrency needs less"
WORKER_RETRIES = 2  # of one trial whose process died
NODE_LOSSES = 100  # of one trial, on machines that may be taken away at any time
# In Ray's words about a trial's process: its machine is gone, or was told to go.
NODE_LOST = ("node was terminated", "node has died", "is unavailable", "receives a SIGTERM")
GROWS = "lower it, or on a cluster that grows set resources.concurrency to what it may grow to"
LOOK_SECONDS = 5.0  # between two looks at what nodes there are
STOP_SECONDS = 3.0  # for all trials to stop in


class Interrupted(BaseException):
    """A person, or the system, asked the study to stop. No Exception: Tune would wait for its workers first."""


class TooLarge(InputError):
    """A trial needs more than the cluster has."""


class _Ours(BaseException):
    """An error of ours in a call from Tune. No Exception: Tune would take it for the failure of a trial, or of Ray."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _kept_from_tune() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Ours(error) from error


class Crashed(Exception):
    """Ray ended before its trials did, for example because a node ran out of memory."""


class Listener(Protocol):
    """Who is told of reports and failures."""

    def progressed(self, name: str, values: dict[str, Any]) -> None:
        """A trial reported."""
        ...

    def recovered(self, name: str, error: str) -> None:
        """A trial's process died, and the trial goes on from its checkpoint."""
        ...

    def failed(self, name: str, error: str) -> None:
        """A trial failed for good."""
        ...

    def spared(self, name: str, error: str) -> None:
        """A trial was given up for what is no fault of its own: it is to be run again."""
        ...

    def waiting(self) -> None:
        """Tune is about to wait for its trials: more than once a second."""
        ...


class _Relay(tune.Callback):
    """Passes Tune's events on in our own vocabulary, and a person's wish to stop the other way."""

    def __init__(
        self, listener: Listener, should_stop: Callable[[], bool], folder: StudyFolder, searcher: StudySearcher
    ) -> None:
        self.listener, self.should_stop, self.folder, self.searcher = listener, should_stop, folder, searcher
        self._losses: Counter[str] = Counter()
        self._deadline: float | None = None  # of trials that were told to stop
        self._steps: Counter[str] = Counter()  # of the last reports
        self._pace = Pace()

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles callbacks into a state of its own, which is never used here."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.should_stop():
            self._stop(trials)
        require_room(self.folder.path)
        with _kept_from_tune():
            self.listener.waiting()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        time.sleep(self._pace.seconds())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._pace.hear()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._pace.hear()

    def _stop(self, trials: list[Any]) -> None:
        """Lets the trials end after their step, with everything durable, as far as a few seconds allow."""
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_SECONDS
            self._pace.hear()
            self.searcher.pause()
            self.folder.order(stop=True)
        if time.monotonic() > self._deadline or not any(trial.status == Trial.RUNNING for trial in trials):
            raise Interrupted

    @_kept_from_tune()
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._pace.hear()
        name, told = trial.config["trial"], unpacked(result)
        if told["step"] > self._steps[name]:  # it gets on: what it failed of before is behind it
            self._steps[name], trial.run_metadata.num_failures = told["step"], 0
        self.listener.progressed(name, told)

    @_kept_from_tune()
    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._pace.hear()
        self._forgive(trial)
        self.listener.recovered(trial.config["trial"], _reason(trial))

    @_kept_from_tune()
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._pace.hear()
        name, reason = trial.config["trial"], _reason(trial)
        if reason == NO_MEMORY:
            self.listener.spared(name, reason)
            raise Blocked(NO_MEMORY)
        if any(os.strerror(number) in reason for number in FULL):
            self.listener.spared(name, reason)  # which may name the trial, as nobody may do who seals the study
            raise Blocked(f"a disk is full, that of {self.folder.path} or of a trial's machine; make room")
        if UnfitNode.__name__ in reason:
            self.listener.spared(name, reason)
            raise Blocked(reason.partition(": ")[2])
        self.listener.failed(name, reason)

    def _forgive(self, trial: Any) -> None:
        """A node that was lost is no failure of the trial, which would be given up after a few."""
        name, failure = trial.config["trial"], _latest_failure(trial)
        if any(words in failure for words in NODE_LOST) and self._losses[name] < NODE_LOSSES:
            self._losses[name] += 1
            trial.run_metadata.num_failures = max(0, trial.run_metadata.num_failures - 1)  # Tune may have forgiven it


class _Limited(ConcurrencyLimiter):
    """The searcher with a limit: without one Ray asks for trials before there is room, and starts workers in turn."""

    @_kept_from_tune()
    def suggest(self, trial_id: str) -> Any:
        return super().suggest(trial_id)

    @_kept_from_tune()
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error)


class _Following(_Limited):
    """As many trials at a time as have room on a cluster's nodes, which come and go, and one that waits.

    What waits is what an autoscaler sees, and adds a node for.
    """

    def __init__(self, searcher: StudySearcher, resources: Resources) -> None:
        super().__init__(searcher, max_concurrent=_room(resources) + 1)
        self._resources, self._looked = resources, time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.max_concurrent, self._looked = _room(self._resources) + 1, time.monotonic()
        return super().suggest(trial_id)


class _Stopper(FIFOScheduler):
    """Stops the trials that the study's scheduler gives up; its decisions are the searcher's, none are kept here."""

    def __init__(self, should_stop: Callable[[str], bool]) -> None:
        super().__init__()
        self.should_stop = should_stop

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles schedulers into a state of its own, which is never used here."""
        return {}

    @_kept_from_tune()
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.STOP if self.should_stop(trial.config["trial"]) else TrialScheduler.CONTINUE


def run_on_ray(study: Study, folder: StudyFolder, searcher: StudySearcher, listener: Listener) -> None:
    """Runs the searcher's trials to the end.

    Args:
        folder: where the trials are, and Ray's own files will be.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
        Crashed: Ray fell over; what had ended by then is in the study folder.
        TooLarge: a trial would wait for ever.
        Blocked: the study's disk is full, a node's memory is too small for its trials, or it lacks what they need.
    """
    ours = not ray.is_initialized()  # else the caller is connected to a cluster, and stays so
    try:
        fitting = _start(study)
        trainable, engines = _trainable(study)
        with console.stop_on_signals() as should_stop, engines:  # after Ray has set handlers of its own
            folder.order(stop=False)
            relay = _Relay(listener, should_stop, folder, searcher)
            try:
                _tuner(study, folder, searcher, relay, trainable, fitting if ours else None).fit()
            except (tune.TuneError, RayError):
                if not should_stop():  # else it ended as it was asked to, only not as cleanly
                    raise
            if should_stop():  # all that ran have stopped, or have just ended
                raise Interrupted
    except _Ours as mistake:
        raise mistake.error from None
    except (tune.TuneError, RayError) as error:
        raise Crashed(NO_MEMORY if _is_memory(error) else _last_words(error)) from None
    finally:
        if ours:
            leave_ray()


def _trainable(study: Study) -> tuple[Callable[..., None], AbstractContextManager[None]]:
    """What a trial's process runs, and what has to be closed at the end."""
    resources = study.resources
    if resources.sharing == 1:
        return partial(run_trial, device=resources.device), nullcontext()
    record = StudyFolder(study.storage.absolute() / study.name).read_study()
    # Beside a GPU an engine has the CPUs of all its clients to evaluate on; on CPUs, trials this small gain nothing.
    threads = max(1, int(resources.cpu * resources.sharing)) if resources.gpu else 1
    packing = Packing(record.study_id, resources.sharing, resources.device, threads)
    return partial(run_packed, packing=packing), closing_engines(packing)


def _tuner(
    study: Study,
    folder: StudyFolder,
    searcher: StudySearcher,
    relay: _Relay,
    trainable: Callable[..., None],
    fitting: int | None,
) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": study.resources.cpu, "gpu": study.resources.gpu}),
        tune_config=tune.TuneConfig(
            search_alg=_limited(searcher, study.resources, fitting),
            scheduler=_Stopper(searcher.should_stop),
            num_samples=searcher.remaining,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.path),
            callbacks=[relay],
            failure_config=tune.FailureConfig(max_failures=WORKER_RETRIES),
            verbose=0,
        ),
    )


def _limited(searcher: StudySearcher, resources: Resources, fitting: int | None) -> ConcurrencyLimiter:
    """The searcher with its limit.

    Args:
        fitting: trials that fit at a time; None where nodes come and go.
    """
    if limit := resources.concurrency or fitting:
        return _Limited(searcher, max_concurrent=limit)
    return _Following(searcher, resources)


def _start(study: Study) -> int:
    """Starts Ray, unless it is connected; returns how many trials fit at a time."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what matters is told in one line of our own
    connected = ray.is_initialized()
    if not connected:
        start_own_ray()
    fitting = _room(study.resources)
    if fitting == 0 and not (connected and study.resources.concurrency):
        _refuse_too_large(study.resources, GROWS if connected else "lower it")
    if fitting == 0:
        log.warning("no node has room for a trial yet: the study waits for the cluster to grow")
    return fitting


def _nodes() -> tuple[list[float], list[float]]:
    """CPUs and GPUs of each living node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node.get("CPU", 0) for node in nodes], [node.get("GPU", 0) for node in nodes]


def _room(resources: Resources) -> int:
    """Trials that the living nodes have room for."""
    return sum(map(resources.fit_in, *_nodes()))


def _refuse_too_large(resources: Resources, advice: str) -> None:
    for name, wanted, there in zip(("cpu", "gpu"), (resources.cpu, resources.gpu), _nodes(), strict=True):
        if wanted > (most := max(there, default=0)):
            what = f"the {most:g} {name.upper()}s of a node"
            raise TooLarge(f"resources.{name}={wanted:g} must be at most {what}; {advice}")
    raise TooLarge(f"resources.cpu={resources.cpu:g} and resources.gpu={resources.gpu:g} are on no node together")


def _reason(trial: Any) -> str:
    """Why a trial's process ended, in one line."""
    error = _latest_failure(trial)
    return NO_MEMORY if _is_memory(error) else _last_words(error) or "the trial's process died"


def _latest_failure(trial: Any) -> str:
    """Ray's text about it, from the driver's own file: the copy in storage, which Ray would read, may come later."""
    file = Path(trial.error_file) if trial.error_file else None
    return file.read_text(encoding="utf-8").rpartition("Failure #")[2] if file and file.exists() else ""


def _is_memory(error: Any) -> bool:
    """Whether Ray's memory monitor has ended something; its own words fill a page.

    A GPU that is full is another matter, and a failure of the trial that was too large for it.
    """
    return "ray.exceptions.OutOfMemoryError" in str(error) or "running low on memory" in str(error)


def _last_words(error: Any) -> str:
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1] if lines else ""
