"""Run on the head: prints the names of the cluster's living nodes, as a JSON list, whenever they have changed."""

import json
import logging
import time

import ray


def main() -> None:
    """Looks twice a second, until it is killed."""
    ray.init("auto", log_to_driver=False, logging_level=logging.CRITICAL)
    shown = None
    while True:
        alive = sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])
        if alive != shown:
            print(json.dumps(alive), flush=True)
            shown = alive
        time.sleep(0.5)


if __name__ == "__main__":
    main()
