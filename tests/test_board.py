"""What a person sees of a running study, on a terminal and off it."""

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from dpsink import console
from dpsink.config import load_config
from dpsink.evaluation import WORST_DISTANCE
from tune.board import SHORT, Board, SealedBoard
from tune.folder import TrialRecord

STATES = ("completed", "stopped_early", "running", "diverged", "failed", "interrupted")
VALUES = {
    "epsilon": 9.9987,
    "fid": 1234.56,
    "accuracy": 0.91234,
    "accuracy_logreg": 0.81234,
    "variety": 0.4321,
    "recall": 0.0234,
}


def record(name: str, *, sample_rate: float = 0.34792) -> TrialRecord:
    """A trial whose settings take as much room as those of a real search."""
    config = load_config(None, [
        "privacy.clip_norm=12.3456", "sinkhorn.blur=0.0512", "optimizer.lr=0.0023456", "privacy.batch_size=2000",
        "privacy.noise_multiplier=3.4567", "sinkhorn.gen_batch_size=100",
    ])  # fmt: skip
    role = "baseline" if name.startswith("baseline-") else "search"
    return TrialRecord(
        name=name, role=role, config_id="x", config=config, steps=400, sample_rate=sample_rate, noise_multiplier=3.4567
    )


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 80 columns."""
    made = Console(force_terminal=True, width=80, height=24, file=io.StringIO(), highlight=False)
    monkeypatch.setattr(console, "err", made)
    return made


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """No terminal."""
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, width=80, highlight=False))
    yield text


def render(board: Board) -> list[str]:
    """The board's lines as the terminal shows them."""
    plain = Console(file=io.StringIO(), width=80, height=24)
    with plain.capture() as captured:
        plain.print(board.render())
    return [line.rstrip() for line in captured.get().splitlines()]


def full_board(objective: str = "accuracy", trials: int = 12) -> Board:
    """Two baselines and searched trials, in all states."""
    board = Board("study quickstart", trials, objective)
    names = ["baseline-class-mean", "baseline-paper", *(f"trial-{number:04d}" for number in range(1, trials - 1))]
    for index, name in enumerate(names):
        board.show(record(name), STATES[index % len(STATES)], VALUES | {"accuracy": 0.5 + index / 10_000})
    board.ledger_text = "study ε ≤ 31.42, spent 20.42"
    return board


def test_twelve_trials_fit_a_terminal_of_80_columns_uncut(terminal: Console) -> None:
    lines = render(full_board())
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert len(lines) == 1 + 1 + 12 + 2  # title, header, trials, summary and ledger: nothing is wrapped


def test_a_line_shows_the_trial_its_settings_its_results_and_its_state(terminal: Console) -> None:
    line = next(line for line in render(full_board()) if line.startswith("trial-0001"))
    expected = [
        "trial-0001",
        "3.46",
        "12.3",
        "0.051",
        "2000",
        "100",
        "0.0023",
        "9.999",
        "1235",
        "0.5002",
        ".43/.02",
        "running",
    ]
    assert line.split() == expected


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_shown_whole(terminal: Console, state: str) -> None:
    board = Board("study", 1, "accuracy")
    board.show(record("trial-0001"), state, VALUES)
    assert render(board)[2].split()[-1] == SHORT.get(state, state)


def test_a_diverged_trial_fits(terminal: Console) -> None:
    board = full_board()
    board.show(
        record("trial-0001"), "diverged", {"fid": WORST_DISTANCE, "accuracy": 0.0, "variety": 0.0, "recall": 0.0}
    )
    lines = render(board)
    assert next(line for line in lines if line.startswith("trial-0001")).endswith("1e+06      0 .00/.00  diverged")
    assert max(map(len, lines)) <= 80


def test_a_value_that_is_not_there_yet_is_a_dash(terminal: Console) -> None:
    board = Board("study", 1, "accuracy")
    board.show(record("trial-0001"), "running")
    assert render(board)[2].split()[-4:] == ["–", "–", "–", "running"]


def test_a_control_without_batches_takes_all_records(terminal: Console) -> None:
    board = Board("study", 1, "accuracy")
    board.show(record("baseline-control", sample_rate=1.0), "running")
    assert render(board)[2].split()[4] == "all"


@pytest.mark.parametrize(
    ("objective", "header"), [("accuracy_logreg", "logreg"), ("fid", "acc"), ("variety", "variety")]
)
def test_what_is_optimised_has_a_column(terminal: Console, objective: str, header: str) -> None:
    assert header in render(full_board(objective))[1].split()


def test_more_trials_than_lines_leave_the_latest_and_the_summary(terminal: Console) -> None:
    lines = render(full_board(trials=100))
    assert len(lines) <= 24
    assert lines[-3].startswith("trial-0098")
    assert "100 trials" in lines[-2]


@pytest.mark.parametrize(("objective", "best"), [("accuracy", "trial-0003"), ("fid", "trial-0001")])
def test_the_best_searched_trial_is_named(terminal: Console, objective: str, best: str) -> None:
    board = Board("study", 4, objective)
    board.show(record("baseline-paper"), "completed", {"accuracy": 0.99, "fid": 0.1})
    for number, (accuracy, fid) in enumerate([(0.5, 1.0), (0.6, 2.0), (0.7, 3.0)], start=1):
        board.show(record(f"trial-{number:04d}"), "completed", {"accuracy": accuracy, "fid": fid})
    assert f"best {best} " in render(board)[-2]


def test_a_configuration_is_best_by_the_mean_of_its_seeds_once_all_have_ended(terminal: Console) -> None:
    board = Board("study", 6, "accuracy", seeds=2)
    told = {"lucky": [(0.9, "completed"), (0.5, "completed")], "steady": [(0.8, "completed"), (0.7, "completed")],
            "short": [(0.95, "completed"), (0.95, "running")]}  # fmt: skip
    for name, values in told.items():
        for seed, (accuracy, state) in enumerate(values, start=1):
            trial = record(f"{name}-{seed}").model_copy(update={"configuration": name})
            board.show(trial, state, {"accuracy": accuracy})
    assert board.best() == ("steady", 0.75)


def test_the_ledger_has_a_line(terminal: Console) -> None:
    assert render(full_board())[-1] == "study ε ≤ 31.42, spent 20.42"


def test_trials_of_an_earlier_session_do_not_make_the_rest_look_fast(terminal: Console) -> None:
    board = Board("study", 3, "accuracy")
    board.restore(record("trial-0001"), "completed", VALUES)
    assert "ETA" not in render(board)[-2]
    board.show(record("trial-0002"), "completed", VALUES)
    assert "2/3 trials" in render(board)[-2]
    assert "ETA" in render(board)[-2]


def test_a_terminal_shows_the_table(terminal: Console) -> None:
    with full_board():
        pass
    assert isinstance(terminal.file, io.StringIO)
    assert "trial-0010" in terminal.file.getvalue()


def test_off_a_terminal_each_change_is_a_plain_line(pipe: io.StringIO) -> None:
    board = Board("study", 1, "accuracy")
    with board:
        board.show(record("trial-0001"), "running")
        board.show(record("trial-0001"), "running", VALUES)
        board.show(record("trial-0001"), "completed", VALUES)
    lines = [line.split() for line in pipe.getvalue().splitlines()]
    results = ["epsilon", "9.999", "fid", "1,235", "accuracy", "0.9123", "variety", "0.4321", "recall", "0.0234"]
    assert lines == [
        ["trial-0001", "running"], ["trial-0001", "running", *results], ["trial-0001", "completed", *results]
    ]  # fmt: skip
    assert "\x1b" not in pipe.getvalue()


def test_off_a_terminal_what_did_not_change_is_not_repeated(pipe: io.StringIO) -> None:
    board = Board("study", 1, "accuracy")
    for _ in range(3):
        board.show(record("trial-0001"), "running", VALUES)
    assert len(pipe.getvalue().splitlines()) == 1


def test_off_a_terminal_trials_of_an_earlier_session_are_not_told_again(pipe: io.StringIO) -> None:
    Board("study", 1, "accuracy").restore(record("trial-0001"), "completed", VALUES)
    assert pipe.getvalue() == ""


@pytest.mark.parametrize("value", ["running", True, None])
def test_what_is_no_number_is_no_value(pipe: io.StringIO, value: Any) -> None:
    board = Board("study", 1, "accuracy")
    board.show(record("trial-0001"), "running", {"fid": value, "epsilon": 1.0})
    assert pipe.getvalue().split() == ["trial-0001", "running", "epsilon", "1"]


def test_a_sealed_study_shows_that_it_runs_and_what_it_may_cost(terminal: Console) -> None:
    with SealedBoard("study secret") as board:
        board.ledger_text = "study ε ≤ 1.78"
        time.sleep(0.6)
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert all(part in shown for part in ("study secret", "running for 0.0 min", "study ε ≤ 1.78"))


def test_a_sealed_study_says_one_line_off_a_terminal(pipe: io.StringIO) -> None:
    with SealedBoard("study secret"):
        pass
    assert pipe.getvalue() == "study secret is running; it is sealed until its winner is known\n"
