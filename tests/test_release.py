"""What may leave a trial: the list is complete, and what is not on it is refused."""

import re
from pathlib import Path

import pytest

from dpsink.checkpoint import save_checkpoint
from dpsink.config import Performance, TrialConfig, flatten, load_config
from dpsink.data import ImageData
from dpsink.engine import Trial, TrialStack, initial_state
from dpsink.entropy import OsEntropy
from dpsink.evaluation import CLASSIFIERS
from dpsink.privacy.plan import PrivacyPlan
from dpsink.privacy.release import (
    CHECKPOINT,
    CHECKPOINT_FILES,
    METRICS,
    NEVER,
    REPORT,
    ReleaseRefused,
    check_checkpoint,
    check_files,
    check_metrics,
    check_report,
)
from dpsink.records import CheckpointState, Report
from dpsink.training import worst_metrics
from tune import schema

GOOD = Report(
    step=1, charged=1, epsilon=1.0, budget_fraction=0.5, steps_per_second=1.0, status="running", metrics={"fid": 1.0}
)  # fmt: skip


def checkpoint(**more: object) -> dict[str, object]:
    state = CheckpointState(
        config=TrialConfig(), plan={}, image_shape=(1, 8, 8), num_classes=10, data_fingerprint="", step=1,
        reports=(GOOD,),
    )  # fmt: skip
    return {**state.model_dump(), **more}


def test_list_names_exactly_the_fields_of_a_report() -> None:
    assert set(REPORT) == set(Report.model_fields)


def test_list_names_exactly_the_fields_of_a_checkpoint() -> None:
    assert set(CHECKPOINT) == set(CheckpointState.model_fields)


def test_list_names_exactly_the_metrics_of_a_trial() -> None:
    assert set(METRICS) == set(worst_metrics(CLASSIFIERS))


def test_list_names_exactly_the_files_of_a_checkpoint(digits: ImageData, tmp_path: Path) -> None:
    config = load_config(None, ["generator.hidden_dim=2"])
    description = CheckpointState.model_validate(checkpoint())
    folder = save_checkpoint(tmp_path, description, initial_state(config, digits.train), b"")
    assert {path.name for path in folder.iterdir()} == set(CHECKPOINT_FILES)


def test_everything_that_tracking_calls_a_metric_is_listed() -> None:
    check_metrics(schema.QUALITY)
    assert {schema.EPSILON, schema.BUDGET_FRACTION, schema.SPEED} <= set(REPORT)
    assert schema.GRID_ARTIFACT in CHECKPOINT_FILES


def test_good_report_passes() -> None:
    check_report(GOOD.model_dump())


def test_good_checkpoint_passes() -> None:
    check_checkpoint(checkpoint())


def test_metric_on_the_test_split_passes() -> None:
    check_metrics(["test_fid"])


@pytest.mark.parametrize("name", NEVER)
def test_unnoised_function_of_private_data_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(ReleaseRefused) as refusal:
        check_report({name: 1.0})
    assert name in str(refusal.value)
    assert NEVER[name] in str(refusal.value)


def test_field_that_nobody_argued_for_is_refused() -> None:
    with pytest.raises(ReleaseRefused, match="'mood' may not leave: it is not on the list"):
        check_report({**GOOD.model_dump(), "mood": 1.0})


def test_metric_inside_a_report_is_checked() -> None:
    with pytest.raises(ReleaseRefused, match="metric 'train_loss'"):
        check_report({**GOOD.model_dump(), "metrics": {"train_loss": 1.0}})


def test_report_inside_a_checkpoint_is_checked() -> None:
    with pytest.raises(ReleaseRefused, match="report field 'gradient_norm'"):
        check_checkpoint(checkpoint(reports=[{"gradient_norm": 1.0}]))


def test_checkpoint_field_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ReleaseRefused, match="checkpoint field 'realised_batch_size'"):
        check_checkpoint(checkpoint(realised_batch_size=5))


def test_file_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ReleaseRefused, match=r"checkpoint file 'batch\.npz'"):
        check_files(["model.safetensors", "batch.npz"])


def test_nothing_is_both_listed_and_refused() -> None:
    assert not set(NEVER) & {*REPORT, *METRICS, *CHECKPOINT, *CHECKPOINT_FILES}


def test_no_setting_is_named_after_what_never_leaves() -> None:
    assert not set(NEVER) & {leaf.rpartition(".")[2] for leaf in flatten(TrialConfig())}


def test_step_returns_nothing(digits: ImageData) -> None:
    """What a caller is not given it cannot log."""
    config = load_config(None, ["generator.hidden_dim=2", "sinkhorn.gen_batch_size=10"])
    plan = PrivacyPlan("record", len(digits.train), 0.1, 3.0, 5.0, 10, 10.0, 5e-5)
    stack = TrialStack(config, digits.train, Performance())
    stack.join(Trial(config, plan, initial_state(config, digits.train), OsEntropy()))
    assert stack.step() is None


def test_every_test_that_the_document_names_exists() -> None:
    document = Path(__file__).parents[1] / "docs" / "privacy.md"
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", document.read_text(encoding="utf-8"))
    source = {file: (Path(__file__).parent / file).read_text(encoding="utf-8") for file, _ in named}
    assert len(named) > 50
    assert [name for file, name in named if f"def {name}(" not in source[file]] == []
