"""A Ray of this process's own, on this machine alone, and the end of the connection to any Ray."""

import gc
import logging
import os
from typing import Any

# Of Ray's daemons and workers, unless a person has set them.
ENVIRONMENT = {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # of what processes use; there is no dashboard to show it
    # Memory in pages of 2 MiB, where the kernel gives them to who asks; and from one heap for all threads, since only
    # that one asks, and a trial runs in a thread of Tune's. Measured: `experiments/bench/README.md`.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
}


def start_own_ray(level: int = logging.ERROR) -> None:
    """Starts Ray, and ends three of its daemons that have nothing to do in a cluster of one machine and one study.

    No worker's output is shown, no page is served and no node is added; but each looks for such work many times a
    second, and beside trials on all cores the three took as much as Ray's other daemons together. A cluster that a
    person has started keeps all of it.

    Args:
        level: of Ray's own words on the console.
    """
    import ray
    from ray._private import worker  # Ray has an option for it in `ray start`, and none here

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=level)
    node: Any = worker._global_node
    for end in (node.kill_log_monitor, node.kill_dashboard, node.kill_monitor):
        end(check_alive=False)


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
