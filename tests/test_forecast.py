"""`--dry-run`: what it says of a study, and that it starts, writes and reads nothing that it should not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpsink.data import ImageData, load_dataset
from tests.test_study import SEALED, SMALL, load, noisy, write
from tune import cli, forecast
from tune.preflight import check_study


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that takes a hundredth of a second for a step and one for an evaluation."""
    monkeypatch.setattr(forecast._Clock, "step_seconds", lambda *_: 0.01)
    monkeypatch.setattr(forecast._Clock, "report_seconds", lambda *_: 1.0)


def told(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    resources = {"concurrency": 2, **changes.pop("resources", {})}
    return forecast.forecast(load(tmp_path, resources=resources, **changes), None)


@pytest.mark.usefixtures("timed")
def test_it_tells_each_baseline_and_the_corners_of_the_space(tmp_path: Path) -> None:
    space = {"privacy.noise_multiplier": {"uniform": [3, 5]}, "privacy.batch_size": {"choice": [50, 100]}}
    document = told(tmp_path, space=space, algorithm={"trials": 3})
    control, search = document["rows"]
    assert (control["name"], control["trials"], control["steps"]) == ("control", 1, (1, 1))
    assert (search["name"], search["trials"], search["steps"]) == ("search", 3, (20, 20))
    assert search["noise_multiplier"] == (3, 5)
    assert search["sample_rate"] == (50 / 1437, 100 / 1437)
    assert 0 < search["epsilon"][0] < search["epsilon"][1] <= 10


@pytest.mark.usefixtures("timed")
def test_it_tells_the_epsilon_that_the_ledger_would_promise(tmp_path: Path) -> None:
    plan = check_study(load(tmp_path), None)
    assert told(tmp_path)["study_epsilon"] == plan.terms.worst_case()


@pytest.mark.usefixtures("timed")
def test_time_is_steps_and_evaluations_side_by_side_and_cost_follows_its_price(tmp_path: Path) -> None:
    """Each searched trial: 20 steps of 0.01 s and one evaluation of 1 s; the control: one of each."""
    document = told(tmp_path, algorithm={"trials": 4, "seeds_per_configuration": 3}, resources={"price_per_hour": 3600})
    assert document["trials"] == 15
    assert document["seconds"] == pytest.approx([(12 * 1.2 + 3 * 1.01) / 2] * 2)
    assert document["cost"] == pytest.approx(document["seconds"])
    assert [row["cost"] for row in document["rows"]] == [pytest.approx([3 * 1.01 / 2] * 2), pytest.approx([7.2] * 2)]


@pytest.mark.usefixtures("timed")
def test_a_study_takes_no_less_than_its_longest_trial(tmp_path: Path) -> None:
    document = told(tmp_path, algorithm={"trials": 1}, resources={"concurrency": 64})
    assert document["seconds"] == pytest.approx([1.2, 1.2])


@pytest.mark.usefixtures("timed")
def test_without_a_price_there_is_no_cost(tmp_path: Path) -> None:
    assert told(tmp_path)["cost"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.usefixtures("timed")
def test_a_study_of_gpus_that_is_timed_without_one_says_so(tmp_path: Path) -> None:
    assert "for want of a GPU" in told(tmp_path, resources={"gpu": 0.25})["timed_on"]


@pytest.mark.usefixtures("timed")
def test_of_a_sealed_study_the_mean_number_of_trials_is_told(tmp_path: Path) -> None:
    document = told(tmp_path, **SEALED)
    assert (document["trials"], document["sealed"]) == (10, True)


def test_it_times_real_steps_and_starts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecast, "TIMED_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, storage=str(tmp_path / "studies"))
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", "sweep", str(path), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert not caught.value.code
    assert all(row["seconds"][0] > 0 for row in document["rows"])
    assert document["rows"][1]["seconds_per_step"][0] > 0
    assert list(tmp_path.iterdir()) == [path]


def test_it_prints_a_plan_that_fits_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "name": "control", "trials": 3, "steps": (1, 1), "noise_multiplier": (0.47, 0.47), "sample_rate": (1, 1),
            "epsilon": (10, 10), "seconds": (59, 59), "cost": (0.5, 0.5),
        },
        {
            "name": "search", "trials": 300, "steps": (12_345, 123_456), "noise_multiplier": (1.105, 5.222),
            "sample_rate": (0.008333, 0.09999), "epsilon": (9.123, 9.999), "seconds": (3700, 86_000),
            "cost": (12, 30.7),
        },
    ]  # fmt: skip
    document = {
        "study": "mine", "data": "mnist", "records": 55_000, "rows": rows, "study_epsilon": 57.05, "delta": 1e-5,
        "policy": "compose_all", "concurrency": 2, "seconds": (36_000, 90_000), "cost": [12.5, 31.2],
        "timed_on": "this machine", "may_stop_early": True, "seeds_per_configuration": 3, "sealed": False,
        "repeats": {"name": "first", "epsilon": 12.5, "delta": 1e-5},
    }  # fmt: skip
    forecast.print_forecast(document)
    lines = capsys.readouterr().out.splitlines()
    assert "1.105–5.222" in lines[3]
    assert "1–24 h" in lines[3]
    assert "cost:    about 12.5–31.2, at resources.price_per_hour: control 0.5, search 12–30.7" in lines
    assert "         with that of first, which it repeats: ε 69.55, δ 2e-05" in lines
    assert max(len(line.rstrip()) for line in lines[:4]) <= 90


@pytest.mark.parametrize("trial", [SMALL["trial"], noisy()], ids=["public validation", "private validation"])
def test_steps_are_timed_on_images_that_are_nobodys(tmp_path: Path, trial: dict[str, Any]) -> None:
    plan = check_study(load(tmp_path, trial=trial), None)
    clock = forecast._Clock(plan)
    real: ImageData = plan.data
    assert (len(clock.data.train), clock.data.train.shape) == (len(real.train), real.train.shape)
    assert not torch.equal(clock.data.train.images, real.train.images)
    assert real.validation is not None
    assert clock.data.validation is not None
    kept = torch.equal(clock.data.validation.images, real.validation.images)
    assert kept == real.validation_is_public
    assert load_dataset(load(tmp_path, trial=trial).configure({}).data).fingerprint != clock.data.fingerprint
