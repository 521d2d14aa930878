"""Commands run in this process, as a user would type them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from lora_capacity_cli.main import main

Run = Callable[..., Result]

STEADY = ("--engine", "steady")
"""Words of commands whose tests are not about playing, which takes its time."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; JAX keeps no cache, since a file stands where its folder would be."""
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora-capacity"])
    return lambda *arguments: CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A workload that a server of some twenty adapters keeps up with."""
    path = tmp_path / "workload.yaml"
    path.write_text(WORKLOAD, encoding="utf-8")
    return path


WORKLOAD = """
adapters:
  mix: {rates_per_s: [0.4, 0.2], ranks: [8, 16]}
requests:
  input_tokens: {mean: 223, std: 248, min: 4, max: 1024}
  output_tokens: {mean: 197, std: 207, min: 4, max: 1024}
horizon_s: 3600
max_pending: 26000
"""
