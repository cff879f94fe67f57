"""Closes this machine's ports of Ray and MLflow to all but the cluster's machines; a second call replaces the first.

    sudo python firewall.py CLUSTER.yaml

as `onprem.yaml` calls it on each of its machines. What else they serve stays as it is.
"""

import socket
import subprocess
import sys
from pathlib import Path

import yaml

# MLflow, the GCS, the dashboard, all that is started with a port of its own (10001: Ray's client server), and metrics
# of the autoscaler and of the dashboard, which have no setting.
PORTS = "5000, 6379, 8265, 10001-19999, 44217, 44227"
RULES = """
table inet dpsink
delete table inet dpsink
table inet dpsink {{
  chain input {{
    type filter hook input priority filter; policy accept;
    iif lo accept
    ip saddr {{ {members} }} accept
    tcp dport {{ {ports} }} reject with tcp reset
  }}
}}
"""


def members(text: str) -> list[str]:
    """IPv4 addresses of the machines that a cluster's YAML names."""
    provider = yaml.safe_load(text)["provider"]
    return [socket.gethostbyname(name) for name in (provider["head_ip"], *provider["worker_ips"])]


def rules(addresses: list[str]) -> str:
    """What nftables is told: one table, replaced as a whole."""
    return RULES.format(members=", ".join(addresses), ports=PORTS)


def main() -> None:
    """Reads the YAML, and loads the rules."""
    addresses = members(Path(sys.argv[1]).read_text(encoding="utf-8"))
    subprocess.run(["nft", "-f", "-"], input=rules(addresses), text=True, check=True)


if __name__ == "__main__":
    main()
