"""What the commands answer: schema of the JSON documents, tables, files, exit codes."""

import csv
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lora_capacity_cli.main import main

from lora_capacity.calibration import bundled_names
from tests.cli.conftest import STEADY, WORKLOAD, Run
from tests.cli.test_bad_input import RUN, write_runs
from tests.unit.profiling.conftest import WAIT_S

LLAMA, QWEN = "llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"
LLAMA_ID = "meta-llama/Llama-3.1-8B-Instruct"
COMMANDS = ("optimize", "report", "simulate", "sweep", "validate", "verify", "observe", "fit", "calibrations")
COLUMNS = [
    "max_cpu_loras",
    "max_loras",
    "max_lora_rank",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_tokens",
    "throughput_tokens_per_s",
    "offered_tokens_per_s",
    "service",
    "starved",
    "completed_per_s",
    "mean_running",
    "mean_waiting",
    "step_time_s",
    "itl_s",
    "tpot_s",
    "ttft_s",
    "answered_ttft_s",
    "attainment",
    "active_adapters",
    "kv_usage",
    "loads_per_s",
    "client_ttft_s",
    "client_tpot_s",
    "client_itl_s",
    "limit",
    "status",
]


def answer(result) -> dict:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout, parse_constant=pytest.fail)


def test_help_names_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example_and_a_format(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n    lora-capacity {command} " in result.stdout.replace(f"{command}\n", f"{command} \n")
    assert "--format [table|json]" in result.stdout


@pytest.mark.parametrize("command", ["optimize", "simulate", "sweep"])
def test_server_settings_have_the_names_of_vllms_flags(run: Run, command: str) -> None:
    text = run(command, "--help").stdout
    for flag in ("max-loras", "max-lora-rank", "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization"):
        assert f"--{flag} " in text
    assert "--max-model-len " in text


def test_optimize_tells_the_same_in_json_and_in_a_table(run: Run, workload: Path) -> None:
    workload.write_text(WORKLOAD.replace("horizon_s: 3600", "horizon_s: 600"), encoding="utf-8")
    command = ("optimize", workload, "--adapters", "16:320:16", "--max-loras", "16:128:16")
    found = answer(run(*command, "--format", "json"))
    best, played = found["predicted"], found["played"]
    assert found["max_cpu_loras"] == best["max_cpu_loras"] >= found["max_loras"] == best["max_loras"] >= 1
    settings = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    assert found["recommended"] == {name: best[name] for name in settings} == {name: played[name] for name in settings}
    assert played["seeds"] == [0, 1, 2, 3]
    assert played["attainment"] >= found["attainment"] == 0.95
    assert played["served"] >= 0.99
    assert found["headroom"] >= 1.0
    assert best["throughput_tokens_per_s"] > 0.9 * best["offered_tokens_per_s"] > 0
    assert found["margin"]["starving_probability"] <= found["risk"] == 0.05
    assert found["margin"]["spare_bytes"] > 0
    assert f"--max-loras {found['max_loras']} --max-cpu-loras {found['max_cpu_loras']}" in found["serve_command"]
    assert found["calibration"] == "llama-3.1-8b-instruct-h100-64gb"
    result = run(*command)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"Serve {found['max_cpu_loras']} adapters with {found['max_loras']} slots: ")
    launch = result.stdout[result.stdout.index("vllm serve ") :].replace("\\\n", "")
    assert " ".join(launch.split()) == found["serve_command"]


def test_optimize_keeps_to_the_grid(run: Run, workload: Path) -> None:
    found = answer(run("optimize", workload, "--adapters", "8:16:4", "--max-loras", "2,8", *STEADY, "--format", "json"))
    assert found["max_cpu_loras"] in (8, 12, 16)
    assert found["max_loras"] in (2, 8)


def test_one_adapter_is_a_workload(run: Run, workload: Path) -> None:
    workload.write_text(WORKLOAD.replace("mix: {rates_per_s: [0.4, 0.2], ranks: [8, 16]}", "list: one.csv"))
    Path("one.csv").write_text("adapter,rank,rate_per_s\nonly,8,0.5\n", encoding="utf-8")
    found = answer(run("optimize", workload, *STEADY, "--format", "json"))
    assert (found["max_cpu_loras"], found["max_loras"]) == (1, 1)
    simulated = answer(run("simulate", workload, "--adapters", 1, "--max-loras", 1, "--format", "json"))
    assert simulated["prediction"]["offered_tokens_per_s"] == pytest.approx(0.5 * 420, rel=1e-4)
    assert simulated["prediction"]["service"] == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_a_derived_calibration_is_one_for_the_modules_that_are_adapted(run: Run, workload: Path) -> None:
    server = ("--model", "Qwen3-8B", "--gpu", "L40S", "--adapters", 8, "--max-loras", 8, "--format", "json")
    every, attention = (
        answer(run("simulate", workload, *server, "--target-modules", modules))["prediction"]
        for modules in ("all-linear", "attention")
    )
    assert attention["kv_cache_tokens"] > every["kv_cache_tokens"]
    assert attention["step_time_s"] < every["step_time_s"]


def test_simulate_json(run: Run, workload: Path) -> None:
    found = answer(run("simulate", workload, "--adapters", 16, "--max-loras", 8, "--format", "json"))
    settings = ["max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens"]
    others = ["loaded_at_start", "goodput", "attainment", "keeps_bounds", "prediction", "client", "classes", "memory"]
    others += ["warnings", "serve_command", "serve_environment"]
    assert list(found) == ["calibration", "model", "engine", "adapters", *settings, *others]
    assert [found[name] for name in settings] == [16, 8, 16, 256, 2048]
    of_clients = {"ttft_s", "tpot_s", "itl_s"}
    assert set(found["prediction"]) == set(COLUMNS) - set(settings) - {f"client_{name}" for name in of_clients}
    assert set(found["client"]) == of_clients
    assert found["client"]["ttft_s"] >= found["prediction"]["answered_ttft_s"]
    assert found["prediction"]["offered_tokens_per_s"] == pytest.approx(16 * 0.3 * 420, rel=1e-4)
    assert [(each["rate_per_s"], each["rank"], each["adapters"]) for each in found["classes"]] == [
        (0.2, 16, 8),
        (0.4, 8, 8),
    ]
    memory = found["memory"]
    assert memory["kv_cache_bytes"] > 0
    assert found["serve_command"].startswith(f"vllm serve {LLAMA_ID} --enable-lora --max-loras 8 --max-cpu-loras 16")
    for flag in ("--max-num-seqs 256", "--block-size 16"):
        assert flag in found["serve_command"]
    off = answer(
        run("simulate", workload, "--adapters", 16, "--max-loras", 8, "--no-enable-prefix-caching", "--format", "json")
    )
    assert off["serve_command"] == f"{found['serve_command']} --no-enable-prefix-caching"
    assert off["prediction"] == found["prediction"]


def test_simulate_tells_windows_and_the_worst(run: Run, workload: Path) -> None:
    workload.write_text(WORKLOAD + "arrivals: {profile: [1, 8, 1]}\n", encoding="utf-8")
    command = ("simulate", workload, "--adapters", 16, "--max-loras", 16)
    windows = answer(run(*command, "--format", "json"))["windows"]
    assert [each["start_s"] for each in windows["each"]] == [0, 1200, 2400]
    assert windows["worst"] == windows["each"][1]
    assert windows["worst"]["requests_per_s"] == pytest.approx(8 * windows["each"][0]["requests_per_s"])
    assert windows["each"][2]["mean_waiting"] > windows["each"][0]["mean_waiting"]  # of what the second left behind
    assert "worst of 3 windows" in run(*command).stdout


def test_simulate_of_a_server_that_does_not_start(run: Run, workload: Path) -> None:
    command = ("simulate", workload, "--adapters", 1000, "--max-loras", 1000)
    found = answer(run(*command, "--format", "json"))
    assert found["prediction"]["status"] == "oom"
    assert found["prediction"]["throughput_tokens_per_s"] is None
    assert found["serve_command"] is None
    text = run(*command)
    assert text.exit_code == 0
    assert "nan" not in text.stdout
    assert "warning: the server runs out of GPU memory while it starts" in text.stdout


def test_simulate_says_what_lies_outside_the_calibration(run: Run, workload: Path) -> None:
    found = answer(run("simulate", workload, "--adapters", 600, "--max-loras", 8, "--format", "json"))
    assert found["prediction"]["status"] == "outside_calibration"
    assert any(warning.startswith("adapters 600 is outside ") for warning in found["warnings"])


def test_settings_reach_the_prediction(run: Run, workload: Path) -> None:
    command = ("simulate", workload, "--adapters", 16, "--max-loras", 8, "--format", "json")
    usual = answer(run(*command))
    short = answer(run(*command, "--gpu-memory-utilization", 0.5, "--max-num-seqs", 64, "--max-model-len", 4096))
    assert short["prediction"]["kv_cache_tokens"] < 0.6 * usual["prediction"]["kv_cache_tokens"]
    assert short["max_num_seqs"] == 64
    for flag in ("--gpu-memory-utilization 0.5", "--max-num-seqs 64", "--max-model-len 4096"):
        assert flag in short["serve_command"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_sweep_writes_the_grid(run: Run, workload: Path, suffix: str) -> None:
    output = Path(f"grid.{suffix}")
    output.write_text("old", encoding="utf-8")
    grid = ("--adapters", "8:24:8", "--max-loras", "8,16")
    found = answer(run("sweep", workload, *grid, "-o", output, "--format", "json"))
    assert found["file"] == str(output)
    assert found["columns"] == COLUMNS
    assert (found["configurations"], found["started"]) == (5, 5)
    rows = read_rows(output)
    assert [(int(row["max_cpu_loras"]), int(row["max_loras"])) for row in rows] == [
        (8, 8), (16, 8), (16, 16), (24, 8), (24, 16)
    ]  # fmt: skip
    assert list(rows[0]) == COLUMNS
    assert sorted(path.name for path in Path().iterdir()) == sorted(["workload.yaml", "no-folder", output.name])


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def test_sweep_compares_batch_limits(run: Run, workload: Path) -> None:
    grid = ("--adapters", "8", "--max-loras", "8", "--max-num-seqs", "64,256", "--max-num-batched-tokens", "1024,2048")
    assert answer(run("sweep", workload, *grid, "-o", "grid.csv", "--format", "json"))["configurations"] == 4
    limits = {(row["max_num_seqs"], row["max_num_batched_tokens"]) for row in read_rows(Path("grid.csv"))}
    assert limits == {("64", "1024"), ("64", "2048"), ("256", "1024"), ("256", "2048")}


def test_validate_json(run: Run) -> None:
    grid = [
        RUN | {"max_loras": str(slots), "max_cpu_loras": str(adapters), "scenario": "s", "set": "mine"}
        for slots in (8, 16)
        for adapters in (16, 32)
    ]
    blank = {
        name: "" for name in RUN if name.startswith("mean_") or name.endswith(("put", "_s")) or name == "completed"
    }
    refused = grid[0] | blank | {"max_loras": "1000", "max_cpu_loras": "1000", "status": "oom", "scenario": "other"}
    write_runs(*grid, refused, grid[0] | {"model": QWEN, "scenario": "t"})
    found = answer(run("validate", "runs.csv", "--engine", "steady", "--format", "json"))
    errors = ["runs", "throughput_smape", "throughput_mape", "itl_smape", "ttft_smape"]
    errors += ["ttft_smape_keeping_up", "tpot_smape"]
    assert list(found) == ["engine", "groups", "models", "starved", "startup", "optima", "warnings"]
    assert found["engine"] == "steady"
    assert all(list(group) == ["model", "set", "scenario", *errors] for group in found["groups"])
    keys = [(group["model"], group["scenario"], group["runs"]) for group in found["groups"]]
    assert keys == [(LLAMA, "s", 4), (LLAMA, "other", 0), (QWEN, "t", 1)]
    assert found["groups"][1]["throughput_smape"] is None
    assert all(list(model) == ["model", *errors] for model in found["models"])
    assert [(model["model"], model["runs"]) for model in found["models"]] == [(LLAMA, 4), (QWEN, 1)]
    assert list(found["starved"]) == ["tp", "fp", "fn", "tn"]
    assert sum(found["starved"].values()) == 5
    assert found["startup"] == {"agree": 6, "disagree": 0}
    (optimum,) = found["optima"]
    assert list(optimum) == ["model", "scenario", "measured", "chosen", "regret"]
    assert list(optimum["measured"]) == ["max_cpu_loras", "max_loras", "throughput"]
    assert list(optimum["chosen"]) == ["max_cpu_loras", "max_loras", "measured_throughput", "starved"]
    text = run("validate", "runs.csv")
    assert text.exit_code == 0
    assert LLAMA in text.stdout


def test_calibrations_are_listed_and_shown(run: Run) -> None:
    listed = answer(run("calibrations", "--format", "json"))
    assert [each["name"] for each in listed] == list(bundled_names())
    text = run("calibrations")
    assert text.exit_code == 0
    for name in bundled_names():
        assert name in text.stdout
        shown = answer(run("calibrations", "show", name, "--format", "json"))
        assert shown["name"] == name
        assert shown["schema_version"] == 2
        assert f"\n  name            {name}" in run("calibrations", "show", name).stdout


def test_fit_writes_a_calibration_that_optimize_takes(run: Run, workload: Path, measurements_dir: Path) -> None:
    command = ("fit", measurements_dir, "--model", QWEN, "--name", "mine", "-o", "calibration.json")
    assert answer(run(*command, "--format", "json")) == json.loads(Path("calibration.json").read_text(encoding="utf-8"))
    found = answer(run("optimize", workload, "--calibration", "calibration.json", *STEADY, "--format", "json"))
    assert (found["calibration"], found["model"]) == ("mine", QWEN)
    text = run(*command)
    assert text.exit_code == 0
    assert "active_block_factor" in text.stdout
    assert "Errors on serving runs: no runs given" in text.stdout


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora_capacity_cli", *map(str, arguments)]


@pytest.mark.slow
def test_compiled_code_is_kept_in_the_users_cache(workload: Path, tmp_path: Path) -> None:
    command = command_line("simulate", workload, "--adapters", 8, "--max-loras", 4, "--format", "json")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept = [path for path in (tmp_path / "cache" / "lora-capacity").rglob("*") if path.is_file()]
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert kept
    assert first.stdout == second.stdout
    assert first.stderr == second.stderr == ""
    folder = tmp_path / "cache" / "lora-capacity"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (folder, folder / "jax")] == [0o700, 0o700]
    for number, path in enumerate(kept):
        path.write_bytes((b"", b"damaged", path.read_bytes()[:100])[number % 3])
    (folder / "jax").chmod(0o777)
    of_others = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (folder / "jax").chmod(0o700)
    damaged = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert first.stdout == damaged.stdout == of_others.stdout
    assert damaged.stderr == ""
    assert of_others.stderr.startswith(f"warning: compiled code is not kept: {folder / 'jax'} belongs to others, or")
    assert of_others.stderr.count("\n") == 1


SWALLOWING = """
import gc, sys
from lora_capacity_cli.main import main

def interrupted_once(*_):
    if "lora_capacity.search.recommend" in sys.modules:  # while JAX is loaded, it makes an error of its own of it
        gc.callbacks.remove(interrupted_once)
        raise KeyboardInterrupt

gc.callbacks.append(interrupted_once)
main()
"""


def test_an_interrupt_that_python_swallows_ends_the_command_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WORKLOAD, encoding="utf-8")
    command = [sys.executable, "-c", SWALLOWING, "optimize", "w.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_interrupt_says_how_to_go_on_and_another_process_is_refused_meanwhile(tmp_path: Path) -> None:
    command = command_line("label", "--workloads", 100_000, "--played", 0, "-o", tmp_path / "labels.parquet")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        kept = tmp_path / "labels.parquet.parts"
        while process.poll() is None and not (kept / "labels.json").exists():
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert second.returncode == 2
    assert "another process makes this one" in second.stderr
    assert process.returncode == 130
    assert stdout.strip() == ""
    assert stderr.strip() == f"interrupted; the same command goes on from what is in {kept}"


@pytest.mark.parametrize("importing", [False, True])
def test_an_interrupt_outside_the_command_itself_ends_it_as_any_other_does(
    importing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        if importing:
            raise ImportError from KeyboardInterrupt()
        raise KeyboardInterrupt

    monkeypatch.setattr("click.Group.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["calibrations"])
    assert ended.value.code == 130


def test_output_that_cannot_be_written_is_told_in_one_line() -> None:
    command = command_line("calibrations", "show", bundled_names()[0])
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 74
    assert result.stderr == b"error: the output cannot be written: No space left on device\n"
    closed = subprocess.run(["sh", "-c", f"{shlex.join(command)} >&-"], stderr=subprocess.PIPE, check=False)
    assert closed.returncode == 74
    assert closed.stderr.startswith(b"error: stdout is closed")


def test_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = command_line("calibrations", "show", bundled_names()[0])
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
