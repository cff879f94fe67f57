"""Cluster files: Ray's and KubeRay's own schemas take them, and they keep secrets and ports to themselves."""

import copy
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "experiments" / "clusters"
LAUNCHED = ("onprem", "aws", "gcp")
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
    assert not re.search(r"[0-9a-f]{32}|RAY_AUTH_TOKEN=|password", text, re.IGNORECASE)


@pytest.mark.parametrize("name", LAUNCHED)
def test_dashboard_and_mlflow_answer_on_the_loopback_only(name: str) -> None:
    commands = " ".join(load(name)["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    assert "mlflow server --host 127.0.0.1" in commands
    assert "0.0.0.0" not in commands


def test_pods_ask_for_the_token_and_are_reached_by_each_other_and_the_operator_only() -> None:
    job, policy = manifest()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    mlflow = cluster["headGroupSpec"]["template"]["spec"]["containers"][1]
    assert "--host=127.0.0.1" in mlflow["command"]
    [rule] = policy["spec"]["ingress"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all("podSelector" in source and "ipBlock" not in source for source in rule["from"])


@pytest.mark.parametrize("name", ("aws", "gcp"))
def test_clouds_grow_from_no_gpu_and_train_nothing_on_the_head(name: str) -> None:
    config = load(name)
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0 < gpu["max_workers"] == config["max_workers"]
    assert gpu["resources"]["GPU"] == 1
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


def test_all_files_pin_the_version_that_this_is() -> None:
    version = re.search(r"^version = (\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    for path in CLUSTERS.glob("*.yaml"):
        named = re.findall(r"dpsink[:-](\d[\w.]*?)(?:-py3|\s)", path.read_text(encoding="utf-8"))
        assert set(named) == {version[1]}, path
