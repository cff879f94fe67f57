"""The training loop: what it yields, what it charges, how it resumes."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dpsink import training
from dpsink.checkpoint import load_generator
from dpsink.config import Performance, TrialConfig, load_config
from dpsink.data import ImageData, load_dataset
from dpsink.engine import Trial, TrialStack, initial_state, learning_rate
from dpsink.errors import InputError
from dpsink.privacy.budget import charged_steps
from dpsink.privacy.noise import fresh_noise
from dpsink.privacy.plan import PrivacyPlan, derive_plan
from dpsink.records import latest_checkpoint, read_state
from dpsink.training import Ensemble, Report, Told, TrialRun, read_result, train
from tests.conftest import ReplayedEntropy

SMALL = [
    "generator.hidden_dim=4", "sinkhorn.gen_batch_size=10", "sinkhorn.cost=l2", "privacy.noise_multiplier=3",
    "privacy.delta=5e-5", "privacy.step_limit=6", "evaluation.points=2", "evaluation.samples=40",
    "evaluation.classifiers=[logreg]",
]  # fmt: skip


CONTROL = [
    "generator={kind: class_mean}", "privacy.noise_multiplier=null", "privacy.delta=5e-5", "privacy.clip_norm=4",
]  # fmt: skip
DRAWS = 2  # times that a step asks for entropy: membership and noise


def small(*overrides: str) -> TrialConfig:
    return load_config(None, [*SMALL, *overrides])


def run(config: TrialConfig, data: ImageData, folder: Path, **more) -> list[Report]:
    return list(train(config, data, folder, **more))


def after(count: int) -> Callable[[], bool]:
    """A stop signal that comes when it has been asked `count` times."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= count


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_generator(folder)[0].state_dict()


@pytest.mark.parametrize("mechanism", ["record", "batch"])
def test_reports_come_at_the_boundaries_and_end_completed(mechanism: str, digits: ImageData, tmp_path: Path) -> None:
    reports = run(small(f"privacy.mechanism={mechanism}", "privacy.batch_size=100"), digits, tmp_path / "run")
    assert [(report.step, report.status) for report in reports] == [(3, "running"), (6, "completed")]


def test_reported_epsilon_is_that_of_the_charged_steps(digits: ImageData, tmp_path: Path) -> None:
    config = small()
    reports = run(config, digits, tmp_path / "run")
    plan = derive_plan(config, len(digits.train))
    assert [report.epsilon for report in reports] == [plan.epsilon(3), plan.epsilon(6)]


def test_capped_trial_reports_what_it_spent_and_not_its_target(digits: ImageData, tmp_path: Path) -> None:
    last = run(small(), digits, tmp_path / "run")[-1]
    assert last.epsilon < 2
    assert last.budget_fraction == 1.0


def test_every_step_is_in_the_ledger(digits: ImageData, tmp_path: Path) -> None:
    run(small(), digits, tmp_path / "run")
    assert charged_steps(tmp_path / "run" / "ledger") == 6


def test_noise_is_drawn_only_after_its_reservation(digits: ImageData, tmp_path: Path) -> None:
    """The ledger already holds step k when the entropy of step k is asked for."""
    folder, seen = tmp_path / "run", []

    class Watching(ReplayedEntropy):
        def random_bytes(self, count: int) -> bytes:
            seen.append(charged_steps(folder / "ledger"))
            return super().random_bytes(count)

    run(small(), digits, folder, entropy=Watching(0))
    assert len(seen) == 6 * DRAWS
    assert all(charged >= index // DRAWS + 1 for index, charged in enumerate(seen))


def test_stopped_trial_resumes_to_the_weights_of_an_unbroken_one(digits: ImageData, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    entropy = ReplayedEntropy(0)
    run(small(), digits, whole, entropy=ReplayedEntropy(0))
    assert run(small(), digits, broken, entropy=entropy, should_stop=after(2)) == []
    run(small(), digits, broken, entropy=entropy)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(broken)[name], tensor, rtol=0, atol=0)


def test_clean_stop_charges_only_the_steps_that_ran(digits: ImageData, tmp_path: Path) -> None:
    config = small("privacy.step_limit=400")
    run(config, digits, tmp_path / "run", should_stop=after(150))
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert charged_steps(tmp_path / "run" / "ledger") == read_state(checkpoint).step


@pytest.mark.parametrize(
    ("points", "seconds", "step"),
    [
        # Six of eight steps were reserved and the checkpoint is at four: two are replayed, and not to be had twice.
        (2, training.CHECKPOINT_SECONDS, 6),
        # Far from any report: saved at every reservation, which is of one step here.
        (1, 0.0, 7),
    ],
)
def test_steps_after_the_last_checkpoint_are_lost_in_a_crash_run_again_and_paid_for_twice(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int, seconds: float, step: int
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)

    class Crash(ReplayedEntropy):
        calls = 0

        def random_bytes(self, count: int) -> bytes:
            self.calls += 1
            if self.calls > 5 * DRAWS:  # in the sixth step
                raise OSError("the machine died")
            return super().random_bytes(count)

    config, folder = small("privacy.step_limit=8", f"evaluation.points={points}"), tmp_path / "run"
    with pytest.raises(OSError, match="died"):
        run(config, digits, folder, entropy=Crash(0))
    last = run(config, digits, folder)[-1]
    assert (last.charged, last.step) == (8, step)


def test_checkpoint_between_two_reports_changes_neither_reports_nor_weights(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("privacy.step_limit=8", "evaluation.points=2")
    plain = run(config, digits, tmp_path / "plain", entropy=ReplayedEntropy(0))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    saving = run(config, digits, tmp_path / "saving", entropy=ReplayedEntropy(0))
    assert [told.metrics for told in saving] == [told.metrics for told in plain]
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "saving")[name], tensor, rtol=0, atol=0)


def test_trial_that_goes_on_tells_its_last_report_again_if_asked_to(digits: ImageData, tmp_path: Path) -> None:
    config, folder = small("privacy.step_limit=8", "evaluation.points=2"), tmp_path / "run"
    first = next(train(config, digits, folder))
    again = list(train(config, digits, folder, tell_again=True))
    assert [told.step for told in again] == [4, 8]
    assert again[0] == first


def test_charges_never_exceed_the_budget_however_often_it_crashes(digits: ImageData, tmp_path: Path) -> None:
    class Crash(ReplayedEntropy):
        def random_bytes(self, count: int) -> bytes:
            raise OSError("the machine died")

    config, folder = small(), tmp_path / "run"
    for _ in range(6):
        with pytest.raises(OSError, match="died"):
            run(config, digits, folder, entropy=Crash(0))
    (report,) = run(config, digits, folder)
    assert (report.step, report.charged, report.status) == (0, 6, "completed")


def test_completed_trial_is_not_trained_again(digits: ImageData, tmp_path: Path) -> None:
    run(small(), digits, tmp_path / "run")
    before = weights(tmp_path / "run")
    assert run(small(), digits, tmp_path / "run") == []
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    assert charged_steps(tmp_path / "run" / "ledger") == 6


def test_folder_of_another_trial_is_refused(digits: ImageData, tmp_path: Path) -> None:
    run(small(), digits, tmp_path / "run")
    with pytest.raises(InputError, match="another trial"):
        run(small("optimizer.lr=2e-3"), digits, tmp_path / "run")


def test_edited_config_does_not_open_the_ledger(digits: ImageData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(small(), digits, folder, should_stop=after(1))
    changed = small("privacy.noise_multiplier=1")
    (folder / "config.yaml").unlink()
    with pytest.raises(InputError, match="noise_multiplier"):
        run(changed, digits, folder)


def test_vanished_ledger_is_refused(digits: ImageData, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    run(small(), digits, folder, should_stop=after(2))
    shutil.rmtree(folder / "ledger")
    with pytest.raises(InputError, match="ledger"):
        run(small(), digits, folder)


def test_missing_inception_weights_are_told_before_a_step_is_charged(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError, match="no Inception weights there"):
        run(small("evaluation.extractor=inception"), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unwritable_folder_is_told(digits: ImageData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(small(), digits, tmp_path / "file" / "run")


def test_diverged_trial_reports_finite_worst_values(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpsink.engine.learning_rate", lambda *_: math.nan)
    (report,) = run(small(), digits, tmp_path / "run")
    assert report.status == "diverged"
    assert (report.metrics["accuracy_logreg"], report.metrics["fid"]) == (0.0, 1e6)


def test_non_private_trial_says_so(digits: ImageData, tmp_path: Path) -> None:
    from dpsink.judging import privacy_card, privacy_line

    overrides = [text for text in SMALL if "noise_multiplier" not in text and "step_limit" not in text]
    config = load_config(None, [*overrides, "privacy.target_epsilon=.inf", "privacy.steps=4"])
    assert math.isinf(run(config, digits, tmp_path / "run")[-1].epsilon)
    _, description = load_generator(tmp_path / "run")
    card = privacy_card(tmp_path / "run", description)
    assert "NON-PRIVATE" in privacy_line(card)
    assert "NON-PRIVATE" in json.dumps(card)


def test_control_is_one_charged_release(digits: ImageData, tmp_path: Path) -> None:
    config = load_config(None, [*CONTROL, "evaluation.samples=200"])
    (report,) = run(config, digits, tmp_path / "run")
    assert (report.step, report.charged) == (1, 1)
    assert 9.9 < report.epsilon <= 10
    assert report.metrics["accuracy_logreg"] > 0.8


def test_checkpoint_holds_no_statistic_of_the_private_batch(digits: ImageData, tmp_path: Path) -> None:
    """The list of what a checkpoint tells; anything new must be argued for here."""
    run(small(), digits, tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    told = json.loads((checkpoint / "state.json").read_text())
    assert set(told) == {
        "format", "config", "plan", "image_shape", "num_classes", "data_fingerprint", "step", "seconds",
        "witness", "score_witness", "reports",
    }  # fmt: skip
    assert set(told["reports"][0]) == {
        "step", "charged", "epsilon", "budget_fraction", "steps_per_second", "status", "metrics"
    }  # fmt: skip


def test_cosine_schedule_runs_from_the_rate_to_zero() -> None:
    config = small("optimizer.schedule=cosine", "optimizer.lr=1e-3")
    assert learning_rate(config, 0, 100) == 1e-3
    assert learning_rate(config, 50, 100) == pytest.approx(5e-4)
    assert learning_rate(config, 100, 100) == pytest.approx(0, abs=1e-12)


def test_generated_batch_never_has_the_size_of_the_real_one(digits: ImageData) -> None:
    """n is public: whatever the Poisson batch, the step generates n + r images."""
    config = small("sinkhorn.debias_ratio=0.25")
    stack = TrialStack(config, digits.train, Performance())
    sizes: list[int] = []
    stack.generators.modules[0].register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[0]))
    for rate in (1e-9, 0.5, 1.0):
        plan = PrivacyPlan("record", 1437, rate, 3.0, 5.0, 10, 10.0, 5e-5)
        slot = stack.join(Trial(config, plan, initial_state(config, digits.train), ReplayedEntropy(0)))
        stack.step()
        stack.leave(slot)
    assert sizes == [12, 12, 12]


def test_result_is_read_back(digits: ImageData, tmp_path: Path) -> None:
    reports = run(small(), digits, tmp_path / "run")
    assert read_result(tmp_path / "run") == reports[-1]


def test_batch_larger_than_the_data_is_refused(digits: ImageData) -> None:
    with pytest.raises(InputError, match=r"batch_size=2000.*1437"):
        derive_plan(small("privacy.batch_size=2000"), len(digits.train))


def test_delta_of_one_over_n_is_refused(digits: ImageData) -> None:
    with pytest.raises(InputError, match=r"delta=0\.001.*1/N"):
        derive_plan(small("privacy.delta=1e-3"), len(digits.train))


def test_target_without_a_step_names_the_smallest_sigma(digits: ImageData) -> None:
    config = small("privacy.target_epsilon=0.1", "privacy.noise_multiplier=0.5")
    with pytest.raises(InputError, match=r"choose at least \d"):
        derive_plan(config, len(digits.train))


def test_noise_is_calibrated_to_given_steps(digits: ImageData) -> None:
    overrides = [text for text in SMALL if "noise_multiplier" not in text and "step_limit" not in text]
    plan = derive_plan(load_config(None, [*overrides, "privacy.steps=300"]), len(digits.train))
    assert plan.steps == 300
    assert 9.9 < plan.epsilon(300) <= 10


def test_step_limit_beyond_the_budget_leaves_the_steps_that_the_budget_affords(digits: ImageData) -> None:
    limited = derive_plan(small("privacy.step_limit=100000000"), len(digits.train))
    assert limited.steps == derive_plan(small("privacy.step_limit=null"), len(digits.train)).steps
    assert limited.epsilon(limited.steps) <= 10 < limited.epsilon(limited.steps + 1)


def test_step_limit_within_the_budget_spares_the_search_for_all_that_it_affords(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("dpsink.privacy.plan.max_steps")
    assert derive_plan(small("privacy.step_limit=6"), len(digits.train)).steps == 6


def test_step_limit_that_cannot_be_accounted_leaves_the_steps_that_the_budget_affords(digits: ImageData) -> None:
    limited = derive_plan(small(f"privacy.step_limit={10**12}"), len(digits.train))
    assert limited.steps == derive_plan(small("privacy.step_limit=null"), len(digits.train)).steps


PRIVATE_SCORES = ["data.validation=private", "privacy.score_noise=3"]


def test_private_validation_releases_noisy_accuracies_and_nothing_else(digits: ImageData, tmp_path: Path) -> None:
    data = load_dataset(small(*PRIVATE_SCORES).data)
    reports = run(small(*PRIVATE_SCORES), data, tmp_path / "run")
    assert all(set(report.metrics) == {"accuracy_logreg"} for report in reports)


def test_private_scores_carry_noise(tmp_path: Path) -> None:
    """The same generator, scored twice, gets two scores; a count of 180 records has no third decimal."""
    data = load_dataset(small(*PRIVATE_SCORES).data)
    scores = [
        run(small(*PRIVATE_SCORES), data, tmp_path / name, entropy=ReplayedEntropy(seed))[0].metrics
        for seed, name in enumerate("ab")
    ]
    assert all((score["accuracy_logreg"] * 180) % 1 > 1e-9 for score in scores)


def test_every_private_score_is_in_a_ledger(tmp_path: Path) -> None:
    config = small(*PRIVATE_SCORES)
    run(config, load_dataset(config.data), tmp_path / "run")
    assert charged_steps(tmp_path / "run" / "score-ledger") == 2


def test_trial_with_private_scores_costs_the_larger_of_training_and_scores(tmp_path: Path) -> None:
    config = small(*PRIVATE_SCORES)
    last = run(config, load_dataset(config.data), tmp_path / "run")[-1]
    plan = derive_plan(config, 1437)
    assert last.epsilon == max(plan.epsilon(6), plan.score_epsilon(2)) == plan.score_epsilon(2)


def test_scores_that_cost_more_than_the_target_are_refused() -> None:
    with pytest.raises(InputError, match=r"score_noise=0\.3.*choose at least"):
        derive_plan(small("data.validation=private", "privacy.score_noise=0.3"), 1437)


def test_private_validation_without_score_noise_is_refused() -> None:
    with pytest.raises(InputError, match="go together"):
        small("data.validation=private")


def test_crash_between_the_last_checkpoint_and_the_result_is_made_good(digits: ImageData, tmp_path: Path) -> None:
    reports = run(small(), digits, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert run(small(), digits, tmp_path / "run") == reports[-1:]
    assert read_result(tmp_path / "run") == reports[-1]


def test_damaged_result_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"result\.json"):
        read_result(tmp_path)


# An ensemble: runs that come and go.

DOUBLE = Performance(precision="double", slots=2)


@pytest.fixture
def opened(digits: ImageData, tmp_path: Path) -> Iterator[Callable[..., TrialRun]]:
    """Opens runs, in float64, which end with the test."""
    with ExitStack() as stack:

        def open_run(name: str, *overrides: str, seed: int = 0, entropy: ReplayedEntropy | None = None) -> TrialRun:
            config = small(f"seed={seed}", *overrides)
            run = TrialRun.open(config, digits, tmp_path / name, entropy or ReplayedEntropy(seed))
            run.state.generator.to(torch.float64)
            return stack.enter_context(run)

        yield open_run


def charged(run: TrialRun) -> int:
    return charged_steps(run.folder / "ledger")


def advance(ensemble: Ensemble, times: int) -> list[Told]:
    return [told for _ in range(times) for told in ensemble.advance()]


def finish(ensemble: Ensemble) -> list[Told]:
    """Lets every run go on until it has ended, or failed."""
    told = []
    while ensemble.busy:
        for run, outcome in ensemble.advance():
            told.append((run, outcome))
            if isinstance(outcome, Report) and not run.ended:
                ensemble.add(run)
    return told


def flat(run: TrialRun) -> torch.Tensor:
    return torch.cat([value.flatten() for value in run.state.generator.state_dict().values()])


def test_runs_that_come_and_go_end_as_they_do_alone(opened: Callable[..., TrialRun]) -> None:
    alone = [opened(f"alone-{seed}", seed=seed) for seed in range(4)]
    for run in alone:
        ensemble = Ensemble(DOUBLE)
        ensemble.add(run)
        finish(ensemble)
    runs = [opened(str(seed), seed=seed) for seed in range(4)]
    ensemble = Ensemble(DOUBLE)
    for run in runs[:3]:
        ensemble.add(run)
    advance(ensemble, 2)
    ensemble.remove(runs[1])
    ensemble.add(runs[3])
    advance(ensemble, 1)
    ensemble.add(runs[1])
    finish(ensemble)
    for run, expected in zip(runs, alone, strict=True):
        assert [(report.step, report.charged, report.epsilon) for report in run.reports] == [
            (report.step, report.charged, report.epsilon) for report in expected.reports
        ]
        torch.testing.assert_close(flat(run), flat(expected), atol=1e-10, rtol=0)


def test_runs_that_join_one_by_one_share_a_stack_and_end_as_they_do_alone(opened: Callable[..., TrialRun]) -> None:
    alone = opened("alone")
    ensemble = Ensemble(DOUBLE)
    ensemble.add(alone)
    finish(ensemble)
    runs = [opened(str(seed), seed=seed) for seed in range(4)]
    ensemble = Ensemble(DOUBLE.model_copy(update={"slots": 4}))
    for run in runs:
        ensemble.add(run)
        ensemble.advance()
    assert runs[1].stack is runs[2].stack is runs[3].stack is not None
    ensemble.add(runs[0])
    finish(ensemble)
    torch.testing.assert_close(flat(runs[0]), flat(alone), atol=1e-10, rtol=0)


def test_noise_is_seeded_once_however_often_a_run_takes_a_slot(
    opened: Callable[..., TrialRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed for each slot would, over many studies, repeat one."""
    made: list[object] = []
    monkeypatch.setattr("dpsink.engine.fresh_noise", lambda *args: made.append(args) or fresh_noise(*args))
    ensemble = Ensemble()
    ensemble.add(opened("run"))
    finish(ensemble)
    assert len(made) == 1


def test_run_that_has_told_is_charged_nothing_until_it_is_added_again(opened: Callable[..., TrialRun]) -> None:
    held, neighbour = opened("held"), opened("neighbour", "privacy.step_limit=40", seed=1)
    ensemble = Ensemble(DOUBLE)
    ensemble.add(held)
    ensemble.add(neighbour)
    ((run, report),) = advance(ensemble, 4)
    advance(ensemble, 3)
    assert (run, charged(held), neighbour.state.step) == (held, 3, 7)
    assert isinstance(report, Report) and report.charged == 3


def test_removed_run_pays_only_for_what_it_ran(opened: Callable[..., TrialRun]) -> None:
    run = opened("run", "privacy.step_limit=4000")
    ensemble = Ensemble()
    ensemble.add(run)
    advance(ensemble, 71)
    assert charged(run) > 71
    ensemble.remove(run)
    checkpoint = latest_checkpoint(run.folder)
    assert checkpoint is not None
    assert (charged(run), read_state(checkpoint).step, ensemble.busy) == (71, 71, False)


def test_run_that_fails_leaves_the_others_in_peace(opened: Callable[..., TrialRun]) -> None:
    failing, sound = opened("failing"), opened("sound", seed=1)
    ensemble = Ensemble(DOUBLE)
    ensemble.add(failing)
    ensemble.add(sound)
    advance(ensemble, 1)
    failing.budget.close()  # its next reservation is refused
    (told, *_), late = advance(ensemble, 1), opened("late", seed=2)
    assert told[0] is failing and isinstance(told[1], RuntimeError)
    ensemble.add(late)
    finish(ensemble)
    assert [run.reports[-1].status for run in (sound, late)] == ["completed", "completed"]
    assert failing.reports == []


def test_step_that_fails_ends_its_own_stack_only(opened: Callable[..., TrialRun]) -> None:
    class Broken(ReplayedEntropy):
        def random_bytes(self, count: int) -> bytes:
            raise OSError("no entropy")

    broken, neighbour = opened("broken", entropy=Broken(0)), opened("neighbour", seed=1)
    other = opened("other", "sinkhorn.gen_batch_size=20")
    ensemble = Ensemble(DOUBLE.model_copy(update={"slots": 3}))
    for run in (broken, neighbour, other):
        ensemble.add(run)
    told = ensemble.advance()
    assert {run for run, _ in told} == {broken, neighbour}
    assert all(str(error) == "no entropy" for _, error in told)
    assert [run for run, _ in finish(ensemble)] == [other, other]


def test_control_and_generators_of_two_shapes_run_side_by_side(opened: Callable[..., TrialRun]) -> None:
    control = opened("control", *CONTROL)
    runs = [control, opened("narrow"), opened("wide", "generator.hidden_dim=8")]
    ensemble = Ensemble(DOUBLE)
    for run in runs:
        ensemble.add(run)
    finish(ensemble)
    assert [(run.reports[-1].status, run.state.step) for run in runs] == [
        ("completed", 1), ("completed", 6), ("completed", 6)
    ]  # fmt: skip


def test_run_that_has_ended_tells_its_last_report_again_and_pays_nothing(opened: Callable[..., TrialRun]) -> None:
    run = opened("run")
    ensemble = Ensemble()
    for _ in range(2):
        ensemble.add(run)
        assert finish(ensemble)[-1] == (run, run.reports[-1])
    assert (len(run.reports), charged(run)) == (2, 6)
