"""One study through what befalls a machine: the memory monitor, the death of all processes, a full disk, a lost MLflow.

The faults come one after another on the same study, each in the middle of a trial, and after each the same command is
typed again. Processes are real, and killed by their ids.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from dpsink.errors import InputError
from dpsink.privacy.budget import charged_steps
from tests.test_sweep import (
    PATIENCE,
    RUNNER,
    TRIALS,
    Command,
    attempts,
    folder_of,
    runs_of,
    states,
    statuses,
    step_of,
    study_status,
    wait_for,
    write_study,
)
from tune import schema
from tune.folder import StudyFolder
from tune.room import LEAST, free_bytes
from tune.study import load_study
from tune.sweep import run_study
from tune.tracking import connect

pytestmark = pytest.mark.slow
STEPS, POINTS = 1500, 30
LOST = "is lost"
BACK = "MLflow is back and has everything"
PASSWORD = "open-sesame-and-nobody-else"


class Server:
    """`mlflow server`, which can be killed and started again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_for(self.answers, "MLflow's server")

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        """kill -9 of the server and its workers, which are a process group of their own."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass
class Seen:
    """How the study stood when a fault had passed."""

    code: int | None
    words: str
    entries: dict[str, bytes]  # of the ledger of the trial that was hit
    charged: int
    step: int
    states: dict[str, str | None]
    seconds: float = 0.0


@dataclass
class Weather:
    """What was seen on the way, by fault."""

    folder: StudyFolder
    seen: dict[str, Seen] = field(default_factory=dict)
    before: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the ledger's entries when the fault struck
    left: list[str] = field(default_factory=list)
    behind: int = STEPS  # steps that MLflow lacked when it was said to have everything
    refusal: str = ""  # of a sweep while MLflow is away

    def note(self, fault: str, command: Command, seconds: float = 0.0) -> None:
        entries, step = entries_of(self.folder), step_of(self.folder, RUNNER)
        self.seen[fault] = Seen(
            command.process.returncode,
            command.errors(),
            entries,
            charged_steps(self.folder.run(RUNNER) / "ledger") if entries else 0,
            step,
            states(self.folder),
            seconds,
        )


def entries_of(folder: StudyFolder) -> dict[str, bytes]:
    """The ledger of the trial that is hit, entry by entry."""
    return {path.name: path.read_bytes() for path in (folder.run(RUNNER) / "ledger").glob("[!.]*.json")}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of its own, small enough to be filled; a folder that is none where nothing can be mounted."""
    place = tmp_path_factory.mktemp("disk")
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(place)], capture_output=True
        ).returncode
    )
    yield place
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def weather(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weather]:
    """A study that had all of it, and was then let finish."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    path = write_study(disk, "weather", steps=STEPS, points=POINTS, tracking={"uri": server.uri})
    weather = Weather(folder_of(path))
    try:
        out_of_memory(path, weather)
        everything_killed(path, weather)
        with Command(path) as command:
            mlflow_away(command, server, weather)
            if disk.is_mount():
                disk_full(command, server, weather)
        refused_without_mlflow(server, path, weather)
        stopped_by_hand(path, weather)
        with Command(path) as command:
            command.process.wait(PATIENCE)
            weather.note("nothing", command)
        yield weather
    finally:
        server.kill()
        patch.undo()


def underway(weather: Weather) -> None:
    """Waits until the trial has got further than it was."""
    before, attempt = step_of(weather.folder, RUNNER), attempts(weather.folder, RUNNER)
    wait_for(lambda: attempts(weather.folder, RUNNER) > attempt, "the trial to start")
    wait_for(lambda: step_of(weather.folder, RUNNER) > before, "the trial to go on")


def out_of_memory(path: Path, weather: Weather) -> None:
    """Ray's memory monitor, told that any use is too much, kills every worker as soon as it starts."""
    monitor = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in monitor.items():
            patch.setenv(name, value)
        with Command(path) as command:
            command.process.wait(PATIENCE)
            weather.note("memory monitor", command)


def everything_killed(path: Path, weather: Weather) -> None:
    with Command(path) as command:
        underway(weather)
        weather.before["all killed"] = entries_of(weather.folder)
        command.look()
        command.kill_all()
        weather.note("all killed", command)


def mlflow_away(command: Command, server: Server, weather: Weather) -> None:
    underway(weather)
    weather.before["MLflow away"] = entries_of(weather.folder)
    server.kill()
    before = step_of(weather.folder, RUNNER)
    wait_for(lambda: step_of(weather.folder, RUNNER) > before, "a report that MLflow does not get")
    wait_for(lambda: LOST in unwrapped(command.errors()), "a word about it")
    weather.note("MLflow away", command)
    server.start()
    wait_for(lambda: BACK in command.errors(), "MLflow to have everything")
    weather.behind = step_of(weather.folder, RUNNER) - shown_step(weather.folder)


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def shown_step(folder: StudyFolder) -> int:
    """Step of the last report of the trial that MLflow has."""
    client = connect(folder.read_study().tracking_uri)
    (run,) = [one for one in runs_of(folder) if one.data.tags[schema.TRIAL_ID_TAG] == RUNNER]
    return max(point.step for point in client.get_metric_history(run.info.run_id, schema.EPSILON))


def disk_full(command: Command, server: Server, weather: Weather) -> None:
    """With MLflow away, so that nothing is lost of what it has not."""
    server.kill()
    disk = weather.folder.path.parent
    ballast = disk / "ballast"
    weather.before["disk full"] = entries_of(weather.folder)
    ballast.write_bytes(bytes(free_bytes(disk) - LEAST // 64))
    command.process.wait(PATIENCE)
    weather.note("disk full", command)
    ballast.unlink()


def refused_without_mlflow(server: Server, path: Path, weather: Weather) -> None:
    server.kill()
    with pytest.raises(InputError) as refused:
        run_study(load_study(path))
    weather.refusal = str(refused.value)
    server.start()


def stopped_by_hand(path: Path, weather: Weather) -> None:
    with Command(path) as command:
        attempt = attempts(weather.folder, RUNNER)
        wait_for(lambda: attempts(weather.folder, RUNNER) > attempt, "the trial to start")
        weather.before["Ctrl-C"] = entries_of(weather.folder)
        command.look()
        started = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        command.process.wait(PATIENCE)
        weather.note("Ctrl-C", command, time.monotonic() - started)
        weather.left = command.left()


FAULTS = ("memory monitor", "all killed", "MLflow away", "disk full", "Ctrl-C")


def test_a_memory_monitor_that_kills_all_workers_stops_the_study_and_fails_no_trial(weather: Weather) -> None:
    seen = weather.seen["memory monitor"]
    assert seen.code == 1
    assert "a node ran out of memory" in seen.words.splitlines()[-1]
    assert set(seen.states.values()) == {None}


def test_a_full_disk_stops_the_study_in_one_line_and_fails_no_trial(weather: Weather) -> None:
    if "disk full" not in weather.seen:
        pytest.skip("a disk that may be filled takes the right to mount one")
    seen = weather.seen["disk full"]
    assert seen.code == 1
    assert "is full" in (line := seen.words.splitlines()[-1])
    assert "run the same command again to go on" in line
    assert seen.states[RUNNER] is None
    assert "Traceback" not in seen.words


def test_a_study_goes_on_while_mlflow_is_away_and_says_so_once(weather: Weather) -> None:
    told = unwrapped(weather.seen["MLflow away"].words)
    assert "the study goes on" in told
    assert told.count(LOST) == 1


def test_mlflow_that_is_back_catches_up_while_the_study_runs(weather: Weather) -> None:
    assert weather.behind <= STEPS / POINTS * 2  # what was reported since


def test_a_study_is_not_taken_up_while_mlflow_is_away(weather: Weather) -> None:
    assert "start the MLflow server" in weather.refusal


def test_ctrl_c_ends_a_sweep_within_ten_seconds(weather: Weather) -> None:
    seen = weather.seen["Ctrl-C"]
    assert seen.code == 130
    assert seen.seconds < 10
    assert weather.left == []


def test_no_entry_of_the_ledger_is_lost_or_changed_by_any_fault(weather: Weather) -> None:
    """By entry and not by sum: a clean stop gives steps back that were reserved and had not run, by one entry more."""
    faults = [fault for fault in FAULTS if fault in weather.seen]
    entries = [kept for fault in faults for kept in (weather.before.get(fault, {}), weather.seen[fault].entries)]
    assert entries[-1]
    assert all(earlier.items() <= later.items() for earlier, later in pairwise(filter(None, entries)))


def test_no_step_that_was_reported_is_off_the_ledger_after_any_fault(weather: Weather) -> None:
    assert all(seen.step <= seen.charged for seen in weather.seen.values())


def test_every_trial_completes_once_after_all(weather: Weather) -> None:
    assert weather.seen["nothing"].code == 0
    assert states(weather.folder) == dict.fromkeys(TRIALS, "completed")
    for name in TRIALS:
        charged = charged_steps(weather.folder.run(name) / "ledger")
        assert step_of(weather.folder, name) <= charged <= weather.folder.read_trial(name).steps


def test_mlflow_has_each_trial_once_finished_with_each_report_once(weather: Weather) -> None:
    assert statuses(weather.folder) == dict.fromkeys(TRIALS, "FINISHED")
    assert study_status(weather.folder) == "FINISHED"
    client = connect(weather.folder.read_study().tracking_uri)
    for run in runs_of(weather.folder):
        history = client.get_metric_history(run.info.run_id, schema.EPSILON)
        reports = weather.folder.reports(run.data.tags[schema.TRIAL_ID_TAG])
        assert [(point.step, point.value) for point in history] == [(one.step, one.epsilon) for one in reports]


def test_a_password_of_mlflow_is_written_nowhere(weather: Weather) -> None:
    files = [path for path in weather.folder.path.parent.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not any(PASSWORD in seen.words for seen in weather.seen.values())
