"""Settings: one tree, YAML in and out, and errors that say what to do."""

from pathlib import Path
from typing import Any

import pytest

from dpsink.config import TrialConfig, config_sha256, dump_config, flatten, load_config, validate
from dpsink.errors import InputError


def test_yaml_round_trip_gives_the_same_trial(tmp_path: Path) -> None:
    config = load_config(None, ["optimizer.lr=3e-4", "generator.hidden_dim=7", "privacy.steps=30"])
    path = tmp_path / "trial.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_non_private_trial_survives_yaml(tmp_path: Path) -> None:
    config = load_config(None, ["privacy.target_epsilon=.inf", "privacy.steps=10"])
    path = tmp_path / "trial.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_scientific_notation_without_a_dot_is_a_number() -> None:
    # YAML 1.1 reads 3e-4 as a string.
    assert load_config(None, ["optimizer.lr=3e-4", "privacy.noise_multiplier=3"]).optimizer.lr == 3e-4


def test_flatten_names_every_leaf_by_its_dotted_path() -> None:
    leaves = flatten(TrialConfig())
    assert leaves["sinkhorn.blur"] == TrialConfig().sinkhorn.blur
    assert not any(isinstance(value, dict | list) for value in leaves.values())


def test_hash_changes_with_any_setting() -> None:
    assert config_sha256(TrialConfig()) != config_sha256(TrialConfig(seed=1))


def test_validation_size_defaults_by_data_set() -> None:
    sizes = [load_config(None, [f"data.name={name}"]).data.validation_size for name in ("digits", "mnist")]
    assert sizes == [180, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.noise_mutiplier=3", "did you mean 'noise_multiplier'"),
        ("generator.hiden_dim=3", "did you mean 'hidden_dim'"),
        ("privacyy.delta=1e-5", "did you mean 'privacy'"),
        ("privacy.noise_multiplier=0", "must be > 0"),
        ("privacy.noise_multiplier=-1", "noise_multiplier=-1"),
        ("privacy.noise_multiplier=.nan", "noise_multiplier=nan"),
        ("privacy.target_epsilon=0", "target_epsilon=0"),
        ("privacy.target_epsilon=.nan", "target_epsilon=nan"),
        ("privacy.delta=2", "delta=2"),
        ("privacy.steps=10", "not both"),
        ("privacy.target_epsilon=.inf", "set steps"),
        ("generator.kind=gan", "conv_cond"),
        ("sinkhorn.backend=geomloss", "mechanism=batch"),
        ("optimizer.lr", "path.to.key=value"),
        ("optimizer.lr=[", "not YAML"),
        ("seed.x=1", "seed"),
    ],
)
def test_bad_setting_is_told_in_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, ["privacy.noise_multiplier=3", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n", "\x00"])
def test_bad_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load_config(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def refusal(tree: dict[str, Any]) -> str:
    """The one line with which a trial's settings are refused."""
    with pytest.raises(InputError) as caught:
        validate(TrialConfig, tree, source="trial")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal({"optimizer": {"lr": -1}, "privacy": {"delta": 2, "noise_multiplier": 3}})
    assert "optimizer.lr=-1" in message and "privacy.delta=2" in message
    unknown = refusal({"optimiser": {}, "seeds": 3, "privacy": {"delta": 2}})
    assert "'optimiser'" in unknown and "'seeds'" in unknown and "delta" not in unknown


def test_of_many_mistakes_the_first_are_told_and_the_rest_counted() -> None:
    assert "(and 2 more)" in refusal({f"unknown{number}": 1 for number in range(7)})
