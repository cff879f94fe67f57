"""The faults: a machine that is cut off and comes back, a raylet that is killed, a machine that is added."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.clusters.rehearsal.desk import Watch, add, say, wait_for
from experiments.clusters.rehearsal.hosts import Host, Lab
from experiments.clusters.rehearsal.ledger import Standing, Trials

PATIENCE = 120.0  # seconds; the machine may have other work
REPLACED = "is another process's by now"


@dataclass
class Fault:
    """What was done, what happened, and how the study stood before and after."""

    name: str
    before: Standing
    after: Standing | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # from the fault to each thing that happened
    facts: dict[str, Any] = field(default_factory=dict)


class Faults:
    """Makes faults, one after the other, and keeps their record."""

    def __init__(self, lab: Lab, head: Host, watch: Watch, trials: Trials) -> None:
        self.lab, self.head, self.watch, self.trials = lab, head, watch, trials
        self.done: list[Fault] = []
        self._entries: dict[str, str] = {}  # of all ledgers, before the fault
        self._started = 0.0
        self._orphan = ("", 0)  # a trial that lost its node, and how often it had been opened by then

    def cut(self, host: Host) -> None:
        """A machine hangs and loses its network in the middle of a trial, and comes back when another has the trial."""
        name = self._busy(host)
        attempt = self.trials.attempts(name)
        self._begin(f"{host.name} hangs and is cut from the network, training {name}", host, name)
        host.signal(signal.SIGSTOP)
        host.plug("down")
        fault = self.done[-1]
        self._when("noticed", lambda: host.name not in self.watch.alive)
        self._when("resumed elsewhere", lambda: self.trials.attempts(name) > attempt)
        held, saved = self.trials.objects(name, attempt), self.trials.saved(name)
        checkpoints: set[tuple[int, int] | None] = set()

        def refused() -> bool:
            checkpoints.add(self.trials.saved(name))
            return self._refused(host, name)

        host.signal(signal.SIGCONT)  # it goes on where it was, and can reach the storage, but not Ray
        self._when("refused by the ledger", refused)
        written = self.trials.objects(name, attempt) - held
        fault.facts["written by it afterwards"] = self.trials.steps_of(name, written)
        fault.facts["checkpoints by it afterwards"] = [
            one for one in checkpoints - {saved} if one and one[0] == attempt
        ]
        host.plug("up")
        self._end()

    def kill_raylet(self, host: Host) -> None:
        """A node's raylet is killed, and with it the trial's process."""
        name = self._busy(host, most=0.8)  # for want of another it may be one that goes on
        attempt = self.trials.attempts(name)
        self._orphan = (name, attempt)
        self._begin(f"the raylet of {host.name} is killed, training {name}", host, name)
        host.signal(signal.SIGKILL, "raylet/raylet ")
        self._when("noticed", lambda: host.name not in self.watch.alive)
        self._end()

    def replace(self, name: str, number: int, others: list[Host]) -> Host:
        """A new machine joins, as a person adds one: by the YAML's own commands, over ssh."""
        self._begin(f"{name} joins", None, None)
        host = self.lab.start(name, number)
        add(host.address, [other.address for other in (self.head, *others)])
        self._when("a node of the cluster", lambda: name in self.watch.alive)
        orphan, attempt = self._orphan
        self._when(f"{orphan} resumed", lambda: self.trials.attempts(orphan) > attempt)
        self._end()
        return host

    def _busy(self, host: Host, most: float = 0.5) -> str:
        """A trial that the host has, in the middle of a reservation that was made this instant.

        Args:
            most: part of the trial's budget that may be charged by then.
        """
        seen: dict[str, int] = {}

        def steps() -> str | None:
            name = self.trials.running_on(host.name)
            if name is None or self.trials.share(name) > most:
                return None
            charged = self.trials.charged(name)
            return name if charged > seen.setdefault(name, charged) else None

        return wait_for(f"a trial that steps on {host.name}", steps, PATIENCE)

    def _refused(self, host: Host, name: str) -> bool:
        logs = host.file("/tmp/ray").glob("session_2*/logs/worker-*.err")
        return any(f"{name} {REPLACED}" in path.read_text(errors="replace") for path in logs)

    def _begin(self, what: str, host: Host | None, name: str | None) -> None:
        say(what)
        self._entries = self.trials.entries()
        self.done.append(Fault(what, self.trials.standing()))
        self.done[-1].facts |= {"host": host.name, "trial": name} if host else {}
        self._started = time.monotonic()

    def _when(self, what: str, test: Callable[[], Any]) -> None:
        wait_for(what, test, PATIENCE)
        self.done[-1].seconds[what] = round(time.monotonic() - self._started, 1)
        say(f"  {what} after {self.done[-1].seconds[what]} s")

    def _end(self) -> None:
        self.done[-1].after = self.trials.standing()
        now = self.trials.entries()
        lost = sorted(place for place, content in self._entries.items() if now.get(place) != content)
        self.done[-1].facts["entries lost or changed"] = lost
