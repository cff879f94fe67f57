"""A cluster that grows from no worker and back: Ray's own autoscaler, with its stand-in for a cloud.

It makes nodes of this machine's processes, as it would make machines; they end with the namespaces that this runs in.
"""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import ray
import yaml

from experiments.clusters.rehearsal.desk import BIN, ENVIRONMENT, LOG, STUDY, Failed, do, make_token, say, wait_for
from experiments.clusters.rehearsal.hosts import SHARED
from experiments.clusters.rehearsal.ledger import Trials

WORKERS, IDLE_SECONDS, PATIENCE = 2, 10.0, 120.0
# What the stand-in calls the head.
HEAD, HEAD_KIND = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000", "ray.head.default"
# Studies, one after the other, and what each searches, besides the control: two at a time are left even if the second
# worker comes when the control has ended.
ROUNDS = (("first", 2), ("again", 2))
STEPS = 120  # of a trial: a few seconds, beside the ten and more that its process takes to start
STAND_IN = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HERE = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",  # as `ray up` has it on clouds
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
}
CLUSTER: dict[str, Any] = {
    "cluster_name": "growing",
    "max_workers": WORKERS,
    "idle_timeout_minutes": IDLE_SECONDS / 60,
    "provider": {
        "type": "external", "module": STAND_IN, "launch_multiple": True, "head_node_id": HEAD,
        # Its nodes have one address, and Ray already.
        "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
    },
    "available_node_types": {
        HEAD_KIND: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": WORKERS},
    },
    "head_node_type": HEAD_KIND,
    "upscaling_speed": 1.0,
    "file_mounts": {},
}  # fmt: skip
NOTHING = (  # is to be copied or called on a node that is a few processes; a cloud's defaults would stand here
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


def grow() -> list[dict[str, Any]]:
    """Two studies on a head without CPUs: each makes workers come, and they go when it has ended."""
    ENVIRONMENT.update(HERE)
    os.environ.update(ENVIRONMENT)
    make_token()
    cluster = CLUSTER | {name: [] for name in NOTHING}
    Path("cluster.yaml").write_text(yaml.safe_dump(cluster), encoding="utf-8")
    do("ray", "start", "--head", "--num-cpus=0", "--disable-usage-stats", "--autoscaling-config=cluster.yaml")
    ray.init("auto", log_to_driver=False)
    return [_round(name, trials) for name, trials in ROUNDS]


def _round(name: str, trials: int) -> dict[str, Any]:
    """One study: workers before it, most of them while it ran, and after it; how its trials went."""
    say(f"{name} study")
    studied, counts, busy = Trials(SHARED / "studies" / name), [_workers()], [0]
    started, sweep = time.monotonic(), _sweep(name, trials)

    def ended() -> bool:
        counts.append(_workers())
        busy.append(_in_use())
        return sweep.poll() is not None

    wait_for(f"the end of the {name} study", ended, PATIENCE)
    if sweep.returncode:
        raise Failed(f"the {name} study: exit code {sweep.returncode}")
    took = round(time.monotonic() - started, 1)
    wait_for("the last worker's end", lambda: _workers() == 0, PATIENCE)
    return {
        "study": name,
        "workers before, at most, after": [counts[0], max(counts), _workers()],
        "trials at a time": max(busy),
        "seconds": took,
        "seconds until no worker": round(time.monotonic() - started - took, 1),
        "trials": studied.document(),
        "problems": studied.problems(),
    }


def _sweep(name: str, trials: int) -> subprocess.Popen[bytes]:
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    study |= {"name": name, "resources": {"concurrency": WORKERS}, "algorithm": {"kind": "random", "trials": trials}}
    study["trial"]["privacy"]["step_limit"] = STEPS
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    with LOG.open("ab") as log:
        line = [BIN / "dpsink-tune", "sweep", path, "--address", "auto"]
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _workers() -> int:
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def _in_use() -> int:
    """CPUs that trials have, each one."""
    return round(ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0))
