"""The study file's JSON Schema (draft 2020-12), so that editors complete and check it: `dpsink-tune schema`.

It knows the settings of a trial, where the study's own model holds any mapping, and the paths that may be searched.
What needs more than one setting to be judged is left to `tune.study.load_study`.
"""

from typing import Any, get_args

from dpsink.config import GeneratorConfig, TrialConfig
from tune import schema
from tune.study import COMMON, Study, setting_paths

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def study_schema() -> dict[str, Any]:
    """The schema, JSON-able."""
    study = Study.model_json_schema(by_alias=True)
    trial = TrialConfig.model_json_schema()
    groups = study.pop("$defs") | trial.pop("$defs")
    fields = study["properties"]
    fields["trial"] |= {"$ref": "#/$defs/Trial"}
    fields["baselines"]["additionalProperties"] = {"$ref": "#/$defs/Baseline"}
    fields["space"] |= {"properties": _searchable(), "additionalProperties": False}
    fields["objectives"]["items"] = {"enum": list(schema.QUALITY)}
    # Any part of a trial, whose kind of generator may come from elsewhere; a baseline may also use dotted paths.
    trial["properties"]["generator"] = _any_kind(trial["properties"]["generator"])
    dotted = {"patternProperties": {r"^[a-z]+\.": {}}}
    groups |= {"Trial": trial, "Baseline": {**trial, **dotted}}
    for name in ("Distribution", "Algorithm"):
        groups[name]["properties"] = {key: _plain(value) for key, value in groups[name]["properties"].items()}
    return {"$schema": DIALECT, **study, "$defs": groups}


def _any_kind(generator: dict[str, Any]) -> dict[str, Any]:
    """A generator's settings where its kind may be left out, so that those of several kinds may fit."""
    return {"anyOf": generator["oneOf"], "description": generator.get("description", "the network, by its kind")}


def _searchable() -> dict[str, Any]:
    """Each path that may be searched with some kind of generator."""
    union, _ = get_args(GeneratorConfig)
    kinds = [group.model_fields["kind"].default for group in get_args(union)]
    paths = {path for kind in kinds for path in setting_paths(kind, "schema")}
    searched = sorted(path for path in paths if path != "seed" and not path.startswith(COMMON))
    return {path: {"$ref": "#/$defs/Distribution"} for path in searched}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """`when` takes one value as well as a list of them."""
    if "additionalProperties" in value:
        return {**value, "additionalProperties": {"description": "a value, or a list of them"}}
    return value
