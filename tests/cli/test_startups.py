"""Starts of servers: a row from a log, predictions against rows, terms corrected by them."""

import json
from pathlib import Path

import pytest

from lora_capacity.memory import EstimatedTerms
from tests.cli.conftest import Run
from tests.unit.measurements.test_startups import LLAMA
from tests.unit.profiling.test_startups import NEW

NAMES = ("--startup", "facts.csv", "--models", "models.csv")
ROWS = {"id", "status", "reason", "model_load_gib", "kv_cache_tokens", "low", "high"}


@pytest.fixture(autouse=True)
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Two starts of one log, on an L4, and one of a model that nobody knows."""
    monkeypatch.chdir(tmp_path)
    Path("model_configs").mkdir()
    Path("model_configs/llama.json").write_text(json.dumps(LLAMA))
    Path("models.csv").write_text("model_as_written_in_table,config_file\norg/model,llama.json\n")
    Path("mine.log").write_text(NEW)
    for words in (["--gpu", "L4"], ["--gpu", "L40S"], ["--gpu", "L4", "--model", "unknown"]):
        assert run("observe", "--startup-log", "mine.log", *words, "-o", "facts.csv").exit_code == 0


def answer(run: Run, *words: str) -> dict:
    result = run(*words, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_rows_of_logs_are_predicted(run: Run) -> None:
    document = answer(run, "validate", *NAMES)
    rows, summary = document["rows"], document["summary"]
    assert all(set(row) == ROWS for row in rows)
    assert [row["status"] for row in rows] == ["ok", "ok", "unsupported"]
    assert "config.json" in rows[2]["reason"]
    # 8 billion parameters, nearly all in linear layers of 8 bits, over two GPUs, and four slots of rank 32.
    assert 4.0 < rows[0]["model_load_gib"] < 5.5
    assert rows[0]["low"] < rows[0]["kv_cache_tokens"] < rows[0]["high"]
    assert (summary["rows"], summary["answered"]) == (3, 2)
    assert set(summary["by_gpu"]) == {"L4", "L40S"}
    assert set(summary["by_lora"]) == {"LoRA"}


def test_terms_are_corrected_by_one_s_own_starts(run: Run) -> None:
    own = answer(run, "fit", "facts.csv", "--models", "models.csv", "-o", "terms.json", "--source", "my card")
    bundled, corrected = (answer(run, "validate", *NAMES, *words) for words in ([], ["--terms", "terms.json"]))
    assert own["source"] == "my card"
    # The log tells 0.05 GiB outside PyTorch for two GPUs over PCIe, less than is usual.
    usual = EstimatedTerms.bundled()
    assert own["context_bytes"] + own["collective_bytes"] < usual.context_bytes + usual.collective_bytes
    assert corrected["rows"][0]["kv_cache_tokens"] != bundled["rows"][0]["kv_cache_tokens"]
    asked = ("memory", "--model", "model_configs/llama.json", "--gpu", "L4", "--quantization", "fp8")
    usually, here = (answer(run, *asked, *words)["kv_cache_tokens"] for words in ([], ["--terms", "terms.json"]))
    assert here["expected"] != usually["expected"]
    alone = answer(run, "fit", "facts.csv", "--models", "models.csv", "-o", "alone.json", "--from-nothing")
    assert alone["context_bytes"] != own["context_bytes"]


def test_what_is_left_out_is_told(run: Run) -> None:
    document = answer(run, "validate", *NAMES, "--leave-out", "gpu")
    assert document["left_out"] == "gpu"
    assert [row["status"] for row in document["rows"]] == ["ok", "ok", "unsupported"]
    assert "GPU L40S" in run("validate", *NAMES).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("validate",), "RUNS: missing"),
        (("validate", "--models", "models.csv"), "RUNS: missing"),
        (("validate", "--startup", "none.csv", "--models", "models.csv"), "none.csv"),
        (("validate", "--startup", "models.csv", "--models", "models.csv"), "'id'"),
        (("validate", *NAMES, "--terms", "models.csv"), "models.csv"),
        (("validate", *NAMES, "--terms", "t.json", "--leave-out", "gpu"), "--terms"),
        (("observe", "--startup-log", "none.log", "-o", "facts.csv"), "none.log"),
        (("observe", "--startup-log", "models.csv", "-o", "facts.csv"), "no memory of a start"),
        (("observe", "dump.txt", "--startup-log", "mine.log", "-o", "facts.csv"), "without sources"),
        (("fit", "facts.csv", "--models", "models.csv", "-o", "none/terms.json"), "--output"),
        (("fit", "facts.csv", "--name", "mine", "-o", "terms.json"), "--name"),
        (("fit", ".", "--from-nothing", "-o", "terms.json"), "--from-nothing"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: tuple[str, ...], told: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
