"""How a study stands, from its folder alone; and the links into MLflow's pages."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

from dpsink import console
from dpsink.errors import InputError
from tests.test_tracking import Fake, make_study, write_trial
from tune import links
from tune.folder import SessionEnd, StudyFolder
from tune.lock import holder, only_one
from tune.status import Reader, document, find_folder, picture

URI = "https://user:secret@tracking.example"


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """Two completed trials, one that failed, one that has just begun, one that waits."""
    fakes = [
        Fake("baseline-control", role="baseline", metrics={"accuracy": 0.99}),
        Fake("trial-0001", metrics={"accuracy": 0.7}),
        Fake("trial-0002", metrics={"accuracy": 0.8}),
        Fake("trial-0003", state="failed", epsilons=(), error="CUDA out of memory"),
        Fake("trial-0004", state=None),
        Fake("trial-0005", state=None, epsilons=()),
    ]
    folder = make_study(tmp_path / "study", fakes, URI, trials=8)
    folder.write_statement({"study_epsilon": 31.4, "spent": 20.1})
    (folder.run("trial-0004") / "config.yaml").write_text("")
    return folder


def shown(folder: StudyFolder) -> str:
    with console.out.capture() as captured:
        console.out.print(picture(Reader(folder).read()), soft_wrap=True)
    return captured.get()


def test_a_study_that_nobody_runs_shows_its_trials_by_state(study: StudyFolder) -> None:
    told = document(Reader(study).read())
    assert told["running"] is None and not told["finished"]
    assert told["counts"] == {"completed": 3, "failed": 1, "interrupted": 1, "pending": 1}
    assert (told["planned"], told["best"], told["seconds_left"]) == (8, "trial-0002", None)


def test_a_study_that_is_run_names_the_process_and_what_runs(study: StudyFolder) -> None:
    with only_one(study):
        told = document(Reader(study).read())
    assert told["running"] == str(os.getpid())
    assert told["counts"]["running"] == 1


def test_looking_at_a_study_does_not_keep_a_sweep_away(study: StudyFolder) -> None:
    with only_one(study):
        pass
    with (study.path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as one who looks, and stays
        with pytest.raises(InputError, match="already being run"), only_one(study):
            pass
    assert holder(study) is None
    with only_one(study):
        assert holder(study)


def test_a_storage_without_locks_is_refused_in_one_line(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unable)
    with pytest.raises(InputError, match=r"\.lock cannot be locked \(No locks available\)"), only_one(study):
        pass
    with pytest.raises(InputError, match="file system with locks"):
        holder(study)


def test_a_failure_is_told_with_its_reason_and_the_ledger_with_its_bound(study: StudyFolder) -> None:
    text = shown(study)
    assert "trial-0003: CUDA out of memory" in text
    assert "study ε ≤ 31.4, spent 20.1" in text


def test_no_password_is_shown(study: StudyFolder) -> None:
    assert "secret" not in shown(study) + json.dumps(document(Reader(study).read()))


def test_how_the_last_session_ended_is_told(study: StudyFolder) -> None:
    assert "its process was killed" in shown(study)
    study.write_outcome(SessionEnd(finished=False, problem="stopped"))
    assert "not running: stopped" in shown(study)
    study.write_outcome(SessionEnd(finished=True))
    assert "is finished" in shown(study)


def test_a_failed_trial_that_runs_again_is_no_failure_any_more(study: StudyFolder) -> None:
    reader = Reader(study)
    assert reader.read().errors
    study.forget_end("trial-0003")
    assert not reader.read().errors


def test_a_sealed_study_shows_nothing_about_trials(study: StudyFolder) -> None:
    (study.path / "study.yaml").write_text("ledger: {policy: release_best}")
    told = document(Reader(study).read())
    assert told["sealed"]
    assert not {"trials", "counts", "planned", "best", "failed", "spent"} & set(told)
    assert "trial-" not in shown(study) and "20.1" not in shown(study)


def test_a_trial_that_is_being_recorded_is_passed_over(study: StudyFolder) -> None:
    study.trial("trial-0006").mkdir()
    assert "trial-0006" not in document(Reader(study).read())["trials"]


@pytest.mark.parametrize("given", ["file", "folder", "name"])
def test_a_study_is_found_by_file_folder_and_name(
    study: StudyFolder, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text(f"name: study\nstorage: {tmp_path}")
    (tmp_path / "studies").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    place = {"file": "study.yaml", "folder": str(study.path), "name": "study"}[given]
    assert find_folder(place).read_study() == study.read_study()


def test_an_unknown_study_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="study nowhere: nothing has been run"):
        find_folder("nowhere")


def test_status_loads_nothing_heavy(study: StudyFolder) -> None:
    code = (
        "import sys; from tune import cli; sys.argv = ['dpsink-tune', 'status', sys.argv[1], '--json']\n"
        "try: cli.main()\n"
        "finally: print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(study.path)], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout)["study"] == "digits-study"


def test_reports_that_are_replaced_while_they_are_read_are_read_again(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpsink import records

    read, looks = records.read_state, []

    def replace_then_read(checkpoint: Path) -> records.CheckpointState:
        if not looks:
            looks.append(checkpoint)
            write_trial(study, Fake("trial-0004", state=None, epsilons=(5.0, 9.5, 9.7)))
        return read(checkpoint)

    monkeypatch.setattr(records, "read_state", replace_then_read)
    assert [report.step for report in study.reports("trial-0004")] == [10, 20, 30]


def test_a_link_to_the_runs_names_the_study_s_own_view() -> None:
    address, _, query = links.runs_link("http://here", "7", "abc").partition("?")
    assert address == "http://here/#/experiments/7/runs"
    assert links.view_tag("abc") == f"mlflow.sharedViewState.{parse_qs(query)['viewStateShareKey'][0]}"


def test_the_view_of_a_study_is_filtered_and_sorted_by_its_objective() -> None:
    view = json.loads(links.view_of("abc", ["fid", "accuracy"], ["optimizer.lr"]))
    assert view["searchFilter"] == "tags.`dpsink.kind` = 'trial' and tags.`dpsink.study_id` = 'abc'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`fid`", True)
    assert view["selectedColumns"][:3] == ["tags.`dpsink.status`", "metrics.`fid`", "metrics.`accuracy`"]


def test_the_view_of_the_largest_search_fits_into_a_tag() -> None:
    paths = [f"generator.some_rather_long_setting_{number:03d}" for number in range(200)]
    assert len(links.view_of("0" * 32, ["fid", "accuracy"], paths)) < 5000  # MLflow's limit


def test_at_most_25_runs_are_compared() -> None:
    link = unquote(links.compare_link("http://here", "7", [str(number) for number in range(40)]))
    runs, experiments = parse_qs(link.partition("?")[2]).values()
    assert len(json.loads(runs[0])) == 25 and json.loads(experiments[0]) == ["7"]
