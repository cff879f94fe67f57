"""A study folder or a run that somebody crafted runs no code, and writes nothing outside of its folder.

Crafted tensors and checkpoints are in `test_checkpoint.py`; that nothing imports an unpickler, in `test_layers.py`.
"""

import json
import os
import pickle
from pathlib import Path

import pytest

from analysis.verdict import _Job
from dpsink.config import TrialConfig
from dpsink.errors import InputError
from tune.folder import StudyFolder, TrialRecord
from tune.search import make_record

ESCAPES = ["../../outside", "/tmp/outside", "..", "a/b", ".hidden", ""]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def record() -> TrialRecord:
    config = TrialConfig.model_validate({"privacy": {"noise_multiplier": 3, "delta": 5e-5, "step_limit": 4}})
    return make_record("trial-0001", "search", config, 1437, {}, 0)


def crafted(place: Path, record: TrialRecord, name: str) -> StudyFolder:
    """A study with a trial that calls itself by that name."""
    folder = StudyFolder(place)
    trial = folder.trial("trial-0001")
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text(json.dumps({**json.loads(record.model_dump_json()), "name": name}))
    return folder


@pytest.mark.parametrize("name", [*ESCAPES, "trial-0002"])
def test_trial_that_names_another_folder_is_refused(name: str, record: TrialRecord, tmp_path: Path) -> None:
    folder = crafted(tmp_path / "study", record, name)
    with pytest.raises(InputError, match=r"trial\.json"):
        folder.trials()


def test_trial_under_its_own_name_is_read(record: TrialRecord, tmp_path: Path) -> None:
    assert [one.name for one in crafted(tmp_path / "study", record, "trial-0001").trials()] == ["trial-0001"]


@pytest.mark.parametrize("file", ["trial.json", "end.json", "test.json", "run/checkpoint-0000000001/state.json"])
def test_pickle_in_place_of_any_json_of_a_trial_is_refused_and_runs_nothing(
    file: str, record: TrialRecord, tmp_path: Path
) -> None:
    folder = crafted(tmp_path / "study", record, "trial-0001")
    path = folder.trial("trial-0001") / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(InputError, match=Path(file).name.replace(".", r"\.")):
        folder.read_trial("trial-0001")
        folder.end_of("trial-0001")
        folder.test_metrics("trial-0001")
        folder.reports("trial-0001")
    assert not (tmp_path / "executed").exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ESCAPES)
def test_crafted_run_cannot_choose_where_its_verdict_is_written(name: str) -> None:
    row = {"run_id": name, "config_sha256": name, "trial": name, "fid_extractor": f"{name}@180"}
    job = _Job(row, Path(name) / "checkpoint-0000000001", 0, 100)
    assert Path(job.file).name == job.file and not job.file.startswith(".")
