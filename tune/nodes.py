"""What each node of a cluster has: packages, memory, a graphics card, the data, the storage."""

import gc
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpsink.config import DataConfig, Strict
from dpsink.errors import InputError
from tune.room import free_memory

PACKAGES = ("dpsink", "torch", "ray", "numpy", "opacus", "dp-accounting", "pydantic", "safetensors")
PATIENCE = 300.0  # seconds that a node may take to load the data


class Node(Strict):
    """What a node told about itself."""

    name: str
    versions: dict[str, str]
    cpus: float
    gpus: float
    cuda: int  # GPUs that PyTorch can use
    free_memory: int  # bytes
    fingerprint: str  # of the data; an error's words where they cannot be loaded
    tokens: tuple[str, ...]  # found in the storage
    problem: str = ""  # with the data


def versions() -> dict[str, str]:
    """Of Python and of what trials compute with, in this process."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray's cluster, or a cluster of this machine alone.

    Raises:
        InputError: nothing answers at the address.
    """
    import logging

    import ray

    try:
        ray.init(address or "local", include_dashboard=False if address is None else None, log_to_driver=False,
                 logging_level=logging.CRITICAL)  # fmt: skip
    except Exception as error:
        raise InputError(f"--address {address}: no Ray cluster answers ({str(error).splitlines()[0][:200]})") from None
    try:
        yield
    finally:
        leave_ray()


def leave_ray() -> None:
    """Ends this process's connection to Ray.

    Garbage is collected before and not meanwhile: where another thread's collection meets an actor's handle in the
    middle of Ray's shutdown, Ray ends the whole process.
    """
    import ray

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


def ask_nodes(data: DataConfig, root: Path, storage: Path) -> list[Node]:
    """Asks every node, each in a task that is pinned to it; needs a running Ray.

    Args:
        root: folder of the data, the same on all nodes.
        storage: of the study; the nodes look for files in it.

    Raises:
        InputError: a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    # Ray hides all GPUs from who has asked for none, unless it is told not to.
    seeing = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=seeing)(_look_around)
    answers = [task.options(scheduling_strategy=place).remote(data, root, storage) for place in pinned]
    try:
        told: Sequence[dict[str, Any]] = ray.get(answers, timeout=PATIENCE)
    except Exception as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(f"a node of the cluster does not answer: {last[:200]}; is dpsink installed on it?") from None
    return [
        Node(name=node["NodeManagerHostname"], cpus=_of(node, "CPU"), gpus=_of(node, "GPU"), **answer)
        for node, answer in zip(nodes, told, strict=True)
    ]


def _look_around(data: DataConfig, root: Path, storage: Path) -> dict[str, Any]:
    """What a node can tell; runs there."""
    import torch

    from dpsink.data import load_dataset

    fingerprint, problem = "", ""
    try:
        fingerprint = load_dataset(data, root=root).fingerprint
    except InputError as error:
        problem = str(error)
    return {
        "versions": versions(),
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "free_memory": free_memory(),
        "fingerprint": fingerprint,
        "tokens": tuple(path.name for path in storage.glob(".token-*")),
        "problem": problem,
    }


def _of(node: dict[str, Any], kind: str) -> float:
    return float(node["Resources"].get(kind, 0))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
