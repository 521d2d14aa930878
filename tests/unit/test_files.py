"""Whole files: nothing half written, nothing left behind."""

import os
import stat
from pathlib import Path

import pytest

from lora_capacity.files import locked, locked_folder, write_whole


@pytest.mark.parametrize("content", ["ünïcode\n", b"\x00\xff"])
def test_content_is_written_and_replaced(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    for given in ("before", content):
        write_whole(path, given)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_whole(path, "before")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_replaced_and_devices_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "target").read_text() == "before"
    assert (tmp_path / "link").read_text() == "after"
    assert not (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises(OSError, match="no ordinary file"):
            write_whole(path, "content")


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left, others, another = (tmp_path / name for name in (".file.1.part", ".file.2.part", ".file2.1.part"))
    for each in (left, others, another):
        each.write_text("half")
    with others.open("rb") as file, locked(file.fileno()):
        write_whole(tmp_path / "file", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.2.part", ".file2.1.part", "file"]


def test_a_folder_is_locked_for_one(tmp_path: Path) -> None:
    with locked_folder(tmp_path) as alone, locked_folder(tmp_path, wait=False) as second:
        assert (alone, second) == (True, False)
