"""The documents keep their word: commands parse, studies load, links lead somewhere, tables name what exists."""

import ast
import configparser
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

import analysis.cli
import dpsink.cli
import tune.cli
from dpsink.config import TrialConfig, load_config
from dpsink.data import private_records
from tune.study import load_study

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DESIGN = ROOT / "docs" / "design.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
APPS = {"dpsink": dpsink.cli.app, "dpsink-tune": tune.cli.app, "dpsink-analysis": analysis.cli.app}
COMMANDS = {name: typer.main.get_command(app) for name, app in APPS.items()}
# They do something and answer nothing; a schema is JSON anyway.
SILENT = {("dpsink-tune", "track"), ("dpsink-tune", "ui"), ("dpsink-tune", "schema")}


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of a language; '' has none."""
    pieces = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    return [text for name, text in pieces if name == language]


def written_commands(path: Path) -> list[list[str]]:
    """Words of every `dpsink…` command line in fenced blocks, and of those in the text that have arguments."""
    text = path.read_text(encoding="utf-8")
    lines = [line for language in ("", "sh", "bash", "console") for block in blocks(path, language)
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    lines += re.findall(r"`(dpsink[\w-]* [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words and words[0] in APPS]


def presets() -> list[Path]:
    return sorted((ROOT / "experiments" / "presets").glob("*.yaml"))


def commented_commands(path: Path) -> list[list[str]]:
    """Command lines in a YAML file's comments."""
    lines = re.findall(r"^#\s+(dpsink.*)$", path.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in lines]


def shown(value: object) -> str:
    """A test's name for a command line."""
    return "_".join(value)[:80] if isinstance(value, list) else ""


def leaves(app: str) -> Iterator[tuple[str, Any]]:
    """Names and commands of an app."""
    group: Any = COMMANDS[app]
    yield from group.commands.items()


def parsed(words: list[str]) -> Any:
    """The context of a command line, as the app makes it before it runs anything; raises what a user would see."""
    group: Any = COMMANDS[words[0]]
    context = group.make_context(words[0], words[1:])
    name, command, rest = group.resolve_command(context, words[1:])
    return command.make_context(name, rest, parent=context)


WRITTEN = [(path, words) for path in DOCUMENTS for words in written_commands(path)] + [
    (path, words) for path in presets() for words in commented_commands(path)
]
WHOLE = [(path, words) for path, words in WRITTEN if len(words) > 2]  # the others name a command only


# Commands.


@pytest.mark.parametrize(("path", "words"), WHOLE, ids=shown)
def test_written_command_parses(path: Path, words: list[str]) -> None:
    assert parsed(words).params, f"{place(path)}: {words}"


@pytest.mark.parametrize(("path", "words"), WRITTEN, ids=shown)
def test_written_command_exists(path: Path, words: list[str]) -> None:
    assert len(words) < 2 or words[1] in dict(leaves(words[0])), f"{place(path)}: {words}"


def test_readme_shows_every_app_and_its_main_commands() -> None:
    """Keeps the tests above honest: the README's commands are found."""
    found = {tuple(words[:2]) for words in written_commands(README)}
    assert found >= {
        ("dpsink", "train"), ("dpsink", "evaluate"), ("dpsink", "sample"), ("dpsink", "budget"),
        ("dpsink-tune", "sweep"), ("dpsink-analysis", "best"),
    }  # fmt: skip


def test_parser_of_these_tests_refuses_an_unknown_option() -> None:
    with pytest.raises(Exception, match="--sigma"):
        parsed(["dpsink", "budget", "--sigma", "1"])


@pytest.mark.parametrize("words", [words for _, words in WHOLE if words[:2] == ["dpsink", "train"]], ids=shown)
def test_written_training_has_settings_that_exist(words: list[str]) -> None:
    given = parsed(words).params
    config = load_config(ROOT / given["config"] if given["config"] else None, given["overrides"] or ())
    assert private_records(config.data) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [words for words in written_commands(README) if words[1] == "budget" and len(words) > 2]
)
def test_readme_s_budget_command_answers(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    with pytest.raises(SystemExit) as ended:
        dpsink.cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["max_steps"]["pld"] > 0


@pytest.mark.parametrize("app", APPS)
def test_every_command_has_help(app: str) -> None:
    for name, command in leaves(app):
        assert (command.help or "").strip(), name
        assert command.get_help_option(command.make_context(name, [], resilient_parsing=True)), name


def test_every_option_says_what_it_is() -> None:
    """Arguments that a metavariable explains may be silent."""
    silent = [
        f"{app} {name} --{parameter.name}"
        for app in APPS
        for name, command in leaves(app)
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.help
    ]
    assert silent == []


def test_every_command_that_answers_takes_json() -> None:
    without = {
        (app, name)
        for app in APPS
        for name, command in leaves(app)
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without <= SILENT


def test_console_scripts_lead_to_the_apps() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options.entry_points"]["console_scripts"].split("\n")
    scripts = dict(re.split(r"\s*=\s*", line) for line in lines if line)
    assert scripts.keys() == APPS.keys()
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_make_targets_of_the_readme_exist() -> None:
    named = set(re.findall(r"`?make ([\w-]+)", README.read_text(encoding="utf-8")))
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"quickstart", "test"} <= named <= made


# Settings.


def test_readme_s_study_loads(tmp_path: Path) -> None:
    (text,) = blocks(README, "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    study = load_study(path)
    assert (study.name, study.algorithm.trials) == ("mine", 10)
    assert study.baseline("class-mean").generator.kind == "class_mean"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/studies").glob("*.yaml")), ids=place)
def test_study_of_the_project_loads(path: Path) -> None:
    assert load_study(path).name == path.stem


@pytest.mark.parametrize("path", presets(), ids=place)
def test_preset_of_the_project_loads(path: Path) -> None:
    assert load_config(path).privacy.private


# Places.


def links(path: Path) -> list[str]:
    """Targets of local links and pictures."""
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in targets if not target.startswith(("http", "#", "mailto"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_every_local_link_and_picture_exists(path: Path) -> None:
    assert [target for target in links(path) if not (path.parent / target).exists()] == []


def test_readme_s_links_are_found() -> None:
    assert {"docs/design.md", "docs/method.md", "docs/privacy.md"} <= set(links(README))


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_every_named_path_of_the_repository_exists(path: Path) -> None:
    """Words in backticks that begin with a top-level folder; what a command writes is not in the repository."""
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:dpsink|tune|analysis|experiments|tests|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_every_test_that_a_document_leans_on_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = []
    for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        source = ROOT / "tests" / file
        names = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
        missing += [] if name in names else [f"{file}::{name}"]
    assert missing == []


# The tables of docs/design.md.


def rooms() -> dict[str, str]:
    """Path of every room in the tables of docs/design.md, to the row's text; a folder ends with '/'."""
    rows: dict[str, str] = {}
    package = ""
    for line in DESIGN.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            package = line.removeprefix("## ").strip()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        folder = ""
        for name in re.findall(r"`([\w/.-]+)`", cells[0]) if line.startswith("| `") else ():
            folder = name[: name.rindex("/") + 1] if "/" in name else folder
            path = name if "/" in name else folder + name  # `privacy/storage.py`, `budget.py`
            rows[f"{package}/{path.removeprefix(package + '/')}"] = line
    return rows


def test_every_room_of_the_design_exists() -> None:
    assert len(rooms()) > 20
    assert [room for room in rooms() if not (ROOT / room).exists()] == []


def modules() -> list[Path]:
    found = [path for package in ("dpsink", "tune", "analysis") for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if not path.name.startswith("__")]


def test_every_module_has_a_room_in_the_design() -> None:
    """By its file name, or by its bare name in the row of its folder."""
    rows = rooms()
    texts = {path: rows.get(place(path)) or rows.get(place(path.parent) + "/", "") for path in modules()}
    assert [place(path) for path, row in texts.items() if not re.search(rf"\b{path.stem}\b", row)] == []


PUBLISHED_FLAGS = """of the published tool's commands for training and evaluation:
    --dataset --resultdir --target_epsilon --debias --debias_ratio --cost --p --mixture_fraction --val_interval
    --vis_interval --num_epochs --batch_size --lr --sinkhorn_eps --g_type --act_function --latent_dim --hidden_dim
    --embed_dim --embed_multiplier --sampling --mechanism --datadir --num_vis_examples --d_steps --dp
    --noise_multiplier --l2_norm_clip --sensitivity_to_l2_norm_clip --gen_batch_size --seed"""


def settings_of(model: type[BaseModel]) -> set[str]:
    """Dotted paths of a trial's settings, under every kind of what has kinds."""
    return {
        f"{name}.{leaf}"
        for name, field in model.model_fields.items()
        for kind in (get_args(field.annotation) or (field.annotation,))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for leaf in kind.model_fields
    }


def test_every_flag_of_the_published_tool_is_mapped_to_a_setting_that_exists() -> None:
    text = (ROOT / "docs" / "from-the-original.md").read_text(encoding="utf-8")
    flags = re.findall(r"--\w+", PUBLISHED_FLAGS)
    assert len(flags) == 31
    assert [flag for flag in flags if not re.search(rf"`{flag}[` ]", text)] == []
    named = set(re.findall(r"`((?:data|generator|sinkhorn|privacy|optimizer|evaluation)\.[a-z0-9_]+)", text))
    assert named - settings_of(TrialConfig) == set()
    assert len(named) > 20
