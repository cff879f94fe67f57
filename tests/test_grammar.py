"""The JSON Schema of study files: it is one, takes what the loader takes, and names what an editor should offer."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.test_study import EVERYTHING, SMALL
from tune import cli
from tune.grammar import study_schema

STUDIES = sorted((Path(__file__).parents[1] / "experiments/studies").glob("*.yaml"))


class Editor(yaml.SafeLoader):
    """Reads numbers as editors do, by YAML 1.2: PyYAML takes 1e-3 for text."""


Editor.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Editor.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(study_schema())


def problems(validator: Draft202012Validator, study: dict[str, Any]) -> list[str]:
    """What is wrong, by its place; through JSON, as an editor sees it."""
    plain = json.loads(json.dumps(study))
    return ["/".join(map(str, error.absolute_path)) for error in validator.iter_errors(plain)]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(study_schema())


def test_it_is_printed_by_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", "schema"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out) == study_schema()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_it_takes_every_study_that_ships(validator: Draft202012Validator, path: Path) -> None:
    assert problems(validator, yaml.load(path.read_text(encoding="utf-8"), Editor)) == []


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "without privacy"])  # JSON has no infinity
def test_it_takes_what_the_loader_takes(validator: Draft202012Validator, name: str) -> None:
    assert problems(validator, {**SMALL, **EVERYTHING[name]}) == []


def test_it_takes_dotted_paths_of_a_baseline(validator: Draft202012Validator) -> None:
    assert problems(validator, {**SMALL, "baselines": {"large": {"privacy.batch_size": 200}}}) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"objectiv": ["fid"]}, ""),
        ({"objectives": ["fidelity"]}, "objectives/0"),
        ({"trial": {"sinkhorn": {"blurr": 1}}}, "trial/sinkhorn"),
        ({"trial": {"sinkhorn": {"blur": "wide"}}}, "trial/sinkhorn/blur"),
        ({"trial": {"generator": {"kind": "gan"}}}, "trial/generator"),
        ({"baselines": {"paper": {"optimizer": {"lr": 2}}}}, "baselines/paper/optimizer/lr"),
        ({"space": {"sinkhorn.blurr": {"uniform": [0, 1]}}}, "space"),
        ({"space": {"data.size": {"choice": [8, 16]}}}, "space"),
        ({"space": {"sinkhorn.blur": {"unifrom": [0, 1]}}}, "space/sinkhorn.blur"),
        ({"algorithm": {"kind": "tpe"}}, "algorithm/kind"),
        ({"scheduler": {"kind": "asha", "grace": 0}}, "scheduler/grace"),
    ],
)
def test_it_finds_what_the_loader_refuses(validator: Draft202012Validator, changes: dict[str, Any], place: str) -> None:
    assert problems(validator, {**SMALL, **changes}) == [place]


def test_it_offers_the_paths_of_every_kind_of_generator_with_their_words() -> None:
    schema = study_schema()
    offered = schema["properties"]["space"]["properties"]
    assert {"generator.noise_std", "generator.embed_dim", "sinkhorn.blur", "generator.kind"} <= offered.keys()
    assert not {"seed", "data.name", "privacy.delta", "evaluation.points"} & offered.keys()
    assert "description" in schema["$defs"]["Distribution"]["properties"]["when"]
