"""Who can reach which port of a machine: a member of the cluster, and a stranger on the same network."""

import json
from typing import Any

from experiments.clusters.rehearsal.desk import BIN
from experiments.clusters.rehearsal.hosts import Host

SSH, MLFLOW, DASHBOARD = 22, 5000, 8265
PROBE = """
import json, socket, sys
def answers(port):
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((sys.argv[1], port)) == 0
print(json.dumps([port for port in map(int, sys.argv[2:]) if answers(port)]))
"""


def who_reaches(host: Host, member: Host, stranger: Host) -> dict[str, Any]:
    """Ports that a machine listens on, beside ssh's, and those of them that answer a member, and a stranger.

    MLflow's and the dashboard's are tried too: they listen on the loopback alone.
    """
    ports = sorted(listening(host))
    tried = [*ports, MLFLOW, DASHBOARD]
    return {
        "host": host.name,
        "listens": ports,
        "answer a member": answering(member, host, tried),
        "answer a stranger": answering(stranger, host, tried),
    }


def listening(host: Host) -> set[int]:
    """TCP ports that a machine's processes listen on, on more than its loopback; without ssh's."""
    places = [line.split()[3].rpartition(":") for line in host.run("ss -Hltn").splitlines()]
    return {int(port) for address, _, port in places if "127.0.0.1" not in address and address != "[::1]"} - {SSH}


def answering(source: Host, target: Host, ports: list[int]) -> list[int]:
    """Those of a machine's ports that another can connect to."""
    numbers = " ".join(map(str, ports))
    return json.loads(source.run(f"{BIN}/python -c '{PROBE}' {target.address} {numbers}"))
