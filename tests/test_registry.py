"""Exports in MLflow's model registry: what loads anywhere, what comes back, and what a crafted entry cannot do."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from analysis.cli import main
from analysis.export import FILES, export_run
from analysis.model import LabelledImages
from analysis.registry import CONTENT_TAG, DATA, digest, fetch_model, register_run
from analysis.rules import parse_rule
from analysis.runs import Runs, load_runs
from analysis.selection import named
from dpsink.checkpoint import load_generator
from dpsink.errors import InputError
from dpsink.privacy.plan import NON_PRIVATE
from dpsink.synthesis import generate
from tests.test_analysis import WITHOUT_PRIVACY
from tests.test_tracking import STATEMENT, Fake, make_study
from tune import schema
from tune.tracking import connect, rebuild

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
FAKES = [
    Fake("sharp", metrics={"fid": 20.0, "accuracy": 0.7}),
    Fake("useful", metrics={"fid": 40.0, "accuracy": 0.8}, overrides=("optimizer.lr=2e-4",)),
    Fake("sunk", state="diverged", metrics={"fid": 1e6, "accuracy": 0.0}),
    Fake("free", overrides=WITHOUT_PRIVACY, epsilons=(float("inf"),), metrics={"accuracy": 0.99}),
]


@pytest.fixture(scope="module")
def home(empty_database: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine where a study ran; both of its best are exported and registered."""
    home = tmp_path_factory.mktemp("registry")
    shutil.copyfile(empty_database[0], home / "mlflow.db")
    rebuild(make_study(home / "digits", FAKES, f"sqlite:///{home}/mlflow.db", name="digits", study_id="id-digits"))
    runs = load_runs("digits", f"sqlite:///{home}/mlflow.db")
    for metric, trial in (("fid", "sharp"), ("accuracy", "useful")):
        folder = export_run(runs, named(runs, trial), home / f"best-{metric}", selected_by=metric)
        register_run(runs, named(runs, trial), folder, alias=f"best-{metric}")
    return home


@pytest.fixture
def uri(home: Path) -> str:
    return f"sqlite:///{home}/mlflow.db"


@pytest.fixture
def runs(uri: str) -> Runs:
    return load_runs("digits", uri)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return connect(uri)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`dpsink-analysis export` in an empty directory: its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dpsink-analysis", "export", *arguments, "--tracking-uri", uri])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def registered(client: MlflowClient, alias: str) -> tuple[Any, Path]:
    """A version, and the folder of its model."""
    version = client.get_model_version_by_alias("digits", alias)
    return version, Path(client.get_model_version_download_uri("digits", version.version).removeprefix("file://"))


# What is registered.


def test_the_aliases_lead_to_the_runs_that_are_best(client: MlflowClient) -> None:
    for alias, trial in (("best-fid", "sharp"), ("best-accuracy", "useful")):
        version, _ = registered(client, alias)
        assert version.tags[schema.TRIAL_ID_TAG] == trial
        assert client.get_run(version.run_id).data.tags[schema.TRIAL_ID_TAG] == trial


def test_a_registered_model_holds_the_export_and_neither_code_nor_pickle(client: MlflowClient, home: Path) -> None:
    _, model = registered(client, "best-fid")
    for name in (*FILES, "statement.json"):
        assert (model / DATA / name).read_bytes() == (home / "best-fid" / name).read_bytes()
    files = {path for path in model.rglob("*") if path.is_file() and path.parent != model / DATA}
    assert {path.name for path in files} == {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    flavors = yaml.safe_load((model / "MLmodel").read_text())["flavors"]
    assert (list(flavors), flavors["python_function"]["code"]) == (["python_function"], None)


def test_a_version_says_what_it_promises_and_where_it_comes_from(client: MlflowClient) -> None:
    version, _ = registered(client, "best-fid")
    assert version.tags[schema.PRIVATE_TAG] == "true"
    assert version.tags[schema.STUDY_NAME_TAG] == "digits"
    assert "(ε, δ) = (" in version.description and "Selected by fid in study digits" in version.description


LOAD = """
import sys, mlflow.pyfunc, pandas as pd
model = mlflow.pyfunc.load_model("models:/digits@best-fid")
answer = model.predict(pd.DataFrame({"label": [3, 1, 4]}), params={"seed": 5})
answer.to_parquet(sys.argv[1])
"""


@pytest.mark.slow
def test_a_model_loads_by_its_alias_where_there_is_nothing_but_this_package_and_the_registry(
    home: Path, uri: str, tmp_path: Path
) -> None:
    kept = (home / "digits").rename(tmp_path / "elsewhere")  # the study's storage is on another machine
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "empty").mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path / "answer.parquet")], cwd=tmp_path / "empty", capture_output=True,
            text=True, env=environment | {"MLFLOW_TRACKING_URI": uri},
        )  # fmt: skip
    finally:
        kept.rename(home / "digits")
    assert done.returncode == 0, done.stderr
    answer = pd.read_parquet(tmp_path / "answer.parquet")
    generator, _ = load_generator(home / "best-fid")
    expected = generate(generator, torch.tensor([3, 1, 4]), num_classes=10, seed=5)
    assert list(answer["label"]) == [3, 1, 4]
    assert np.array_equal(decoded(answer), expected.images[:, 0].numpy())
    assert list((tmp_path / "empty").iterdir()) == []


def decoded(answer: pd.DataFrame) -> np.ndarray:
    """uint8, (n, H, W) of grey images."""
    return np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in answer["image"]])


def test_the_same_export_registered_again_is_the_same_version(runs: Runs, client: MlflowClient, home: Path) -> None:
    before, _ = registered(client, "best-fid")
    assert register_run(runs, named(runs, "sharp"), home / "best-fid", alias="best-fid") == "models:/digits@best-fid"
    assert registered(client, "best-fid")[0].version == before.version
    assert len(client.search_model_versions(f"run_id='{before.run_id}'")) == 1


def test_an_alias_is_taken_from_another_run_by_force_only(runs: Runs, client: MlflowClient, home: Path) -> None:
    folder, useful = home / "best-accuracy", named(runs, "useful")
    register_run(runs, named(runs, "sharp"), home / "best-fid", name="moving", alias="best-fid")
    with pytest.raises(InputError, match=r"models:/moving@best-fid: is trial sharp of digits; .*--force"):
        register_run(runs, useful, folder, name="moving", alias="best-fid")
    assert client.get_model_version_by_alias("moving", "best-fid").tags[schema.TRIAL_ID_TAG] == "sharp"
    register_run(runs, useful, folder, name="moving", alias="best-fid", force=True)
    assert client.get_model_version_by_alias("moving", "best-fid").tags[schema.TRIAL_ID_TAG] == "useful"


# What a model answers.


def test_the_same_seed_gives_the_same_images_and_another_one_others(home: Path) -> None:
    labels = pd.DataFrame({"label": [0, 1, 2]})
    first, same, other = (LabelledImages(home / "best-fid").predict(labels, {"seed": seed}) for seed in (1, 1, 2))
    assert first.equals(same) and not first.equals(other)


@pytest.mark.parametrize(
    ("data", "params", "told"),
    [
        ({"label": [3, 10]}, {}, r"label=10 must be in \[0, 10\)"),
        ({"label": [-1]}, {}, r"label=-1 must be in \[0, 10\)"),
        ({"label": [0.5]}, {}, "integers"),
        ({"class": [1]}, {}, "a column 'label'"),
        ({"label": [1]}, {"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_labels_that_no_generator_knows_are_refused(
    data: dict[str, list[Any]], params: dict[str, Any], told: str, home: Path
) -> None:
    with pytest.raises(InputError, match=told):
        LabelledImages(home / "best-fid").predict(pd.DataFrame(data), params)


def test_a_generator_that_knows_no_classes_answers_without_labels(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.model.is_conditional", lambda description: False)
    answer = LabelledImages(home / "best-fid").predict(pd.DataFrame({"label": [7, 70]}))
    assert (list(answer.columns), len(answer)) == (["image"], 2)


# The command.


def test_a_study_is_exported_registered_and_fetched_back(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, printed, _ = command("digits", "--by", "fid", "--register", "--name", "shipped")
    assert code == 0
    assert "trial sharp of digits, selected by FID" in printed and "models:/shipped@best-fid" in printed
    assert "whole study ε ≤ 31.416" in printed
    code, printed, _ = command("models:/shipped@best-fid", "--out", "back")
    assert code == 0 and "(ε, δ) = (" in printed
    assert digest(tmp_path / "back") == digest(tmp_path / "exports" / "digits" / "best-fid")


def test_without_a_rule_the_study_s_objective_decides(command: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = command("digits", "--json")
    (export,) = json.loads(printed)["exports"]
    assert (code, export["card"]["trial"], export["model"]) == (0, "useful", None)
    assert export["folder"] == "exports/digits/best-accuracy"


def test_a_study_of_two_objectives_sets_both_aliases_at_once(
    command: Callable[..., tuple[int, str, str]], client: MlflowClient, home: Path, uri: str
) -> None:
    place, objectives = home / "double", ("fid", "accuracy")
    rebuild(make_study(place, FAKES[:2], uri, name="double", study_id="id-double", objectives=objectives))
    code, printed, _ = command("double", "--register")
    assert code == 0 and "(alias best-fid set)" in printed and "(alias best-accuracy set)" in printed
    for alias, trial in (("best-fid", "sharp"), ("best-accuracy", "useful")):
        assert client.get_model_version_by_alias("double", alias).tags[schema.TRIAL_ID_TAG] == trial


def test_two_folders_are_not_put_into_one(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    twofold = replace(runs, studies=(replace(runs.study, objectives=("fid", "accuracy")),))
    monkeypatch.setattr("analysis.runs.load_runs", lambda *_: twofold)
    code, _, error = command("digits", "--out", "one")
    assert code == 2 and "--out=one: 2 folders are made, one by each objective" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("by", "weights", "alias"),
    [
        (["fid"], None, "best-fid"),
        (["accuracy"], None, "best-accuracy"),
        (["accuracy_cnn"], None, "best-accuracy"),
        (["accuracy:0.01", "fid"], None, "best-accuracy"),
        (["kid"], None, "best-kid"),
        ([], "accuracy=1,fid=-0.02", "best-weighted-accuracy-fid"),
    ],
)
def test_the_alias_follows_the_main_metric_of_the_rule(by: list[str], weights: str | None, alias: str) -> None:
    assert parse_rule(by, weights).alias == alias


def test_conditions_are_part_of_what_a_run_was_selected_by(
    command: Callable[..., tuple[int, str, str]], client: MlflowClient
) -> None:
    words = ("--by", "accuracy", "--where", "fid<30", "--epsilon", "9.9", "--register", "--name", "bound", "--json")
    code, printed, _ = command("digits", *words)
    (export,) = json.loads(printed)["exports"]
    assert (code, export["card"]["trial"]) == (0, "sharp")
    assert export["card"]["selected_by"] == "accuracy, where fid<30 and ε ≤ 9.9"
    told = client.get_model_version_by_alias("bound", "best-accuracy").description
    assert "Selected by accuracy, where fid<30 and ε ≤ 9.9 in study digits" in str(told)


def test_a_model_is_found_among_more_than_a_page_of_them(home: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{shutil.copyfile(home / 'mlflow.db', tmp_path / 'mlflow.db')}"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        rows = [(f"a{index:03d}", 0, 0) for index in range(150)]  # MLflow shows a hundred, by name
        connection.executemany(
            "insert into registered_models (name, creation_time, last_updated_time) values (?, ?, ?)", rows
        )
    assert fetch_model("models:/digits@best-fid", tmp_path / "back", tracking_uri=uri).is_dir()
    with pytest.raises(InputError, match="did you mean 'digits'"):
        fetch_model("models:/digit@best-fid", tmp_path / "other", tracking_uri=uri)


def test_a_fetched_folder_makes_a_data_set(home: Path, uri: str, tmp_path: Path) -> None:
    back = fetch_model("models:/digits@best-fid", tmp_path / "back", tracking_uri=uri)
    words = ["sample", str(back), "--out", str(tmp_path / "set.npz"), "--count", "20"]
    done = subprocess.run([sys.executable, "-m", "dpsink", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "set.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (20, 8, 8, 1)
    assert json.loads((tmp_path / "set.npz.card.json").read_text())["statement"] == STATEMENT


def test_a_run_without_privacy_is_shipped_by_its_name_and_under_its_label(
    command: Callable[..., tuple[int, str, str]], client: MlflowClient, tmp_path: Path
) -> None:
    code, printed, _ = command("digits", "--trial", "free", "--register", "--name", "label")
    assert (code, NON_PRIVATE in printed.splitlines()[0]) == (0, True)
    card = json.loads((tmp_path / "exports" / "digits" / "free" / "card.json").read_text())
    assert (card["private"], card["epsilon"]) == (False, NON_PRIVATE)
    (version,) = client.search_model_versions("name='label'")
    assert version.tags[schema.PRIVATE_TAG] == NON_PRIVATE
    assert str(version.description).startswith(NON_PRIVATE) and version.aliases == []
    code, printed, _ = command("models:/label/1", "--out", "back")
    assert (code, NON_PRIVATE in printed.splitlines()[0]) == (0, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("digits", "--trial", "sunk"), "trial sunk is set apart (diverged) and is not exported"),
        (("digits", "--trial", "sharpp"), "did you mean 'sharp'"),
        (("digits", "--trial", "sharp", "--by", "fid"), "leave the rules out"),
        (("digits", "--name", "mine"), "goes with --register"),
        (("digit",), "did you mean 'digits'"),
        (("models:/digit@best-fid",), "did you mean 'digits'"),
        (("models:/digits@best-fod",), "the aliases of 'digits' are: best-accuracy, best-fid"),
        (("models:/digits/99",), "no such version"),
        (("models:/digits",), "must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        (("models:/../x@best-fid",), "must be models:/NAME@ALIAS"),
        (("models:/digits@best-fid", "--by", "fid"), "is fetched as it is"),
        (("models:/digits@best-fid", "digits"), "one at a time"),
        (("digits", "--register", "--name", "a/b"), "cannot be registered as 'a/b'"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    words: tuple[str, ...], told: str, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, printed, error = command(*words)
    assert (code, printed, error.count("\n")) == (2, "", 1), error
    assert told in error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_over_what_exists_without_force(uri: str, tmp_path: Path) -> None:
    back = fetch_model("models:/digits@best-fid", tmp_path / "back", tracking_uri=uri)
    (back / "mark").touch()
    with pytest.raises(InputError, match="--force"):
        fetch_model("models:/digits@best-accuracy", back, tracking_uri=uri)
    fetch_model("models:/digits@best-accuracy", back, tracking_uri=uri, force=True)
    assert json.loads((back / "card.json").read_text())["trial"] == "useful"
    assert not (back / "mark").exists()


def test_a_registry_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(InputError, match=r"models:/a@b cannot be fetched .*is the MLflow server up") as caught:
        fetch_model("models:/a@b", tmp_path / "out", tracking_uri=server)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_sealed_study_ships_its_winner_and_knows_no_other(empty_database: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copyfile(empty_database[0], tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sealed = STATEMENT | {"policy": "release_best"}
    study = make_study(tmp_path / "quiet", [Fake("winner", metrics={"accuracy": 0.7})], uri, name="quiet")
    study.write_statement(sealed)
    make_study(study.sealed.path, [Fake("trial-0004", metrics={"accuracy": 0.9})], uri)  # a loser, not yet destroyed
    rebuild(study)
    runs = load_runs("quiet", uri)
    out = export_run(runs, named(runs, "winner"), tmp_path / "out", selected_by="accuracy")
    assert list(runs.table["trial"]) == ["winner"]
    assert json.loads((out / "card.json").read_text())["statement"] == sealed
    assert not any(b"trial-0004" in path.read_bytes() for path in out.iterdir())
    with pytest.raises(InputError, match="no trial 'trial-0004'"):
        named(runs, "trial-0004")


# A crafted entry.


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def with_flavor(**changes: Any) -> Callable[[Path, Path], None]:
    def craft(model: Path, mark: Path) -> None:
        tree = yaml.safe_load((model / "MLmodel").read_text())
        tree["flavors"]["python_function"] |= changes
        (model / "MLmodel").write_text(yaml.safe_dump(tree))

    return craft


def pickled(model: Path, mark: Path) -> None:
    with_flavor(loader_module="mlflow.pyfunc.model", python_model="python_model.pkl")(model, mark)
    (model / "python_model.pkl").write_bytes(pickle.dumps(Bomb(mark)))


def yaml_that_runs(model: Path, mark: Path) -> None:
    (model / "MLmodel").write_text(f"flavors: !!python/object/apply:pathlib.Path.touch [{mark}]\n")


def pickled_weights(model: Path, mark: Path) -> None:
    torch.save(Bomb(mark), model / DATA / "model.safetensors")


def other_flavor(model: Path, mark: Path) -> None:
    (model / "MLmodel").write_text("flavors: {sklearn: {pickled_model: model.pkl}}\n")


def linked(model: Path, mark: Path) -> None:
    secret = mark.with_name("secret.json")
    (model / DATA / "card.json").rename(secret)
    (model / DATA / "card.json").symlink_to(secret)


def linked_folder(model: Path, mark: Path) -> None:
    (model / DATA).rename(mark.with_name("outside"))
    (model / DATA).symlink_to(mark.with_name("outside"), target_is_directory=True)


def edited(name: str, change: Callable[[str], str]) -> Callable[[Path, Path], None]:
    def craft(model: Path, mark: Path) -> None:
        path = model / DATA / name
        path.write_text(change(path.read_text()))

    return craft


def without(name: str) -> Callable[[Path, Path], None]:
    return lambda model, mark: (model / DATA / name).unlink()


def no_picture(model: Path, mark: Path) -> None:
    (model / DATA / "samples.png").write_text("<svg/>")


def oversized(model: Path, mark: Path) -> None:
    with (model / DATA / "card.json").open("ab") as file:
        file.truncate(17 * 1024**2)


CRAFTED: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "another loader": (with_flavor(loader_module="os"), "loader_module 'os', not 'analysis.model'"),
    "a pickle": (pickled, "loader_module 'mlflow.pyfunc.model'"),
    "code": (with_flavor(code="code"), "code of its own"),
    "another flavor": (other_flavor, "another flavor"),
    "yaml that runs": (yaml_that_runs, "MLmodel"),
    "a way out": (with_flavor(data="../../../../etc"), r"data '\.\./\.\./\.\./\.\./etc'"),
    "a way out of data": (with_flavor(data=f"{DATA}/../.."), "data 'data/generator"),
    "weights that are a pickle": (pickled_weights, "model.safetensors: cannot be read"),
    "a link": (linked, "it has no file card.json"),
    "a linked folder": (linked_folder, "outside the artifact directory"),  # MLflow sees it
    "requirements that lead elsewhere": (
        edited("requirements.txt", lambda text: f"--index-url http://evil.example/\n{text}"),
        "'--index-url http://evil.example/' of its requirements must be PACKAGE==VERSION",
    ),
    "another package": (
        edited("requirements.txt", lambda text: text + "evil==1.0\n"),
        "'evil==1.0' of its requirements",
    ),
    "a false card": (edited("card.json", lambda text: text.replace('"private": true', '"private": false')), "privacy"),
    "other settings": (edited("config.yaml", lambda text: text.replace("lr: ", "lr: 1.0e-7 # ")), "of another trial"),
    "a changed statement": (edited("statement.json", lambda text: text.replace("31.4159", "3.1")), "not those that"),
    "a picture that is none": (no_picture, "samples.png: is no PNG"),
    "no weights": (without("model.safetensors"), "it has no file model.safetensors"),
    "nothing": (lambda model, mark: shutil.rmtree(model), "it has no file MLmodel"),
    "a file too large": (oversized, r"card.json: is above 16,777,216 bytes"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_entry_runs_nothing_and_writes_nothing(
    kind: str, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    craft, told = CRAFTED[kind]
    version, model = registered(client, "best-fid")
    shutil.copytree(model, tmp_path / "model")
    craft(tmp_path / "model", tmp_path / "mark")
    place = enter(client, tmp_path / "model", version.tags[CONTENT_TAG])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=told) as caught:
        fetch_model(place, tmp_path / "out", tracking_uri=uri)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_honest_copy_of_an_entry_is_fetched(client: MlflowClient, uri: str, tmp_path: Path) -> None:
    """Keeps the test above honest: what is refused there is the change."""
    version, model = registered(client, "best-fid")
    shutil.copytree(model, tmp_path / "model")
    place = enter(client, tmp_path / "model", version.tags[CONTENT_TAG])
    assert sorted(path.name for path in fetch_model(place, tmp_path / "out", tracking_uri=uri).iterdir()) == sorted(
        (*FILES, "statement.json")
    )


def enter(client: MlflowClient, model: Path, content: str) -> str:
    """A version that anybody who can write to the registry can make."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model("crafted")
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    version = client.create_model_version("crafted", model.as_uri(), tags={CONTENT_TAG: content})
    return f"models:/crafted/{version.version}"
