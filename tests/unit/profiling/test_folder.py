import csv
import json
from pathlib import Path

import pytest
from lora_capacity_profiling.folder import TABLES, Finished, ProfileFolder

from lora_capacity.errors import InputError

START = Finished("start/slots2-rank8", "kv_capacity", {"model": "m", "max_loras": 2, "status": "ok"}, took_s=1.0)
BATCH = Finished("adapters/x", "adapter_latency", {"model": "m", "mean_itl_ms": 4.0}, (4.0, 5.0))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_that_a_kill_left_behind_is_written_in_the_end(tmp_path: Path) -> None:
    folder = ProfileFolder(tmp_path)
    for size in (1, 2):
        row = {"model": "m", "batch_size": size}
        folder.add(Finished(f"decode/batch{size}", "backbone_latency", row, (1.0,), "ms", 1.0, ""), {})
    whole = (tmp_path / "backbone_latency.csv").read_text()
    (tmp_path / "backbone_latency.csv").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    ProfileFolder(tmp_path).complete({})
    assert (tmp_path / "backbone_latency.csv").read_text() == whole


def test_every_point_is_on_disk_at_once(tmp_path: Path) -> None:
    folder = ProfileFolder(tmp_path / "new" / "profile")
    folder.add(START, {"device": "cpu"})
    folder.add(BATCH, {"device": "cpu"})
    folder.add(Finished("decode/batch1", failure="it fell over"), {"device": "cpu"})
    again = ProfileFolder(folder.path)
    assert again.finished == folder.finished
    assert (again.is_done(START.id), again.is_done("decode/batch1"), again.is_done("other")) == (True, False, False)
    (row,) = read(folder.path / "kv_capacity.csv")
    assert tuple(row) == TABLES["kv_capacity"].names
    assert (row["max_loras"], row["kv_cache_tokens"]) == ("2", "")
    description = again.description()
    assert description["device"] == "cpu"
    assert description["points"][1] == {"id": "adapters/x", "took_s": 0.0, "repeats_ms": [4.0, 5.0], "spread": 0.25}
    assert description["failed"] == [{"id": "decode/batch1", "reason": "it fell over"}]
    assert not list(folder.path.glob(".*.csv*")) + list(folder.path.glob(".*.json*"))


def test_later_attempt_takes_the_place_of_an_earlier(tmp_path: Path) -> None:
    folder = ProfileFolder(tmp_path)
    folder.add(Finished(BATCH.id, failure="no"), {})
    folder.add(BATCH, {})
    again = ProfileFolder(tmp_path)
    assert again.is_done(BATCH.id)
    assert json.loads((tmp_path / "profile.json").read_text())["failed"] == []


def test_torn_line_costs_its_point_only(tmp_path: Path) -> None:
    ProfileFolder(tmp_path).add(START, {})
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write('{"id": "adapters/x", "tab')
    folder = ProfileFolder(tmp_path)
    assert list(folder.finished) == [START.id]
    folder.add(BATCH, {})
    assert list(ProfileFolder(tmp_path).finished) == [START.id, BATCH.id]


def test_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").symlink_to("/dev/full")
    folder = ProfileFolder.__new__(ProfileFolder)
    folder.path, folder.finished, folder._torn = tmp_path, {}, False
    with pytest.raises(InputError, match="No space left on device"):
        folder.add(START, {})
    assert folder.finished == {}


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a folder that can be written"):
        ProfileFolder(tmp_path / "file")
    ProfileFolder(tmp_path).path.joinpath("profile.json").write_text("{")
    with pytest.raises(InputError, match="choose another -o"):
        ProfileFolder(tmp_path).description()
