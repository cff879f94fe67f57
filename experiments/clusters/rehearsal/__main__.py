"""Rehearses a cluster on one machine: `python -m experiments.clusters.rehearsal`, as root.

Three hosts in namespaces, each with its own address, ssh server, home, /tmp and /dev/shm, and one shared folder; the
committed on-prem YAML through the real `ray up`; `dpsink-tune check`; a study through `ray job submit`, during which
one worker is cut off and comes back, the raylet of another is killed, and a new one joins; a stranger on the network
knocks at all ports; `ray down`. Other scenes have no faults: throughput on 1, 2 and 3 workers (`--scene scaling`), and
a cluster that grows from none and back (`--scene growing`).

Nothing outside of the namespaces is touched but the folder of the results, and Debian's packages where some are
missing.
All of it ends with this process, however that ends.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments.clusters.rehearsal import growing, report
from experiments.clusters.rehearsal.desk import (
    BIN,
    DASHBOARD,
    ENVIRONMENT,
    HOME,
    LOG,
    STUDY,
    YAML,
    Failed,
    Watch,
    do,
    make_token,
    say,
    wait_for,
    write_yaml,
)  # fmt: skip
from experiments.clusters.rehearsal.faults import PATIENCE, Faults
from experiments.clusters.rehearsal.hosts import SHARED, Host, Lab, enter, programs
from experiments.clusters.rehearsal.ledger import Trials, as_json, mlflow_runs
from experiments.clusters.rehearsal.ports import who_reaches

PROGRAMS = {
    "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2", "curl": "curl",
    "nft": "nftables",
}  # fmt: skip
STUDY_SECONDS = 300.0


def main() -> None:
    """Enters the namespaces of the desk, and works there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rehearsal"), help="folder of the results")
    parser.add_argument("--scene", choices=SCENES, default="rehearsal", help="what is played: %(choices)s")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        sys.exit(rehearse(options.out, options.scene))
    if os.geteuid() != 0:
        sys.exit("error: namespaces with a network of their own need root; run it with sudo")
    install()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, "-m", "experiments.clusters.rehearsal", "--inside", "--out", str(out)]
    again += ["--scene", options.scene]
    command = enter("desk", [*programs(), f"+{out}"], again)
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(HOME / ".cache")}
    os.execvpe(command[0], command, environment)


def install() -> None:
    """Installs what is missing from Debian's packages; no server of theirs is started."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    if missing:
        say(f"installing {', '.join(missing)}")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "SYSTEMD_OFFLINE": "1", "RUNLEVEL": "1"}
        for words in (["update"], ["-y", "install", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", "-qq", *words], check=True, env=quiet, stdout=subprocess.DEVNULL)


def rehearse(out: Path, name: str) -> int:
    """A scene from its beginning to its end; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hosts: list[Host] = []
    started = time.monotonic()
    try:
        document = SCENES[name](hosts)
    except (Failed, KeyboardInterrupt) as problem:
        say(f"failed: {str(problem) or 'stopped'}")
        keep_logs(hosts, out)
        return 1
    document["seconds"] = round(time.monotonic() - started)
    report.write(out, name, document)
    print(document["table"])
    say(f"done in {document['seconds']} s: {out}/{name}.json, {out}/{name}.md")
    for problem in document["problems"]:
        say(f"problem: {problem}")
    if document["problems"]:
        keep_logs(hosts, out)
    return int(bool(document["problems"]))


def play(hosts: list[Host]) -> dict[str, Any]:
    """From nothing to a finished study and no cluster."""
    lab = Lab()
    head, *workers = [lab.start(name, 10 + n) for n, name in enumerate(("head", "worker-1", "worker-2"))]
    hosts += [head, *workers]
    with ExitStack() as stack:
        say("ray up")
        watch = launch(head, workers)
        stack.callback(watch.close)
        say("dpsink-tune check")
        checked = do("ray", "exec", str(YAML), f"dpsink-tune check {STUDY} --address auto")
        say("ray job submit")
        job = submit(stack)
        trials = Trials(SHARED / "studies" / "rehearsal")
        faults = Faults(lab, head, watch, trials)
        say("a stranger on the network knocks at every port")
        stranger = lab.start("stranger", 99)
        wait_for("a trial", lambda: trials.running_on(workers[0].name), PATIENCE)
        reached = [who_reaches(head, workers[0], stranger), who_reaches(workers[0], head, stranger)]
        faults.cut(workers[0])
        faults.kill_raylet(workers[1])
        hosts.append(faults.replace("worker-3", 13, workers))
        say("waiting for the study's end")
        wait_for("the study's end", lambda: job.poll() is not None, STUDY_SECONDS)
    end, problems = trials.standing(), trials.problems()
    if job.returncode:
        problems.append(f"the job's exit code is {job.returncode}")
    runs = mlflow_runs(SHARED / "mlflow.db")
    if runs != {"FINISHED": len(trials.names()) + 1}:
        problems.append(f"MLflow has other runs than one of each trial and one of the study: {runs}")
    say("ray down")
    down = time.monotonic()
    do("ray", "down", "-y", str(YAML))
    wait_for("the last Ray process's end", lambda: not any(map(ray_processes, hosts)), 90)
    down = round(time.monotonic() - down, 1)
    wait_for("MLflow's end", lambda: not head.processes("mlflow"), 30)
    return {
        "check": [line.strip() for line in checked.splitlines() if line.startswith(("ok ", "problem "))],
        "faults": [report.plain(fault) for fault in faults.done],
        "ports": reached,
        "end": as_json(end),
        "trials": trials.document(),
        "mlflow": runs,
        "seconds of ray down": down,  # to the end of the last process: workers miss the head, and end by themselves
        "problems": problems,
        "table": report.table(faults.done, end),
    }


def scale(hosts: list[Host]) -> dict[str, Any]:
    """How a study's throughput grows with the workers."""
    lab = Lab()
    head, *workers = [lab.start(f"worker-{n}" if n else "head", 10 + n) for n in range(4)]
    hosts += [head, *workers]
    watch = launch(head, workers)
    say("throughput on 1, 2 and 3 workers")
    printed = head.run(f"python -m experiments.clusters.rehearsal.scaling {SHARED}")
    watch.close()
    rows = [json.loads(line.removeprefix("scaling ")) for line in printed.splitlines() if line.startswith("scaling ")]
    return {"rows": rows, "problems": [], "table": report.rows(rows)}


def grow_and_shrink(hosts: list[Host]) -> dict[str, Any]:
    """Workers that come with a study and go after it."""
    Lab()
    rounds = growing.grow()
    problems = [problem for one in rounds for problem in one["problems"]]
    return {"rounds": rounds, "problems": problems, "table": report.rows(rounds, leave_out=("trials", "problems"))}


SCENES: dict[str, Callable[[list[Host]], dict[str, Any]]] = {
    "rehearsal": play, "scaling": scale, "growing": grow_and_shrink,
}  # fmt: skip


def ray_processes(host: Host) -> list[int]:
    """Those that make a machine a node."""
    return [*host.processes("raylet/raylet "), *host.processes("gcs/gcs_server ")]


def launch(head: Host, workers: list[Host]) -> Watch:
    """Brings the cluster up; returns when all of its nodes are there."""
    key = HOME / ".config/dpsink/fingerprint.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(os.urandom(32))  # as a `--dry-run` at the desk leaves it
    make_token()
    write_yaml(head.address, [worker.address for worker in workers])
    do("ray", "up", "-y", "--no-config-cache", str(YAML))
    watch = Watch(head)
    wait_for("all nodes", lambda: len(watch.alive) == 1 + len(workers), 120)
    return watch


def submit(stack: ExitStack) -> subprocess.Popen[Any]:
    """Submits the study through a tunnel to the dashboard."""
    log = stack.enter_context(LOG.open("ab"))
    quiet: dict[str, Any] = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    tunnel = subprocess.Popen([BIN / "ray", "dashboard", YAML], **quiet)
    stack.callback(tunnel.kill)
    wait_for("the dashboard", dashboard_answers, 60)
    line = ["dpsink-tune", "sweep", str(STUDY), "--address", "auto"]
    job = [BIN / "ray", "job", "submit", "--address", DASHBOARD, "--", *line]
    return subprocess.Popen(job, **quiet)


def dashboard_answers() -> bool:
    """Whether the tunnel stands: an answer of any kind."""
    done = subprocess.run(["curl", "--silent", "--output", "/dev/null", "--max-time", "2", DASHBOARD], check=False)
    return done.returncode == 0


def keep_logs(hosts: list[Host], out: Path) -> None:
    """Copies what a person needs to find out why: the commands' output, and Ray's logs of all machines."""
    shutil.rmtree(out / "logs", ignore_errors=True)
    (out / "logs").mkdir()
    if LOG.exists():
        shutil.copy(LOG, out / "logs")
    machines = {"desk": Path("/tmp/ray")} | {host.name: host.file("/tmp/ray") for host in hosts}
    for name, folder in machines.items():
        for place in folder.glob("session_2*/logs"):
            shutil.copytree(place, out / "logs" / name, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    if SHARED.exists():
        shutil.copytree(SHARED, out / "logs" / "shared", dirs_exist_ok=True)
    say(f"the logs are in {out}/logs")


if __name__ == "__main__":
    main()
