"""Many trials in one process: an engine for each GPU, and the light clients that Ray places there.

Ray places every trial as usual, with its part of a GPU. The trial's own process is a client that imports neither torch
nor CUDA: it joins the engine of its study on its GPU, hands the reports on to Tune, and leaves. The engine holds
all of them in one `dpsink.training.Ensemble`. On a CPU the same engine serves all trials of a node.

- A trial that has reported takes no step before its client has asked for more: a scheduler's word comes first.
- A client holds a lease, which every question renews. When one dies the lease runs out, and the engine stops the trial
  cleanly; when Tune starts another in its place, that one takes the lease over, and the old one is refused. The last
  report is then told again, since nobody can know whether Tune had it, and whether its driver lived to decide on it.
- When an engine dies its clients make a new one, and each trial goes on from its own checkpoint.
- An engine ends with its study; or by itself, when nobody has held a lease for a while.

What needs torch is imported where an engine uses it, because a client imports this module.
"""

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpsink.errors import InputError
from dpsink.privacy.storage import InUse
from tune.fitness import UnfitNode, needed_of_node, require_storage
from tune.folder import StudyFolder
from tune.orders import Orders
from tune.versions import require_same
from tune.wire import packed

if TYPE_CHECKING:
    from dpsink.config import DataConfig, TrialConfig
    from dpsink.data import ImageData
    from dpsink.training import Ensemble, Told, TrialRun

log = logging.getLogger("dpsink")

NAMESPACE = "dpsink"
POLL_SECONDS = 1.0  # that a question waits for an answer
LEASE_SECONDS = 30.0
IDLE_SECONDS = 60.0
CLOSE_SECONDS = 5.0  # for all trials of an engine to stop in
HURRY_SECONDS = 2.5  # the same, while a person waits
ENGINE_LOSSES = 3  # in a row, without a report between them, before a trial fails


class LeaseLost(RuntimeError):
    """Another process has the trial, or the study is over: who asks has no more say."""


class LeaseRanOut(RuntimeError):
    """Nothing was heard of a client for so long that its trial was stopped; it may join again."""


@dataclass(frozen=True)
class Packing:
    """How the trials of a study share engines.

    Attributes:
        study_id: of the study that the engines belong to.
        slots: trials that step at a time in one engine; the others wait.
        device: of the engines, `cpu` or `cuda`.
        threads: of the tensor library on the CPU, in one engine.
        lease_seconds: without a sign of life, before a client counts as dead.
        idle_seconds: without a lease, before an engine ends itself.
    """

    study_id: str
    slots: int
    device: str = "cpu"
    threads: int = 1
    lease_seconds: float = LEASE_SECONDS
    idle_seconds: float = IDLE_SECONDS

    @property
    def prefix(self) -> str:
        """What the names of the study's engines begin with."""
        return f"dpsink-engine-{self.study_id}-"


@dataclass(frozen=True)
class News:
    """What a trial has to tell: a report, or why it failed.

    Attributes:
        values: of the report, flat.
        ended: whether nothing will follow.
        error: one line; empty in a report.
        kind: name of the error's class.
    """

    values: dict[str, Any]
    ended: bool
    error: str = ""
    kind: str = ""

    @classmethod
    def of_error(cls, error: Exception) -> "News":
        """An error without its class, which a client might have to import torch for."""
        return cls({}, True, " ".join(str(error).split()), type(error).__name__)

    def raise_error(self) -> None:
        """Raises what went wrong, if anything did."""
        for known in (InUse, UnfitNode, InputError):
            if self.kind == known.__name__:
                raise known(self.error)
        if self.kind:
            raise RuntimeError(f"{self.kind}: {self.error}")


# -- the client -------------------------------------------------------------------------------------------------------


def run_packed(config: dict[str, Any], packing: Packing) -> None:
    """Lets an engine train one trial of a study folder; reports to Tune. Run in the trial's own process.

    Args:
        config: as for `tune.trainable.run_trial`.
    """
    require_storage(StudyFolder(Path(config["folder"])))
    with needed_of_node():
        require_same(config["versions"])  # its engine is of this node, too
    client = _Client(config, packing)
    while True:
        try:
            return client.run()
        except LeaseRanOut:  # while Tune had no time for a report
            continue
        except InUse:  # by the engine that an earlier driver of the study left behind, until its leases run out
            client.waits += 1
            if client.waits > packing.lease_seconds + CLOSE_SECONDS:
                raise
            time.sleep(1)
        except RayActorError:
            client.losses += 1
            if client.losses > ENGINE_LOSSES:
                raise
            time.sleep(client.losses)  # until the kernel has let go of what the old engine had locked


class _Client:
    """A trial's own process, as far as it has anything to do."""

    def __init__(self, config: dict[str, Any], packing: Packing) -> None:
        self.config, self.packing, self.name = config, packing, str(config["trial"])
        self.told = 0  # step of the last report that Tune has from here
        self.losses = 0  # of engines, since the last report
        self.waits = 0  # seconds, for the trial's ledger

    def run(self) -> None:
        """Joins, asks and reports until the trial has ended, or is to stop; leaves however it ends."""
        orders = Orders(StudyFolder(Path(self.config["folder"])))
        if orders.stop():
            return
        engine = _find_engine(self.config, self.packing)
        token: Any = ray.get(engine.join.remote(self.name, self.told))
        try:
            while not (orders.stop() or self._ask(engine, token)):
                pass
        finally:
            with suppress(RayActorError, GetTimeoutError):
                ray.get(engine.leave.remote(self.name, token), timeout=CLOSE_SECONDS)

    def _ask(self, engine: Any, token: str) -> bool:
        """One question, which says what Tune has heard; whether the trial has ended."""
        news: News | None = ray.get(engine.poll.remote(self.name, token, self.told))
        if news is None:
            return False
        news.raise_error()
        tune.report(packed(news.values))
        self.told, self.losses = news.values["step"], 0
        return news.ended


def _find_engine(config: dict[str, Any], packing: Packing) -> Any:
    """The engine of this process's node and GPU, made if there is none."""
    context = ray.get_runtime_context()
    node = context.get_node_id()
    gpu = next(iter(context.get_accelerator_ids().get("GPU", [])), "")
    options = {
        "name": f"{packing.prefix}{node}-{gpu or 'cpu'}",
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",  # outlives the client that made it
        "num_cpus": 0,  # its share of the machine is that of its clients
        "max_concurrency": 2 * packing.slots + 16,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        # Ray hides all GPUs from who has asked for none, unless it is told not to.
        "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": gpu, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
    }
    return (
        ray.remote(GpuEngine)
        .options(**options)
        .remote(packing, config["folder"], config["data_root"], config["fingerprint"])
    )


# -- the driver -------------------------------------------------------------------------------------------------------


@contextmanager
def closing_engines(packing: Packing) -> Iterator[None]:
    """Ends the study's engines with the context; where Ray itself fell over they end with it, or by themselves."""
    try:
        yield
    except (RayError, tune.TuneError):
        raise
    except BaseException:  # somebody waits, and the trials have been told to stop
        close_engines(packing, HURRY_SECONDS)
        raise
    else:
        close_engines(packing, CLOSE_SECONDS)


def close_engines(packing: Packing, seconds: float) -> None:
    """Stops all trials in the study's engines, cleanly as far as so many seconds allow, and ends the engines."""
    there: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in there if one["namespace"] == NAMESPACE and one["name"].startswith(packing.prefix)]
    engines: list[Any] = []
    for name in names:
        with suppress(ValueError):  # it has just ended
            engines.append(ray.get_actor(name, NAMESPACE))
    if not engines:
        return
    ray.wait([engine.close.remote() for engine in engines], num_returns=len(engines), timeout=seconds)
    for engine in engines:
        ray.kill(engine)


# -- the engine -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Lease:
    """A trial's place in an engine; one client has it at a time, who knows the token."""

    name: str
    token: str
    renewed: float
    told: int  # step of the last report that the first client had handed on; 0: it has just begun
    run: "TrialRun | None" = None
    news: News | None = None  # told until it is acknowledged


class GpuEngine:
    """All trials of a study on one GPU, in one process. A Ray actor; its clients' calls are served by several threads.

    One thread of its own has the ensemble and all that torch does on the device; calls leave it notes of what to do.

    Args:
        packing: of the study.
        folder, data_root: absolute.
        fingerprint: of the study's data.
    """

    def __init__(self, packing: Packing, folder: str, data_root: str, fingerprint: str) -> None:
        self.packing, self.folder, self.data_root = packing, Path(folder), Path(data_root)
        self.fingerprint = fingerprint
        self._leases: dict[str, _Lease] = {}
        self._changed = threading.Condition()  # guards the leases and the notes
        self._notes: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closed = False
        self._used = time.monotonic()  # when there was a lease last
        self._data: dict[DataConfig, ImageData] = {}
        self._loading = threading.Lock()
        self._ensemble: Ensemble | None = None
        self._seated: dict[TrialRun, _Lease] = {}
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    # Calls of clients.

    def join(self, name: str, told: int = 0) -> str:
        """Takes a trial's lease, or takes it over; returns the token to ask with.

        Args:
            told: step of the last report that this client has handed on; 0 if it has just begun.
        """
        token = secrets.token_hex(8)
        with self._changed:
            self._refuse_if_closed()
            lease = self._leases.get(name)
            if lease is not None:
                lease.token, lease.renewed = token, time.monotonic()
                self._changed.notify_all()
                return token
            lease = self._leases[name] = _Lease(name, token, math.inf, told)
        self._prepare(lease)
        return token

    def poll(self, name: str, token: str, told: int = 0) -> News | None:
        """Renews the lease, and waits a little for news.

        Args:
            told: step of the last report that this client has handed on: the trial goes on behind it.

        Raises:
            LeaseLost: it was taken over, or the engine is closed.
            LeaseRanOut: too late.
        """
        with self._changed:
            lease = self._lease(name, token)
            self._acknowledge(lease, told)
            patience = min(POLL_SECONDS, self.packing.lease_seconds / 3)
            self._changed.wait_for(lambda: lease.news or lease.token != token or self._closed, patience)
            return self._lease(name, token).news

    def leave(self, name: str, token: str) -> None:
        """Gives the lease back; the trial is stopped, with everything durable, when this returns. A lost lease is no
        longer there to be given back."""
        with self._changed:
            lease = self._leases.get(name)
            if lease is None or lease.token != token:
                return
            stopped = self._end(lease)
        stopped.exception()  # was logged

    def close(self) -> None:
        """Lets nobody join any more; all trials are stopped, with everything durable, when this returns."""
        with self._changed:
            self._closed = True
            for lease in list(self._leases.values()):
                self._end(lease)  # what went wrong is logged
            behind = self._note(lambda: None)  # also behind the stops of clients who left a moment ago
        behind.result()

    def _lease(self, name: str, token: str) -> _Lease:
        """The lease that a client has, renewed."""
        self._refuse_if_closed()
        lease = self._leases.get(name)
        if lease is None:
            raise LeaseRanOut(f"{name}: nothing was heard of its process for {self.packing.lease_seconds:g} s")
        if lease.token != token:
            raise LeaseLost(f"{name}: another process has it")
        lease.renewed = time.monotonic()
        return lease

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise LeaseLost("the engine was closed together with its study")

    def _acknowledge(self, lease: _Lease, told: int) -> None:
        news = lease.news
        if news is not None and not news.ended and news.values["step"] == told:
            lease.news = None
            self._note(partial(self._go_on, lease))

    def _prepare(self, lease: _Lease) -> None:
        """Everything slow about a trial's start, while the others go on; the rest is left to the engine's thread."""
        from dpsink.privacy.plan import derive_plan

        try:
            config = StudyFolder(self.folder).read_trial(lease.name).config
            data = self._load(config.data)
            derive_plan(config, len(data.train))
            start = partial(self._start, lease, config, data)
        except Exception as error:
            start = partial(self._fail, lease, error)
        with self._changed:
            lease.renewed = time.monotonic()
            self._note(start)

    def _load(self, config: "DataConfig") -> "ImageData":
        """The data, loaded once and shared."""
        from tune.trainable import load_same

        with self._loading, needed_of_node():
            if config not in self._data:
                self._data[config] = load_same(config, self.data_root, self.fingerprint)
            return self._data[config]

    def _end(self, lease: _Lease) -> Future[None]:
        """Takes a lease away, at once, and its trial out of the ensemble as soon as its step is over."""
        del self._leases[lease.name]
        return self._note(partial(self._stop, lease))

    def _note(self, task: Callable[[], None]) -> Future[None]:
        """Leaves the engine's thread something to do; the lock is held."""
        done: Future[None] = Future()
        self._notes.append((task, done))
        self._changed.notify_all()
        return done

    # The engine's thread.

    def _work(self) -> None:
        try:
            while not self._idle():
                self._take_notes()
                self._let_leases_run_out()
                if self._ensemble is not None and self._ensemble.busy:
                    self._tell(self._ensemble.advance())
        except Exception:
            log.exception("an engine ends; its trials go on in another, from their checkpoints")
        self._die()

    def _take_notes(self) -> None:
        """Does what is to be done; waits for it where there is nothing else."""
        with self._changed:
            if not (self._notes or (self._ensemble is not None and self._ensemble.busy)):
                self._changed.wait(min(POLL_SECONDS, self.packing.lease_seconds, self.packing.idle_seconds) / 2)
            notes = [self._notes.popleft() for _ in range(len(self._notes))]
        for task, done in notes:
            try:
                done.set_result(task())
            except Exception as error:
                log.exception("a trial was not stopped cleanly; what it had reserved stays charged")
                done.set_exception(error)

    def _let_leases_run_out(self) -> None:
        now = time.monotonic()
        with self._changed:
            for lease in list(self._leases.values()):
                if now - lease.renewed > self.packing.lease_seconds:
                    self._end(lease)

    def _idle(self) -> bool:
        now = time.monotonic()
        with self._changed:
            if self._leases or self._notes:
                self._used = now
        return now - self._used > self.packing.idle_seconds

    def _start(self, lease: _Lease, config: "TrialConfig", data: "ImageData") -> None:
        """Opens a trial's run folder; in this thread, because it may draw from torch's own generator."""
        from dpsink.config import Performance
        from dpsink.training import Ensemble, TrialRun

        if self._leases.get(lease.name) is not lease:
            return  # its client has left meanwhile
        try:
            with needed_of_node():
                self._ensemble = self._ensemble or Ensemble(
                    Performance(device=self.packing.device, threads=self.packing.threads, slots=self.packing.slots)
                )
            lease.run = TrialRun.open(config, data, StudyFolder(self.folder).run(lease.name))
        except Exception as error:
            return self._fail(lease, error)
        self._seated[lease.run] = lease
        missed = [report for report in lease.run.reports if report.step > lease.told]
        if missed and not lease.run.ended:  # an engine, or a driver, died between the checkpoint and the word about it
            self._tell([(lease.run, missed[-1])])
        else:
            self._go_on(lease)

    def _go_on(self, lease: _Lease) -> None:
        if self._ensemble is not None and lease.run in self._seated:
            self._ensemble.add(lease.run)

    def _stop(self, lease: _Lease) -> None:
        if lease.run is None or self._ensemble is None:
            return
        del self._seated[lease.run]
        with lease.run:
            self._ensemble.remove(lease.run)

    def _tell(self, told: "list[Told]") -> None:
        from tune.trainable import flat

        if any(isinstance(outcome, Exception) for _, outcome in told):
            self._check_device()
        with self._changed:
            for run, outcome in told:
                if isinstance(outcome, Exception):
                    self._fail(self._seated[run], outcome)
                else:
                    self._seated[run].news = News(flat(outcome), run.ended)
            if told:
                self._changed.notify_all()

    def _fail(self, lease: _Lease, error: Exception) -> None:
        log.error("a trial failed", exc_info=error)
        with self._changed:
            lease.news = News.of_error(error)
            self._changed.notify_all()

    def _check_device(self) -> None:
        """Raises if the GPU answers no more: after some errors all that follow fail, and only a new process helps."""
        if self.packing.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def _die(self) -> None:
        """Ends the actor; who is just about to join will find another."""
        ray.kill(ray.get_runtime_context().current_actor)
