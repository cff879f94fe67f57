"""The commands as a user has them: real processes for whole lives, the process of the test for each mistake."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsink import console
from dpsink.checkpoint import load_generator
from dpsink.config import load_config
from dpsink.privacy.budget import charged_steps
from dpsink.records import latest_checkpoint, read_state
from dpsink.training import read_result
from dpsink.training import train as run_training
from tests.conftest import Answer, Command

SETTINGS = {
    "generator.hidden_dim": "4", "sinkhorn.gen_batch_size": "10", "sinkhorn.cost": "l2",
    "privacy.noise_multiplier": "3", "privacy.delta": "5e-5", "privacy.step_limit": "6", "evaluation.points": "2",
    "evaluation.samples": "40", "evaluation.classifiers": "[logreg]",
}  # fmt: skip
BUDGET = ("budget", "--noise-multiplier", "1.1", "--sample-rate", "8.333e-4", "--delta", "1e-5")


def small(**changes: str) -> list[str]:
    """Overrides of a trial of seconds; `privacy__delta="1"` sets privacy.delta."""
    settings = SETTINGS | {path.replace("__", "."): value for path, value in changes.items()}
    return [f"{path}={value}" for path, value in settings.items()]


def process(*words: object, **more) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dpsink", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, **more,
    )  # fmt: skip


def finish(running: subprocess.Popen[str]) -> Answer:
    out, err = running.communicate(timeout=120)
    return Answer(running.returncode, out, err)


def wait_for(happened: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    """Until it has happened in the process; fails if the process ends first, or takes a minute."""
    patience = time.monotonic() + 60
    while not happened():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < patience
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a tree, whole."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits) -> Path:
    """The run folder of a small trial that has ended; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    list(run_training(load_config(None, small()), digits, folder))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# Whole lives, in processes of their own.


@pytest.mark.slow
def test_interrupted_training_goes_on_with_the_same_command_and_pays_for_no_step_twice(tmp_path: Path) -> None:
    ledger, command = tmp_path / "run/ledger", ("train", *small(privacy__step_limit="300"), "--out", tmp_path / "run")
    first = process(*command)
    wait_for(lambda: len(list(ledger.glob("*-*.json"))) > 20, first)
    first.send_signal(signal.SIGINT)
    stopped = finish(first)
    assert (stopped.code, stopped.out) == (130, ""), stopped.err
    assert "run the same command again" in stopped.errors[-1]
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    done = read_state(checkpoint).step
    assert 20 < done == charged_steps(ledger) < 300
    assert finish(process(*command)).code == 0
    report = read_result(tmp_path / "run")
    assert report is not None and (report.step, report.charged, charged_steps(ledger)) == (300, 300, 300)


@pytest.mark.slow
def test_killed_training_is_charged_for_all_that_it_ran_and_never_more_than_allowed(tmp_path: Path) -> None:
    settings = small(privacy__step_limit="300", evaluation__points="3")
    ledger, command = tmp_path / "run/ledger", ("train", *settings, "--out", tmp_path / "run")
    first = process(*command)
    wait_for(lambda: latest_checkpoint(tmp_path / "run") is not None and charged_steps(ledger) > 110, first)
    first.kill()
    assert finish(first).code == -signal.SIGKILL
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    lost = charged_steps(ledger) - read_state(checkpoint).step  # reserved after it: run, or not, who knows
    assert lost > 0
    answer = finish(process(*command, "--json"))
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)  # refuses anything before or after the one document
    assert (told["charged"], told["step"]) == (300, 300 - lost)


# The same commands, in this process.


def test_train_answers_with_one_json_document_and_tells_the_rest_on_stderr(dpsink: Command, tmp_path: Path) -> None:
    answer = dpsink("train", *small(), "--out", tmp_path / "run", "--json")
    told = json.loads(answer.out)
    assert (answer.code, told["status"], told["step"], told["charged"]) == (0, "completed", 6, 6)
    assert [line.split("ε")[0].strip() for line in answer.errors] == ["step 3", "step 6"]


def test_finished_training_shows_its_result_again_and_spends_nothing(copy: Path, dpsink: Command) -> None:
    told = json.loads(dpsink("train", *small(), "--out", copy, "--json").out)
    report = read_result(copy)
    assert report is not None and told.pop("floor")["fid"] > 0
    assert told == {"folder": str(copy), **report.model_dump()}
    assert charged_steps(copy / "ledger") == 6


def test_training_names_its_folder_by_the_settings(
    dpsink: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [
        json.loads(dpsink("train", *small(seed=seed), "--json").out)["folder"] for seed in ("1", "2", "1")
    ]  # fmt: skip
    assert folders[0] == folders[2] != folders[1]
    assert {str(path) for path in Path("runs").iterdir()} == set(folders)


def test_override_goes_over_the_file(dpsink: Command, tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text("optimizer: {lr: 1.0e-4}\nseed: 3\n")
    dpsink("train", "--config", path, *small(optimizer__lr="5e-4"), "--out", tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.optimizer.lr, config.seed) == (5e-4, 3)


def test_people_are_told_epsilon_folder_and_what_comes_next(copy: Path, dpsink: Command) -> None:
    lines = dpsink("train", *small(), "--out", copy).out.splitlines()
    assert re.fullmatch(r"completed: 6 steps, ε = 1\.\d+, [\d.]+ steps/s", lines[0])
    assert lines[2:] == [f"folder: {copy}", f"next:   dpsink evaluate {copy}"]


def test_training_shows_variety_and_recall_beside_accuracy_and_the_floor_beside_distances(
    dpsink: Command, tmp_path: Path
) -> None:
    answer = dpsink("train", *small(), "--out", tmp_path / "run")
    number = r"[-\d.,e]+"
    shown = rf"fid {number} \(floor {number}\)  kid {number} \(floor {number}\)  precision {number}  recall {number}  "
    shown += rf"variety {number}  accuracy_logreg {number}"
    for line in (*answer.errors, answer.out.splitlines()[1]):
        assert re.fullmatch(rf"(step \d  ε {number}|on validation:) +{shown}", line)


def test_training_without_validation_images_shows_no_floor(dpsink: Command, tmp_path: Path) -> None:
    answer = dpsink("train", *small(data__validation_size="0"), "--out", tmp_path / "run")
    assert "floor" not in answer.out + answer.err
    assert len(answer.out.splitlines()) == 3


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A data root with own images, one of them cut short."""
    for index in range(40):
        path = tmp_path / "root" / "pets" / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(256, size=(8, 8), dtype=np.uint8)).save(path)
    (tmp_path / "root/pets/dog/07.png").write_bytes(b"\x89PNG")
    return tmp_path / "root"


def own(root: Path) -> tuple[str, ...]:
    """Settings of a trial on the pets."""
    settings = small(
        data__name="folder:pets", data__test="public", data__validation="public", data__test_size="20",
        privacy__delta="1e-3", privacy__batch_size="4", privacy__noise_multiplier="10",
    )  # fmt: skip
    return (*settings, "--data-root", str(root))


def test_image_that_cannot_be_read_is_named_with_the_option_that_skips_it(
    pets: Path, dpsink: Command, tmp_path: Path
) -> None:
    answer = dpsink("train", *own(pets), "--out", tmp_path / "run")
    assert (answer.code, answer.out) == (2, "")
    assert re.fullmatch(rf"error: {pets}/pets/dog/07\.png: .*--skip-bad.*", answer.errors[-1])
    assert not (tmp_path / "run").exists()


def test_skipping_is_a_setting_of_the_trial(pets: Path, dpsink: Command, tmp_path: Path) -> None:
    """So it is in the hash that names the folder, and in the record."""
    answer = dpsink("train", *own(pets), "--skip-bad", "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "1 bad train images are skipped" in " ".join(answer.err.split())
    assert load_config(tmp_path / "run" / "config.yaml").data.skip_bad
    assert dpsink("train", *own(pets), "data.skip_bad=true", "--out", tmp_path / "run").code == 0


def test_evaluate_answers_with_metrics_and_the_guarantee(trained: Path, dpsink: Command) -> None:
    answer = dpsink("evaluate", trained, "--samples", "200", "--json")
    told, report = json.loads(answer.out), read_result(trained)
    assert answer.code == 0 and report is not None
    assert {"accuracy", "accuracy_logreg", "accuracy_mlp", "accuracy_cnn", "fid", "kid", "variety"} <= set(
        told["metrics"]
    )
    assert (told["epsilon"], told["delta"], told["split"], told["samples"]) == (report.epsilon, 5e-5, "test", 200)


def test_evaluate_changes_nothing_in_the_run(copy: Path, dpsink: Command) -> None:
    before = contents(copy)
    assert dpsink("evaluate", copy, "--samples", "50").code == 0
    assert contents(copy) == before


def test_evaluate_shows_the_guarantee_on_one_line(trained: Path, dpsink: Command) -> None:
    last = dpsink("evaluate", trained, "--samples", "50").out.splitlines()[-1]
    assert last.startswith("(ε, δ) = (1.") and last.endswith("6 steps charged")


def test_evaluate_shows_floor_interval_and_control_in_80_columns(
    trained: Path, dpsink: Command, tmp_path: Path, digits
) -> None:
    words = shlex.split(json.loads(dpsink("evaluate", trained, "--samples", "40", "--json").out)["control_command"])
    assert dpsink(*words[1:], "--out", tmp_path / "control").code == 0
    shown = ("evaluate", trained, "--samples", "40", "--seeds", "2", "--control", tmp_path / "control")
    lines = dpsink(*shown).out.splitlines()
    assert lines[0].split() == ["metric", "test", "±", "95", "%", "class", "means", "floor"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:10]}
    assert {name: len(cells) for name, cells in table.items()} == {
        "fid": 4, "kid": 4, "precision": 3, "recall": 3, "variety": 3, "accuracy_logreg": 3, "accuracy_mlp": 3,
        "accuracy_cnn": 3, "accuracy": 3,
    }  # fmt: skip
    assert max(map(len, lines[:10])) <= 80
    assert any(line.startswith("floor: validation (180 images) against test (180 images)") for line in lines)


def test_evaluate_of_images_says_that_nothing_is_known_of_their_privacy(dpsink: Command, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 10)
    words = ("evaluate", tmp_path / "theirs.npz", "--data", "digits", "--samples", "40")
    answer = dpsink(*words, "data.validation_size=0")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "nothing is known about the privacy of these images: no ε is claimed"
    assert "floor: one half of test (90 images) against the other (90 images)" in answer.out
    assert "--control" not in answer.out
    told = json.loads(dpsink(*words, "--json").out)
    assert (told["epsilon"], told["control_command"]) == (None, None)


def test_sample_writes_the_images_of_the_generator_and_its_card(trained: Path, dpsink: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "set.npz"
    told = json.loads(dpsink("sample", trained, "--out", out, "--count", "30", "--json").out)
    card_file = tmp_path / "new" / "set.npz.card.json"
    card = json.loads(card_file.read_text())
    assert told == {**card, "images": str(out), "card": str(card_file), "count": 30}
    with np.load(out) as arrays:
        assert np.bincount(arrays["labels"]).tolist() == [3] * 10


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        ((), [1000] * 10),
        (("--count", "12"), [2, 2, *[1] * 8]),
        (("--per-class", "4"), [4] * 10),
        (("--class-counts", "0=5,3=2"), [5, 0, 0, 2, *[0] * 6]),
    ],
)
def test_sample_makes_the_counts_that_are_asked_for(
    words: tuple[str, ...], counts: list[int], trained: Path, dpsink: Command, tmp_path: Path
) -> None:
    assert dpsink("sample", trained, "--out", tmp_path / "set.npz", *words).code == 0
    assert np.bincount(np.load(tmp_path / "set.npz")["labels"], minlength=10).tolist() == counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set.npz", "set.parquet", "set"])
def test_interrupted_sampling_leaves_nothing_and_says_so(name: str, trained: Path, tmp_path: Path) -> None:
    running = process("sample", trained, "--out", tmp_path / name, "--count", "3000000")
    wait_for(lambda: any(tmp_path.iterdir()), running)
    running.send_signal(signal.SIGINT if name == "set" else signal.SIGTERM)
    answer = finish(running)
    assert (answer.code, answer.out, answer.errors[-1]) == (
        130,
        "",
        f"stopped; nothing was written to {tmp_path / name}",
    )
    assert list(tmp_path.iterdir()) == []


def test_sample_prints_paths_whole_however_long(trained: Path, dpsink: Command, tmp_path: Path) -> None:
    out = tmp_path / ("a" * 90) / "set.npz"
    assert str(out) in dpsink("sample", trained, "--out", out, "--count", "10").out


def test_sample_replaces_only_by_force(trained: Path, dpsink: Command, tmp_path: Path) -> None:
    out = tmp_path / "set.npz"
    sizes = []
    for words in (("--count", "10"), ("--count", "20"), ("--count", "20", "--force")):
        dpsink("sample", trained, "--out", out, *words)
        sizes.append(len(np.load(out)["labels"]))
    assert sizes == [10, 10, 20]


@pytest.mark.slow
def test_budget_gives_the_steps_by_each_accountant(dpsink: Command) -> None:
    answer = dpsink(*BUDGET, "--target-epsilon", "10", "--json")
    told = json.loads(answer.out)
    assert (answer.code, answer.err) == (0, "")
    assert told["max_steps"]["pld"] == pytest.approx(4_468_900, abs=100)
    assert told["max_steps"]["rdp"] == pytest.approx(3_986_600, abs=100)


@pytest.mark.parametrize(("held_out", "rate"), [((), 1), (("--validation-size", "0"), 1437 / 1617)])
def test_budget_takes_the_rate_from_data_set_and_batch(held_out: tuple[str, ...], rate: float, dpsink: Command) -> None:
    words = ("budget", "--noise-multiplier", "30", "--delta", "5e-5", "--target-epsilon", "0.5", "--json")
    told = json.loads(dpsink(*words, "--data", "digits", "--batch-size", "1437", *held_out).out)
    assert told["sample_rate"] == rate


def test_budget_of_several_sigmas_is_one_document(dpsink: Command) -> None:
    words = ("--noise-multiplier", "40", "--sample-rate", "1", "--delta", "1e-5", "--target-epsilon", "1", "--json")
    told = json.loads(dpsink("budget", "--noise-multiplier", "30", *words).out)
    assert [row["noise_multiplier"] for row in told] == [30, 40]
    assert told[0]["max_steps"]["pld"] < told[1]["max_steps"]["pld"]


def test_budget_that_allows_no_step_is_an_answer(dpsink: Command) -> None:
    words = ("--noise-multiplier", "0.5", "--sample-rate", "1", "--delta", "1e-5", "--target-epsilon", "0.01")
    answer = dpsink("budget", *words, "--json")
    assert (answer.code, json.loads(answer.out)["max_steps"]) == (0, {"pld": 0, "rdp": 0})


def test_budget_draws_a_picture(dpsink: Command, tmp_path: Path) -> None:
    words = ("--noise-multiplier", "30", "--sample-rate", "1", "--delta", "1e-5", "--target-epsilon", "2")
    assert dpsink("budget", *words, "--plot", tmp_path / "curve.png").code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_infinities_are_json_that_every_parser_takes(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("inf"), "b": [float("nan")], "c": (1.5, None)})
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert told == {"a": "inf", "b": ["nan"], "c": [1.5, None]}


def test_bare_command_shows_its_commands(dpsink: Command) -> None:
    answer = dpsink()
    assert answer.code == 2
    assert all(f"  {name} " in answer.err for name in ("train", "evaluate", "sample", "budget", "audit"))


# Mistakes. Each: exit code 2, one line on stderr that names the value, and nothing written.


def test_what_the_system_does_not_permit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def reads(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/theirs/study.json")

    with pytest.raises(SystemExit) as ended:
        console.run(reads)  # pyright: ignore[reportArgumentType]
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: /theirs/study.json: Permission denied; ask its owner")


def check_refused(answer: Answer, named: str) -> None:
    assert (answer.code, answer.out) == (2, "")
    (line,) = answer.errors
    assert line.startswith("error: ")
    assert re.search(named, line), line


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("optimizer.lrr", "1", r"'optimizer\.lrr'; did you mean 'lr'"),
        ("privacy.noise_mutiplier", "1", "did you mean 'noise_multiplier'"),
        ("sinkorn.blur", "1", "did you mean 'sinkhorn'"),
        ("privacy.noise_multiplier", "0", r"noise_multiplier=0 must be > 0"),
        ("privacy.noise_multiplier", "-1", r"noise_multiplier=-1"),
        ("privacy.noise_multiplier", ".nan", r"noise_multiplier=nan"),
        ("privacy.noise_multiplier", ".inf", r"noise_multiplier=inf must be finite"),
        ("privacy.noise_multiplier", "many", r"noise_multiplier='many'"),
        # So small that accounting would take minutes.
        ("privacy.noise_multiplier", "0.001", r"noise_multiplier=0\.001 must be .*>= 0\.1; choose"),
        ("privacy.delta", "1e-3", r"delta=0\.001 must be below 1/N = 0\.000696 \(N = 1437.*choose"),
        ("privacy.delta", "0", r"delta=0"),
        ("privacy.target_epsilon", "0.01", r"noise_multiplier=3 allows no step within epsilon 0\.01.*at least [\d.]+"),
        ("privacy.target_epsilon", "-1", r"target_epsilon=-1"),
        ("privacy.batch_size", "5000", r"batch_size=5000 .*1437"),
        ("data.name", "cifar", r"name='cifar'.*'digits'"),
        ("data.validation_size", "1617", r"validation_size=1617 must be below the 1617"),
        ("data.validation_size", "5", r"validation_size=5 cannot be split"),
        ("generator.kind", "gan", r"conv_cond"),
    ],
)
def test_bad_setting_is_refused_before_anything_is_written(
    path: str, value: str, named: str, dpsink: Command, tmp_path: Path
) -> None:
    answer = dpsink("train", *small(), f"{path}={value}", "--out", tmp_path / "run")
    check_refused(answer, named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"privacy: {noise_mutiplier: 3}", r"trial\.yaml: unknown key 'privacy\.noise_mutiplier'; did you mean"),
        (b"privacy: 3", r"trial\.yaml: privacy=3"),
        (b"- privacy", r"trial\.yaml: must hold key: value"),
        (b"privacy: [", r"trial\.yaml: cannot be read as YAML"),
        (b"\xff\xfe\xfa", r"trial\.yaml: cannot be read as YAML"),
        (b"3: 4", r"trial\.yaml: 3"),
    ],
)
def test_bad_file_is_refused_by_name(text: bytes, named: str, dpsink: Command, tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_bytes(text)
    check_refused(dpsink("train", "--config", path, "--out", tmp_path / "run"), named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config", "absent.yaml"], r"absent\.yaml: no such file"),
        (["--config", "/"], r"/: cannot be read"),
        (["optimizer.lr"], r"'optimizer\.lr' must be path\.to\.key=value"),
        (["optimizer.lr=["], r"'optimizer\.lr=\[' has a value that is not YAML"),
        (["seed.x=1", "seed.x.y=2"], r"seed\.x"),
        (["--threads", "-1"], r"--threads"),
        (["--threads", "two"], r"--threads"),
        (["--configg", "x"], r"--configg.*--config"),
        (["--out"], r"--out"),
    ],
)
def test_mistyped_training_is_refused(
    words: list[str], named: str, dpsink: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(dpsink("train", *words), named)
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_refused(dpsink: Command) -> None:
    check_refused(dpsink("trian"), "'trian'")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_missing_data_set_names_the_folder_and_the_option(name: str, dpsink: Command, tmp_path: Path) -> None:
    settings = small(data__name=name, privacy__delta="1e-6")
    answer = dpsink("train", *settings, "--data-root", tmp_path / "none", "--out", tmp_path / "run")
    check_refused(answer, f"{tmp_path}/none.*--data-root, or --download")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/dpsink", "/dev/null/run"])
def test_unwritable_output_folder_is_refused(place: str, dpsink: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    answer = dpsink("train", *small(), "--out", tmp_path / place)
    check_refused(answer, rf"{place}: cannot be written \(.*\); choose another --out")
    assert contents(tmp_path) == {"file": b"mine"}


def test_folder_of_another_trial_is_refused_and_left_alone(copy: Path, dpsink: Command) -> None:
    before = contents(copy)
    check_refused(dpsink("train", *small(optimizer__lr="0.1"), "--out", copy), f"{copy}: holds another trial")
    assert contents(copy) == before


def test_checkpoint_of_another_trial_is_refused(copy: Path, dpsink: Command, tmp_path: Path) -> None:
    """Weights of other settings, copied into a run by hand."""
    checkpoint = latest_checkpoint(copy)
    assert checkpoint is not None
    words = ("train", *small(generator__hidden_dim="6"), "--out", tmp_path / "other")
    assert dpsink(*words).code == 0
    other = latest_checkpoint(tmp_path / "other")
    assert other is not None
    shutil.copy(checkpoint / "model.safetensors", other)
    (tmp_path / "other" / "result.json").unlink()
    check_refused(dpsink(*words), "weights do not fit")


@pytest.mark.parametrize("command", [("evaluate",), ("sample", "--out", "set.npz")])
@pytest.mark.parametrize("place", ["absent", "empty", "file"])
def test_folder_without_a_checkpoint_is_refused(
    place: str, command: tuple[str, ...], dpsink: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    check_refused(dpsink(*command, place), f"{place}: holds no checkpoint; give the folder of a run")
    assert not Path("set.npz").exists()


def with_plan(**changes: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        state = json.loads(content)
        state["plan"] |= changes
        return json.dumps(state).encode()

    return change


@pytest.mark.parametrize("command", [("evaluate", "--samples", "20"), ("sample", "--count", "10", "--out", "set.npz")])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", lambda content: content[:-40]),
        ("state.json", lambda content: b""),
        ("state.json", lambda content: content.replace(b'"format": 2', b'"format": 3')),
        ("state.json", with_plan(sigma=1)),
        ("state.json", with_plan(noise_multiplier="none")),
        ("model.safetensors", lambda content: content[:-1]),
        ("model.safetensors", lambda content: content[:100]),
        ("model.safetensors", lambda content: b""),
        ("model.safetensors", None),
    ],
)
def test_damaged_run_is_refused_by_name(
    name: str, damage: Callable[[bytes], bytes] | None, command: tuple[str, ...], copy: Path, dpsink: Command,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoint = latest_checkpoint(copy)
    assert checkpoint is not None
    path = checkpoint / name
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        assert damage(whole) != whole
        path.write_bytes(damage(whole))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    check_refused(dpsink(*command, copy), re.escape(str(copy)))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_damaged_run_is_not_trained_on(name: str, copy: Path, dpsink: Command) -> None:
    checkpoint = latest_checkpoint(copy)
    assert checkpoint is not None
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:50])
    (copy / "result.json").unlink()
    check_refused(dpsink("train", *small(), "--out", copy), name)
    assert charged_steps(copy / "ledger") == 6


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_result_is_refused_by_name(text: str, copy: Path, dpsink: Command) -> None:
    (copy / "result.json").write_text(text)
    check_refused(dpsink("train", *small(), "--out", copy), r"result\.json")


def test_lost_ledger_is_refused(copy: Path, dpsink: Command) -> None:
    shutil.rmtree(copy / "ledger")
    (copy / "result.json").unlink()
    check_refused(dpsink("train", *small(), "--out", copy), "ledger")


def test_run_that_another_process_trains_is_refused(copy: Path, dpsink: Command) -> None:
    import fcntl

    with open(next((copy / "ledger").glob("lock-*")), "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refused(dpsink("train", *small(), "--out", copy), "in use by process")


def test_data_that_have_changed_since_are_refused(trained: Path, dpsink: Command, monkeypatch, tmp_path: Path) -> None:
    """Another owner's key stands for other data: the fingerprint differs."""
    monkeypatch.setenv("DPSINK_KEY_FILE", str(tmp_path / "other.key"))
    check_refused(dpsink("evaluate", trained, "--samples", "20"), "other data")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--samples", "2"], "--samples"),
        (["--split", "train"], "--split=train must be test or validation"),
        (["--extractor", "vgg"], "'vgg'.*classifier or inception"),
        (["--inception-weights", "/nonexistent"], "/nonexistent"),
        (["--inception-weights", __file__], r"test_cli\.py"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--seeds", "0"], "--seeds"),
        (["--device", "cuda:99"], "device=cuda:99"),
        (["--data", "digits"], "judged by the data that it was made for"),
        (["--control", "/nonexistent"], "/nonexistent: holds no checkpoint"),
    ],
)
def test_evaluation_that_cannot_be_is_refused(
    words: list[str], named: str, trained: Path, dpsink: Command
) -> None:  # fmt: skip
    check_refused(dpsink("evaluate", trained, "--samples", "40", *words), named)


@pytest.mark.parametrize("name", ["flat", "flat/0.png", "none.npz", "set.parquet"])
def test_what_is_neither_a_run_nor_images_is_told(name: str, dpsink: Command, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").touch()
    answer = dpsink("evaluate", tmp_path / name, "--data", "digits")
    check_refused(answer, f"{tmp_path / name}: holds neither a run nor images; give an npz file, or a folder")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "taken.npz"], r"taken\.npz: exists; choose another --out, or --force"),
        (["--out", "set.png"], r"set\.png: must end in \.npz or \.parquet, or be the name of a folder"),
        (["--out", "set", "--format", "npz"], r"--format=npz does not go with --out=set"),
        (["--out", "set.npz", "--format", "png"], r"--format=png does not go with --out=set\.npz"),
        (["--out", "set.npz", "--format", "jpg"], "--format"),
        (["--out", "mine", "--force"], r"mine: cannot be written .*not replaced"),
        (["--out", "new.npz", "--per-class", "2"], "give one of --count and --per-class"),
        (["--out", "new.npz", "--device", "cuda:99"], r"device=cuda:99"),
        (["--out", "new.npz", "--count", "0"], "--count"),
        (["--out", "new.npz", "--seed", str(2**64)], "--seed"),
        (["--out", "folder.npz", "--force"], r"folder\.npz: cannot be written .*choose another --out"),
        (["--out", "taken.npz/new.npz"], r"taken\.npz/new\.npz: cannot be written .*choose another --out"),
        (["--out", "/proc/new.npz"], r"/proc/new\.npz: cannot be written .*choose another --out"),
        ([], "--out"),
    ],
)
def test_samples_that_cannot_be_written_are_refused(
    words: list[str], named: str, trained: Path, dpsink: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.npz").write_bytes(b"mine")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    check_refused(dpsink("sample", trained, "--count", "10", *words), named)
    assert contents(tmp_path) == {"taken.npz": b"mine"}


@pytest.mark.parametrize("text", ["0", "0=", "0=x", "10=5", "0=1,0=2", "-1=3", "0=0", "a=1", "0=5,"])
def test_counts_that_cannot_be_are_refused(text: str, trained: Path, dpsink: Command, tmp_path: Path) -> None:
    check_refused(dpsink("sample", trained, "--out", tmp_path / "set", "--class-counts", text), "--class-counts=")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--noise-multiplier", "0"], r"noise_multiplier=0\.0 must be"),
        (["--noise-multiplier", "nan"], r"noise_multiplier=nan must be"),
        (["--noise-multiplier", "0.01"], r"noise_multiplier=0\.01 must be .*>= 0\.1; choose"),
        (["--noise-multiplier", "much"], "--noise-multiplier"),
        (["--sample-rate", "2"], r"sample_rate=2\.0 must be in \(0, 1\]"),
        (["--sample-rate", "nan"], r"sample_rate=nan"),
        (["--sample-rate", "0"], r"sample_rate=0\.0"),
        (["--delta", "1"], r"delta=1\.0 must be in \(0, 1\)"),
        (["--delta", "nan"], r"delta=nan"),
        (["--target-epsilon", "inf"], r"target_epsilon=inf must be a finite"),
        (["--target-epsilon", "0"], r"target_epsilon=0\.0"),
        (["--plot", "/proc/curve.png"], r"--plot=/proc/curve\.png: cannot be written"),
        (["--plot", "curve.doc"], r"--plot=curve\.doc: cannot be written"),
    ],
)
def test_budget_out_of_range_is_refused(words: list[str], named: str, dpsink: Command) -> None:
    usual = ["--sample-rate", "1", "--delta", "1e-5", "--target-epsilon", "1"]
    usual += [] if "--noise-multiplier" in words else ["--noise-multiplier", "30"]
    check_refused(dpsink("budget", *usual, *words), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give --sample-rate, or --data and --batch-size"),
        (["--data", "mnist"], "give --sample-rate, or --data and --batch-size"),
        (["--data", "cifar", "--batch-size", "50"], "name='cifar'"),
        (["--data", "digits", "--batch-size", "0"], r"--batch-size=0 must be in \[1, 1437\]"),
        (["--data", "digits", "--batch-size", "1438"], r"--batch-size=1438 must be in \[1, 1437\]"),
        (["--data", "digits", "--batch-size", "5", "--validation-size", "1617"], "validation_size=1617"),
        (["--data", "digits", "--batch-size", "5", "--delta", "1e-3"], r"--delta=0\.001 must be below 1/N"),
    ],
)
def test_budget_of_a_data_set_that_cannot_be_is_refused(words: list[str], named: str, dpsink: Command) -> None:
    usual = ("budget", "--noise-multiplier", "3", "--delta", "1e-5", "--target-epsilon", "1")
    check_refused(dpsink(*usual, *words), named)


def test_failure_of_the_program_is_not_called_bad_input(
    trained: Path, dpsink: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that no input explains keeps its traceback; Python then exits with 1."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dpsink.judging.judge", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        dpsink("evaluate", trained)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_becomes_a_flag_and_a_second_one_kills(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), console.stop_on_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_loaded_generator_of_a_run_is_the_one_that_was_saved(trained: Path) -> None:
    """Keeps the fixture honest: `trained` holds a whole checkpoint."""
    _, description = load_generator(trained)
    assert (description.step, description.witness["charged"]) == (6, 6)


@pytest.mark.parametrize("option", [("--device", "cuda:99"), ("--device", "tpu"), ("--precision", "half")])
def test_performance_that_cannot_be_had_is_one_line_and_writes_nothing(
    option: tuple[str, str], dpsink: Command, tmp_path: Path
) -> None:  # fmt: skip
    answer = dpsink(
        "train", "privacy.noise_multiplier=3", "privacy.delta=5e-5", *option, "--out", str(tmp_path / "run")
    )
    assert (answer.code, len(answer.err.strip().splitlines())) == (2, 1)
    assert not (tmp_path / "run").exists()


def test_command_leaves_without_a_last_collection_over_all_that_was_loaded() -> None:
    """It took two seconds with torch, Ray and MLflow loaded, and counted among the ten of Ctrl-C."""
    script = (
        "import atexit, gc, sys; from dpsink import cli; sys.argv = ['dpsink', '--help'];"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0)); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "frozen" not in done.stderr
    assert done.stdout.splitlines()[-1] == "frozen True"
