"""The benchmarks: the plain step computes what ours computes, and both scripts run and write what they promise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import gpu, step, study
from experiments.bench.agreement import differences
from experiments.bench.convolutions import generator_passes
from experiments.bench.harness import Effort, fitted_exponent, in_turns
from experiments.bench.subjects import Setting
from experiments.bench.unprotected import UnprotectedStack

SMALL = Setting(shape=(1, 8, 8), hidden=2, n=10, batch=20, records=100)


def run(main: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a script writes; the threads of the tests stay as they were."""
    threads = torch.get_num_threads()
    main([*arguments, "--json", str(folder / "out.json")])
    torch.set_num_threads(threads)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("cost", ["l1+l2", "l2", "l1"])
@pytest.mark.parametrize("mechanism", ["batch", "record"])
@pytest.mark.parametrize("clip_norm", [1e-2, 1e6])
def test_plain_step_has_our_gradient(mechanism: str, cost: str, clip_norm: float) -> None:
    """Binding clips and idle ones, so that neither mechanism hides behind the other's scale."""
    setting = Setting(mechanism, cost, (3, 8, 8), 2, n=10, batch=40, records=100, blur=1, clip_norm=clip_norm)
    found = differences(setting)
    assert found["image gradient"] < 1e-9 and found["weight gradient"] < 1e-9
    assert found.get("loss", 0.0) < 1e-10


def test_three_ways_to_run_generators_agree() -> None:
    torch.manual_seed(0)
    one_by_one, grouped, folded = (way() for way in generator_passes(SMALL, slots=3).values())
    torch.testing.assert_close(grouped, one_by_one, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(folded, one_by_one, atol=1e-3, rtol=1e-4)


def test_unprotected_step_neither_clips_nor_draws_noise() -> None:
    from experiments.bench.subjects import stack_of

    setting = Setting("record", shape=(1, 8, 8), hidden=2, n=10, batch=100, records=100, clip_norm=1e9)
    stacks = [stack_of(setting, kind=kind) for kind in (UnprotectedStack, type(stack_of(setting)))]
    inputs = stacks[0]._draw()
    for stack in stacks:
        stack._pure_step(inputs)
    assert not inputs.noise.any()
    torch.testing.assert_close(stacks[0].generators.weights, stacks[1].generators.weights, atol=1e-5, rtol=0)


def test_functions_are_timed_in_turns() -> None:
    calls: list[str] = []
    effort = Effort(rounds=2, seconds=0, fewest=2)
    taken = in_turns([lambda: calls.append("a"), lambda: calls.append("b")], effort, lambda: None)
    assert taken.shape == (2, 2) and (taken > 0).all()
    ends = [one for one, following in zip(calls, [*calls[1:], ""], strict=True) if one != following]
    assert ends == ["a", "b", "a", "b"]  # set-up, then b before a, then a before b


def test_exponent_of_a_power_is_found() -> None:
    assert fitted_exponent([1, 10, 100], [2, 200, 20_000]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("agreement", {"image gradient", "weight gradient", "loss", "target"}),
        ("loss", {"ours ms", "plain ms", "ratio", "q1", "q3", "rounds", "target"}),
        ("step", {"ours ms", "plain ms", "ratio", "q1", "q3", "rounds"}),
        ("record", {"unprotected ms", "protected ms", "ratio", "target"}),
        ("parts", {"whole ms", "noise ms", "public OT ms", "private query ms"}),
        ("stack", {"stacked ms", "singles ms", "ratio", "trial-steps/s"}),
        ("generators", {"one by one ms", "grouped ms", "products + fold ms"}),
        ("growth", {"20 ms", "40 ms", "exponent"}),
    ],
)
def test_step_measures_each_part(kind: str, columns: set[str], tmp_path: Path) -> None:
    found = run(step.main, tmp_path, "--quick", "--only", kind)
    assert {"date", "machine", "device", "torch", "threads", "rows"} <= set(found)
    assert found["rows"] and all(row["measured"] for row in found["rows"])
    assert columns <= set(found["rows"][0]["values"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("scale", {"s", "s a trial", "MB at 4", "status s", "resumed s"}),
        ("loop", {"extra %", "extra s a trial", "steps"}),
        ("overhead", {"extra %", "extra s a trial", "steps"}),
    ],
)
def test_what_a_study_costs_is_measured(kind: str, columns: set[str], tmp_path: Path) -> None:
    (row,) = run(study.main, tmp_path, "--quick", "--only", kind)["rows"]
    assert columns <= set(row["values"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_rows_are_not_measured_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(gpu.main, tmp_path, "--quick")
    assert "not measured" in capsys.readouterr().out
    rows = found["rows"]
    assert not any(row["measured"] for row in rows if row["kind"] != "checks")
    measured = [row for row in rows if row["kind"] == "checks" and row["measured"]]
    assert len(measured) >= 10 and all(row["values"]["passed"] == "True" for row in measured)
