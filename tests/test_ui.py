"""MLflow's server as `dpsink-tune ui` starts it: on this machine alone, and gone when it is left."""

import socket
import urllib.request
from pathlib import Path

import pytest

from dpsink.errors import InputError
from tests.test_tracking import Fake, make_study
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


def test_a_study_without_runs_is_told_how_to_write_them(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run of it; `dpsink-tune track` writes what is missing"):
        study_links(make_study(tmp_path / "study", [], uri), "http://server", uri)
