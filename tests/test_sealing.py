"""Studies of which only the winner is published: what stays secret, on the way, at the end and across crashes."""

import json
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import analysis.cli
from dpsink.errors import InputError
from dpsink.privacy.ledger import Selection
from tests.test_sweep import (
    Inline,
    folder_of,
    in_place_of_ray,
    no_judge,
    noisy_trial,
    refused,
    runs_of,
    study_status,
    sweep,
    write_study,
)
from tune import cluster, preflight, schema, sealing
from tune.choice import select_best
from tune.cluster import Crashed, Interrupted
from tune.folder import StudyFolder, TrialRecord
from tune.sealing import Unsealing
from tune.study import Study, load_study
from tune.sweep import Outcome, run_study
from tune.tracking import check_tracking

LEDGER = {"policy": "release_best", "selection": {"expected_trials": 3}}
SECRET = re.compile(r"trial-\d|baseline-")
KINDS = (schema.KIND_STUDY, schema.KIND_TRIAL)
DRAWN = 3  # K of every study here that does not say otherwise


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of all studies here; they share a database, which takes seconds to make."""
    storage = tmp_path_factory.mktemp("sealed")
    check_tracking(f"sqlite:///{storage}/mlflow.db")
    return storage


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Decides the number that is drawn."""

    def set_to(trials: int) -> None:
        monkeypatch.setattr(Selection, "draw", lambda _: trials)

    set_to(DRAWN)
    return set_to


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inline]:
    """A loop in this process in Ray's place."""
    return in_place_of_ray(monkeypatch)


def write_sealed(root: Path, name: str, **changes: Any) -> Path:
    settings = {"algorithm": {}, "baselines": {}, "ledger": LEDGER, "steps": 4, "points": 1, **changes}
    return write_study(root, name, **settings)


def open_files(folder: StudyFolder) -> list[Path]:
    """All that is not its owner's alone."""
    return sorted(path for path in folder.path.rglob("*") if path.is_file() and folder.ledger not in path.parents)


def told_by_mlflow(root: Path, folder: StudyFolder) -> str:
    """Every row of the database that belongs to the study, as text."""
    runs = {run.info.run_id for kind in KINDS for run in runs_of(folder, kind)}
    with sqlite3.connect(root / "mlflow.db") as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        rows = [row for table in tables for row in database.execute(f"select * from {table}")]
    return "\n".join(str(row) for row in rows if runs & set(map(str, row)))


class Killed(BaseException):
    """As if by kill -9: nothing of ours catches it."""


# Through Ray.


@pytest.fixture(scope="module")
def published(root: Path) -> Iterator[tuple[Path, Outcome, str]]:
    """A sealed study that Ray ran to its end, and all that was written on the console."""
    path = write_sealed(root, "published", steps=10, points=2)
    with pytest.MonkeyPatch.context() as patch, (root / "console").open("w+") as console:
        patch.setattr(Selection, "draw", lambda _: DRAWN)
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        for descriptor in kept:
            os.dup2(console.fileno(), descriptor)
        try:
            outcome = run_study(load_study(path))
        finally:
            for descriptor, original in kept.items():
                os.dup2(original, descriptor)
        console.seek(0)
        yield path, outcome, console.read()


@pytest.mark.slow
def test_only_the_winner_is_left_of_a_selection(published: tuple[Path, Outcome, str]) -> None:
    folder = published[1].folder
    assert [trial.name for trial in folder.trials()] == ["winner"]
    assert not folder.sealed.path.exists()
    assert not (folder.path / "ray").exists()
    assert published[1].finished


@pytest.mark.slow
def test_a_selection_ran_as_many_trials_as_were_drawn(published: tuple[Path, Outcome, str]) -> None:
    """Its ledger, which stays secret, has them."""
    ledger = published[1].folder.ledger
    assert len(list(ledger.glob("admit-*.json"))) == DRAWN
    assert ledger.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_no_file_of_a_finished_selection_names_a_trial(published: tuple[Path, Outcome, str]) -> None:
    files = open_files(published[1].folder)
    assert len(files) > 10
    assert [path for path in files if SECRET.search(str(path))] == []
    assert [path for path in files if SECRET.search(path.read_bytes().decode("utf-8", errors="replace"))] == []


@pytest.mark.slow
def test_nothing_that_mlflow_has_of_a_selection_names_a_trial(published: tuple[Path, Outcome, str], root: Path) -> None:
    told = told_by_mlflow(root, published[1].folder)
    assert "winner" in told
    assert not SECRET.search(told)
    assert [run.data.tags[schema.TRIAL_ID_TAG] for run in runs_of(published[1].folder)] == ["winner"]


@pytest.mark.slow
def test_the_console_of_a_selection_names_no_trial(published: tuple[Path, Outcome, str]) -> None:
    assert not SECRET.search(published[2])


@pytest.mark.slow
def test_the_winner_carries_the_statement_and_is_judged_on_test_images(published: tuple[Path, Outcome, str]) -> None:
    _, outcome, _ = published
    folder = outcome.folder
    assert json.loads((folder.run("winner") / "statement.json").read_text()) == outcome.statement
    assert outcome.statement["policy"] == "release_best"
    assert {"fid", "accuracy"} <= set(folder.test_metrics("winner"))
    assert folder.floor()["of"] == "validation (180 images) against test (180 images)"


@pytest.mark.slow
def test_a_finished_selection_run_again_starts_and_changes_nothing(
    published: tuple[Path, Outcome, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, outcome, _ = published
    monkeypatch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
    before = {file: file.read_bytes() for file in open_files(outcome.folder)}
    again = run_study(load_study(path))
    assert (again.finished, again.best, again.statement) == (True, outcome.best, outcome.statement)
    assert {file: file.read_bytes() for file in open_files(outcome.folder)} == before


# Without Ray.


def test_the_number_of_trials_makes_no_difference_that_could_be_seen(
    root: Path,
    inline: Callable[..., Inline],
    drawn: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []
    for index, trials in enumerate((1, 5)):
        inline()
        drawn(trials)
        path = write_sealed(root, f"count{index}")
        code, out, err = sweep(path, monkeypatch, capsys)
        folder = folder_of(path)
        text = (out + err).replace(path.stem, "").replace(str(root), "")
        seen.append(
            (
                code,
                re.sub(r"\s+", " ", re.sub(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?|–", "#", text)),
                [str(file.relative_to(folder.path)) for file in open_files(folder)],
                [sorted(run.data.params | run.data.tags) for kind in KINDS for run in runs_of(folder, kind)],
            )
        )
    assert seen[0] == seen[1]


def test_the_winner_has_the_best_objective_of_all_trials(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline()
    scores = {}
    monkeypatch.setattr(sealing, "destroy_sealed", lambda folder: scores.update(objectives(folder.sealed)))
    outcome = run_study(load_study(write_sealed(root, "winner")))
    assert len(scores) == DRAWN
    assert objectives(outcome.folder)["winner"] == max(scores.values())


def objectives(folder: StudyFolder) -> dict[str, float]:
    return {trial.name: folder.reports(trial.name)[-1].metrics["accuracy_logreg"] for trial in folder.trials()}


def test_what_runs_lies_in_a_folder_of_its_owner_alone(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(Interrupted())
    path = write_sealed(root, "private")
    sweep(path, monkeypatch, capsys)
    folder = folder_of(path)
    assert len(folder.sealed.trials()) == 2
    assert folder.sealed.path.stat().st_mode & 0o077 == folder.path.stat().st_mode & 0o077 == 0
    outside = [file for file in open_files(folder) if folder.sealed.path not in file.parents]
    assert {file.name for file in outside} == {".lock", "study.yaml", "study.json", "statement.json"}
    assert runs_of(folder) == []


def test_a_stopped_selection_says_how_to_go_on_and_not_how_far_it_is(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(Interrupted())
    path = write_sealed(root, "stopped")
    code, out, err = sweep(path, monkeypatch, capsys)
    assert code == 130
    assert err.splitlines()[-1] == "stopped; run the same command again to go on"
    assert not SECRET.search(out + err)
    assert study_status(folder_of(path)) == "KILLED"


def test_a_stopped_selection_goes_on_to_the_drawn_number_of_trials(root: Path, inline: Callable[..., Inline]) -> None:
    path = write_sealed(root, "resumed")
    inline(Interrupted())
    assert run_study(load_study(path)).interrupted
    inline()
    outcome = run_study(load_study(path))
    assert outcome.finished
    assert len(list(outcome.folder.ledger.glob("admit-*.json"))) == DRAWN


def test_when_ray_falls_over_its_words_are_not_repeated(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(*[Crashed("trial-0002 ran out of memory")] * 9)
    _, out, err = sweep(write_sealed(root, "crashing"), monkeypatch, capsys)
    assert not SECRET.search(out + err)


def test_the_words_of_an_error_are_sealed(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(ValueError("trial-0002 has a bug"))
    path = write_sealed(root, "bug")
    code, out, err = sweep(path, monkeypatch, capsys)
    assert code == 1
    assert not SECRET.search(out + err)
    assert "error.log" in err.splitlines()[-1]
    assert "trial-0002 has a bug" in (folder_of(path).sealed.path / "error.log").read_text()


def fail_all(study: Study, folder: StudyFolder, searcher: Any, listener: Any) -> None:
    for number in range(searcher.remaining):
        name = searcher.suggest(str(number))["trial"]
        searcher.on_trial_complete(str(number), error=True)
        listener.failed(name, "the disk is full")


def test_a_selection_whose_trials_all_failed_has_no_winner_and_does_not_say_why(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "run_on_ray", fail_all)
    path = write_sealed(root, "failing")
    code, out, err = sweep(path, monkeypatch, capsys)
    folder = folder_of(path)
    assert code == 1
    assert "no winner" in err.splitlines()[-1]
    assert "disk" not in out + err and not SECRET.search(out + err)
    assert (folder.trials(), folder.sealed.path.exists(), runs_of(folder)) == ([], False, [])


def test_a_selection_without_a_winner_stays_without_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "run_on_ray", fail_all)
    path = write_sealed(root, "lost")
    sweep(path, monkeypatch, capsys)
    monkeypatch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
    code, _, err = sweep(path, monkeypatch, capsys)
    assert (code, "no winner" in err) == (1, True)


def test_retrying_failed_trials_of_a_selection_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match="--retry-failed goes against release_best"):
        run_study(load_study(write_sealed(root, "retried")), retry_failed=True)


def test_a_selection_whose_ledger_vanished_is_refused_without_a_number(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inline(Interrupted())
    path = write_sealed(root, "vanished")
    run_study(load_study(path))
    shutil.rmtree(folder_of(path).ledger)
    capsys.readouterr()
    message = refused(path, monkeypatch, capsys)
    assert "is damaged" in message
    assert not re.search(r"\d+ objects", message)


def test_a_selection_that_has_lost_its_trials_is_refused(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would run once more, and more noise would be drawn than was accounted."""
    inline(Interrupted())
    path = write_sealed(root, "gone")
    run_study(load_study(path))
    shutil.rmtree(folder_of(path).sealed.path)
    capsys.readouterr()
    message = refused(path, monkeypatch, capsys)
    assert "trials that its ledger admitted are gone" in message
    assert not SECRET.search(message)


def test_what_is_computed_about_proposals_stays_out_of_the_persons_cache(
    root: Path, inline: Callable[..., Inline]
) -> None:
    """An entry for each would tell how many there were, and their settings."""
    inline()
    space = {"privacy.step_limit": {"int": [3, 15]}}
    study = load_study(write_sealed(root, "cached", space=space))
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "dpsink" / "accounting"
    preflight.check_study(study, None)
    before = sorted(cache.iterdir())
    assert run_study(study).finished
    assert sorted(cache.iterdir()) == before
    assert os.environ["XDG_CACHE_HOME"] == str(cache.parent.parent)


def test_a_selection_by_private_scores_states_both_accounts(root: Path, inline: Callable[..., Inline]) -> None:
    inline()
    path = write_sealed(root, "noisy", trial=noisy_trial(steps=4, score_noise=20))
    outcome = run_study(load_study(path))
    accounts = outcome.statement["accounts"]
    assert outcome.statement["study_epsilon"] == max(account["epsilon"] for account in accounts.values())
    assert set(accounts) == {"training", "private validation"}
    assert outcome.best and outcome.best.score_releases == 2
    assert "fid" not in outcome.folder.reports("winner")[-1].metrics


def test_the_winner_of_a_selection_by_private_scores_is_exported_with_both_accounts(
    root: Path, inline: Callable[..., Inline], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inline()
    path = write_sealed(root, "exported", trial=noisy_trial(steps=4, score_noise=20))
    outcome = run_study(load_study(path))
    out = tmp_path / "winner"
    monkeypatch.setattr(sys, "argv", ["dpsink-analysis", "export", str(outcome.folder.path), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        analysis.cli.main()
    assert ended.value.code == 0
    card = json.loads((out / "card.json").read_text())
    assert (card["trial"], card["statement"]) == ("winner", outcome.statement)


# The last steps, killed at every boundary.


@pytest.fixture(scope="module")
def ended(root: Path) -> tuple[Path, Path, TrialRecord]:
    """A study file, a copy of its folder when all its trials had ended and nothing was unsealed, and who is best."""
    path = write_sealed(root, "unsealing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selection, "draw", lambda _: DRAWN)
        patch.setattr(cluster, "run_on_ray", Inline())
        patch.setattr(Unsealing, "run", die)
        with pytest.raises(Killed):
            run_study(load_study(path))
    folder, copy = folder_of(path), root / "unsealing-copy"
    shutil.copytree(folder.path, copy)
    best = select_best(folder.sealed, "accuracy_logreg")
    assert best
    return path, copy, best


def die(*_: Any, **__: Any) -> None:
    raise Killed


def restore(path: Path, copy: Path) -> StudyFolder:
    folder = folder_of(path)
    shutil.rmtree(folder.path)
    shutil.copytree(copy, folder.path)
    return folder


def finish(path: Path) -> Outcome:
    """The same command again, which has nothing to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.choice.judge", no_judge)
        patch.setattr(cluster, "run_on_ray", lambda *_: pytest.fail("Ray was started"))
        return run_study(load_study(path))


STEPS = [
    (StudyFolder, "add_trial"), (StudyFolder, "end_trial"), (StudyFolder, "write_test"), (Unsealing, "draw_out"),
    (Unsealing, "publish"), (Unsealing, "conclude"), (StudyFolder, "write_selection"), (sealing, "_copy_untimed"),
    (sealing, "destroy_sealed"),
]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[step for _, step in STEPS])
def test_killed_at_any_step_of_the_unsealing_the_same_winner_comes_out_once(
    ended: tuple[Path, Path, TrialRecord], inline: Callable[..., Inline], owner: Any, step: str, when: str
) -> None:
    path, copy, best = ended
    inline()
    folder = restore(path, copy)
    real = getattr(owner, step)

    def killed(*args: Any, **words: Any) -> None:
        if when == "after":
            real(*args, **words)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, step, killed)
        finish(path)
    outcome = finish(path)
    assert outcome.finished
    assert outcome.best == best.model_copy(update={"name": "winner", "number": None})
    assert [trial.name for trial in folder.trials()] == ["winner"]
    assert [run.data.tags[schema.TRIAL_ID_TAG] for run in runs_of(folder)] == ["winner"]
    assert not folder.sealed.path.exists()


def test_killed_while_the_losers_are_deleted_the_rest_is_deleted(ended: tuple[Path, Path, TrialRecord]) -> None:
    path, copy, _ = ended
    folder = restore(path, copy)

    def delete_half(place: Path, **_: Any) -> None:
        files = sorted(file for file in place.rglob("*") if file.is_file())
        for file in files[: len(files) // 2]:
            file.unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sealing, "destroy_sealed", lambda folder: delete_half(folder.sealed.path))
        finish(path)
    assert folder.sealed.path.exists()
    assert finish(path).finished
    assert not folder.sealed.path.exists()


def test_the_winners_files_tell_neither_when_nor_by_which_process_they_were_made(
    ended: tuple[Path, Path, TrialRecord],
) -> None:
    """Times and process ids count up, and would tell its place."""
    path, copy, _ = ended
    folder = restore(path, copy)
    started = time.time()
    finish(path)
    places = [folder.trial("winner"), *folder.trial("winner").rglob("*")]
    assert len(places) > 10
    assert min(place.stat().st_mtime for place in places) > started - 0.1
    assert not [place for place in places if place.name.startswith("lock")]
    assert folder.read_trial("winner").number is None
