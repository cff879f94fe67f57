"""MLflow's pages about a study: its server, where one is needed, and the links into it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from dpsink import console
from dpsink.errors import InputError
from tune import links, schema
from tune.folder import StudyFolder, StudyRecord
from tune.outage import told_when_lost

if TYPE_CHECKING:  # its import takes seconds
    from mlflow.entities import Experiment, Run

PATIENCE = 120.0  # seconds that the server may take to answer; 13 are usual
GRACE = 5.0  # seconds that it may take to end


@contextmanager
def serving(uri: str) -> Iterator[str]:
    """The address of MLflow's server: of one that is started here on a database and ends with the context, or the URI.

    Raises:
        InputError: there is no database, or the server does not start.
    """
    database = schema.sqlite_file(uri)
    if database is None:
        yield schema.shown_uri(uri).rstrip("/")
        return
    if not database.exists():  # a server would create it
        raise InputError(f"{database}: no such database; run the study first")
    with tempfile.TemporaryFile() as words:
        port = _free_port()
        server = _start(uri, port, words)
        try:
            _wait(server, port, words)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(server)


def study_links(folder: StudyFolder, server: str, uri: str) -> dict[str, str]:
    """Links to a study's runs, as a table and as charts, and to the best of its search side by side.

    Raises:
        InputError: MLflow does not answer, knows no run of the study, or has no view of it.
    """
    record = folder.read_study()
    with told_when_lost(uri):
        experiment, best = _experiment_and_best(record, uri)
    if experiment is None or not best or links.view_tag(record.study_id) not in experiment.tags:
        missing = "no view" if best else "no run"
        raise InputError(f"study {record.name}: MLflow has {missing} of it; `dpsink-tune track` writes what is missing")
    table = (server, experiment.experiment_id, record.study_id)
    return {
        "runs": links.runs_link(*table),
        "charts": links.runs_link(*table, charts=True),
        "best": links.compare_link(server, experiment.experiment_id, [run.info.run_id for run in best]),
    }


def _experiment_and_best(record: StudyRecord, uri: str) -> tuple["Experiment | None", Sequence["Run"]]:
    """What MLflow holds of a study: its experiment, and the completed runs of its search that are best."""
    from tune.tracking import connect

    client = connect(uri)
    experiment = client.get_experiment_by_name(record.experiment)
    if experiment is None:
        return None, []
    wanted, order = links.ranked_of(record.study_id), [links.order_of(record.objectives[0])]
    return experiment, client.search_runs(
        [experiment.experiment_id], wanted, max_results=links.COMPARED, order_by=order
    )


def _start(uri: str, port: int, words: IO[bytes]) -> subprocess.Popen[bytes]:
    """Bound to this machine alone, with one worker: by default it has seven, of 230 MB each."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # A session of its own: Ctrl-C is for us alone, and all that it starts can be ended together.
    return subprocess.Popen(
        command, stdout=words, stderr=subprocess.STDOUT, env={**os.environ, **quiet}, start_new_session=True
    )


def _wait(server: subprocess.Popen[bytes], port: int, words: IO[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    with console.err.status("MLflow's server is starting, which takes about a quarter of a minute"):
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                words.seek(0)
                last = (words.read().decode(errors="replace").split("\n") or [""])[-2:]
                raise InputError(f"MLflow's server does not start: {' '.join(last).strip()}; see `mlflow server`")
            time.sleep(0.2)


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
        return answer.status == 200
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(GRACE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
