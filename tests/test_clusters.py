"""Cluster files: Ray's and KubeRay's own schemas take them, and they keep secrets and ports to themselves."""

import configparser
import copy
import gzip
import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.command_runner import SSHOptions
from ray.autoscaler._private.util import prepare_config, validate_config

from experiments.clusters.firewall import PORTS, members, rules
from tests.test_readme import blocks, parsed

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "experiments" / "clusters"
LAUNCHED = ("onprem", "aws", "gcp")
GUIDE = ROOT / "docs" / "cluster.md"
IMAGED = ("aws", "gcp")
RAYJOB = ROOT / "tests" / "data" / "rayjob-v1.schema.json.gz"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8"))


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    """The RayJob and its network policy."""
    job, policy = yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text(encoding="utf-8"))
    return job, policy


def unknown(document: Any, schema: dict[str, Any], place: str = "") -> Iterator[str]:
    """Fields that a schema does not have, which KubeRay would drop without a word."""
    properties = schema.get("properties")
    if isinstance(document, dict) and properties:
        for key, value in document.items():
            if key in properties:
                yield from unknown(value, properties[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(document, list):
        for value in document:
            yield from unknown(value, schema.get("items", {}), place)


def commands() -> list[str]:
    """All commands of the guide, without their comments, and those of Ray's in its text that have arguments.

    What stands behind `&&` is one of its own.
    """
    lines = [line.partition("  #")[0].split("&&") for block in blocks(GUIDE, "") for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", GUIDE.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines += [inline.split("&&") for inline in re.findall(r"`(ray [^`]*(?:/|--)[^`]*)`", text)]
    return [one.strip().removesuffix("&").strip() for line in lines for one in line if one.strip()]


def words(program: str) -> list[list[str]]:
    """Words of each of the guide's commands of a program; redirections are no words."""
    split = [shlex.split(re.sub(r"[<>] \S+|2>&1", "", line)) for line in commands()]
    return [line for line in split if line[0] == program]


def inner(line: list[str]) -> list[str]:
    """The command that a command of Ray's runs on the cluster; empty where it runs none."""
    if line[1] == "exec":
        return shlex.split(line[3])
    return line[line.index("--") + 1 :] if "--" in line else []


def parsed_by_ray(line: list[str]) -> Any:
    """The context of a command line of Ray's, as it makes it before it runs anything."""
    with warnings.catch_warnings(action="ignore"):  # of Ray's own parts that are of no matter here
        from ray.scripts.scripts import cli
    command: Any = cli
    context, rest = command.make_context("ray", line[1:]), line[1:]
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def problems(job: dict[str, Any]) -> list[str]:
    """What KubeRay's schema finds wrong."""
    schema = json.loads(gzip.decompress(RAYJOB.read_bytes()))
    found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(job)]
    return found + list(unknown({"spec": job["spec"]}, schema))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_yaml(name: str) -> None:
    prepared = prepare_config(load(name))
    validate_config(prepared)
    assert prepared["max_workers"] >= 2


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_refuses_the_yaml_with_a_misspelt_key(name: str) -> None:
    config = load(name)
    config["file_mount"] = config.pop("file_mounts")
    with pytest.raises(jsonschema.ValidationError, match="file_mount"):
        validate_config(prepare_config(config))


def test_kuberay_takes_the_manifest() -> None:
    assert problems(manifest()[0]) == []


def test_kuberay_refuses_a_manifest_with_a_wrong_or_a_misspelt_field() -> None:
    job = copy.deepcopy(manifest()[0])
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "many"
    job["spec"]["rayClusterSpec"]["authOption"] = {}
    assert len(problems(job)) == 2


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_the_token_and_no_file_holds_it(name: str) -> None:
    text = (CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=token" in text
    assert load(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"[0-9a-f]{32}|RAY_AUTH_TOKEN=|password[:=]", text, re.IGNORECASE)


@pytest.mark.parametrize("name", LAUNCHED)
def test_dashboard_and_mlflow_answer_on_the_loopback_only(name: str) -> None:
    commands = " ".join(load(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "mlflow server --host 127.0.0.1" in commands
    assert "0.0.0.0" not in commands


@pytest.mark.parametrize("name", LAUNCHED)
def test_head_is_ready_when_mlflow_answers(name: str) -> None:
    ray, mlflow, wait = load(name)["head_start_ray_commands"][-3:]
    assert "ray start --head" in ray and mlflow.endswith("&")
    assert "pgrep -n gcs_server" in mlflow  # that it ends with Ray, the rehearsal shows
    assert wait.startswith("timeout ") and "http://127.0.0.1:5000/health" in wait


def test_firewall_admits_the_machines_of_the_yaml_and_no_other() -> None:
    provider = load("onprem")["provider"]
    assert members((CLUSTERS / "onprem.yaml").read_text(encoding="utf-8")) == [
        provider["head_ip"], *provider["worker_ips"]
    ]  # fmt: skip
    told = rules(["192.0.2.10", "192.0.2.11"])
    assert re.findall(r"saddr .*", told) == ["saddr { 192.0.2.10, 192.0.2.11 } accept"]


def started(command: str) -> dict[str, int]:
    """Ports that a command of `ray start` names."""
    return {name: int(port) for name, port in re.findall(r"--([a-z-]*port)=(\d+)", command)}


@pytest.mark.parametrize("place", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_port_that_ray_opens_on_own_machines_is_behind_the_firewall(place: str) -> None:
    [line] = [line for line in load("onprem")[place] if "ray start" in line]
    ports = started(line)
    ports.pop("port", None)
    assert ports.keys() == {
        "node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "metrics-export-port", "min-worker-port", "max-worker-port",
    }  # fmt: skip
    assert "10001-19999" in PORTS.split(", ")
    assert all(10001 <= port <= 19999 for port in ports.values())
    assert len(set(ports.values())) == len(ports)


@pytest.mark.parametrize("place", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_own_machines_start_ray_behind_the_firewall_of_their_own_yaml_and_with_the_storage(place: str) -> None:
    """Of a machine that has rebooted Ray's autoscaler calls the start commands only."""
    config = load("onprem")
    firewall, storage, *rest = config[place]
    assert firewall == "sudo ~/dpsink/bin/python ~/members/firewall.py ~/members/cluster.yaml"
    assert "until mountpoint --quiet /shared;" in storage
    assert any("ray start" in line for line in rest)
    assert config["file_mounts"]["~/members/cluster.yaml"] == "experiments/clusters/onprem.yaml"
    assert (ROOT / config["file_mounts"]["~/members/firewall.py"]).is_file()


def test_wheel_of_the_same_version_is_installed_again() -> None:
    commands = load("onprem")["setup_commands"]
    assert any("--force-reinstall --no-deps ~/wheels/dpsink-" in line for line in commands)


@pytest.mark.parametrize("name", IMAGED)
def test_nothing_is_installed_into_the_image(name: str) -> None:
    """Ray's defaults would: they count where a file leaves a list out."""
    places = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    prepared = prepare_config(load(name))
    assert [prepared[place] for place in places] == [[], [], []]
    left_out = prepare_config({key: value for key, value in load(name).items() if key not in places})
    assert any("pip install" in line for line in left_out["head_setup_commands"])


@pytest.mark.parametrize("name", IMAGED)
def test_gpu_nodes_wait_for_their_driver_after_all_that_the_others_do(name: str) -> None:
    prepared = prepare_config(load(name))
    *same, driver = prepared["available_node_types"]["gpu"]["initialization_commands"]
    assert same == prepared["initialization_commands"]
    assert driver.startswith("timeout 600 ") and "nvidia-smi" in driver
    assert "initialization_commands" not in prepared["available_node_types"]["head"]


@pytest.mark.parametrize("name", IMAGED)
def test_docker_may_be_called_from_a_connection_that_is_made_after_rays_own_has_idled_out(name: str) -> None:
    idle = SSHOptions("key", "path").arg_dict["ControlPersist"]
    sleep = re.search(r"usermod -aG docker \$USER && sleep (\d+)", load(name)["initialization_commands"][-1])
    assert sleep and int(sleep[1]) > int(idle.removesuffix("s"))


def test_aws_has_rays_own_security_group() -> None:
    """Which admits ssh, and its own members: one of ours could only open more."""
    config = load("aws")
    assert "security_group" not in config["provider"]
    assert all("SecurityGroupIds" not in kind["node_config"] for kind in config["available_node_types"].values())


def test_google_cloud_has_a_network_of_its_own_whose_firewall_goes_by_a_tag() -> None:
    kinds = [kind["node_config"] for kind in load("gcp")["available_node_types"].values()]
    assert all(kind["tags"] == {"items": ["dpsink"]} for kind in kinds)
    assert all(one["subnetwork"].endswith("/subnetworks/dpsink") for kind in kinds for one in kind["networkInterfaces"])
    made = [line for line in commands() if "firewall-rules create" in line]
    assert len(made) == 2 and all("--network dpsink" in line for line in made)
    ssh, inside = made
    assert "--allow tcp:22" in ssh
    assert "--source-tags dpsink --target-tags dpsink" in inside


def templates() -> list[dict[str, Any]]:
    """The pods of the manifest: the head's, the workers'."""
    cluster = manifest()[0]["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_pods_ask_for_the_token() -> None:
    assert manifest()[0]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_job_begins_with_the_check() -> None:
    shell, option, script = shlex.split(manifest()[0]["spec"]["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    check, sweep = map(shlex.split, script.split("&&"))
    assert parsed(check).command.name == "check" and parsed(sweep).command.name == "sweep"
    assert check[2:] == sweep[2:]


def test_network_policy_closes_every_pod_of_the_job() -> None:
    policy = manifest()[1]["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    assert chosen and policy["policyTypes"] == ["Ingress"]
    assert all(chosen.items() <= template["metadata"]["labels"].items() for template in templates())


def test_network_policy_admits_the_pods_of_the_job_and_the_operator_to_the_dashboard() -> None:
    policy = manifest()[1]["spec"]
    inside, operator = policy["ingress"]
    assert inside == {"from": [{"podSelector": policy["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    [source] = operator["from"]
    assert source["namespaceSelector"]["matchLabels"] and source["podSelector"]["matchLabels"]


def test_pods_of_ray_start_when_mlflow_answers_on_the_loopback() -> None:
    head, worker = templates()
    [mlflow] = head["spec"]["initContainers"]
    assert mlflow["restartPolicy"] == "Always"  # a sidecar: it goes on beside what starts after it
    assert "--host=127.0.0.1" in mlflow["command"]
    assert mlflow["startupProbe"]["exec"]["command"][-1] == "http://127.0.0.1:5000/health"
    assert "initContainers" not in worker["spec"]


@pytest.mark.parametrize("name", IMAGED)
def test_clouds_grow_from_no_gpu_and_train_nothing_on_the_head(name: str) -> None:
    config = load(name)
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0 < gpu["max_workers"] == config["max_workers"]
    assert gpu["resources"]["GPU"] == 1
    assert "--num-cpus=0" in config["head_start_ray_commands"][1]


def test_all_files_pin_the_version_that_this_is() -> None:
    version = re.search(r"^version = (\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    for path in map(CLUSTERS.joinpath, ("onprem.yaml", "aws.yaml", "gcp.yaml", "kuberay.yaml")):
        named = re.findall(r"dpsink[:-](\d[\w.]*?)(?:-py3|\s)", path.read_text(encoding="utf-8"))
        assert set(named) == {version[1]}, path


def test_guide_leads_to_every_kind_of_cluster_from_nothing_to_its_end() -> None:
    """Keeps the tests below honest: the guide's commands are found."""
    ray = [line[1:3] for line in words("ray")]
    for name in LAUNCHED:
        path = f"experiments/clusters/{name}.yaml"
        assert (["up", path] in ray and ["down", path] in ray) or name == "gcp"  # where it says: as on AWS
    assert ["kubectl", "create", "-f", "experiments/clusters/kuberay.yaml"] in words("kubectl")
    assert [inner(line)[:2] for line in words("ray") if line[1] == "job"] == [["dpsink-tune", "sweep"]] * 2


@pytest.mark.parametrize("line", words("ray"), ids=" ".join)
def test_guides_command_is_one_of_rays(line: list[str]) -> None:
    assert parsed_by_ray(line)


def test_parser_of_these_tests_refuses_what_ray_does_not_have() -> None:
    for line in (["ray", "launch", "x.yaml"], ["ray", "up", "--fast", "x.yaml"]):
        with pytest.raises(Exception, match=r"launch|--fast"):
            parsed_by_ray(line)


@pytest.mark.parametrize("line", [one for line in words("ray") if (one := inner(line))], ids=" ".join)
def test_guides_command_on_the_cluster_is_one_of_ours(line: list[str]) -> None:
    assert parsed(line).params


@pytest.mark.parametrize("name", ["onprem", "aws"])
def test_guides_tunnel_has_no_terminal_and_the_job_waits_for_it(name: str) -> None:
    """`ssh -tt` in the background stops where it has one."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    [place] = [
        at for at, line in enumerate(lines) if line.startswith(f"ray dashboard experiments/clusters/{name}.yaml")
    ]
    assert lines[place].partition("  #")[0].rstrip().endswith(".yaml < /dev/null > /dev/null 2>&1 &")
    assert lines[place + 1].startswith("until curl ") and lines[place + 2].startswith("ray job submit ")


def test_guides_token_can_be_read_by_its_owner_only() -> None:
    made = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("ray get-auth-token")]
    assert made == ["ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"] * 2


def test_guide_names_files_that_exist() -> None:
    named = re.findall(r"(?:experiments|docs)/[\w./-]+\w", " ".join(commands()))
    assert set(named) >= {f"experiments/clusters/{name}.yaml" for name in ("onprem", "aws", "kuberay")}
    assert all((ROOT / name).is_file() for name in named)


def test_what_the_guide_says_to_fill_in_stands_in_the_files() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    blanks = {"aws": ("REGISTRY", "FILESYSTEM", "IMAGE"), "gcp": ("REGISTRY", "PROJECT", "FILESTORE")}
    blanks |= {"kuberay": ("REGISTRY",), "kuberay-storage": ("SERVER",)}
    for name, words in blanks.items():
        file = (CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8")
        code = "\n".join(line.partition("# ")[0] for line in file.splitlines())
        assert set(re.findall(r"\b[A-Z]{5,}\b", code)) - {"TERMINATE", "PERSISTENT", "HEAD", "NAT", "MLFLOW"} == set(
            words
        )
        assert all(word in text for word in words)


def test_claim_of_the_pods_is_the_one_that_the_guide_makes() -> None:
    volume, claim = yaml.safe_load_all((CLUSTERS / "kuberay-storage.yaml").read_text(encoding="utf-8"))
    made = {"persistentVolumeClaim": claim["metadata"]["name"], "secret": "dpsink", "configMap": "dpsink"}
    keys = {"persistentVolumeClaim": "claimName", "secret": "secretName", "configMap": "name"}
    for template in templates():
        mounted = {
            kind: one[kind][key] for one in template["spec"]["volumes"] for kind, key in keys.items() if kind in one
        }
        assert mounted == made
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert {"lookupcache=positive", "actimeo=0"} <= set(volume["spec"]["mountOptions"])


def test_every_folder_that_nodes_share_is_seen_at_once() -> None:
    for name in IMAGED:
        [mount] = [line for line in load(name)["initialization_commands"] if "mount -t" in line]
        assert "nfsvers=4.1" in mount and "lookupcache=positive,actimeo=0" in mount


def test_image_has_what_rays_launcher_and_an_autoscaling_head_call() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    installed = re.findall(r"no-install-recommends ([^\\&]*)", text)[0].split()
    assert set(installed) >= {"curl", "openssh-client", "procps", "rsync", "wget"}
    assert '".[clouds]"' in text
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    clouds = extras["options.extras_require"]["clouds"]
    assert "boto3" in clouds and "google-api-python-client" in clouds


def test_image_asks_the_nvidia_runtime_for_the_nodes_gpus() -> None:
    """Ray's launcher starts it under that runtime, which shows none to an image that does not ask."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "NVIDIA_VISIBLE_DEVICES=all" in text and "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in text
