"""Whatever is wrong with the input, the answer is one line that says so: no traceback, no number."""

import json
from pathlib import Path

import pytest

from lora_capacity.calibration import Calibration, bundled_names, load_calibration
from tests.cli.conftest import WORKLOAD, Run

LIST = WORKLOAD.replace("mix: {rates_per_s: [0.4, 0.2], ranks: [8, 16]}", "list: adapters.csv")
SIMULATE = ("simulate", "workload.yaml", "--adapters", 16, "--max-loras", 8)
OPTIMIZE = ("optimize", "workload.yaml")
SWEEP = ("sweep", "workload.yaml", "--adapters", "8,16", "--max-loras", "8", "-o", "grid.csv")
RUN = {
    "model": "llama-3.1-8b-instruct",
    "max_loras": "8",
    "max_cpu_loras": "16",
    "max_lora_rank": "16",
    "ranks": "8 16",
    "rates": "0.4 0.2",
    "mean_input_tokens": "223",
    "mean_output_tokens": "197",
    "completed": "17000",
    "duration_s": "3600",
    "input_throughput": "1050",
    "output_throughput": "930",
    "mean_itl_ms": "30",
    "mean_ttft_ms": "120",
    "status": "ok",
}


def assert_refused(result, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in result.stderr


def write_runs(*rows: dict[str, str]) -> None:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    Path("runs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("command", [OPTIMIZE, SIMULATE, SWEEP], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (WORKLOAD.replace("0.4", "-0.4"), ["rates_per_s", "-0.4", "> 0"]),
        (WORKLOAD.replace("0.4", "0"), ["rates_per_s", "> 0"]),
        (WORKLOAD.replace("[8, 16]", "[8, 0]"), ["ranks", "0", ">= 1"]),
        (WORKLOAD.replace("[8, 16]", "[8, big]"), ["ranks", "big"]),
        (WORKLOAD.replace("[8, 16]", "[8, 1000]"), ["rank", "1000", "512"]),
        (WORKLOAD.replace("[8, 16]", "[]"), ["ranks"]),
        (WORKLOAD.replace("[0.4, 0.2]", "[]"), ["rates_per_s"]),
        (WORKLOAD.replace("horizon_s: 3600", "horizon: 3600"), ["horizon", "did you mean 'horizon_s'?"]),
        ("- adapters\n- requests\n", ["workload.yaml", "a list", "mapping"]),
        ("adapters: [\n", ["workload.yaml line"]),
        ("", ["workload.yaml", "nothing"]),
        (LIST, ["adapters.csv", "file not found"]),
    ],
    ids=lambda value: None,
)
def test_bad_workload(run: Run, workload: Path, command, text: str, fragments: list[str]) -> None:
    workload.write_text(text, encoding="utf-8")
    assert_refused(run(*command), *fragments)
    assert not Path("grid.csv").exists()


def test_lengths_above_what_the_model_takes(run: Run, workload: Path) -> None:
    workload.write_text(WORKLOAD.replace("max: 1024", "max: 70000"), encoding="utf-8")
    assert_refused(run(*OPTIMIZE), "max_model_len", "131072", "140000")


@pytest.mark.parametrize(
    ("table", "fragments"),
    [
        ("adapter,rank,rate_per_s\n", ["adapters.csv", "no rows"]),
        ("", ["adapters.csv", "column 'adapter'"]),
        ("adapter,rank\na,8\n", ["adapters.csv", "rate_per_s"]),
        ("adapter,rank,rate_per_s\na,eight,0.1\n", ["adapters.csv line 2, rank", "eight"]),
        ("adapter,rank,rate_per_s\na,8,0.1\nb,8,-1\n", ["adapters.csv line 3, rate_per_s", "-1"]),
    ],
)
def test_bad_adapter_list(run: Run, workload: Path, table: str, fragments: list[str]) -> None:
    workload.write_text(LIST, encoding="utf-8")
    Path("adapters.csv").write_text(table, encoding="utf-8")
    assert_refused(run("simulate", "workload.yaml", "--adapters", 1, "--max-loras", 1), *fragments)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--adapters", 8, "--max-loras", 0), ["max_loras", "0", ">= 1", "use 0 adapters"]),
        (("--adapters", 8, "--max-loras", 4, "--max-cpu-loras", 3), ["max_cpu_loras", "3", "max_loras 4"]),
        (("--adapters", -8, "--max-loras", 1), ["adapters", "-8"]),
        (("--adapters", "many", "--max-loras", 1), ["--adapters", "many"]),
        (("--adapters", 8), ["--max-loras"]),
        (("--adapters", 8, "--max-loras", 4, "--max-lora-rank", 8), ["max_lora_rank", "8", "use at least 16"]),
        (("--adapters", 8, "--max-loras", 4, "--max-lora-rank", 17), ["max_lora_rank", "17", "use 32"]),
        (("--adapters", 8, "--max-loras", 4, "--max-model-len", 2047), ["max_model_len", "2047", "2048"]),
        (("--adapters", 8, "--max-loras", 4, "--max-model-len", 999999), ["max_model_len", "131072"]),
        (("--adapters", 8, "--max-loras", 4, "--gpu-memory-utilization", 1.5), ["gpu_memory_utilization", "1.5"]),
        (("--adapters", 8, "--max-loras", 4, "--gpu-memory-utilization", "nan"), ["gpu_memory_utilization", "nan"]),
        (("--adapters", 8, "--max-loras", 4, "--max-num-seqs", 0), ["max_num_seqs", "0"]),
        (("--adapters", 8, "--max-loras", 4, "--target-modules", "atention"), ["target_modules", "'attention'"]),
        (("--adapters", 8, "--max-loras", 4, "--engine", "guess"), ["--engine", "steady", "event"]),
        (("--adapters", 8, "--max-loras", 4, "--engine", "event", "--seed", "-1"), ["--seed", "-1"]),
        (("--adapters", 8, "--max-loras", 4, "--engine", "event", "--seed", "one"), ["--seed", "one"]),
        (("--adapters", 8, "--max-loras", 4, "--calibration", "llama"), ["calibration", "llama"]),
        (("--adapters", 8, "--max-loras", 4, "--calibration", "none.json"), ["none.json", "file not found"]),
        (("--adapters", 8, "--max-loras", 4, "--slots", 4), ["--slots"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_option_of_simulate(run: Run, workload: Path, options, fragments: list[str]) -> None:
    assert_refused(run("simulate", "workload.yaml", *options), *fragments)


@pytest.mark.parametrize("value", ["0", "-8", "8,", "a", "8:4", "8:16:0", "8:16:4:2", "1:99999", "1.5", "", "8,0"])
@pytest.mark.parametrize("command", ["optimize", "sweep"])
def test_bad_grid(run: Run, workload: Path, command: str, value: str) -> None:
    others = ("--max-loras", "1", "-o", "grid.csv") if command == "sweep" else ()
    assert_refused(run(command, "workload.yaml", "--adapters", value, *others), "--adapters", "8:384:8")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--adapters", "4", "--max-loras", "8"), ["max_loras", "8", "4"]),
        (("--max-lora-rank", 8), ["max_lora_rank", "8"]),
        (("--risk", 0), ["risk", "0"]),
        (("--risk", 2), ["risk", "2"]),
        (("--objective", "throughput", "--starvation-threshold", -1), ["starvation", "-1"]),
        (("--objective", "fewest-slots", "--within", 1.5), ["within", "1.5"]),
        (("--goodput", "ttft:0"), ["goodput.ttft", "0"]),
        (("--goodput", "itl:50"), ["--goodput", "itl:50", "ttft:MS, tpot:MS or e2el:MS"]),
        (("--goodput", "ttft"), ["--goodput", "ttft:MS"]),
        (("--goodput", "ttft:5", "--goodput", "ttft:6"), ["--goodput", "each key once"]),
        (("--attainment", 1.5), ["attainment", "1.5"]),
        (("--objective", "speed"), ["--objective", "throughput"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_option_of_optimize(run: Run, workload: Path, options, fragments: list[str]) -> None:
    assert_refused(run("optimize", "workload.yaml", *options), *fragments)


def test_nothing_feasible_is_another_exit_code(run: Run, workload: Path) -> None:
    workload.write_text(WORKLOAD.replace("[0.4, 0.2]", "[500]"), encoding="utf-8")
    result = run("optimize", "workload.yaml", "--engine", "steady")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [OPTIMIZE, SIMULATE, SWEEP, ("validate", "runs.csv"), ("calibrations", "show", "mine.json")],
    ids=lambda command: command[0],
)
def test_file_that_is_not_there(run: Run, command) -> None:
    (name,) = (each for each in command if each in ("workload.yaml", "runs.csv", "mine.json"))
    assert_refused(run(*command), name, "file not found")


@pytest.mark.parametrize(
    ("output", "fragments"),
    [("grid.xlsx", [".parquet or .csv"]), ("none/grid.csv", ["folder that exists"]), ("folder.csv", ["not a folder"])],
)
def test_bad_output_of_sweep(run: Run, workload: Path, output: str, fragments: list[str]) -> None:
    Path("folder.csv").mkdir()
    assert_refused(run(*SWEEP[:-1], output), "--output", *fragments)


def test_an_output_writes_over_nothing_that_is_read(run: Run, workload: Path) -> None:
    content = Path("model/config.json")
    content.parent.mkdir()
    content.write_text("{}")
    Path("adapters.csv").write_text("adapter,rank,rate_per_s\na,8,0.5\n")
    Path("listed.yaml").write_text(LIST)
    for words in (
        ("calibrations", "derive", "--model", "model", "--gpu", "L4", "-o", "model/config.json"),
        ("fit", "model", "-o", "model/config.json"),
        ("sweep", "listed.yaml", "--adapters", 1, "--max-loras", 1, "-o", "adapters.csv"),
    ):
        assert_refused(run(*words), "--output", "it would be written over")
    Path("fitted.json").touch()  # which no option names, though some are empty
    assert_refused(run("fit", "model", "-o", "fitted.json"), "so say which model")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"schema_version": 99}, ["schema_version", "99", "update lora-capacity"]),
        ({"schema_version": None}, ["schema_version"]),
        ({"memory": {}}, ["memory"]),
        ({"surprise": 1}, ["surprise"]),
        ({"coefficients": []}, ["coefficients"]),
        ({"coefficients": {"step": {}, "loads": {}}}, ["coefficients.step"]),
        ({"fitted_ranges": {"adapters": [9, 1]}}, ["fitted_ranges.adapters"]),
        ({"vllm_version": "0.6"}, ["vllm_version", "0.6"]),
    ],
    ids=lambda value: None,
)
def test_bad_calibration(run: Run, workload: Path, change: dict[str, object], fragments: list[str]) -> None:
    content = load_calibration(bundled_names()[0]).to_json() | change
    Path("calibration.json").write_text(json.dumps(content), encoding="utf-8")
    assert_refused(run(*SIMULATE, "--calibration", "calibration.json"), *fragments)


@pytest.mark.parametrize("text", ["", "[]", "{", "adapters: {}"])
def test_calibration_that_is_none(run: Run, workload: Path, text: str) -> None:
    Path("calibration.json").write_text(text, encoding="utf-8")
    assert_refused(run(*SIMULATE, "--calibration", "calibration.json"), "calibration.json")


@pytest.mark.parametrize("column", RUN)
def test_runs_without_a_column(run: Run, column: str) -> None:
    write_runs({name: value for name, value in RUN.items() if name != column})
    assert_refused(run("validate", "runs.csv"), "runs.csv", f"column {column!r}")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"max_loras": "eight"}, ["line 2, max_loras", "eight"]),
        ({"max_loras": "0"}, ["line 2, max_loras", ">= 1"]),
        ({"max_loras": "17"}, ["row 1, max_loras", "17", "16"]),
        ({"mean_itl_ms": "fast"}, ["line 2, mean_itl_ms", "fast"]),
        ({"mean_itl_ms": ""}, ["row 1, mean_itl_ms", "status is ok"]),
        ({"duration_s": "0"}, ["line 2, duration_s", "> 0"]),
        ({"completed": "-1"}, ["line 2, completed"]),
        ({"rates": "0.4 fast"}, ["row 1, rates", "0.4 fast"]),
        ({"rates": "0.4 0"}, ["row 1, rates", "> 0"]),
        ({"ranks": "8 -16"}, ["row 1, ranks"]),
        ({"status": "fine"}, ["row 1, status", "fine", "no_kv_cache"]),
        ({"model": "gpt-2"}, ["model", "gpt-2", "llama-3.1-8b-instruct"]),
        ({"max_lora_rank": "17"}, ["max_lora_rank", "17"]),
        ({"mean_output_tokens": "5000"}, ["runs.csv, mean_output_tokens", "1024"]),
        ({"rate_values": "0.4 0.2", "rate_counts": "16"}, ["row 1, rate_counts"]),
        ({"rate_values": "0.4 0.2", "rate_counts": "8.5 7.5"}, ["row 1, rate_counts"]),
        ({"arrivals": "many"}, ["line 2, arrivals", "many"]),
        ({"max_model_len": "9999999"}, ["max_model_len"]),
    ],
    ids=lambda value: None,
)
def test_runs_with_a_bad_cell(run: Run, change: dict[str, str], fragments: list[str]) -> None:
    write_runs(RUN | change)
    assert_refused(run("validate", "runs.csv"), *fragments)


def test_calibration_of_another_model_than_the_runs(run: Run) -> None:
    write_runs(RUN)
    (name,) = (each for each in bundled_names() if load_calibration(each).model.name != RUN["model"])
    assert_refused(run("validate", "runs.csv", "--calibration", name), "--calibration", RUN["model"])


@pytest.mark.parametrize("options", [("--engine", "guess"), ("--engine", "event", "--seed", "1.5")])
def test_bad_option_of_validate(run: Run, options) -> None:
    write_runs(RUN)
    assert_refused(run("validate", "runs.csv", *options), *options[-2:])


def test_runs_without_rows(run: Run) -> None:
    Path("runs.csv").write_text(",".join(RUN) + "\n", encoding="utf-8")
    assert_refused(run("validate", "runs.csv"), "runs.csv", "no rows")


def test_calibration_that_is_unknown_to_show(run: Run) -> None:
    assert_refused(run("calibrations", "show", "llama-3"), "llama-3", *bundled_names())


def test_fit_of_an_empty_folder(run: Run) -> None:
    Path("profile").mkdir()
    assert_refused(run("fit", "profile", "-o", "calibration.json"), "profile")
    assert not Path("calibration.json").exists()


def test_fit_into_no_folder(run: Run) -> None:
    assert_refused(run("fit", "profile", "-o", "none/calibration.json"), "--output")


def test_a_bug_keeps_its_traceback(run: Run, workload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibration, "from_json", None)
    result = run(*SIMULATE)
    assert result.exit_code == 70  # 1 is "nothing feasible"
    assert "Traceback" in result.stderr
    assert "TypeError" in result.stderr
