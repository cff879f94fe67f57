"""The simulation of a driver: a real session, of which every trial is decided, told and mirrored."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.clusters.rehearsal import scaling
from tests.test_packing import study_of
from tune.wire import unpacked

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_simulated_study_is_a_whole_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.clusters.simulation", "--in-flight", "4", "--rounds", "2"]
    command += ["--seconds", "2", "--points", "2", "--few-noises", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    [row] = json.loads((tmp_path / "simulation.json").read_text(encoding="utf-8"))
    assert (row["in flight"], row["trials"]) == (4, 8)
    assert 0 < row["efficiency"] <= 1.5 and row["memory MiB"] > 100
    assert row["decided s, median"] >= 0 and row["in MLflow s, 99 %"] > 0
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")


def test_trial_that_only_sleeps_tells_what_trials_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, told = study_of(tmp_path, a=["evaluation.points=2"]), []
    monkeypatch.setattr(scaling.time, "sleep", lambda _: None)
    monkeypatch.setattr(scaling.ray_tune, "report", told.append)
    scaling.sleep_through({"folder": str(folder.path), "trial": "a"}, "cpu")
    assert [unpacked(one)["step"] for one in told] == [1, 2]  # a step for each report
