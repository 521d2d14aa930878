"""Whole files: nothing half written, nothing left behind."""

import os
import stat
from pathlib import Path

import pytest

from lora_capacity.files import write_whole


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
