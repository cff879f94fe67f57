"""MLflow's server as `dpsink-tune ui` starts it: on this machine alone, and gone when it is left."""

import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpsink.errors import InputError
from tests.test_tracking import Fake, make_study, refused_port
from tune.cli import main
from tune.schema import State
from tune.tracking import rebuild
from tune.ui import serving, study_links


def listening() -> list[str]:
    """Addresses on which some process of this machine listens, `ADDRESS:PORT` in hexadecimal."""
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [fields[1] for fields in lines if fields[3] == "0A"]


@pytest.mark.slow
def test_the_server_answers_on_loopback_alone_and_ends_with_the_command(uri: str) -> None:
    with serving(uri) as server:
        port = int(server.rpartition(":")[2])
        with urllib.request.urlopen(f"{server}/health", timeout=10) as answer:
            assert answer.status == 200
        assert [address for address in listening() if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_that_runs_elsewhere_is_taken_as_it_is_without_its_password() -> None:
    with serving("https://user:secret@tracking.example/") as server:
        assert server == "https://tracking.example"


def test_a_database_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such database"), serving(f"sqlite:///{tmp_path}/none.db"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_study_has_links_to_its_runs_and_to_its_best_side_by_side(uri: str, tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", [Fake(f"trial-{number:04d}") for number in (1, 2)], uri)
    rebuild(folder)
    links = study_links(folder, "http://server", uri)
    assert set(links) == {"runs", "charts", "best"}
    assert all(link.startswith("http://server/#/") for link in links.values())
    assert links["best"].count("%22") == 2 * (2 + 1)  # two runs of one experiment, in quotes


def test_the_best_are_completed_trials(uri: str, tmp_path: Path) -> None:
    states: tuple[State, ...] = ("completed", "stopped_early", "diverged", "failed")
    fakes = [Fake(state, state=state, metrics={"accuracy": 0.9}) for state in states]
    folder = make_study(tmp_path / "study", fakes, uri)
    rebuild(folder)
    assert study_links(folder, "http://server", uri)["best"].count("%22") == 2 * (1 + 1)  # a run, an experiment


def test_a_study_without_runs_is_told_how_to_write_them(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run of it; `dpsink-tune track` writes what is missing"):
        study_links(make_study(tmp_path / "study", [], uri), "http://server", uri)


# MLflow that is lost: one line, without a password, and exit code 2.


class Unwilling(BaseHTTPRequestHandler):
    """Refuses everything with the server's `code`; a server that is only busy has answered one question before."""

    def do_POST(self) -> None:
        code = int(self.server.code)  # type: ignore[attr-defined]
        code, body = (200, b"{}") if code == 503 and self.path.endswith("experiments/search") else (code, b"No.")
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def unwilling(request: pytest.FixtureRequest) -> Iterator[str]:
    """Host and port of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Unwilling) as server:
        server.code = request.param  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, folder: Path) -> str:
    """The one line with which a command ends as of bad input."""
    monkeypatch.setattr(sys, "argv", ["dpsink-tune", command, str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize("command", ["ui", "track"])
def test_a_dead_server_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = make_study(tmp_path / "study", [], f"http://127.0.0.1:{refused_port()}")
    assert "Connection refused" in refusal(monkeypatch, capsys, command, folder.path)


def test_no_password_of_a_dead_server_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_study(tmp_path / "study", [], f"http://user:secret@127.0.0.1:{refused_port()}")
    assert "secret" not in refusal(monkeypatch, capsys, "ui", folder.path)


@pytest.mark.parametrize("unwilling", [401, 403], indirect=True)
@pytest.mark.parametrize("command", ["ui", "track"])
def test_a_server_that_wants_to_know_who_asks_is_told_with_what_to_set(
    unwilling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = make_study(tmp_path / "study", [], f"http://{unwilling}")
    assert "put user and password into MLFLOW_TRACKING_USERNAME" in refusal(monkeypatch, capsys, command, folder.path)


@pytest.mark.parametrize("unwilling", [503], indirect=True)
def test_a_server_that_is_lost_while_it_is_written_is_told_in_one_line(
    unwilling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_study(tmp_path / "study", [], f"http://{unwilling}")
    said = refusal(monkeypatch, capsys, "track", folder.path)
    assert f"MLflow at http://{unwilling} is lost" in said and "repeat the command" in said
