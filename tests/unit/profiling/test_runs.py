import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_capacity_profiling.load import at_once, run_load
from lora_capacity_profiling.metrics import Sampler
from lora_capacity_profiling.runs import append_runs, run_row
from lora_capacity_profiling.server import Server

from lora_capacity.errors import InputError
from lora_capacity.measurements import read_runs
from lora_capacity.measurements.schemas import SERVING_RUNS
from tests.unit.profiling.test_server import WAIT_S

ABOUT = {
    "run_id": "1",
    "model": "fake",
    "max_loras": 1,
    "max_cpu_loras": 2,
    "max_lora_rank": 8,
    "ranks": "8 8",
    "rates": "0.5 0.25",
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
}


def test_rows_are_read_by_what_reads_serving_runs(launch: Callable[..., Server], tmp_path: Path) -> None:
    server = launch()
    with Sampler(server.endpoint) as sampler:
        requests = at_once([0, 1, 0, 1], np.full(4, 30), np.full(4, 6))
        result = run_load(server.endpoint, requests, ["a0", "a1"], base_model="fake", duration_s=30)
    rows = [
        run_row({**ABOUT, "status": "ok"}, result.summary() | sampler.window.summary()),
        run_row({**ABOUT, "max_loras": 2, "status": "no_kv_cache"}, {}),
    ]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, SERVING_RUNS.names)
        writer.writeheader()
        writer.writerows(rows)
    runs = read_runs(tmp_path / "runs.csv")
    assert runs.started.tolist() == [True, False]
    assert runs.class_rate_per_s.tolist() == [[0.5, 0.25]] * 2
    assert runs.throughput_tokens_per_s[0] == pytest.approx(4 * 36 / result.duration_s)
    assert runs.ttft_s[0] == pytest.approx(result.ttft_s.mean())
    assert (runs.arrivals[0], runs.max_num_seqs[0]) == (4, 64)
    assert rows[0]["mean_kv_usage"] == 0.25
    assert rows[1]["completed"] == ""


def test_unknown_column_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'max_loras'"):
        run_row({"max_lora": 1}, {})


def test_columns_are_those_of_the_published_table(measurements_dir: Path) -> None:
    with (measurements_dir / "serving_runs.csv").open(newline="") as file:
        published = set(next(csv.reader(file)))
    added = {"max_num_seqs", "max_num_batched_tokens", "max_model_len", "metrics_interval_s"}
    added |= {"base_rate_per_s", "max_pending", "std_input_tokens", "std_output_tokens", "max_output_tokens"}
    added |= {"mean_skipped", "cached_share"}
    unknown_to_a_client = {"busy_s"}
    assert published - unknown_to_a_client | added == set(SERVING_RUNS.names)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_added_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.csv"
    append_runs(path, [])
    assert table(path) == []
    append_runs(path, [run_row({**ABOUT, "run_id": "1"}, {"completed": 5, "arrivals": float("nan")})])
    append_runs(path, [run_row({**ABOUT, "run_id": "2"}, {"completed": 6})])
    assert [(row["run_id"], row["completed"], row["arrivals"]) for row in table(path)] == [
        ("1", "5", ""),
        ("2", "6", ""),
    ]
    assert list(tmp_path.glob("deep/.*")) == []


def test_table_of_other_columns_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text('note,max_cpu_loras,run_id\n"a, ""b""",3,old\n', encoding="utf-8-sig")
    append_runs(path, [run_row({"run_id": "new", "max_cpu_loras": 4}, {})])
    rows = table(path)
    assert [(row["run_id"], row["max_cpu_loras"], row["note"]) for row in rows] == [
        ("old", "3", 'a, "b"'),
        ("new", "4", ""),
    ]
    assert list(rows[0])[:3] == ["note", "max_cpu_loras", "run_id"]


ADD = """
import sys
from pathlib import Path
from lora_capacity_profiling.runs import append_runs
sys.stdin.readline()
for number in range(10):
    append_runs(Path(sys.argv[1]), [{"run_id": f"{sys.argv[2]}-{number}", "max_cpu_loras": 1}])
"""


def test_rows_of_several_processes_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(path), str(number)],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait(WAIT_S) for process in processes] == [0] * 4
    assert {row["run_id"] for row in table(path)} == {f"{who}-{what}" for who in range(4) for what in range(10)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.parametrize(
    ("content", "text"),
    [("a,b\n1,2\n", "columns a, b"), ("run_id,max_cpu_loras\n1\n", "different lengths"), ("\udcff", "utf-8")],
)
def test_what_is_no_table_of_runs_is_left_alone(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(InputError, match=text):
        append_runs(path, [run_row(ABOUT, {})])
    assert path.read_bytes() == before


def test_row_that_cannot_be_saved_is_in_the_note(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        append_runs(tmp_path / "file" / "runs.csv", [run_row({"run_id": "lost"}, {})])
    assert "\nlost," in error.value.__notes__[0]
    with pytest.raises(InputError, match="no ordinary file"):
        append_runs(Path("/dev/full"), [])
