"""The study file: what it may say, and that what it may not say is found before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsink.config import DataConfig, load_config
from dpsink.data import ImageData, private_records
from dpsink.errors import InputError
from dpsink.privacy.plan import derive_plan
from tune import preflight
from tune.preflight import check_storage, check_study
from tune.study import Study, load_study, merge

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL: dict[str, Any] = {
    "name": "small",
    "trial": {
        "generator": {"hidden_dim": 4},
        "privacy": {"noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": 20},
        "evaluation": {"samples": 100, "classifiers": ["logreg"]},
    },
    "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
    "objective": "accuracy_logreg",
}


def write(tmp_path: Path, **changes: Any) -> Path:
    """A study file like SMALL, with top-level keys changed."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}), encoding="utf-8")
    return path


def load(tmp_path: Path, **changes: Any) -> Study:
    return load_study(write(tmp_path, **changes))


def refusal(tmp_path: Path, **changes: Any) -> str:
    """The one line with which a study file is refused."""
    with pytest.raises(InputError) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "unknown key 'objectiv'; did you mean 'objective'?" in refusal(tmp_path, objectiv="fid")


def test_unknown_key_of_a_group_is_refused_with_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, algorithm={"kind": "random", "trails": 3})
    assert "unknown key 'algorithm.trails'; did you mean 'trials'?" in message


def test_unknown_key_of_the_trial_is_refused_with_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, trial={**SMALL["trial"], "optimiser": {"lr": 1e-3}})
    assert "unknown key 'optimiser'; did you mean 'optimizer'?" in message


def test_unknown_key_of_a_baseline_is_refused_with_the_nearest(tmp_path: Path) -> None:
    message = refusal(tmp_path, baselines={"paper": {"sinkhorn": {"blurr": 1}}})
    assert "baseline paper: unknown key 'sinkhorn.blurr'; did you mean 'blur'?" in message


@pytest.mark.parametrize(
    ("path", "near"),
    [("sinkhorn.blurr", "sinkhorn.blur"), ("lr", "optimizer.lr"), ("privacy.noise_multiplyer", "noise_multiplier")],
)
def test_space_path_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path, path: str, near: str) -> None:
    message = refusal(tmp_path, space={path: {"uniform": [0.1, 1]}})
    assert f"space path '{path}' does not exist" in message
    assert near in message


def test_space_path_of_another_kind_of_generator_does_not_exist(tmp_path: Path) -> None:
    message = refusal(tmp_path, space={"generator.noise_std": {"uniform": [0.1, 1]}})
    assert "space path 'generator.noise_std' does not exist" in message


@pytest.mark.parametrize(
    "path", ["data.validation_size", "privacy.target_epsilon", "privacy.delta", "evaluation.samples"]
)
def test_what_trials_have_in_common_is_not_searched(tmp_path: Path, path: str) -> None:
    message = refusal(tmp_path, space={path: {"choice": [100, 180]}})
    assert f"space path '{path}' must be the same in all trials" in message


@pytest.mark.parametrize(
    ("path", "space"),
    [
        ("optimizer.lr", {"uniform": [0.5, 1.5]}),
        ("optimizer.lr", {"uniform": [0, 0.5]}),
        ("sinkhorn.gen_batch_size", {"int": [1, 8]}),
        ("sinkhorn.cost", {"choice": ["l2", "l3"]}),
        ("privacy.noise_multiplier", {"uniform": [0, 3]}),
    ],
)
def test_each_edge_of_the_space_has_to_be_a_valid_trial(tmp_path: Path, path: str, space: dict[str, Any]) -> None:
    assert path.rpartition(".")[2] in refusal(tmp_path, space={path: space})


@pytest.mark.parametrize(
    ("space", "rule"),
    [
        ({"uniform": [2, 1]}, "low < high"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"int": [3, 3]}, "low < high"),
        ({"log_uniform": [0, 1]}, "must start above 0"),
        ({"log_uniform": [-1, 1]}, "must start above 0"),
        ({"uniform": [1, float("inf")]}, "finite"),
        ({"uniform": [float("nan"), 1]}, "low < high"),
        ({"choice": []}, "at least one"),
        ({}, "exactly one of"),
        ({"uniform": [1, 2], "choice": [1]}, "exactly one of"),
        ({"uniform": [1, 2, 3]}, "space.sinkhorn.blur.uniform"),
        ({"int": [0.5, 3]}, "space.sinkhorn.blur.int"),
    ],
)
def test_distribution_that_cannot_be_drawn_from_is_refused(tmp_path: Path, space: dict[str, Any], rule: str) -> None:
    message = refusal(tmp_path, space={"sinkhorn.blur": space})
    assert "sinkhorn.blur" in message
    assert rule in message


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "a/b", "x" * 65, 3])
def test_name_that_is_no_folder_is_refused(tmp_path: Path, name: Any) -> None:
    assert "name" in refusal(tmp_path, name=name)


def test_name_of_a_baseline_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "baseline 'a/b'" in refusal(tmp_path, baselines={"a/b": {}})


def test_unknown_objective_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'accuracy_logreg'?" in refusal(tmp_path, objective="accuracy_logref")


@pytest.mark.parametrize("objective", ["accuracy", "accuracy_cnn"])
def test_objective_that_no_trial_would_report_is_refused(tmp_path: Path, objective: str) -> None:
    message = refusal(tmp_path, objective=objective)
    assert f"objective '{objective}' needs evaluation.classifiers" in message
    assert "cnn" in message


def test_objective_that_a_baseline_would_not_report_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, baselines={"blind": {"evaluation": {"classifiers": ["cnn"]}}})
    assert "needs evaluation.classifiers to hold logreg" in message


@pytest.mark.parametrize("generator", ["conv_cond", 3, ["conv_cond"], None, {"kind": "gan"}])
def test_generator_that_is_no_group_is_refused_in_one_line(tmp_path: Path, generator: Any) -> None:
    assert "generator" in refusal(tmp_path, trial={**SMALL["trial"], "generator": generator})


def test_study_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(InputError, match="must hold key: value settings"):
        load_study(path)


def test_searched_values_reach_the_trial(tmp_path: Path) -> None:
    study = load(tmp_path)
    config = study.configure({"optimizer.lr": 0.005, "sinkhorn.blur": 0.5})
    assert (config.optimizer.lr, config.sinkhorn.blur, config.privacy.batch_size) == (0.005, 0.5, 100)


def test_a_configuration_leaves_the_base_trial_as_it_was(tmp_path: Path) -> None:
    study = load(tmp_path)
    before = study.model_dump()
    study.configure({"privacy.batch_size": 50})
    assert study.model_dump() == before


def test_a_baseline_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    study = load(tmp_path, baselines={"large": {"privacy": {"batch_size": 200}}})
    large, base = study.baseline("large"), study.configure({})
    assert large.privacy.batch_size == 200
    assert large.model_copy(update={"privacy": base.privacy}) == base


CONTROL_PRIVACY = {"noise_multiplier": None, "step_limit": None}


def test_a_baseline_of_another_kind_replaces_the_whole_group(tmp_path: Path) -> None:
    control = {"generator": {"kind": "class_mean"}, "privacy": CONTROL_PRIVACY}
    study = load(tmp_path, baselines={"control": control})
    assert study.baseline("control").generator.model_dump() == {"kind": "class_mean", "noise_std": 0.3}


def test_a_baseline_of_the_same_kind_keeps_the_group(tmp_path: Path) -> None:
    study = load(tmp_path, baselines={"same": {"generator": {"kind": "conv_cond", "latent_dim": 3}}})
    generator = study.baseline("same").generator.model_dump()
    assert (generator["latent_dim"], generator["hidden_dim"]) == (3, 4)


@pytest.mark.parametrize("keys", [("generator.kind", "generator.noise_std"), ("generator.noise_std", "generator.kind")])
def test_dotted_keys_of_a_baseline_mean_the_same_in_any_order(tmp_path: Path, keys: tuple[str, str]) -> None:
    values = {"generator.kind": "class_mean", "generator.noise_std": 0.7}
    study = load(tmp_path, baselines={"control": {key: values[key] for key in keys} | {"privacy": CONTROL_PRIVACY}})
    assert study.baseline("control").generator.model_dump() == {"kind": "class_mean", "noise_std": 0.7}


def test_dotted_keys_reach_into_groups_that_the_base_leaves_out() -> None:
    assert merge({}, {"a": {"b.c": 1}, "a.d": 2}) == {"a": {"b": {"c": 1}, "d": 2}}


def test_a_value_out_of_range_is_found_before_the_data_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "load_dataset", lambda *_, **__: pytest.fail("the data were touched"))
    assert "sinkhorn.debias_ratio" in refusal(tmp_path, trial={**SMALL["trial"], "sinkhorn": {"debias_ratio": 2}})


def test_trials_on_different_data_are_no_study(tmp_path: Path) -> None:
    study = load(tmp_path, baselines={"other": {"data": {"validation_size": 100}}})
    with pytest.raises(InputError, match="data must be the same in all trials"):
        check_study(study, None)


def test_a_study_without_validation_images_is_refused(tmp_path: Path) -> None:
    study = load(tmp_path, trial={**SMALL["trial"], "data": {"name": "digits", "validation_size": 0}})
    with pytest.raises(InputError, match="nothing to select on"):
        check_study(study, None)


def test_a_space_in_which_no_trial_affords_a_step_is_refused(tmp_path: Path) -> None:
    trial = {**SMALL["trial"], "privacy": {**SMALL["trial"]["privacy"], "target_epsilon": 0.01}}
    study = load(tmp_path, trial=trial, space={"privacy.noise_multiplier": {"uniform": [0.5, 1]}})
    with pytest.raises(InputError, match=r"allows no step within epsilon 0\.01"):
        check_study(study, None)


def test_a_plan_counts_every_trial_at_its_worst(tmp_path: Path) -> None:
    space = {"privacy.noise_multiplier": {"uniform": [2, 5]}, "optimizer.lr": {"uniform": [1e-3, 1e-2]}}
    plan = check_study(load(tmp_path, space=space, algorithm={"trials": 3}, baselines={"base": {}}), None)
    assert plan.worst_trial
    assert plan.worst_trial.noise_multiplier == 2
    assert len(plan.costs) == 4
    assert plan.costs[0] not in plan.costs[1:]
    assert len(set(plan.costs[1:])) == 1


def test_storage_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(tmp_path / "file" / "study")


def test_the_storage_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_storage(tmp_path / "new" / "study")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_loads_and_plans(path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(path)
    data = DataConfig.model_validate(study.trial.get("data", {}))
    if data.name != "digits":  # not at hand: a plan asks for no more than the number of records
        monkeypatch.setattr(preflight, "load_dataset", lambda *_, **__: stand_in(digits, private_records(data)))
    plan = check_study(study, None)
    assert len(plan.costs) == len(study.baselines) + study.algorithm.trials


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_that_ships_loads_and_affords_its_steps(path: Path) -> None:
    config = load_config(path)
    plan = derive_plan(config, private_records(config.data))
    assert plan.steps >= 1
    assert plan.epsilon(plan.steps) <= config.privacy.target_epsilon


def stand_in(digits: ImageData, count: int) -> ImageData:
    """So many records, all alike, without the memory."""
    images, labels = digits.train.images[:1].expand(count, -1, -1, -1), digits.train.labels[:1].expand(count)
    return replace(digits, train=replace(digits.train, images=images, labels=labels))
