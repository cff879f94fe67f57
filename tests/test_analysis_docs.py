"""docs/analysis.md keeps its word: every line of code in it runs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import analysis
import analysis.cli
import dpsink.judging
from tests.test_readme import ROOT, blocks
from tests.test_tracking import Fake, make_study
from tune.tracking import rebuild

DOCUMENT = ROOT / "docs" / "analysis.md"
COMMANDS = [line for block in blocks(DOCUMENT, "sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def home(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the quickstart has run."""
    home = tmp_path_factory.mktemp("docs")
    (home / "studies").mkdir()
    database = shutil.copyfile(empty_database[0], home / "studies" / "mlflow.db")
    fakes = [
        Fake(f"t{index}", metrics={"accuracy": 0.6 + index / 50, "fid": 30.0 - index}, epsilons=(8.0 + index / 10,),
             overrides=(f"optimizer.lr={0.001 * (index + 1)}",))
        for index in range(6)
    ]  # fmt: skip
    control = Fake("class-mean", role="baseline", metrics={"accuracy": 0.65, "variety": 0.01})
    study = make_study(home / "studies" / "quickstart", [*fakes, control], f"sqlite:///{database}", name="quickstart")
    rebuild(study)
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the quickstart has run, with a judge who is quick."""

    def judge(place: Path, **options: Any) -> dict[str, Any]:
        return {"metrics": {"accuracy": 0.6 + options["seed"] % 3 / 100, "variety": 0.5, "recall": 0.4}}

    monkeypatch.setattr(dpsink.judging, "judge", judge)
    monkeypatch.chdir(home)


def test_every_python_block_runs() -> None:
    names: dict[str, Any] = {}
    for code in blocks(DOCUMENT, "python"):
        exec(code, names)
    assert {"runs", "front.png", "effects.png", "report.html"} <= {*names, *(path.name for path in Path().iterdir())}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_answers(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        analysis.cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    told = "models:/quickstart@best-accuracy" if " export " in line else "quickstart: 7 of 7 runs accepted"
    assert told in printed.out


def test_there_are_five_questions_each_with_a_line_of_python_and_a_command_and_the_report() -> None:
    assert len(blocks(DOCUMENT, "python")) == 1 + 5 + 1
    asked = [shlex.split(line)[1] for line in COMMANDS]
    assert asked == ["runs", "best", "pareto", "importance", "evaluate-top", "report", "export", "export"]


def test_a_notebook_takes_the_best_with_one_line_and_sees_what_stands_beside_it() -> None:
    runs = analysis.load_runs("quickstart")
    run = analysis.select_best(runs, "fid")
    (row,) = analysis.rows_of(analysis.best(runs, "fid").head(1))
    control = analysis.control_of(runs, run)
    assert run["trial"] == analysis.run_of(runs, row)["trial"] == analysis.named(runs, "t5")["trial"] == "t5"
    assert run["run_id"] == analysis.select_best(runs, analysis.parse_rule("fid"))["run_id"]
    assert [one["trial"] for one in analysis.baselines(runs)] == ["class-mean"]
    assert control is None  # none of its generators is one
    assert analysis.guarantee(runs).startswith("each trial ε ≤ 10")


def test_every_name_that_the_document_calls_is_of_the_package() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## All of it on one page")[0]
    called = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", text.partition("**Beside these.**")[2]))
    assert called - set(analysis.__all__) == set()


def test_every_name_of_the_package_leads_to_a_function() -> None:
    assert all(callable(getattr(analysis, name)) for name in analysis.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bset'"):
        _ = analysis.bset


def test_the_document_names_every_reason() -> None:
    """Reasons are literals of analysis/runs.py; the document's table has a row for each."""
    text, source = DOCUMENT.read_text(encoding="utf-8"), (ROOT / "analysis" / "runs.py").read_text(encoding="utf-8")
    reasons = ["stopped early", "without epsilon", "above the target epsilon", "on other data", "beside another seed"]
    reasons += ["without all its seeds", "judged by another number of samples"]
    reasons += ["with another FID extractor", "without its objective", "without its files", "unfinished"]
    assert [reason for reason in reasons if f'"{reason}"' not in source or f"`{reason}`" not in text] == []
