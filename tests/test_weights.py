"""Inception's weights: one file, found by path, by the environment, in torch hub's cache, or downloaded."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpsink.errors import InputError
from dpsink.evaluation import Extractor, build_extractor, extractors
from dpsink.evaluation.extractors import find_weights, require_extractor
from tests.conftest import Command
from tests.test_cli import small

NAME = "weights-inception-2015-12-05-6726825d.pth"
CONTENT = b"weights"


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch hub's cache is empty, and the environment names no file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(extractors.WEIGHTS_VARIABLE, raising=False)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The place in torch hub's cache, where nothing is yet."""
    return tmp_path / "torch" / "hub" / "checkpoints" / NAME


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file on a server of this machine, from which the weights are downloaded."""
    file = tmp_path / "published" / NAME
    put(file)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(file.parent)))
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/{NAME}")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256_PREFIX", hashlib.sha256(CONTENT).hexdigest()[:8])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield file
    server.shutdown()
    server.server_close()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are read as weights: each gives an extractor that sees four pixels."""
    files = []

    def load(path: Path, _device: str) -> Extractor:
        files.append(path)
        return Extractor("inception", "inception", lambda images: images.flatten(1)[:, 20:24])

    monkeypatch.setattr(extractors, "_load_inception", load)
    return files


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    return path


def test_missing_weights_are_told_with_every_way_to_give_them(cached: Path) -> None:
    with pytest.raises(InputError) as told:
        require_extractor("inception")
    message = str(told.value)
    assert message.startswith(f"{cached}: no Inception weights there")
    for way in ("--inception-weights", "$DPSINK_INCEPTION_WEIGHTS", "--download", "`classifier`"):
        assert way in message


def test_a_path_goes_before_the_environment_and_that_before_the_cache(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cached)
    assert find_weights() == cached
    monkeypatch.setenv(extractors.WEIGHTS_VARIABLE, str(put(tmp_path / "named.pth")))
    assert find_weights() == tmp_path / "named.pth"
    assert find_weights(put(tmp_path / "given.pth")) == tmp_path / "given.pth"


def test_a_named_file_that_is_not_there_is_refused_whatever_the_cache_holds(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cached)
    monkeypatch.setenv(extractors.WEIGHTS_VARIABLE, str(tmp_path / "named.pth"))
    for weights in (None, tmp_path / "given.pth"):
        with pytest.raises(InputError, match=rf"^{weights or tmp_path / 'named.pth'}: no Inception weights there"):
            find_weights(weights)


def test_missing_weights_are_downloaded_where_that_is_asked(published: Path, cached: Path, tmp_path: Path) -> None:
    assert find_weights(download=True).read_bytes() == cached.read_bytes() == CONTENT
    assert find_weights(tmp_path / "new" / "w.pth", download=True).read_bytes() == CONTENT
    published.unlink()
    assert find_weights(download=True) == cached  # no second time


@pytest.mark.parametrize("content", [b"others", None])
def test_a_failed_download_is_told_and_leaves_nothing(content: bytes | None, published: Path, cached: Path) -> None:
    published.unlink() if content is None else published.write_bytes(content)
    with pytest.raises(InputError, match=r"127\.0\.0\.1.* cannot be downloaded to .*by hand") as told:
        find_weights(download=True)
    assert "\n" not in str(told.value)
    assert not list(cached.parent.iterdir())


def test_the_extractor_reads_the_file_that_is_found(cached: Path, digits, read: list[Path]) -> None:
    build_extractor("inception", digits.test, weights=put(cached.with_name("given.pth")))
    put(cached)
    build_extractor("inception", digits.test)
    assert read == [cached.with_name("given.pth"), cached]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("way", ["path", "environment", "cache", "download"])
def test_train_and_evaluate_take_the_weights_by_each_way(
    way: str, dpsink: Command, read: list[Path], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"path": tmp_path / "given.pth", "environment": tmp_path / "named.pth"}.get(way, cached)
    options = {"path": ["--inception-weights", str(file)], "download": ["--download"]}.get(way, [])
    if way == "environment":
        monkeypatch.setenv(extractors.WEIGHTS_VARIABLE, str(file))
    if way != "download":
        put(file)
    train = dpsink("train", *small(evaluation__extractor="inception"), *options, "--out", tmp_path / "run")
    assert train.code == 0, train.err
    assert set(read) == {file}
    if way == "download":
        file.unlink()
    judged = dpsink("evaluate", tmp_path / "run", "--samples", "40", "--extractor", "inception", *options)
    assert judged.code == 0, judged.err
    assert set(read) == {file}


def test_training_without_the_weights_is_refused_before_anything_is_written(dpsink: Command, tmp_path: Path) -> None:
    answer = dpsink("train", *small(evaluation__extractor="inception"), "--out", tmp_path / "run")
    assert (answer.code, answer.out) == (2, "")
    assert "no Inception weights there" in answer.errors[-1]
    assert not (tmp_path / "run").exists()


def test_training_without_validation_images_needs_no_weights(dpsink: Command, tmp_path: Path) -> None:
    words = small(evaluation__extractor="inception", data__validation_size="0")
    assert dpsink("train", *words, "--out", tmp_path / "run").code == 0
