"""Terminals and locales: encodings that lack characters, few columns, no colours, names of files that are no text."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_capacity_cli.main import main

from tests.cli.conftest import WORKLOAD
from tests.cli.test_bad_input import RUN, write_runs
from tests.unit.profiling.test_observing import DUMPS

NAME = os.fsdecode(b"w\xff\xe9\xe4.yaml")
MISSING = os.fsdecode(b"no\xff.yaml")
SERVER = ("--max-lora-rank", 16, "--max-num-seqs", 16, "--max-num-batched-tokens", 2048)
COMMANDS: dict[tuple[object, ...], int] = {
    ("--help",): 0,
    ("optimize", "--help"): 0,
    ("memory", "--model", "Qwen3-8B", "--gpu", "L40S", "--max-loras", 8, "--max-lora-rank", 16): 0,
    ("simulate", NAME, "--adapters", 4, "--max-loras", 2): 0,
    ("predict", NAME): 0,
    ("rules", "--target", "slots"): 0,
    ("validate", "runs.csv"): 0,
    ("calibrations",): 0,
    ("calibrations", "show", "llama-3.1-8b-instruct-h100-64gb"): 0,
    (
        "observe",
        *DUMPS,
        "--workload",
        NAME,
        "--model",
        "m",
        "--adapters",
        4,
        *SERVER,
        "--window",
        "50s",
        "-o",
        "o.csv",
    ): 0,
    ("profile", "--dry-run", "--campaign", "quick", "--python", "nowhere"): 0,
    ("simulate", MISSING, "--adapters", 4, "--max-loras", 2): 2,
    ("simulate", "≥–\x1b[2J.yaml", "--adapters", 4, "--max-loras", 2): 2,
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_answer_on_any_terminal(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no-folder").touch()
    variables = {"XDG_CACHE_HOME": str(tmp_path / "no-folder"), "COLUMNS": "20", "NO_COLOR": "1", "LC_ALL": "C"}
    monkeypatch.chdir(tmp_path)
    Path(NAME).write_text(WORKLOAD, encoding="utf-8")
    write_runs(RUN)
    for command, code in COMMANDS.items():
        result = CliRunner(charset=encoding, env=variables).invoke(main, [str(word) for word in command])
        assert result.exit_code == code, (command, result.output)
        assert result.output.replace("\n", "").isprintable(), command
        if code:
            assert result.stderr.startswith("error: ")
            assert result.stderr.count("\n") == 1


def test_what_an_encoding_lacks_is_spelt() -> None:
    result = CliRunner(charset="ascii").invoke(
        main, ["simulate", "±≥é–\U0001f600.yaml", "--adapters", "1", "--max-loras", "1"]
    )
    assert "+->=\\xe9-\\U0001f600.yaml" in result.stderr
