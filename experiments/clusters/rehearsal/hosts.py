"""Machines made of namespaces: each has its own address, processes, home, /tmp and /dev/shm, and an ssh server.

They, and the network between them, live in the namespaces of the process that makes them, and vanish with it.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOM = Path(__file__).with_name("room.sh")
PROJECT = Path(__file__).parents[3]
SHARED = Path("/mnt/shared")  # the one folder that all machines see
KEYS = Path("/run/keys")  # of ssh, made for this rehearsal
NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
NETWORK = "10.77.0"  # of no matter to anybody: it ends at the namespaces


def enter(name: str, keep: Sequence[str], command: Sequence[str]) -> list[str]:
    """The command line that runs a command in namespaces of its own; all that is in them ends with it."""
    return ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", str(ROOM), name, *keep, "--", *command]


def programs() -> list[str]:
    """The folders that every machine sees: Python, its packages, this project."""
    return sorted({os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, PROJECT)})


@dataclass
class Host:
    """A machine.

    Attributes:
        process: that holds it.
        init: its first process, an ssh server, as the maker's namespace numbers it.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]
    init: int

    def command(self, line: str) -> list[str]:
        """The command line that runs a line of a login shell there."""
        there = ["nsenter", "--target", str(self.init), "--net", "--mount", "--pid", "--uts", "--ipc"]
        return [
            *there,
            "env",
            "-i",
            f"HOME={Path.home()}",
            "bash",
            "--login",
            "-c",
            f"cd; test ! -f .bashrc || source .bashrc; {line}",
        ]

    def run(self, line: str) -> str:
        """What a line of shell prints there."""
        return subprocess.run(self.command(line), check=True, capture_output=True, text=True).stdout

    def processes(self, name: str = "") -> list[int]:
        """The processes there, as the maker numbers them: all but the first, or those whose command holds a name."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        return [pid for pid in _pids() if pid != self.init and _space(pid) == space and name in _line(pid)]

    def signal(self, number: signal.Signals, name: str = "") -> None:
        """Sends a signal to processes there."""
        for pid in self.processes(name):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def file(self, path: str) -> Path:
        """A path there, as the maker sees it."""
        return Path(f"/proc/{self.init}/root{path}")

    def plug(self, state: str) -> None:
        """Connects the machine's network cable (`up`), or pulls it (`down`)."""
        _ip("link", "set", f"to-{self.name}", state)


class Lab:
    """The network, and the desk at which a person sits: this process's own namespaces."""

    def __init__(self) -> None:
        SHARED.mkdir()
        _run("mount", "-t", "tmpfs", "tmpfs", str(SHARED))
        KEYS.mkdir()
        for key in ("machine", "person"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(KEYS / key))
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "wire", "type", "bridge")
        _ip("address", "add", f"{NETWORK}.1/24", "dev", "wire")
        _ip("link", "set", "wire", "up")

    def start(self, name: str, number: int) -> Host:
        """Starts a machine, and connects it."""
        server = ["/usr/sbin/sshd", "-D", "-f", "/dev/null"]
        for option in (
            f"HostKey={KEYS}/machine", f"AuthorizedKeysFile={KEYS}/person.pub", "StrictModes=no", "UsePAM=no",
            "PidFile=none", "PermitRootLogin=prohibit-password",
        ):  # fmt: skip
            server += ["-o", option]
        keep = [*programs(), str(KEYS), f"+{SHARED}"]
        process = subprocess.Popen(enter(name, keep, server), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        host = Host(name, f"{NETWORK}.{number}", process, _child(process))
        inside = ("nsenter", "--target", str(host.init), "--net", "ip")
        _ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.init))
        _ip("link", "set", f"to-{name}", "master", "wire", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "route", "add", "default", "via", f"{NETWORK}.1")  # Ray finds its own address by it
        return host


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process that `unshare` has started, once it is the ssh server."""
    while True:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and "sshd" in _line(int(children[0])).split(" ")[0]:
            return int(children[0])
        if process.poll() is not None:
            raise RuntimeError(f"a machine did not start: {shlex.join(map(str, process.args))}")  # type: ignore[arg-type]
        time.sleep(0.05)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
