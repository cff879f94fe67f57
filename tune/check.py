"""What has to hold before a study starts: one list of checks. `sweep` makes the quick ones, `check` all of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dpsink.config import TrialConfig
from dpsink.data import default_root
from dpsink.errors import InputError
from tune.folder import StudyFolder
from tune.footprint import Footprint, Sketch, footprint, gpu_need, host_need
from tune.largest import largest
from tune.nodes import Node, ask_nodes, cluster
from tune.preflight import StudyPlan, check_storage, check_study
from tune.room import LEAST, Blocked, free_bytes, free_memory, require_room
from tune.schema import shown_uri
from tune.shared import meeting_place
from tune.study import Study
from tune.tracking import check_tracking, tracking_uri
from tune.versions import differences, versions

TRIAL_BYTES = 2**20  # of a trial beside its checkpoint: reservations, records, Ray's files
DRAWN = 0.99  # part of the cases in which a selection draws no more trials than its files are given room for
NAMED = 8  # nodes at most in a line
LATER = "nodes that join later are not seen here: one that is unfit stops the study before a step of a trial on it"
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Check:
    """One thing that has to hold; `run` says what it found, or raises InputError or Blocked.

    Attributes:
        needs: names of checks without which this one could find nothing.
    """

    name: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found; of one that was not made, why not."""

    name: str
    ok: bool
    text: str
    made: bool = True

    @property
    def mark(self) -> str:
        """For people, at the beginning of a line."""
        return "ok" if self.ok else "problem" if self.made else "skipped"


def look(checks: Iterable[Check]) -> Iterator[Finding]:
    """Makes checks one by one; a problem ends those alone that need what it is about."""
    failed: set[str] = set()
    for check in checks:
        found = _make(check, failed)
        if not found.ok:
            failed.add(found.name)
        yield found


def _make(check: Check, failed: set[str]) -> Finding:
    if wanting := [name for name in check.needs if name in failed]:
        return Finding(check.name, False, f"cannot be looked at before {' and '.join(wanting)}", made=False)
    try:
        return Finding(check.name, True, check.run())
    except (InputError, Blocked) as problem:
        return Finding(check.name, False, str(problem))


class Preflight:
    """The checks of a study, to be closed after the thorough ones. No private record is used.

    Args:
        address: of the Ray cluster, on which there may be more nodes later than there are now; None: this machine.
    """

    def __init__(self, study: Study, data_root: Path | None, *, address: str | None = None) -> None:
        self.study, self.address = study, address
        self.data_root = (data_root or default_root()).absolute()
        self.folder = StudyFolder(study.storage.absolute() / study.name)
        self.storage = study.storage.absolute()
        self._joined = ExitStack()
        self._cluster: list[Node] = []  # as its nodes have told
        self._footprint: Footprint | None = None  # once it was measured

    def close(self) -> None:
        """Leaves the cluster."""
        self._joined.close()

    def quick(self) -> tuple[Check, ...]:
        """Those that a sweep begins with: nothing is written, nothing is started."""
        return (
            Check("settings", self._settings),
            Check("storage", self._storage),
            Check("tracking", self._tracking),
        )

    def thorough(self) -> tuple[Check, ...]:
        """Those that take a while, in a running Ray."""
        return (
            Check("nodes", self._nodes, needs=("storage",)),
            Check("room", self._room, needs=("nodes",)),
            Check("GPUs", self._gpus, needs=("nodes",)),
            Check("packages", self._packages, needs=("nodes",)),
            Check("data", self._data, needs=("settings", "nodes")),
            Check("shared storage", self._shared, needs=("nodes",)),
            Check("size", self._size, needs=("settings",)),
            Check("memory", self._memory, needs=("size", "nodes")),
            Check("GPU memory", self._gpu_memory, needs=("size", "GPUs")),
            Check("disk", self._disk, needs=("size", "storage")),
        )

    @cached_property
    def plan(self) -> StudyPlan:
        """What the study will do; raises InputError where that cannot be."""
        return check_study(self.study, self.data_root)

    def _settings(self) -> str:
        if not self.folder.exists:
            self.plan.terms.worst_case()
        skipped, corners = self.plan.without_a_step, self.plan.without_a_step + len(self.plan.searched)
        where = f"{skipped} of {corners} corners of the space afford no step: proposals there are skipped"
        afforded = where if skipped else "the budget affords every trial"
        return f"{self.plan.data.name}, N = {len(self.plan.data.train):,}; {afforded}"

    def _storage(self) -> str:
        check_storage(self.folder.path)
        require_room(self.folder.path)
        return f"{self.folder.path} can be written"

    def _tracking(self) -> str:
        uri = self.folder.read_study().tracking_uri if self.folder.exists else tracking_uri(self.study)
        check_tracking(uri)
        return f"{shown_uri(uri)} answers"

    def _nodes(self) -> str:
        self._joined.enter_context(cluster(self.address))
        with meeting_place(self.storage) as place:
            self._cluster = ask_nodes(self._trials[0].data, self.data_root, place)
        return f"{len(self._cluster)} answer: {_listed(node.name for node in self._cluster)}"

    def _room(self) -> str:
        resources, fitting = self.study.resources, sum(self._at_once(node) for node in self._cluster)
        wanted, grows = resources.concurrency, self.address is not None
        if not fitting and not (grows and wanted):
            there = ", ".join(f"{node.name}: {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in self._cluster)
            raise InputError(
                f"resources.cpu={resources.cpu:g} and resources.gpu={resources.gpu:g} fit on no node ({there}); "
                "lower them, or on a cluster that grows set resources.concurrency to what it may grow to"
            )
        if wanted > fitting and not grows:
            raise InputError(f"resources.concurrency={wanted} must be at most {fitting}, what fits at a time; lower it")
        idle = [node.name for node in self._cluster if not self._at_once(node)]
        without = f"; none on {_listed(idle)}" if idle else ""
        if wanted > fitting:
            return f"for {fitting} of {wanted} trials at a time{without}; {LATER}"
        return f"for {fitting} trials at a time{without}"

    def _gpus(self) -> str:
        if not self.study.resources.gpu:
            return "not asked for"
        blind = [node for node in self._cluster if node.cuda < node.gpus]
        if blind:
            told = [f"{node.name} is said to have {node.gpus:g} GPUs, and PyTorch sees {node.cuda}" for node in blind]
            raise InputError(f"{'; '.join(told)} there; install NVIDIA's driver, and let containers see it")
        return _listed(f"{node.cuda} on {node.name}" for node in self._cluster if node.gpus) or f"none yet; {LATER}"

    def _packages(self) -> str:
        ours = versions()
        other = [(node.name, one) for node in self._cluster for one in differences(node.versions, ours)]
        _refuse(other, "make them the same")
        return ", ".join(f"{name} {ours[name]}" for name in ("python", "torch", "ray", "dpsink")) + " on every node"

    def _data(self) -> str:
        known = self.plan.data.fingerprint
        other = [(one.name, one.problem or "other data than here") for one in self._cluster if one.fingerprint != known]
        _refuse(other, "every node needs the data as they are here, and of private data the key of their fingerprint")
        return "the same on every node"

    def _shared(self) -> str:
        _refuse(
            [(node.name, f"{node.storage} in {self.storage}") for node in self._cluster if node.storage],
            "all nodes need one folder, of one user, on a file system with hard links and locks",
        )
        return f"every node reads, writes, links, renames and locks in {self.storage}"

    def _size(self) -> str:
        self._footprint = taken = footprint(self._sketch)
        process = "a trial" if self._sketch.slots == 1 else f"an engine of {self._sketch.slots} trials"
        return f"{process} takes up to {taken.memory / MIB:,.0f} MiB, and writes {taken.files / MIB:.2g} MiB a trial"

    def _memory(self) -> str:
        for node in self._cluster:
            self._require_memory(self._measured, node)
        return "enough on every node for its trials at a time"

    def _require_memory(self, taken: Footprint, node: Node) -> None:
        resources, at_once = self.study.resources, self._at_once(node)
        fitting = [count for count in range(at_once + 1) if host_need(taken, resources, count) <= node.free_memory]
        if at_once not in fitting:
            need = host_need(taken, resources, at_once) / GIB
            lower = f"set resources.concurrency to {fitting[-1]} a node, or " if fitting[-1] else ""
            raise InputError(
                f"{at_once} trials at a time need {need:.1f} GiB on {node.name}, which has "
                f"{node.free_memory / GIB:.1f}; {lower}make trials smaller"
            )

    def _gpu_memory(self) -> str:
        resources = self.study.resources
        if not resources.gpu:
            return "not asked for"
        need = gpu_need(self._measured, resources)
        small = [node for node in self._cluster if need > min(node.gpu_memory, default=math.inf)]
        if small:
            there = ", ".join(f"{min(node.gpu_memory) / GIB:.1f} on {node.name}" for node in small)
            raise InputError(
                f"the trials on a GPU need about {need / GIB:.1f} GiB of its memory, and one has {there}; raise "
                "resources.gpu, or make trials smaller"
            )
        silent = [node.name for node in self._cluster if node.gpus and not node.gpu_memory]
        unknown = f"; what is free, nvidia-smi does not tell on {_listed(silent)}" if silent else ""
        return f"the trials on a GPU need about {need / GIB:.1f} GiB{unknown}"

    def _disk(self) -> str:
        trials, free = self._kept, free_bytes(self.folder.path)
        need = LEAST + trials * (TRIAL_BYTES + self._measured.files)
        if need > free:
            raise InputError(
                f"the disk of {self.folder.path} has {free / GIB:.1f} GiB left, and {trials:,} trials may need "
                f"{need / GIB:.1f}; make room, or set another storage"
            )
        return f"{free / GIB:.1f} GiB are free, {trials:,} trials need at most {need / GIB:.2g} GiB"

    def _at_once(self, node: Node) -> int:
        """Trials that a node may get at a time."""
        fitting = self.study.resources.fit_in(node.cpus, node.gpus)
        return min(fitting, self.study.resources.concurrency or fitting)

    @property
    def _kept(self) -> int:
        """Trials whose files lie in the storage at a time. A selection, which keeps them all to its end, draws no more
        in most cases; how many it has drawn is not looked at."""
        drawn = self.study.ledger.drawn
        return drawn.quantile(DRAWN) if drawn else self.study.trials

    @property
    def _measured(self) -> Footprint:
        assert self._footprint is not None  # else what needs it is not looked at
        return self._footprint

    @property
    def _sketch(self) -> Sketch:
        data, resources = self.plan.data, self.study.resources
        slots = min(resources.sharing, resources.concurrency or resources.sharing)
        return Sketch(
            configs=tuple(self._trials), slots=slots, padded=bool(resources.gpu), shape=data.train.shape,
            num_classes=data.train.num_classes, records=len(data.train),
            validation=len(data.validation or ()), test=len(data.test), limit=int(0.8 * free_memory()),
        )  # fmt: skip

    @cached_property
    def _trials(self) -> Sequence[TrialConfig]:
        return largest(self.study)


def _refuse(found: Iterable[tuple[str, str]], advice: str) -> None:
    """Raises InputError with everything that was found, each thing with the names of the nodes that it is about."""
    nodes: dict[str, list[str]] = {}
    for node, what in found:
        nodes.setdefault(what, []).append(node)
    if nodes:
        told = "; ".join(f"{_listed(names)}: {what}" for what, names in nodes.items())
        raise InputError(f"{told}; {advice}")


def _listed(names: Iterable[str]) -> str:
    """Names in a line; of many the first."""
    given = list(names)
    more = f" and {len(given) - NAMED} more" if len(given) > NAMED else ""
    return ", ".join(given[:NAMED]) + more
