"""What a person does at the desk: writes the cluster's YAML, brings it up, submits a study, takes it down."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from experiments.clusters.rehearsal.hosts import KEYS, PROJECT, SHARED, Host

BIN = Path(os.path.realpath(sys.prefix)) / "bin"
HOME = Path.home()
YAML = HOME / "onprem.yaml"
STUDY = Path(__file__).with_name("study.yaml")
DASHBOARD = "http://127.0.0.1:8265"
LOG = HOME / "log"
SSH = ("ssh", "-i", str(KEYS / "person"), "-o", "StrictHostKeyChecking=no")
SMALL = "--object-store-memory=100000000 --disable-usage-stats"
# A machine that does not answer counts as lost after a few seconds; by default it is after half a minute.
QUICK = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
ENVIRONMENT = {
    "HOME": str(HOME),
    "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": str(PROJECT),
    "RAY_AUTH_MODE": "token",
    "RAY_UP_enable_autoscaler_v2": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "TERM": "dumb",
}


class Failed(Exception):
    """The rehearsal cannot go on."""


def wait_for(what: str, test: Callable[[], Any], patience: float) -> Any:
    """The test's answer as soon as there is one.

    Raises:
        Failed: not within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if answer := test():
            return answer
        time.sleep(0.1)
    raise Failed(f"waited {patience:.0f} s for {what}")


def say(text: str) -> None:
    """One line of the log."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def write_yaml(head: str, workers: list[str]) -> None:
    """The on-prem YAML as it is committed, with these machines in it, and what is theirs alone.

    The package is not installed from a wheel but seen where it is, by root, who needs no sudo; each worker has one CPU,
    and the head none; lost nodes are noticed soon.
    """
    text = (PROJECT / "experiments/clusters/onprem.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("/shared", str(SHARED)).replace("ray start ", f"ray start {SMALL} "))
    _add_cpus(config, "head_start_ray_commands", 0)  # two cores are all there is
    _add_cpus(config, "worker_start_ray_commands", 1)
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(KEYS / "person")}
    mine = {"experiments/clusters/onprem.yaml": str(YAML)}
    config["file_mounts"] = {
        there: mine.get(here, str(PROJECT / here) if here.startswith("experiments") else here)
        for there, here in config["file_mounts"].items()
        if ".whl" not in there
    }
    ours = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    ours["RAY_gcs_rpc_server_reconnect_timeout_s"] = "20"  # that a node goes on without its head; by default 60
    ours |= {f"RAY_health_check_{name}": str(value) for name, value in QUICK.items()}
    exports = " ".join(f"{name}={value}" for name, value in ours.items())
    seen = [f"ln -sfn {BIN.parent} ~/dpsink", f"grep -q PYTHONPATH ~/.bashrc || echo 'export {exports}' >> ~/.bashrc"]
    installed = ("venv", "pip install", "apt-get")
    config["setup_commands"] = seen + [
        line for line in config["setup_commands"] if not any(w in line for w in installed)
    ]
    for place in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        config[place] = [line.replace("sudo ", "") for line in config[place]]
    YAML.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _add_cpus(config: dict[str, Any], place: str, cpus: int) -> None:
    config[place] = [line.replace("ray start ", f"ray start --num-cpus={cpus} ") for line in config[place]]


def make_token() -> None:
    """Makes Ray's token, as docs/cluster.md does: Ray leaves it readable by all."""
    do("ray", "get-auth-token", "--generate")
    (HOME / ".ray/auth_token").chmod(0o600)


def do(*words: str, patience: float = 180) -> str:
    """Runs a command; what it printed.

    Raises:
        Failed: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            words, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=patience,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{' '.join(words)}: took more than {patience:.0f} s:\n{late.stdout}") from None
    with LOG.open("a", encoding="utf-8") as log:
        print("$", *words, "\n" + done.stdout, file=log)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def add(address: str, members: list[str]) -> None:
    """Makes a machine a worker of a running cluster, as docs/cluster.md tells a person: it is written into the YAML,
    let in by all others, and goes through `ray up`'s files, setup and start."""
    head, *workers = members
    write_yaml(head, [*workers, address])
    config = yaml.safe_load(YAML.read_text(encoding="utf-8"))
    [admit] = [line for line in config["worker_start_ray_commands"] if "firewall.py" in line]
    for member in members:
        _copy(YAML, member, "members/cluster.yaml")
        _at(member, admit)
    for there, here in config["file_mounts"].items():
        _copy(Path(here).expanduser(), address, there.replace("~/", ""))
    for line in (*config["setup_commands"], *config["worker_start_ray_commands"]):
        _at(address, f"export RAY_HEAD_IP={head}; {line}")


def _copy(path: Path, address: str, place: str) -> None:
    _at(address, f"mkdir -p {os.path.dirname(place)}")
    do("rsync", "--rsh", " ".join(SSH), str(path), f"root@{address}:{place}")


def _at(address: str, line: str) -> None:
    do(*SSH, f"root@{address}", f"test ! -f .bashrc || source .bashrc; {line}")


class Watch:
    """The names of the living nodes, as the head sees them, kept up to date."""

    def __init__(self, head: Host) -> None:
        self.alive: list[str] = []
        self._process = subprocess.Popen(
            head.command(f"exec python {Path(__file__).with_name('watch.py')}"), stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("["):  # a word of Ray's own
                continue
            self.alive = json.loads(line)
            say(f"nodes: {', '.join(self.alive)}")

    def close(self) -> None:
        """Looks no longer."""
        self._process.kill()
