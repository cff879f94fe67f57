"""The study file: what it may say, and that what it may not say is found before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpsink.config import DataConfig, load_config
from dpsink.data import ImageData, private_records
from dpsink.errors import InputError
from dpsink.privacy.accounts import TrialCosts
from dpsink.privacy.ledger import TrialCost
from dpsink.privacy.plan import derive_plan
from tune import preflight
from tune.folder import StudyFolder
from tune.preflight import check_storage, check_study
from tune.space import Distribution
from tune.study import Study, load_study, merge
from tune.sweep import open_accounts

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL: dict[str, Any] = {
    "name": "small",
    "trial": {
        "generator": {"hidden_dim": 4},
        "privacy": {"noise_multiplier": 3, "delta": 5e-5, "batch_size": 100, "step_limit": 20},
        "evaluation": {"samples": 100, "classifiers": ["logreg"]},
    },
    "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}},
    "objectives": ["accuracy_logreg"],
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
    assert "unknown key 'objectiv'; did you mean 'objectives'?" in refusal(tmp_path, objectiv=["fid"])


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
    assert f"path '{path}' must be the same in all trials" in message


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


def test_inception_weights_that_the_environment_does_not_name_are_told_before_a_trial_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    trial = {"privacy": {"noise_multiplier": 3, "delta": 5e-5}, "evaluation": {"extractor": "inception"}}
    with pytest.raises(InputError, match="no Inception weights there"):
        check_study(load(tmp_path, trial=trial), None)
    (tmp_path / "w.pth").touch()
    monkeypatch.setenv("DPSINK_INCEPTION_WEIGHTS", str(tmp_path / "w.pth"))  # the way to give them to a study
    assert check_study(load(tmp_path, trial=trial), None).extractor == "inception@180"


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


@pytest.mark.parametrize("storage", ["s3://bucket/studies", "gs://bucket"])
def test_storage_in_an_object_store_is_refused(storage: str) -> None:
    """It would be a local folder of that name, which no other node sees."""
    with pytest.raises(ValueError, match="must be a folder, on a cluster one that all nodes share"):
        Study(name="any", storage=storage)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "a/b", "x" * 65, 3])
def test_name_that_is_no_folder_is_refused(tmp_path: Path, name: Any) -> None:
    assert "name" in refusal(tmp_path, name=name)


def test_name_of_a_baseline_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "baseline 'a/b'" in refusal(tmp_path, baselines={"a/b": {}})


def test_unknown_objective_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'accuracy_logreg'?" in refusal(tmp_path, objectives=["accuracy_logref"])


@pytest.mark.parametrize("objective", ["accuracy", "accuracy_cnn"])
def test_objective_that_no_trial_would_report_is_refused(tmp_path: Path, objective: str) -> None:
    message = refusal(tmp_path, objectives=[objective])
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
    control, baseline, *searched = plan.terms.planned
    assert (control.sample_rate, baseline.noise_multiplier) == (1, 3)
    assert len(searched) == 3
    assert {cost.noise_multiplier for cost in searched} == {2}


@pytest.mark.parametrize(("bound", "refused"), [(10.0, True), (10.5, False)])
def test_a_bound_that_no_searched_trial_fits_under_beside_the_control_is_refused(
    tmp_path: Path, bound: float, refused: bool
) -> None:
    """The control spends its target, 10; a searched trial 0.4 more."""
    study = load(tmp_path, ledger={"study_epsilon": bound})
    if not refused:
        assert check_study(study, None).terms.common["study_epsilon"] == bound
        return
    with pytest.raises(InputError, match="study_epsilon=10 leaves no room for a searched trial") as caught:
        check_study(study, None)
    assert "\n" not in str(caught.value)


def test_storage_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(tmp_path / "file" / "study")


def test_the_storage_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_storage(tmp_path / "new" / "study")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_ships_loads_and_plans(path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(path)
    data = DataConfig.model_validate(study.trial.get("data", {}))
    if data.name != "digits":  # not at hand: a plan asks for no more than the number of records
        monkeypatch.setattr(preflight, "load_dataset", lambda *_, **__: stand_in(digits, private_records(data)))
    plan = check_study(study, None)
    assert len(plan.terms.planned) == study.trials


@pytest.mark.slow
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


# Studies of which only the winner is published.


SEALED: dict[str, Any] = {"ledger": {"policy": "release_best", "selection": {"expected_trials": 10}}}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"ledger": {"policy": "release_best"}}, "release_best and selection go together"),
        ({"ledger": {"selection": {"expected_trials": 10}}}, "release_best and selection go together"),
        ({"ledger": {**SEALED["ledger"], "study_epsilon": 3}}, "study_epsilon follows from the selection"),
        ({"ledger": {"policy": "release_best", "selection": {"expected_trials": 1}}}, "greater than 1"),
        ({"ledger": {"policy": "release_best", "selection": {"expected_trials": 5, "shape": "flat"}}}, "geometric"),
        ({**SEALED, "algorithm": {"kind": "optuna"}}, "algorithm.kind must be random"),
        ({**SEALED, "algorithm": {"trials": 10}}, "algorithm.trials is drawn in secret"),
        ({**SEALED, "algorithm": {"seed": 0}}, "algorithm.seed is drawn in secret"),
        ({**SEALED, "baselines": {"base": {}}}, "run them as their own study"),
    ],
)
def test_what_does_not_go_with_a_selection_is_refused(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(tmp_path, **changes)


def test_a_sealed_study_is_written_down_without_a_number_of_trials_and_a_seed(tmp_path: Path) -> None:
    assert yaml.safe_load(load(tmp_path, **SEALED).to_yaml())["algorithm"] == {
        "kind": "random",
        "seeds_per_configuration": 1,
    }


def test_a_sealed_study_needs_no_space(tmp_path: Path) -> None:
    """Then the best of many runs of one configuration is published."""
    assert len(check_study(load(tmp_path, **SEALED, space={}), None).terms.planned) == 1


@pytest.mark.parametrize(("sigmas", "told"), [([3, 4], False), (list(range(3, 12)), True)])
def test_grid_of_many_mechanisms_says_beforehand_that_their_budgets_take_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sigmas: list[int], told: bool
) -> None:
    caplog.set_level("INFO", "dpsink")
    space = {"privacy.noise_multiplier": {"choice": sigmas}}
    check_study(load(tmp_path, space=space, algorithm={"kind": "grid"}), None)
    assert ("may cost in 9 settings" in caplog.text) is told


@pytest.mark.parametrize(("shape", "expected"), [("logarithmic", 1.78), ("geometric", 2.14)])
def test_a_selection_in_a_study_file_costs_the_measured_epsilon(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch, shape: str, expected: float
) -> None:
    """E[K] = 10 over trials with ε = 1 by RDP: σ 1.1, q = 50/60,000, 65,601 steps, δ 1e-5."""
    monkeypatch.setattr(preflight, "load_dataset", lambda *_, **__: stand_in(digits, 60_000))
    privacy = {"noise_multiplier": 1.1, "batch_size": 50, "delta": 1e-5, "target_epsilon": 1, "step_limit": 65_601}
    ledger = {"policy": "release_best", "selection": {"expected_trials": 10, "shape": shape}}
    study = load(tmp_path, trial={**SMALL["trial"], "privacy": privacy}, ledger=ledger)
    plan = check_study(study, None)
    with open_accounts(study, StudyFolder(tmp_path / "study"), plan) as accounts:
        statement = accounts.statement(plan.target_epsilon)
    assert statement.study_epsilon == pytest.approx(expected, abs=0.006)


NOISY_SPACE = {"privacy.noise_multiplier": {"log_uniform": [5, 20]}, "privacy.batch_size": {"choice": [100, 500]}}


def test_a_selection_covers_what_lies_between_the_corners_of_its_space(tmp_path: Path) -> None:
    """With the corners alone, six in ten proposals cost a little more at some Rényi order, and were refused."""
    trial = {**SMALL["trial"], "privacy": {"noise_multiplier": 9, "delta": 5e-5, "target_epsilon": 1}}
    study = load(tmp_path, **SEALED, trial=trial, space=NOISY_SPACE)
    plan = check_study(study, None)
    values = [{path: space.at(quantile) for path, space in study.space.items()} for quantile in (0.1, 0.4, 0.6, 0.9)]
    inside = [TrialCosts.of(derive_plan(study.configure(one), len(plan.data.train))) for one in values]
    with open_accounts(study, StudyFolder(tmp_path / "study"), plan) as accounts:
        assert [accounts.covers(costs) for costs in inside] == [True] * 4


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        ({"uniform": [2, 4]}, 2, 3),
        ({"log_uniform": [1, 100]}, 1, 10),
        ({"int": [1, 4]}, 1, 3),
        ({"choice": ["a", "b"]}, "a", "b"),
    ],
)
def test_a_quantile_of_a_dimension_is_where_its_proposals_are_split(space: dict[str, Any], low: Any, high: Any) -> None:
    dimension = Distribution.model_validate(space)
    assert (dimension.at(0.0), dimension.at(0.5)) == (low, pytest.approx(high) if isinstance(high, int) else high)


# Studies on private validation images.


def noisy(**evaluation: Any) -> dict[str, Any]:
    """The base trial, scored by private validation images."""
    trial = SMALL["trial"]
    return {
        **trial,
        "data": {"name": "digits", "validation": "private"},
        "privacy": {**trial["privacy"], "score_noise": 20},
        "evaluation": {**trial["evaluation"], **evaluation},
    }


def test_a_plan_counts_every_private_score_of_every_trial(tmp_path: Path) -> None:
    study = load(tmp_path, trial=noisy(points=3), algorithm={"trials": 2}, baselines={"base": {}})
    control, *rest = check_study(study, None).terms.planned_scores
    assert (control, rest) == (TrialCost(1.0, 20.0, 1), [TrialCost(1.0, 20.0, 3)] * 3)


def test_a_plan_counts_private_scores_at_their_worst(tmp_path: Path) -> None:
    space = {"privacy.score_noise": {"uniform": [10, 30]}}
    terms = check_study(load(tmp_path, trial=noisy(), space=space, algorithm={"trials": 2}), None).terms
    assert terms.planned_scores == (TrialCost(1.0, 20.0, 1), *[TrialCost(1.0, 10.0, 1)] * 2)
    assert (terms.adaptive, terms.adaptive_scores) == (False, True)


@pytest.mark.parametrize("objective", ["fid", "variety"])
def test_what_private_validation_images_do_not_tell_is_no_objective(tmp_path: Path, objective: str) -> None:
    assert "needs data.validation=public" in refusal(tmp_path, trial=noisy(), objectives=[objective])


# What a study file may say.


EVERYTHING: dict[str, dict[str, Any]] = {
    "as it is": {},
    "int and choice": {
        "space": {"sinkhorn.gen_batch_size": {"int": [8, 16]}, "sinkhorn.cost": {"choice": ["l2", "l1"]}}
    },
    "grid": {"algorithm": {"kind": "grid"}, "space": {"optimizer.lr": {"log_uniform": [1e-3, 1e-2], "points": 3}}},
    "list": {"algorithm": {"kind": "listed", "configurations": [{"optimizer.lr": 0.01}]}, "space": {}},
    "conditions": {
        "space": {
            "sinkhorn.cost": {"choice": ["l2", "l1+l2"]},
            "sinkhorn.l1_weight": {"uniform": [1, 3], "when": {"sinkhorn.cost": "l1+l2"}},
        }
    },
    "several objectives and seeds": {
        "objectives": ["fid", "accuracy_logreg"],
        "algorithm": {"kind": "optuna", "trials": 4, "seeds_per_configuration": 3},
    },
    "scheduler": {
        "scheduler": {"kind": "asha", "grace": 0.2, "reduction": 2},
        "trial": {**SMALL["trial"], "evaluation": {**SMALL["trial"]["evaluation"], "points": 5}},
    },
    "price and account": {"resources": {"price_per_hour": 2.5}, "ledger": {"study_epsilon": 30}},
    "without privacy": {
        "trial": {**SMALL["trial"], "privacy": {"target_epsilon": float("inf"), "steps": 5, "batch_size": 100}}
    },
    "sealed": {"ledger": {"policy": "release_best", "selection": {"expected_trials": 10}}},
}


@pytest.mark.parametrize("changes", EVERYTHING.values(), ids=EVERYTHING)
def test_a_study_that_was_written_down_loads_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    study = load(tmp_path, **changes)
    (tmp_path / "again.yaml").write_text(study.to_yaml(), encoding="utf-8")
    again = load_study(tmp_path / "again.yaml")
    assert again == study
    assert again.to_yaml() == study.to_yaml()


def test_a_preset_is_the_base_of_the_trial(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    preset = {"optimizer": {"lr": 0.004, "schedule": "cosine"}, "privacy": {"noise_multiplier": 9, "delta": 5e-5}}
    (tmp_path / "presets/base.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
    study = load(tmp_path, preset="presets/base.yaml", trial={**SMALL["trial"], "optimizer": {"lr": 0.002}})
    config = study.configure({})
    assert (config.optimizer.lr, config.optimizer.schedule, config.privacy.noise_multiplier) == (0.002, "cosine", 3)
    assert study.preset is None  # its settings are in the trial: the study folder needs no other file


def test_a_preset_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere.yaml: no such file" in refusal(tmp_path, preset="nowhere.yaml")


COSTS = {"sinkhorn.cost": {"choice": ["l2", "l1+l2"]}}
RATES = {"optimizer.lr": {"log_uniform": [1e-3, 1e-2]}}
WEIGHT = {"uniform": [1, 3], "when": {"sinkhorn.cost": "l1+l2"}}
REPORTING = {**SMALL["trial"], "evaluation": {**SMALL["trial"]["evaluation"], "points": 4}}


SLOW = {"optimizer.lr": 0.001}
LISTED: dict[str, Any] = {"kind": "listed", "configurations": [SLOW, {"optimizer.lr": 0.002}]}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"objectives": []}, "must name at least one metric"),
        ({"objectives": "accuracy"}, "must be a list, such as [accuracy]"),
        ({"objectives": ["fid", "fid"]}, "must name each metric once"),
        ({"objective": "fid"}, "unknown key 'objective'; did you mean 'objectives'?"),
        ({"objectives": ["accuracy_logreg", "accuracy_cnn"]}, "objective 'accuracy_cnn' needs"),
        ({"algorithm": {"kind": "grid"}}, "space.optimizer.lr needs points"),
        ({"algorithm": {"kind": "grid", "trials": 3}, "space": COSTS}, "algorithm.trials follows from the space"),
        ({"algorithm": {"kind": "grid"}, "space": {"sinkhorn.gen_batch_size": {"int": [2, 10**6]}}}, "100,000 points"),
        ({"space": {"optimizer.lr": {"uniform": [0.1, 0.2], "points": 3}}}, "points is for algorithm.kind=grid"),
        ({"space": {"sinkhorn.cost": {"choice": ["l2"], "points": 3}}}, "points=3 is for numbers"),
        ({"space": {"sinkhorn.cost": {"choice": [["l2"]]}}}, "plain values"),
        ({"space": {"sinkhorn.l1_weight": WEIGHT}}, "sinkhorn.l1_weight.when: 'sinkhorn.cost' is not searched"),
        ({"space": {"seed": {"int": [1, 3]}}}, "set algorithm.seeds_per_configuration instead"),
        ({"algorithm": {"seeds_per_configuration": 0}}, "algorithm.seeds_per_configuration=0"),
        ({"scheduler": {"kind": "asha"}}, "evaluation.points=1 gives scheduler.grace=0.1 no report"),
        ({"scheduler": {"kind": "asha", "grace": 0.8}, "trial": REPORTING}, "set at least 5"),
        ({"scheduler": {"kind": "asha", "grace": 1}}, "scheduler.grace=1"),
        ({"scheduler": {"grace": 0.2}}, "grace=0.2 has no effect with kind=none"),
        ({"scheduler": {"reduction": 2}}, "reduction=2 has no effect with kind=none"),
        ({"algorithm": {"kind": "grid", "seed": 1}, "space": COSTS}, "seed=1 has no effect with kind=grid"),
        ({"algorithm": {**LISTED, "seed": 1}, "space": {}}, "seed=1 has no effect with kind=listed"),
        ({"scheduler": {"kind": "asha", "reduction": 1}}, "scheduler.reduction=1"),
        ({"scheduler": {"kind": "asha"}, "algorithm": {"seeds_per_configuration": 2}}, "the mean needs every seed"),
        ({"scheduler": {"kind": "asha"}, "objectives": ["fid", "accuracy_logreg"]}, "none with several objectives"),
        ({**SEALED, "scheduler": {"kind": "asha"}}, "scheduler.kind must be none under release_best"),
        ({**SEALED, "objectives": ["fid", "accuracy_logreg"]}, "objectives must be one under release_best"),
        ({**SEALED, "algorithm": {"seeds_per_configuration": 2}}, "seeds_per_configuration must be 1"),
        ({"baselines": {"control": {}}}, "baseline 'control' must be of generator.kind=class_mean"),
        ({"resources": {"price_per_hour": -1}}, "resources.price_per_hour=-1"),
        ({"algorithm": {"kind": "listed"}, "space": {}}, "must list at least one"),
        ({"algorithm": LISTED}, "space is for a search"),
        ({"algorithm": {**LISTED, "trials": 2}, "space": {}}, "algorithm.trials follows from the configurations"),
        ({"algorithm": {**LISTED, "configurations": [SLOW, SLOW]}, "space": {}}, "configurations must differ"),
        ({"algorithm": {**LISTED, "kind": "random"}}, "configurations is for algorithm.kind=listed"),
        (
            {"algorithm": {**LISTED, "configurations": [{"optimizer.rate": 1}]}, "space": {}},
            "'optimizer.rate'",
        ),
        ({"algorithm": {**LISTED, "configurations": [{"optimizer.lr": -1}]}, "space": {}}, "optimizer.lr=-1"),
        ({"algorithm": {**LISTED, "configurations": [{"seed": 1}]}, "space": {}}, "path 'seed' is not searched"),
        ({"algorithm": {**LISTED, "configurations": [{"data.name": "mnist"}]}, "space": {}}, "the same in all trials"),
        ({"repeats": "studies/other"}, "repeats is for algorithm.kind=listed"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(tmp_path, **changes)


def test_all_mistaken_paths_of_a_space_are_told_at_once(tmp_path: Path) -> None:
    one = {"choice": [1]}
    told = refusal(tmp_path, space={"optimizer.rate": one, "sinkhorn.blurr": one, "data.size": one})
    assert all(f"path '{path}'" in told for path in ("optimizer.rate", "sinkhorn.blurr", "data.size"))


def test_what_a_scheduler_can_act_on_is_taken(tmp_path: Path) -> None:
    assert load(tmp_path, scheduler={"kind": "asha", "grace": 0.75}, trial=REPORTING).scheduler.reduction == 3


KINDS = {"generator.kind": {"choice": ["conv_cond", "cond_biggan"]}}


def test_a_path_exists_where_every_kind_with_which_it_is_searched_has_it(tmp_path: Path) -> None:
    study = load(tmp_path, space={**KINDS, "generator.hidden_dim": {"int": [4, 8]}})
    assert study.configure({"generator.kind": "cond_biggan", "generator.hidden_dim": 5}).generator.hidden_dim == 5  # type: ignore[union-attr]


def test_a_path_that_one_of_the_kinds_lacks_is_refused(tmp_path: Path) -> None:
    space = {"generator.kind": {"choice": ["conv_cond", "class_mean"]}, "generator.hidden_dim": {"int": [4, 8]}}
    assert "space path 'generator.hidden_dim' does not exist" in refusal(tmp_path, space=space)


def test_every_edge_is_tried_under_each_of_its_conditions(tmp_path: Path) -> None:
    space = {**COSTS, "sinkhorn.l1_weight": {"uniform": [1, 101], "when": {"sinkhorn.cost": "l1+l2"}}}
    assert "sinkhorn.l1_weight=101" in refusal(tmp_path, space=space)


def test_what_is_not_searched_keeps_the_value_of_the_trial(tmp_path: Path) -> None:
    space = {**COSTS, "sinkhorn.l1_weight": WEIGHT}
    study = load(tmp_path, space=space, trial={**SMALL["trial"], "sinkhorn": {"l1_weight": 7}})
    assert study.configure({"sinkhorn.cost": "l2"}).sinkhorn.l1_weight == 7


# The control.


def test_every_study_has_the_class_mean_control(tmp_path: Path) -> None:
    study = load(tmp_path)
    assert list(study.baselines) == ["control"]
    assert study.baseline("control").generator.kind == "class_mean"


def test_a_control_of_ones_own_is_enough(tmp_path: Path) -> None:
    own = {"generator": {"kind": "class_mean"}, "privacy": CONTROL_PRIVACY}
    assert list(load(tmp_path, baselines={"means": own}).baselines) == ["means"]


def test_the_control_comes_before_other_baselines(tmp_path: Path) -> None:
    assert list(load(tmp_path, baselines={"base": {}}).baselines) == ["control", "base"]


@pytest.mark.parametrize(("changes"), [SEALED, EVERYTHING["without privacy"]])
def test_a_study_that_can_have_no_control_has_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert load(tmp_path, **changes).baselines == {}


@pytest.mark.parametrize(
    ("data", "clip_norm"),
    [({"name": "digits"}, 4), ({"name": "mnist"}, 14), ({"name": "celeba"}, 27.71), ({"name": "mnist", "size": 14}, 7)],
)
def test_the_control_clips_at_the_size_of_an_image(tmp_path: Path, data: dict[str, Any], clip_norm: float) -> None:
    study = load(tmp_path, trial={**SMALL["trial"], "data": {"validation_size": 180, **data}})
    assert study.baseline("control").privacy.clip_norm == pytest.approx(clip_norm)


# What it costs.


NOISE = {"privacy.noise_multiplier": {"uniform": [2, 4], "points": 3}}


def test_a_grid_is_planned_point_by_point_and_its_costs_are_fixed(tmp_path: Path) -> None:
    terms = check_study(load(tmp_path, algorithm={"kind": "grid"}, space=NOISE), None).terms
    assert [cost.noise_multiplier for cost in terms.planned[1:]] == [2, 3, 4]
    assert not terms.adaptive


def test_a_list_is_planned_as_it_stands(tmp_path: Path) -> None:
    listed = [{"privacy.noise_multiplier": 2}, {"privacy.noise_multiplier": 4, "optimizer.lr": 0.01}]
    study = load(tmp_path, algorithm={"kind": "listed", "configurations": listed}, space={})
    terms = check_study(study, None).terms
    assert [cost.noise_multiplier for cost in terms.planned[1:]] == [2, 4]
    assert not terms.adaptive
    assert study.searched == ("privacy.noise_multiplier", "optimizer.lr")


def test_a_grid_with_a_point_that_affords_no_step_is_refused(tmp_path: Path) -> None:
    privacy = {**SMALL["trial"]["privacy"], "target_epsilon": 0.01}
    space = {"privacy.noise_multiplier": {"uniform": [1, 2], "points": 2}}
    study = load(tmp_path, algorithm={"kind": "grid"}, space=space, trial={**SMALL["trial"], "privacy": privacy})
    with pytest.raises(InputError, match="noise_multiplier=1 allows no step"):
        check_study(study, None)


def test_every_seed_is_planned(tmp_path: Path) -> None:
    algorithm = {"trials": 2, "seeds_per_configuration": 3}
    study = load(tmp_path, algorithm=algorithm, baselines={"base": {}})
    planned = check_study(study, None).terms.planned
    assert len(planned) == study.trials == 12
    assert [cost.sample_rate == 1 for cost in planned] == [True] * 3 + [False] * 9


def test_a_cost_under_a_condition_is_planned(tmp_path: Path) -> None:
    space = {**COSTS, "privacy.noise_multiplier": {"uniform": [2, 4], "when": {"sinkhorn.cost": "l2"}}}
    plan = check_study(load(tmp_path, space=space, algorithm={"trials": 1}), None)
    assert sorted(one.noise_multiplier for one in plan.searched) == [2, 3, 4]
    assert plan.terms.planned[-1].noise_multiplier == 2
