"""Reading a study back: what may be compared, what is best, and what leaves the house."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from analysis import export
from analysis.cli import app, main
from analysis.export import export_run
from analysis.page import render
from analysis.rules import ordered, parse_rule
from analysis.runs import Row, Runs, load_runs, rows_of
from analysis.selection import baselines, best, comparable, select_best
from analysis.tables import guarantee
from dpsink.checkpoint import load_generator
from dpsink.config import load_config
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from tests.test_tracking import EXTRACTOR, STATEMENT, TARGET, Fake, make_study
from tune import schema
from tune.tracking import rebuild

WITHOUT_PRIVACY = ("privacy.target_epsilon=.inf", "privacy.noise_multiplier=0", "privacy.steps=100")
BASELINES = [
    Fake("class-mean", role="baseline", metrics={"fid": 90.0, "accuracy": 0.75, "variety": 0.01}),
    Fake("paper", role="baseline", metrics={"fid": 30.0, "accuracy": 0.6}),
]
GOOD = [
    Fake("sharp", metrics={"fid": 20.0, "accuracy": 0.7}, test={"fid": 21.0, "accuracy": 0.69}),
    Fake("useful", metrics={"fid": 40.0, "accuracy": 0.8}, overrides=("optimizer.lr=2e-4",)),
]
BAD = {
    "failed": Fake("a-failed", state="failed", error="out of memory"),
    "diverged": Fake("b-diverged", state="diverged", metrics={"fid": 1e6, "accuracy": 0.0}),
    "unfinished": Fake("c-unfinished", state=None),
    NON_PRIVATE: Fake("d-free", overrides=WITHOUT_PRIVACY, epsilons=(math.inf,), metrics={"accuracy": 0.99}),
    "above the target epsilon": Fake("e-greedy", epsilons=(5.0, TARGET + 1e-6), metrics={"accuracy": 0.99}),
    "on other data": Fake("f-elsewhere", fingerprint="hmac:theirs", metrics={"accuracy": 0.99}),
    "with another FID extractor": Fake("g-inception", overrides=("evaluation.extractor=inception",)),
    "without its objective": Fake("h-blind", metrics={"accuracy": math.nan}),
    "without epsilon": Fake("i-silent", epsilons=()),
    "stopped early": Fake("j-stopped", state="stopped_early", metrics={"accuracy": 0.99}),
    "without its files": Fake("k-gone", metrics={"accuracy": 0.99}),
    "beside another seed": Fake("l-second-seed", config_id="c-a-failed", metrics={"accuracy": 0.99}),
}


@pytest.fixture(scope="module")
def database(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with one study of each kind; the tests only read it."""
    place = tmp_path_factory.mktemp("analysis")
    shutil.copyfile(empty_database[0], place / "mlflow.db")
    uri = f"sqlite:///{place}/mlflow.db"
    studies: dict[str, Sequence[Fake]] = {
        "digits": [*BASELINES, *GOOD, *BAD.values()],
        "empty": [],
        "hopeless": [BAD["diverged"], BAD["unfinished"], Fake("d", state=None)],
        "baselines-only": [*BASELINES, BAD["failed"]],
        "ties": [
            Fake(name, epsilons=(epsilon,), metrics={"fid": 7.0})
            for name, epsilon in [("c", 4.0), ("b", 3.0), ("a", 4.0), ("z", 3.0)]
        ],
    }
    for name, fakes in studies.items():
        rebuild(make_study(place / name, list(fakes), uri, name=name, study_id=f"id-{name}"))
    shutil.rmtree(place / "digits" / "trials" / "k-gone" / "run")
    return uri


@pytest.fixture
def runs(database: str) -> Runs:
    return load_runs("digits", database)


def study_folder(database: str, name: str) -> Path:
    return Path(database.removeprefix("sqlite:///")).parent / name


@pytest.mark.parametrize("reason", BAD)
def test_a_run_that_may_not_be_compared_is_rejected_with_its_reason(runs: Runs, reason: str) -> None:
    rejected = {row["trial"]: row["reason"] for row in runs.rejected.to_dict("records")}
    assert rejected[BAD[reason].name] == reason


def test_all_others_are_accepted(runs: Runs) -> None:
    assert list(runs.accepted["trial"]) == ["class-mean", "paper", "sharp", "useful"]


def test_a_rejection_gives_its_detail(runs: Runs) -> None:
    details = {row["trial"]: row["detail"] for row in runs.rejected.to_dict("records")}
    assert details["a-failed"] == "out of memory"
    assert details["h-blind"] == "accuracy"


def test_params_that_are_numbers_are_read_as_numbers(runs: Runs) -> None:
    (useful,) = [run for run in rows_of(runs.accepted) if run["trial"] == "useful"]
    assert useful["optimizer.lr"] == 2e-4
    assert useful["optimizer.schedule"] == "constant"
    assert math.isnan(useful["privacy.steps"])


def test_the_study_brings_its_facts_and_statement(runs: Runs) -> None:
    assert runs.study.target_epsilon == TARGET
    assert runs.study.extractor == EXTRACTOR
    assert runs.study.searched == ("optimizer.lr", "privacy.noise_multiplier")
    assert runs.study.statement["study_epsilon"] == STATEMENT["study_epsilon"]


def test_a_study_is_found_by_its_file(database: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"name: ties\ntracking: {{uri: '{database}'}}\n")
    assert load_runs(str(path)).study.study_id == "id-ties"


def test_a_study_is_found_by_its_folder(database: str) -> None:
    assert load_runs(str(study_folder(database, "ties"))).study.study_id == "id-ties"


def test_the_environment_names_the_default_database(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert load_runs("ties").tracking_uri == database


def test_an_unknown_study_names_the_nearest(database: str) -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        load_runs("digit", database)


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such database"):
        load_runs("digits", f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_told_in_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(InputError, match="cannot be read") as caught:
        load_runs("digits", f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


def test_a_study_without_trials_says_so(database: str) -> None:
    with pytest.raises(InputError, match="no trial has started"):
        comparable(load_runs("empty", database))


def test_a_study_whose_runs_are_all_rejected_says_why_by_count(database: str) -> None:
    with pytest.raises(InputError, match="all 3 runs are rejected: 2 unfinished, 1 diverged"):
        best(load_runs("hopeless", database))


def chosen(runs: Runs, by: str) -> Row:
    return select_best(runs, parse_rule(by))


def test_fid_is_minimised(runs: Runs) -> None:
    assert chosen(runs, "fid")["trial"] == "sharp"


def test_accuracy_is_maximised(runs: Runs) -> None:
    assert chosen(runs, "accuracy")["trial"] == "useful"


def test_baselines_are_not_selected_from(runs: Runs) -> None:
    assert set(best(runs, "accuracy")["role"]) == {schema.ROLE_SEARCH}
    assert [run["trial"] for run in baselines(runs)] == ["class-mean", "paper"]


def test_ties_go_to_less_epsilon_and_then_to_the_first_name(database: str) -> None:
    assert list(best(load_runs("ties", database), "fid")["trial"]) == ["b", "z", "a", "c"]


def test_fid_of_different_extractors_is_never_ranked(runs: Runs) -> None:
    mixed = runs.accepted.assign(fid_extractor=[f"classifier@{index}" for index in range(len(runs.accepted))])
    with pytest.raises(InputError, match="different FID extractors"):
        ordered(mixed, parse_rule("fid"))
    assert len(ordered(mixed, parse_rule("accuracy"))) == len(mixed)


def test_an_unknown_metric_names_the_nearest(runs: Runs) -> None:
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        best(runs, "acuracy")


def test_a_study_without_searched_runs_says_so(database: str) -> None:
    with pytest.raises(InputError, match=r"no accepted run of role search \(1 failed\)"):
        best(load_runs("baselines-only", database), "fid")


def test_an_export_is_the_generator_that_was_trained(runs: Runs, tmp_path: Path) -> None:
    run = chosen(runs, "fid")
    exported, _ = load_generator(export_run(runs, run, tmp_path / "out", selected_by="fid"))
    trained, _ = load_generator(Path(run["folder"]))
    pairs = zip(exported.state_dict().values(), trained.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_export_carries_its_settings_samples_metrics_and_the_statement_that_covers_the_selection(
    runs: Runs, tmp_path: Path
) -> None:
    run = chosen(runs, "fid")
    out = export_run(runs, run, tmp_path / "out", selected_by="fid")
    card = json.loads((out / "card.json").read_text())
    assert load_config(out / "config.yaml").model_dump() == load_generator(out)[1].config.model_dump()
    assert Image.open(out / "samples.png").size[0] > 0
    assert (card["study"], card["trial"], card["selected_by"]) == ("digits", "sharp", "fid")
    assert card["metrics"]["test_accuracy"] == 0.69
    assert card["statement"] == STATEMENT
    assert json.loads((out / "statement.json").read_text()) == STATEMENT


def card_of(folder: Path) -> dict[str, Any]:
    """The card of an export; its statement is the one that `dpsink sample` finds."""
    card = json.loads((folder / "card.json").read_text())
    assert card["statement"] == json.loads((folder / "statement.json").read_text())
    return card


def test_an_export_chosen_among_several_studies_carries_all_their_statements_and_their_sum(
    database: str, tmp_path: Path
) -> None:
    runs = load_runs(["digits", "ties"], database)
    told = card_of(export_run(runs, chosen(runs, "fid"), tmp_path / "out", selected_by="fid"))["statement"]
    assert told["studies"] == {"digits": STATEMENT, "ties": STATEMENT}
    assert told["study_epsilon"] == pytest.approx(2 * STATEMENT["study_epsilon"])
    assert told["study_delta"] == pytest.approx(2 * STATEMENT["study_delta"])
    assert (told["assumptions"], told["policy"]) == (["one", "two"], "compose_all")


def test_among_several_studies_one_without_a_claim_leaves_none_for_all(runs: Runs, tmp_path: Path) -> None:
    silent = replace(runs.study, name="silent", study_id="id-silent", run_id=run_without_artifacts(runs), statement={})
    both = replace(runs, studies=(*runs.studies, silent))
    told = card_of(export_run(both, chosen(runs, "fid"), tmp_path / "out", selected_by="fid"))["statement"]
    assert told["study_epsilon"] is None
    assert told["not_covered"][0].startswith("the selection among the trials of study silent: no statement")


def run_without_artifacts(runs: Runs) -> str:
    return str(runs.rejected.set_index("trial").loc["i-silent", "run_id"])


@pytest.mark.parametrize("there", ["artifact", "folder", "tag", "nothing"])
def test_the_statement_is_taken_from_the_best_place_that_is_left(runs: Runs, tmp_path: Path, there: str) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"study_id": runs.study.study_id}))
    (folder / "statement.json").write_text(json.dumps(STATEMENT | {"assumptions": ["of the folder"]}))
    study = replace(
        runs.study,
        run_id=runs.study.run_id if there == "artifact" else run_without_artifacts(runs),
        folder=str(folder) if there == "folder" else None,
        statement={} if there == "nothing" else {"policy": "compose_all", "study_epsilon": 31.4159},
    )
    left = replace(runs, studies=(study,))
    told = card_of(export_run(left, chosen(runs, "fid"), tmp_path / "out", selected_by="fid"))["statement"]
    wanted = {"artifact": ["one", "two"], "folder": ["of the folder"], "tag": None}
    if there == "nothing":
        assert told["study_epsilon"] is None and told["guarantee"] == "of this trial alone, had nothing been selected"
        assert told["not_covered"][0].startswith("the selection among the trials of study digits: no statement")
    else:
        assert (told["study_epsilon"], told.get("assumptions")) == (31.4159, wanted[there])


def test_the_delta_of_a_whole_study_is_its_statement_s(runs: Runs) -> None:
    """That of a study that repeats another contains the first one's."""
    again = replace(runs, studies=(replace(runs.study, statement=STATEMENT | {"study_delta": 2e-5}),))
    assert guarantee(again) == ("each trial ε ≤ 10 at δ = 1e-05, whole study ε ≤ 31.416 (compose_all) at δ = 2e-05")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.sections.statement_of", lambda _, study: study.statement)
        assert "ε ≤ 31.416 at δ = 2e-05" in render(again)


def test_studies_of_which_one_claims_nothing_have_no_claim_together(runs: Runs) -> None:
    silent = replace(runs.study, name="silent", study_id="id-silent", statement=STATEMENT | {"study_epsilon": None})
    assert guarantee(replace(runs, studies=(*runs.studies, silent))).endswith("no claim for the studies together")


def test_a_study_without_a_statement_is_told_what_is_not_covered(runs: Runs) -> None:
    bare = replace(runs, studies=(replace(runs.study, statement={}),))
    assert "without a statement: the selection among its trials is not covered" in guarantee(bare)
    assert "the selection among its trials is not covered" in render(bare)


def test_an_export_has_no_optimiser(runs: Runs, tmp_path: Path) -> None:
    out = export_run(runs, chosen(runs, "fid"), tmp_path / "out", selected_by="fid")
    assert not list(out.glob("optimizer*"))


def test_nothing_is_overwritten_without_force(runs: Runs, tmp_path: Path) -> None:
    run = chosen(runs, "fid")
    out = export_run(runs, run, tmp_path / "out", selected_by="fid")
    (out / "mark").touch()
    with pytest.raises(InputError, match="--force"):
        export_run(runs, run, out, selected_by="fid")
    assert (out / "mark").exists()
    export_run(runs, run, out, selected_by="fid", force=True)
    assert not (out / "mark").exists()


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "is a link"), (b"root:x:0:0", "is no PNG")], ids=["a link out", "no picture"]
)
def test_a_grid_that_is_no_picture_of_the_run_is_not_shipped(
    runs: Runs, tmp_path: Path, content: bytes | None, rule: str
) -> None:
    run = chosen(runs, "fid")
    grid = export.checkpoint_of(run) / schema.GRID_ARTIFACT
    kept = grid.rename(tmp_path / "holiday.png")
    if content is None:
        grid.symlink_to(kept)
    else:
        grid.write_bytes(content)
    try:
        with pytest.raises(InputError, match=rule):
            export_run(runs, run, tmp_path / "out", selected_by="fid")
    finally:
        grid.unlink()
        kept.rename(grid)
    assert list(tmp_path.iterdir()) == []


def test_force_does_not_replace_what_is_no_export(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"without card\.json it is not replaced"):
        export_run(runs, chosen(runs, "fid"), tmp_path, selected_by="fid", force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_export_that_fails_leaves_the_old_one(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = chosen(runs, "fid")
    out = export_run(runs, run, tmp_path / "out", selected_by="fid")
    before = sorted(out.iterdir())

    def disk_is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_card", disk_is_full)
    with pytest.raises(InputError, match="No space left"):
        export_run(runs, run, out, selected_by="fid", force=True)
    assert sorted(out.iterdir()) == before
    assert list(tmp_path.iterdir()) == [out]


def test_files_that_are_elsewhere_are_asked_for(runs: Runs, tmp_path: Path) -> None:
    gone = chosen(runs, "fid") | {"folder": str(tmp_path / "gone")}
    with pytest.raises(InputError, match="where the study's storage is"):
        export_run(runs, gone, tmp_path / "out", selected_by="fid")


def test_files_of_another_trial_are_refused(runs: Runs, tmp_path: Path) -> None:
    swapped = chosen(runs, "fid") | {"folder": chosen(runs, "accuracy")["folder"]}
    with pytest.raises(InputError, match="another trial"):
        export_run(runs, swapped, tmp_path / "out", selected_by="fid")
    assert not (tmp_path / "out").exists()


def call_best(database: str, *more: str) -> Result:
    arguments = ["best", "digits", "--tracking-uri", database, *more]
    return CliRunner().invoke(app, arguments, standalone_mode=False)


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_best_draws_what_the_best_and_the_baselines_make(database: str, tmp_path: Path) -> None:
    result = call_best(database, "--plot", str(tmp_path / "comparison.png"))
    assert result.exception is None
    assert Image.open(tmp_path / "comparison.png").size[0] > 500
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]  # it shows, and takes nothing out


def test_best_prints_one_json_document(database: str) -> None:
    document = json.loads(call_best(database, "--json").stdout)
    assert document["accepted"] == 4
    assert len(document["rejected"]) == len(BAD)
    shown = {run["title"]: run for run in document["runs"]}
    assert shown["best by FID"]["trial"] == "sharp"
    assert shown["best by accuracy"]["optimizer.lr"] == 2e-4
    assert shown["class-mean"]["variety"] == 0.01
    assert shown["class-mean"]["test_fid"] is None
    assert document["studies"][0]["statement"]["study_epsilon"] == STATEMENT["study_epsilon"]


def test_best_refuses_before_it_writes_anything(database: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.png").write_text("mine")
    result = call_best(database, "--plot", str(tmp_path / "comparison.png"), "--csv", str(tmp_path / "table.csv"))
    assert isinstance(result.exception, InputError)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command line in an empty directory; answers with its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dpsink-analysis", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_bad_input_is_one_line_and_exit_code_2(
    database: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("best", "digit", "--tracking-uri", database) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"error: study 'digit' is not in {database}; did you mean 'digits'?"]


def test_best_prints_the_comparison_and_the_reasons(
    database: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("best", "digits", "--tracking-uri", database) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "4 of 16 runs accepted" in printed.out
    assert "above the target epsilon" in printed.out
    assert "whole study ε ≤ 31.416" in printed.out
    assert "floor: real images against real ones have FID 0.1234, KID 0.0012: validation (180" in printed.out


def test_the_package_is_a_command() -> None:
    asked = subprocess.run([sys.executable, "-m", "analysis", "--help"], capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "best" in asked.stdout


def test_best_by_a_rule_says_by_which(database: str) -> None:
    document = json.loads(call_best(database, "--by", "accuracy:0.2", "--by", "fid", "--json").stdout)
    assert document["runs"][-1]["selected_by"] == "accuracy within 0.2, then FID"
    assert document["runs"][-1]["trial"] == "sharp"


def test_the_best_by_a_rule_is_exported_under_its_name(
    database: str, command: Callable[..., int], tmp_path: Path
) -> None:
    assert command("export", "digits", "--by", "accuracy:0.2", "--by", "fid", "--tracking-uri", database) == 0
    (folder,) = (tmp_path / "exports" / "digits").iterdir()
    assert folder.name == "best-accuracy-fid"
    card = json.loads((folder / "card.json").read_text())
    assert (card["trial"], card["selected_by"]) == ("sharp", "accuracy within 0.2, then FID")


def test_best_says_how_it_compares_with_the_control(database: str) -> None:
    printed = call_best(database).stdout
    assert "study 'digits' has no class-mean control at this ε" in printed  # none of its generators is one


def test_several_studies_are_selected_from_with_all_their_promises(database: str) -> None:
    printed = call_best(database, "ties", "--by", "fid").stdout
    assert "digits+ties: 8 of 20 runs accepted" in printed
    assert "digits: each trial ε ≤ 10, whole study ε ≤ 31.416" in printed
    assert "together, by basic composition: ε ≤ 62.832, δ ≤ 2e-05" in printed  # twice 31.4159


def test_a_winner_whose_files_are_gone_is_one_line_that_says_where_they_were(
    database: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = tmp_path.with_name(f"{tmp_path.name}-moved")
    moved = study_folder(database, "ties").rename(place)
    try:
        assert command("export", "ties", "--by", "fid", "--tracking-uri", database) == 2
    finally:
        moved.rename(study_folder(database, "ties"))
    assert "files of trial b are not at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_runs_lists_what_was_set_apart_and_writes_all(
    database: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command("runs", "hopeless", "--tracking-uri", database, "--csv", "runs.csv") == 0
    assert "set apart: 2 unfinished, 1 diverged" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "runs.csv")["reason"]) == ["diverged", "unfinished", "unfinished"]


@pytest.mark.parametrize("word", ["best", "pareto", "importance", "evaluate-top", "export"])
def test_every_command_ends_with_code_2_where_all_runs_are_rejected(
    word: str, database: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command(word, "hopeless", "--tracking-uri", database) == 2
    assert "all 3 runs are rejected: 2 unfinished, 1 diverged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("best", "digits", "--by", "fid", "--weights", "fid=-1"), "not both"),
        (("best", "digits", "--where", "acuracy>0"), "did you mean 'accuracy'"),
        (("best", "digits", "--epsilon", "0.1"), "leaves none of 2 configurations: epsilon lies in [9.5, 9.5]"),
        (("pareto", "digits", "--metric", "fid"), "two or three"),
        (("pareto", "digits", "--reference", "fid"), "METRIC=NUMBER"),
        (("importance", "digits"), "needs 5 configurations, it has 2"),
        (("evaluate-top", "digits", "--by", "test_fid"), "'test_fid' may not select: the test split judges"),
        (("best", "digits", "--by", "test_accuracy"), "may not select"),
        (("best", "digits", "--weights", "test_fid=-1"), "may not select"),
        (("best", "digits", "--where", "test_accuracy>0.5"), "may not select"),
        (("pareto", "digits", "--metric", "test_fid", "--metric", "accuracy"), "may not select"),
        (("importance", "digits", "--by", "test_fid"), "may not select"),
        (("export", "digits", "--by", "test_fid"), "may not select"),
        (("best", "digits", "nothing"), "study 'nothing' is not in"),
        (("best", "digits", "--plot=x.foo"), "--plot=x.foo: must end in .png, .pdf or .svg"),
        (("pareto", "digits", "--csv=x.csv", "--plot=x"), "--plot=x: must end in .png"),
        (("importance", "digits", "--plot=x.foo"), "--plot=x.foo: must end in .png"),
        (("evaluate-top", "digits", "--plot=x.foo"), "--plot=x.foo: must end in .png"),
        (
            ("evaluate-top", "digits", "--inception-weights=w.pth"),
            f"--inception-weights=w.pth: study digits measured FID with {EXTRACTOR}; leave it out",
        ),
    ],
)
def test_bad_input_is_told_and_writes_nothing(
    words: tuple[str, ...],
    told: str,
    database: str,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert command(*words, "--tracking-uri", database) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "option"), [("runs", "--csv"), ("pareto", "--csv"), ("pareto", "--plot")])
def test_no_table_or_picture_is_overwritten_without_force(
    word: str, option: str, database: str, command: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "mine.png").write_text("mine")
    assert command(word, "digits", "--tracking-uri", database, option, "mine.png") == 2
    assert (tmp_path / "mine.png").read_text() == "mine"
    assert command(word, "digits", "--tracking-uri", database, option, "mine.png", "--force") == 0
    assert (tmp_path / "mine.png").read_bytes() != b"mine"


def test_a_study_s_name_is_no_path(runs: Runs) -> None:
    evil = Runs((replace(runs.study, name="../../etc/passwd"),), runs.tracking_uri, runs.table)
    assert export.default_folder(evil) == Path("exports/__.._etc_passwd")
