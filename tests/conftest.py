"""What all tests share: no test reads or writes a person's own key, cache or MLflow."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# One thread a process, set before torch is imported here or in a child: tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from dpsink import cli
from dpsink.config import DataConfig
from dpsink.data import ImageData, load_dataset

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys and caches of the whole test session live in a temporary folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("DPSINK_INCEPTION_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """The embedded data set."""
    return load_dataset(DataConfig())


@pytest.fixture
def data_root() -> Path:
    """The folder of the real MNIST and Fashion-MNIST; skips where the machine has none."""
    root = os.environ.get("DPSINK_DATA_ROOT")
    if not root:
        pytest.skip("DPSINK_DATA_ROOT is not set: real MNIST is not at hand")
    return Path(root)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A new database, which takes seconds to make, and what making it wrote on the console."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    command = f"from tune.tracking import check_tracking; check_tracking('sqlite:///{path}')"
    made = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return path, made.stdout + made.stderr


@pytest.fixture
def uri(empty_database: tuple[Path, str], tmp_path: Path) -> str:
    """A database of one's own."""
    shutil.copyfile(empty_database[0], tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines on stderr that are no log lines."""
        return [line for line in self.err.splitlines() if not LOG_LINE.match(line)]


Command = Callable[..., Answer]


@pytest.fixture
def dpsink(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command line in this process, up to its exit code."""
    logger, threads = logging.getLogger("dpsink"), torch.get_num_threads()
    before = logger.handlers, logger.level, logger.propagate

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["dpsink", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code, told = ended.value.code, capsys.readouterr()
        return Answer(code if isinstance(code, int) else 1, told.out, told.err)

    yield call
    logger.handlers, logger.level, logger.propagate = before
    torch.set_num_threads(threads)


class ReplayedEntropy:
    """Bytes from a seed: two runs with the same seed draw the same noise. Lives under tests/ only."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def random_bytes(self, count: int) -> bytes:
        return self.rng.bytes(count)
