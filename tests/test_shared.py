"""The storage as each node tries it out: what a study rests on works there, or is named."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from dpsink.errors import InputError
from tune.shared import can_be_read, meeting_place, try_out


def test_a_good_storage_passes_is_read_back_and_is_left_empty(tmp_path: Path) -> None:
    with meeting_place(tmp_path) as place:
        assert [try_out(place, name) for name in ("one", "two")] == ["", ""]
        assert can_be_read(place, "one") and can_be_read(place, "two")
    assert not list(tmp_path.iterdir())


def test_a_node_with_another_folder_of_that_name_sees_nothing(tmp_path: Path) -> None:
    assert try_out(tmp_path, "node") == "does not see what others wrote"


@pytest.mark.parametrize(
    ("module", "function", "said"),
    [
        (os, "mkdir", "cannot make a folder"),
        (os, "replace", "cannot replace a file"),
        (os, "link", "cannot make a hard link"),
        (fcntl, "flock", "cannot lock a file"),
        (os, "rename", "cannot rename a folder"),
    ],
)
def test_what_a_node_cannot_do_is_named_with_the_systems_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, function: str, said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with meeting_place(tmp_path) as place:
        monkeypatch.setattr(module, function, refuse)
        assert try_out(place, "node") == f"{said} (Read-only file system)"
        monkeypatch.undo()


def test_a_storage_that_gives_one_name_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with meeting_place(tmp_path) as place:
        monkeypatch.setattr(os, "link", os.replace)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        assert try_out(place, "node").startswith("cannot refuse a name that is taken")
        monkeypatch.undo()


def test_what_a_node_left_and_another_changed_cannot_be_read(tmp_path: Path) -> None:
    with meeting_place(tmp_path) as place:
        assert not can_be_read(place, "absent")
        try_out(place, "node")
        (place / "node" / "node.json").write_text("other")
        assert not can_be_read(place, "node")


def test_a_storage_that_the_driver_cannot_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(InputError, match=r"file cannot be written \(Not a directory\); set another")
    with refused, meeting_place(tmp_path / "file"):
        pass
