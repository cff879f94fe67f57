"""What each node of a cluster has: packages, memory, a graphics card, the data, the storage."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpsink.config import DataConfig, Strict
from dpsink.errors import InputError
from tune.own_ray import leave_ray, start_own_ray
from tune.room import free_memory
from tune.shared import can_be_read, try_out
from tune.versions import versions

PATIENCE = 300.0  # seconds that the nodes may take to load the data


class Node(Strict):
    """What a node told about itself."""

    name: str
    versions: dict[str, str]
    cpus: float
    gpus: float
    cuda: int  # GPUs that PyTorch can use
    gpu_memory: tuple[int, ...] = ()  # bytes free on each; none where its driver does not tell
    free_memory: int  # bytes
    fingerprint: str  # of the data; empty where they cannot be loaded
    problem: str = ""  # with the data
    storage: str = ""  # what it cannot do in the storage


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray's cluster, or a cluster of this machine alone.

    Raises:
        InputError: nothing answers at the address.
    """
    import logging

    import ray

    try:
        if address is None:
            start_own_ray(logging.CRITICAL)
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        what = f"--address {address}: no Ray cluster answers" if address else "Ray does not start on this machine"
        raise InputError(f"{what} ({str(error).splitlines()[0][:200]})") from None
    try:
        yield
    finally:
        leave_ray()


def ask_nodes(data: DataConfig, root: Path, place: Path) -> list[Node]:
    """Asks every node, each in a task that is pinned to it; needs a running Ray.

    Args:
        root: folder of the data, the same on all nodes.
        place: `tune.shared.meeting_place` of the study's storage.

    Raises:
        InputError: nodes that do not answer, by their names.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    # Ray hides all GPUs from who has asked for none, unless it is told not to.
    seeing = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=seeing)(_look_around)
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [
        task.options(scheduling_strategy=pin).remote(data, root, place, node["NodeID"])
        for node, pin in zip(nodes, pinned, strict=True)
    ]
    deadline, answers, silent = time.monotonic() + PATIENCE, [], []
    for node, answer in zip(nodes, asked, strict=True):
        try:
            told: Any = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            answers.append(_node(node, told, place))
        except Exception as error:
            silent.append(f"{node['NodeManagerHostname']} does not answer ({_last_words(error)})")
    if silent:
        raise InputError(f"{'; '.join(silent)}; is the same dpsink installed there?")
    return answers


def _node(node: dict[str, Any], told: dict[str, Any], place: Path) -> Node:
    """A node by what Ray knows of it and what it told."""
    unread = "leaves files that cannot be read here"
    storage = told.pop("storage") or ("" if can_be_read(place, node["NodeID"]) else unread)
    cpus, gpus = (float(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
    return Node(name=node["NodeManagerHostname"], cpus=cpus, gpus=gpus, storage=storage, **told)


def _look_around(data: DataConfig, root: Path, place: Path, own: str) -> dict[str, Any]:
    """What a node can tell; runs there."""
    import torch

    from dpsink.data import load_dataset

    fingerprint, problem = "", ""
    try:
        fingerprint = load_dataset(data, root=root).fingerprint
    except InputError as error:
        problem = str(error)
    return {
        "versions": dict(versions()),
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu_memory": free_gpu_memory(),
        "free_memory": free_memory(),
        "fingerprint": fingerprint,
        "problem": problem,
        "storage": try_out(place, own),
    }


def free_gpu_memory() -> tuple[int, ...]:
    """Bytes that each GPU of this machine has left; none where its driver does not tell.

    Not through PyTorch, which would take some hundred MiB of them for as long as this process lives.
    """
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return tuple(int(line) * 2**20 for line in told.splitlines())
    return ()


def _last_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__
