"""The stack: trials side by side are the trials alone; slots freeze, empty and refill; speed changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpsink.config import Performance, TrialConfig, load_config
from dpsink.data import ImageData
from dpsink.engine import Trial, TrialStack, bucket, initial_state, open_stack
from dpsink.graphs import StaticStep
from dpsink.optimizer import StackedAdam
from dpsink.privacy.plan import PrivacyPlan, derive_plan
from dpsink.stacking import StackedGenerator
from dpsink.training import TrialRun, train, train_together
from tests.conftest import ReplayedEntropy

DOUBLE = Performance(precision="double")
SMALL = [
    "generator.hidden_dim=4", "sinkhorn.gen_batch_size=10", "privacy.delta=5e-5", "privacy.noise_multiplier=2",
    "privacy.batch_size=60", "privacy.step_limit=6", "evaluation.points=2", "evaluation.samples=40",
    "evaluation.classifiers=[logreg]",
]  # fmt: skip
# Different in everything that a stack allows to differ.
DIFFERENT = [
    ["seed=1"],
    ["optimizer.lr=3e-3", "privacy.clip_norm=3", "optimizer.schedule=cosine", "sinkhorn.blur=2", "seed=2"],
    ["privacy.noise_multiplier=4", "sinkhorn.blur=0.5", "sinkhorn.l1_weight=3", "sinkhorn.label_weight=5",
     "privacy.batch_size=90", "optimizer.beta1=0.5"],
]  # fmt: skip
COSTS = ["l1+l2", "l2", "l1"]


def small(*overrides: str) -> TrialConfig:
    return load_config(None, [*SMALL, *overrides])


def trial(config: TrialConfig, data: ImageData, seed: int = 0) -> Trial:
    plan = derive_plan(config, len(data.train))
    return Trial(config, plan, initial_state(config, data.train), ReplayedEntropy(seed))


def weights_after(steps: int, trials: list[Trial], data: ImageData, performance: Performance) -> list[Tensor]:
    """Weights and statistics of trials that took some steps side by side."""
    stack = TrialStack(trials[0].config, data.train, performance, len(trials))
    for one in trials:
        one.state.generator.to(torch.float64)
        stack.join(one)
    for _ in range(steps):
        stack.step()
    for slot in range(len(trials)):
        stack.leave(slot)
    return [flat(one) for one in trials]


def flat(one: Trial) -> Tensor:
    return torch.cat([value.double().flatten() for value in one.state.generator.state_dict().values()])


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("mechanism", ["record", "batch"])
def test_stacked_trials_are_the_trials_alone(mechanism: str, cost: str, digits: ImageData) -> None:
    configs = [small(f"privacy.mechanism={mechanism}", f"sinkhorn.cost={cost}", *more) for more in DIFFERENT]
    together = weights_after(5, [trial(config, digits, k) for k, config in enumerate(configs)], digits, DOUBLE)
    for k, config in enumerate(configs):
        (alone,) = weights_after(5, [trial(config, digits, k)], digits, DOUBLE)
        torch.testing.assert_close(together[k], alone, atol=1e-10, rtol=0)


def test_stacked_trials_agree_under_geomloss(digits: ImageData) -> None:
    common = ["privacy.mechanism=batch", "sinkhorn.backend=geomloss"]
    configs = [small(*common, *more) for more in DIFFERENT]
    together = weights_after(2, [trial(config, digits, k) for k, config in enumerate(configs)], digits, DOUBLE)
    ours = [small("privacy.mechanism=batch", *more) for more in DIFFERENT]
    analytic = weights_after(2, [trial(config, digits, k) for k, config in enumerate(ours)], digits, DOUBLE)
    for mine, theirs in zip(analytic, together, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=0)


@pytest.mark.parametrize("mechanism", ["record", "batch"])
def test_empty_batch_of_a_slot_takes_its_noisy_step(mechanism: str, digits: ImageData) -> None:
    """Alone and beside a trial with records, F(∅) plus noise moves the weights alike."""
    config = small(f"privacy.mechanism={mechanism}")
    plan = PrivacyPlan(mechanism, 1437, 1e-12, 2.0, 20.0, 6, 10.0, 5e-5)
    together, alone = trial(config, digits), trial(config, digits)
    together.plan = alone.plan = plan
    weights_after(3, [together, trial(config, digits, 1)], digits, DOUBLE)
    start = flat(trial(config, digits))
    (expected,) = weights_after(3, [alone], digits, DOUBLE)
    torch.testing.assert_close(flat(together), expected, atol=1e-10, rtol=0)
    assert not torch.allclose(expected, start)


def test_non_finite_slot_freezes_only_itself(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    sick, sound = trial(small(), digits, 1), trial(small(), digits, 2)
    (expected,) = weights_after(4, [trial(small(), digits, 2)], digits, DOUBLE)
    next(sick.state.generator.parameters()).data.fill_(math.nan)
    weights_after(4, [sick, sound], digits, DOUBLE)
    torch.testing.assert_close(flat(sound), expected, atol=1e-10, rtol=0)


def test_frozen_slot_is_told(digits: ImageData) -> None:
    stack = TrialStack(small(), digits.train, Performance(), 2)
    sick = trial(small(), digits)
    next(sick.state.generator.parameters()).data.fill_(math.nan)
    slots = [stack.join(sick), stack.join(trial(small(), digits))]
    stack.step()
    assert [stack.finite(slot) for slot in slots] == [False, True]


def test_refilled_slot_starts_from_its_own_trial(digits: ImageData) -> None:
    (expected,) = weights_after(3, [trial(small("optimizer.lr=1e-2"), digits, 5)], digits, DOUBLE)
    stack = TrialStack(small(), digits.train, DOUBLE, 2)
    neighbour = stack.join(trial(small(), digits, 1))
    leaving = stack.join(trial(small("sinkhorn.blur=1"), digits, 2))
    for _ in range(2):
        stack.step()
    stack.leave(leaving)
    stack.step()
    late = trial(small("optimizer.lr=1e-2"), digits, 5)
    late.state.generator.to(torch.float64)
    slot = stack.join(late)
    for _ in range(3):
        stack.step()
    stack.leave(slot)
    torch.testing.assert_close(flat(late), expected, atol=1e-10, rtol=0)
    assert stack.finite(neighbour)


def test_empty_slot_changes_nothing_for_its_neighbour(digits: ImageData) -> None:
    (expected,) = weights_after(3, [trial(small(), digits)], digits, DOUBLE)
    stack = TrialStack(small(), digits.train, DOUBLE, 3)
    one = trial(small(), digits)
    one.state.generator.to(torch.float64)
    slot = stack.join(one)
    for _ in range(3):
        stack.step()
    stack.leave(slot)
    torch.testing.assert_close(flat(one), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "override",
    ["sinkhorn.gen_batch_size=20", "sinkhorn.debias_ratio=0.5", "generator.hidden_dim=8", "sinkhorn.cost=l2",
     "privacy.mechanism=batch", "sinkhorn.p=2"],
)  # fmt: skip
def test_trial_of_another_structure_is_refused(override: str, digits: ImageData) -> None:
    with pytest.raises(ValueError, match="structure"):
        TrialStack(small(), digits.train, Performance()).join(trial(small(override), digits))


def test_control_and_generator_do_not_share_a_stack(digits: ImageData) -> None:
    control = load_config(None, ["generator.kind=class_mean", "privacy.noise_multiplier=null", "privacy.delta=5e-5"])
    with pytest.raises(ValueError, match="structure"):
        open_stack(control, digits.train, Performance()).join(trial(small(), digits))


@pytest.mark.parametrize(
    "performance",
    [{"graphs": "on"}, {"threads": 2}, {"slots": 3}, {"graphs": "on", "slots": 2}],
    ids=lambda settings: ",".join(settings),
)
def test_performance_changes_neither_epsilon_nor_steps_nor_weights(
    performance: dict[str, Any], digits: ImageData, tmp_path: Path
) -> None:
    def outcome(settings: Performance, folder: Path) -> tuple[list[Any], Tensor]:
        """Of the first of three trials: one after another, or on as many slots as there are."""
        runs = [
            TrialRun.open(small(f"seed={k}", f"optimizer.lr={k + 1}e-3"), digits, folder / str(k), ReplayedEntropy(k))
            for k in range(3)
        ]
        for run in runs:
            run.state.generator.to(torch.float64)
        told = [report for run, report in train_together(runs, performance=settings) if run is runs[0]]
        for run in runs:
            run.__exit__()
        facts = [(report.step, report.charged, report.epsilon, report.status) for report in told]
        return facts, torch.cat([value.flatten() for value in runs[0].state.generator.state_dict().values()])

    threads = torch.get_num_threads()
    plain, changed = DOUBLE, DOUBLE.model_copy(update=performance)
    facts, weights = outcome(plain, tmp_path / "plain")
    changed_facts, changed_weights = outcome(changed, tmp_path / "changed")
    torch.set_num_threads(threads)
    assert facts == changed_facts
    torch.testing.assert_close(weights, changed_weights, atol=1e-10, rtol=0)


@pytest.mark.parametrize("precision", ["single", "tf32", "double"])
def test_precision_changes_neither_epsilon_nor_steps(precision: Any, digits: ImageData, tmp_path: Path) -> None:
    reports = train(small(), digits, tmp_path / "run", performance=Performance(precision=precision))
    plan = derive_plan(small(), len(digits.train))
    assert [(report.step, report.epsilon) for report in reports] == [(3, plan.epsilon(3)), (6, plan.epsilon(6))]


def test_runs_beyond_the_slots_wait_and_all_end(digits: ImageData, tmp_path: Path) -> None:
    runs = [
        TrialRun.open(small(f"seed={k}", f"privacy.step_limit={4 + k}"), digits, tmp_path / str(k), ReplayedEntropy(k))
        for k in range(3)
    ]
    told = list(train_together(runs, performance=Performance(slots=2)))
    for run in runs:
        run.__exit__()
    ends = {run.folder.name: report.step for run, report in told if report.status == "completed"}
    assert ends == {"0": 4, "1": 5, "2": 6}
    assert len(told) == 6


def test_stopped_runs_keep_only_what_they_used(digits: ImageData, tmp_path: Path) -> None:
    config = small("privacy.step_limit=400")
    runs = [TrialRun.open(config, digits, tmp_path / str(k), ReplayedEntropy(k)) for k in range(2)]
    asked = iter(range(10**9))
    list(train_together(runs, performance=Performance(slots=2), should_stop=lambda: next(asked) >= 90))
    assert [(run.state.step, run.budget.charged) for run in runs] == [(90, 90), (90, 90)]
    for run in runs:
        run.__exit__()


@pytest.mark.parametrize("slots", [1, 3])
def test_vectorised_generators_are_the_generators_one_by_one(slots: int, digits: ImageData) -> None:
    template = initial_state(small(), digits.train).generator.double()
    stacks = [StackedGenerator(template, slots, vectorised=vectorised) for vectorised in (False, True)]
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(stacks[0].weights.shape, generator=rng, dtype=torch.float64) / 10
    latents, labels = torch.rand(slots, 12, 16, generator=rng).double(), torch.randint(10, (slots, 12), generator=rng)
    answers = []
    for stack in stacks:
        stack.weights.copy_(weights)
        images = stack(latents, labels, [True] * slots)
        gradient = stack.backward(images, images.detach().sin(), torch.ones(slots, dtype=torch.bool)).clone()
        answers.append((images.detach(), gradient, *stack.buffers.values()))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_statistics_of_an_empty_slot_stay_in_a_vectorised_run(digits: ImageData) -> None:
    template = initial_state(small(), digits.train).generator
    stack = StackedGenerator(template, 2, vectorised=True)
    stack.load(1, template)
    before = {name: value.clone() for name, value in stack.buffers.items()}
    labels = torch.zeros(2, 12, dtype=torch.int64)
    images = stack(torch.rand(2, 12, 16), labels, [True, True])
    stack.backward(images, torch.ones_like(images), torch.tensor([False, True]))
    assert all(torch.equal(stack.buffers[name][0], value[0]) for name, value in before.items())
    assert not torch.equal(stack.buffers["layers.0.running_mean"][1], before["layers.0.running_mean"][1])


def test_stacked_adam_is_torch_adam_row_by_row() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(2, 7, generator=rng, dtype=torch.float64)
    settings = [(1e-2, 0.9, 0.999), (3e-3, 0.5, 0.99)]
    rows = [start[k].clone().requires_grad_() for k in range(2)]
    references = [torch.optim.Adam([row], lr, (b1, b2)) for row, (lr, b1, b2) in zip(rows, settings, strict=True)]
    weights = start.clone()
    adam = StackedAdam(weights)
    for t in range(1, 30):
        gradient = torch.randn(2, 7, generator=rng, dtype=torch.float64)
        rates = torch.tensor(
            [[lr, b1, b2, 1 - b1**t, math.sqrt(1 - b2**t)] for lr, b1, b2 in settings], dtype=torch.float64
        )
        adam.step(gradient.clone(), rates, torch.tensor([True, True]))
        for row, reference, own in zip(rows, references, gradient, strict=True):
            row.grad = own
            reference.step()
    torch.testing.assert_close(weights, torch.stack([row.detach() for row in rows]), atol=1e-12, rtol=0)


def test_rows_that_are_not_updated_keep_weights_and_moments() -> None:
    weights = torch.ones(2, 3)
    adam = StackedAdam(weights)
    rates = torch.tensor([[0.1, 0.9, 0.999, 0.1, 0.03]] * 2, dtype=torch.float64)
    adam.step(torch.ones(2, 3), rates, torch.tensor([False, False]))
    assert torch.equal(weights, torch.ones(2, 3)) and not adam.moments.any()


def test_static_step_runs_once_per_call_on_fixed_addresses() -> None:
    from typing import NamedTuple

    class Inputs(NamedTuple):
        value: Tensor
        maybe: Tensor | None

    seen: list[tuple[int, float]] = []
    step = StaticStep(lambda inputs: seen.append((inputs.value.data_ptr(), float(inputs.value))), torch.device("cpu"))
    for number in range(5):
        step(Inputs(torch.tensor(float(number)), None))
    assert [value for _, value in seen] == [0, 1, 2, 3, 4]
    assert len({address for address, _ in seen}) == 1


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 100, 500, 2000, 2049, 60_000])
def test_bucket_holds_the_batch_and_is_little_wider(rows: int) -> None:
    assert rows <= bucket(rows) <= max(64, rows * 9 / 8)


def test_few_buckets_serve_batches_of_one_rate() -> None:
    """Ten standard deviations of a batch of 2,000 meet in a handful of shapes."""
    assert len({bucket(rows) for rows in range(1776, 2225)}) <= 5
