"""What has to hold before a study starts: one list of checks. `sweep` makes the quick ones, `check` all of them."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpsink.config import TrialConfig
from dpsink.data import default_root
from dpsink.errors import InputError
from tune.folder import StudyFolder
from tune.footprint import Footprint, Sketch, footprint
from tune.nodes import Node, ask_nodes, versions
from tune.preflight import StudyPlan, check_storage, check_study
from tune.room import LEAST, NoRoom, free_bytes, free_memory, require_room
from tune.schema import shown_uri
from tune.space import active
from tune.study import Study
from tune.tracking import check_tracking, tracking_uri

TRIAL_BYTES = 2**20  # of a trial beside its checkpoint: reservations, records, Ray's files
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Check:
    """One thing that has to hold; `run` says what it found, or raises InputError or NoRoom."""

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    name: str
    ok: bool
    text: str


def look(checks: Iterable[Check]) -> Iterator[Finding]:
    """Makes checks one by one; a problem does not end the others."""
    for check in checks:
        try:
            yield Finding(check.name, True, check.run())
        except (InputError, NoRoom) as problem:
            yield Finding(check.name, False, str(problem))


class Preflight:
    """The checks of a study. No private record is used.

    Args:
        grows: whether there may be more nodes later than there are now.
    """

    def __init__(self, study: Study, data_root: Path | None, *, grows: bool = False) -> None:
        self.grows = grows
        self.study, self.data_root = study, (data_root or default_root()).absolute()
        self.folder = StudyFolder(study.storage.absolute() / study.name)
        self._footprint: Footprint | None = None  # of a trial, once it was measured

    @cached_property
    def plan(self) -> StudyPlan:
        """What the study will do; raises InputError where that cannot be."""
        return check_study(self.study, self.data_root)

    def quick(self) -> tuple[Check, ...]:
        """Those that a sweep begins with: nothing is written, nothing is started."""
        return (
            Check("settings", self._settings),
            Check("storage", self._storage),
            Check("tracking", self._tracking),
        )

    def thorough(self) -> tuple[Check, ...]:
        """Those that take a while; they need a running Ray."""
        return (
            Check("nodes", self._nodes),
            Check("GPUs", self._gpus),
            Check("packages", self._packages),
            Check("data", self._data),
            Check("shared storage", self._shared),
            Check("memory", self._memory),
            Check("disk", self._disk),
        )

    def _settings(self) -> str:
        if not self.folder.exists:
            self.plan.terms.worst_case()
        return f"{self.plan.data.name}, N = {len(self.plan.data.train):,}; the budget affords every trial"

    def _storage(self) -> str:
        check_storage(self.folder.path)
        require_room(self.folder.path)
        return f"{self.folder.path} can be written"

    def _tracking(self) -> str:
        uri = self.folder.read_study().tracking_uri if self.folder.exists else tracking_uri(self.study)
        check_tracking(uri)
        return f"{shown_uri(uri)} answers"

    def _disk(self) -> str:
        if self._footprint is None:
            raise InputError("what a trial writes is not known while it cannot be measured; see memory")
        trials = self.study.trials
        need = LEAST + trials * (TRIAL_BYTES + self._footprint.files)
        free = free_bytes(self.folder.path)
        if need > free:
            raise InputError(
                f"the disk of {self.folder.path} has {free / GIB:.1f} GiB left, and {trials} trials may need "
                f"{need / GIB:.1f}; make room, or set another storage"
            )
        return f"{free / GIB:.1f} GiB are free, {trials} trials need at most {need / GIB:.2g}"

    def _nodes(self) -> str:
        resources, fitting = self.study.resources, sum(self._at_once(node) for node in self._cluster)
        wanted = resources.concurrency
        if not fitting and not (self.grows and wanted):
            there = ", ".join(f"{node.name}: {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in self._cluster)
            raise InputError(
                f"resources.cpu={resources.cpu:g} and resources.gpu={resources.gpu:g} fit on no node ({there}); "
                "lower them, or on a cluster that grows set resources.concurrency to what it may grow to"
            )
        if wanted > fitting and not self.grows:
            raise InputError(f"resources.concurrency={wanted} must be at most {fitting}, what fits at a time; lower it")
        idle = [node.name for node in self._cluster if not self._at_once(node)]
        without = f"; none on {', '.join(idle)}" if idle else ""
        return f"{len(self._cluster)} with room for {fitting} trials at a time{without}"

    def _gpus(self) -> str:
        if not self.study.resources.gpu:
            return "not asked for"
        for node in self._cluster:
            if node.cuda < node.gpus:
                raise InputError(
                    f"{node.name} is said to have {node.gpus:g} GPUs, and PyTorch sees {node.cuda} there; install "
                    "NVIDIA's driver, and let containers see it"
                )
        return ", ".join(f"{node.cuda} on {node.name}" for node in self._cluster)

    def _packages(self) -> str:
        ours = versions()
        for node in self._cluster:
            for name, version in ours.items():
                if node.versions[name] != version:
                    raise InputError(
                        f"{name} is {node.versions[name]} on {node.name}, here {version}; make them the same"
                    )
        return ", ".join(f"{name} {ours[name]}" for name in ("python", "torch", "ray", "dpsink")) + " everywhere"

    def _data(self) -> str:
        for node in self._cluster:
            if node.problem:
                raise InputError(f"on {node.name}: {node.problem}")
            if node.fingerprint != self.plan.data.fingerprint:
                raise InputError(
                    f"the data on {node.name} are not those here; copy them, and of private data the key of their "
                    "fingerprint too, to every node"
                )
        return "the same on every node"

    def _shared(self) -> str:
        blind = [node.name for node in self._cluster if self._token not in node.tokens]
        if blind:
            raise InputError(
                f"storage {self.study.storage.absolute()} is not seen by {', '.join(blind)}; "
                "set a folder that all nodes share"
            )
        return f"every node sees {self.study.storage.absolute()}"

    def _memory(self) -> str:
        self._footprint = footprint(self._sketch)
        need = self._footprint.memory
        for node in self._cluster:
            at_once = self._at_once(node)
            if need * at_once > node.free_memory:
                fit = node.free_memory // need
                raise InputError(
                    f"{at_once} trials at a time need {need * at_once / GIB:.1f} GiB on {node.name}, which has "
                    f"{node.free_memory / GIB:.1f}; set resources.concurrency to {fit} a node, or make trials smaller"
                )
        return f"a trial takes up to {need / MIB:,.0f} MiB while it trains"

    def _at_once(self, node: Node) -> int:
        """Trials that a node may get at a time."""
        fitting = self.study.resources.fit_in(node.cpus, node.gpus)
        return min(fitting, self.study.resources.concurrency or fitting)

    @property
    def _sketch(self) -> Sketch:
        data = self.plan.data
        others = len(data.test) + (len(data.validation) if data.validation else 0)
        return Sketch(
            config=self._largest, shape=data.train.shape, num_classes=data.train.num_classes,
            records=len(data.train), others=others, limit=int(0.8 * free_memory()),
        )  # fmt: skip

    @cached_property
    def _largest(self) -> TrialConfig:
        """A trial that is large in every direction of the space."""
        largest = {path: max(space.extremes, key=_size) for path, space in self.study.space.items()}
        return self.study.configure(self._largest_listed or active(self.study.space, largest))

    @property
    def _largest_listed(self) -> dict[str, Any]:
        listed = self.study.algorithm.configurations
        return max(listed, key=lambda one: sum(map(_size, one.values())), default={})

    @cached_property
    def _cluster(self) -> list[Node]:
        """All nodes, asked while a token lies in the storage."""
        storage = self.study.storage.absolute()
        storage.mkdir(parents=True, exist_ok=True)
        token = storage / self._token
        token.touch()
        try:
            return ask_nodes(self._largest.data, self.data_root, storage)
        finally:
            token.unlink()

    @cached_property
    def _token(self) -> str:
        return f".token-{secrets.token_hex(8)}"


def _size(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
