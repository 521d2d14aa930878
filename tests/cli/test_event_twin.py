"""Commands that ask the event twin, about a minute of a small server."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import WORKLOAD, Run
from tests.cli.test_bad_input import RUN, write_runs
from tests.cli.test_commands import answer, command_line, read_rows

SIMULATE = ("simulate", "--adapters", 15, "--max-loras", 8, "--engine", "event")
"""Adapters and lengths such that all tests here share what is compiled."""

MINUTE = WORKLOAD.replace("horizon_s: 3600", "horizon_s: 60")


@pytest.fixture
def minute(tmp_path: Path) -> Path:
    path = tmp_path / "minute.yaml"
    path.write_text(MINUTE, encoding="utf-8")
    return path


def test_simulate_plays_the_requests_of_its_seed(run: Run, minute: Path) -> None:
    first, again, other = (answer(run(*SIMULATE, minute, "--seed", seed, "--format", "json")) for seed in (1, 1, 2))
    assert first == again
    assert first["prediction"]["throughput_tokens_per_s"] != other["prediction"]["throughput_tokens_per_s"]
    assert (first["engine"], first["events"]["seed"]) == ("event", 1)
    events = first["events"]
    quantiles = list(events["ttft_quantiles_s"].values())
    assert list(events["ttft_quantiles_s"]) == ["p50", "p95", "p99"]
    assert quantiles == sorted(quantiles)
    assert 0 < quantiles[0] < 60
    shares = events["time_shares"]
    assert shares["compute"] + shares["load"] + shares["idle"] == pytest.approx(1, abs=1e-5)
    assert shares["scheduling"] <= shares["compute"]
    assert min(shares.values()) >= 0
    assert events["disk_loads"] == 15
    assert events["steps"] > 100
    assert events["preemptions"] == 0
    worst = [each["completed"] / each["arrived"] for each in events["worst_served"]]
    assert len(worst) == 12
    assert worst == sorted(worst)
    assert {(each["rate_per_s"], each["rank"]) for each in events["worst_served"]} <= {(0.4, 8), (0.2, 16)}
    steady = answer(run("simulate", minute, "--adapters", 15, "--max-loras", 8, "--format", "json"))
    assert "events" not in steady
    assert set(first["prediction"]) == set(steady["prediction"])
    assert first["prediction"]["itl_s"] == pytest.approx(steady["prediction"]["itl_s"], rel=0.2)


def test_simulate_by_the_reference(run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.yaml"
    short.write_text(WORKLOAD.replace("horizon_s: 3600", "horizon_s: 5"), encoding="utf-8")
    asked = (short, "--adapters", 15, "--max-loras", 8, "--format", "json", "--seed", 1, "--engine")
    event, reference = (answer(run("simulate", *asked, engine)) for engine in ("event", "reference"))
    assert reference["engine"] == "reference"
    assert event["events"]["steps"] == reference["events"]["steps"] > 10
    assert reference["prediction"]["itl_s"] == pytest.approx(event["prediction"]["itl_s"], rel=1e-4)
    for command in ("sweep", "optimize"):
        refused = run(command, short, "--engine", "reference")
        assert refused.exit_code == 2
        assert "'reference' is not one of 'steady', 'event'" in refused.stderr


def test_simulate_replays_a_trace_whatever_the_seed(run: Run, tmp_path: Path) -> None:
    trace = "arrival_s,adapter,rank,input_tokens,output_tokens\n0,a,8,40,20\n10,b,8,60,30\n20,a,8,80,600\n60,b,8,9,9\n"
    (tmp_path / "requests.csv").write_text(trace, encoding="utf-8")
    path = tmp_path / "trace.yaml"
    path.write_text("requests: {trace: requests.csv}\n", encoding="utf-8")
    command = ("simulate", path, "--adapters", 2, "--max-loras", 1, "--engine", "event", "--format", "json")
    found = answer(run(*command, "--seed", 3))
    assert found["prediction"]["throughput_tokens_per_s"] == pytest.approx((60 + 90 + 680) / 60, rel=1e-3)
    assert found["events"]["disk_loads"] == 2
    assert found["events"]["worst_served"][0]["completed"] == 1
    assert found["prediction"] == answer(run(*command, "--seed", 4))["prediction"]


def test_simulate_prints_what_only_the_event_twin_tells(run: Run, minute: Path) -> None:
    text = run(*SIMULATE, minute)
    assert text.exit_code == 0
    for words in ("seed 0", "TTFT p50, p95, p99", "preemptions", "in steps", "Worst served adapters"):
        assert words in text.stdout


def test_simulate_of_a_server_that_does_not_start(run: Run, minute: Path) -> None:
    command = (*SIMULATE, minute, "--gpu-memory-utilization", 0.3)
    found = answer(run(*command, "--format", "json"))
    assert found["prediction"]["status"] == "no_kv_cache"
    assert found["prediction"]["throughput_tokens_per_s"] is None
    assert found["events"]["worst_served"] == []
    text = run(*command)
    assert text.exit_code == 0
    assert "nan" not in text.stdout


def test_validate_by_the_event_twin(run: Run) -> None:
    write_runs(RUN | {"duration_s": "60", "max_cpu_loras": "15"})
    command = ("validate", "runs.csv", "--engine", "event", "--format", "json")
    first, again, other = (run(*command, "--seed", seed) for seed in (1, 1, 2))
    assert first.stdout == again.stdout != other.stdout
    found = json.loads(first.stdout)
    assert found["engine"] == "event"
    assert found["models"][0]["runs"] == 1
    unknown = {"model", "tpot_smape", "ttft_smape_keeping_up"}  # not measured; the run does not keep up
    assert all(math.isfinite(value) for name, value in found["models"][0].items() if name not in unknown)
    assert found["models"] != answer(run("validate", "runs.csv", "--format", "json"))["models"]


def test_sweep_by_the_event_twin(run: Run, minute: Path) -> None:
    grid = ("--adapters", "12,15", "--max-loras", 8, "--engine", "event", "--seed", 1, "--seeds", 2)
    found = answer(run("sweep", minute, *grid, "-o", "grid.csv", "--format", "json"))
    assert (found["engine"], found["configurations"], found["started"]) == ("event", 4, 4)
    rows = read_rows(Path("grid.csv"))
    assert list(rows[0]) == found["columns"]
    assert [(row["max_cpu_loras"], row["seed"]) for row in rows] == [("12", "1"), ("12", "2"), ("15", "1"), ("15", "2")]
    alone = answer(run(*SIMULATE, minute, "--seed", 2, "--format", "json"))
    assert float(rows[3]["ttft_s"]) == pytest.approx(alone["prediction"]["ttft_s"])
    assert float(rows[3]["ttft_p95_s"]) == pytest.approx(alone["events"]["ttft_quantiles_s"]["p95"])
    assert int(rows[3]["steps"]) == alone["events"]["steps"]
    worst = alone["events"]["worst_served"][0]
    assert float(rows[3]["worst_service"]) == pytest.approx(worst["completed"] / worst["arrived"])
    assert [path.name for path in Path().iterdir() if path.name.startswith(("grid", ".grid"))] == ["grid.csv"]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(run: Run, minute: Path) -> None:
    grid = ("--adapters", "1:40", "--max-loras", "1:8", "--engine", "event", "-o", "grid.parquet")
    process = subprocess.Popen(
        command_line("sweep", minute, *grid), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    parts = Path("grid.parquet.parts")
    try:
        deadline = time.monotonic() + 120
        while not list(parts.glob("*.msgpack")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, stdout.strip()) == (130, "")
    assert stderr.strip() == f"interrupted; the same command goes on from what is in {parts}"
    assert not Path("grid.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.msgpack")}
    assert before
    other = run("sweep", minute, *grid, "--seed", 5)
    assert other.exit_code == 2
    assert "delete the folder" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.msgpack")} == before
    assert answer(run("sweep", minute, *grid, "--format", "json"))["configurations"] == 40 * 8 - 28
    assert not parts.exists()


@pytest.mark.parametrize("option", [("--seed", 1), ("--warmup-s", 1.0), ("--samples", 2)])
def test_what_only_steps_can_tell_is_refused_without_them(run: Run, minute: Path, option: tuple[str, float]) -> None:
    result = run("simulate", minute, "--adapters", 15, "--max-loras", 8, *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option[0] in result.stderr


def test_compare(run: Run, minute: Path) -> None:
    grid = ("--adapters", "12,15", "--max-loras", 8, "--seeds", 1)
    found = answer(run("compare", minute, *grid, "-o", "both.csv", "--format", "json"))
    counts = ["configurations", "compared", "differ"]
    assert list(found) == ["calibration", "tolerance", "seeds", *counts, "regimes", "worst"]
    assert (found["configurations"], found["compared"], found["seeds"]) == (2, 2, [0])
    rows = read_rows(Path("both.csv"))
    assert [row["max_cpu_loras"] for row in rows] == ["12", "15"]
    alone = answer(run(*SIMULATE, minute, "--format", "json"))
    assert float(rows[1]["itl_s"]) == pytest.approx(alone["prediction"]["itl_s"])
    steady = answer(run("simulate", minute, "--adapters", 15, "--max-loras", 8, "--format", "json"))
    assert float(rows[1]["steady_itl_s"]) == pytest.approx(steady["prediction"]["itl_s"])
    assert sum(row["differs"] == "true" for row in rows) == found["differ"] == len(found["worst"])
    text = run("compare", minute, *grid)
    assert text.exit_code == 0
    assert "By regime" in text.stdout
    assert "nan" not in text.stdout


def test_optimize_is_played_unless_told_otherwise(run: Run, minute: Path) -> None:
    command = ("optimize", minute, "--adapters", "12,15", "--max-loras", 8)
    found = answer(run(*command, "--seeds", 1, "--format", "json"))
    assert (found["engine"], found["played"]["seeds"]) == ("event", [0])
    text = run(*command, "--seeds", 1)
    assert text.exit_code == 0
    assert "event twin, mean of 1 seed" in text.stdout
    alone = run(*command, "--engine", "steady")
    assert "not checked by the event twin" in alone.stdout
    assert answer(run(*command, "--engine", "steady", "--format", "json"))["played"] is None
