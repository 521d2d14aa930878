"""`observe` on answers recorded from a real server, and on the fake one."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lora_capacity_profiling.load import at_once, run_load
from lora_capacity_profiling.server import Server

from lora_capacity.measurements import read_runs
from tests.cli.conftest import Run
from tests.cli.fake_site import Site, command, write_site
from tests.unit.fitting.test_fit import write_profile
from tests.unit.profiling.conftest import fake_environment
from tests.unit.profiling.test_observing import DUMPS
from tests.unit.profiling.test_server import WAIT_S

SERVER = ("--max-lora-rank", 8, "--max-num-seqs", 16, "--max-num-batched-tokens", 2048)
JSON = ("--format", "json")
RECORDED_WORKLOAD = """
adapters:
  mix: {rates_per_s: [2.0, 1.0], ranks: [8, 4]}
requests:
  input_tokens: {mean: 60, std: 30, min: 4, max: 200}
  output_tokens: {mean: 30, std: 15, min: 2, max: 80}
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "recorded.yaml").write_text(RECORDED_WORKLOAD)
    return write_site(tmp_path)


@pytest.fixture
def server(site: Site, tmp_path: Path) -> Iterator[Server]:
    flags = {"enable_lora": True, "max_loras": 2, "lora_modules": ["a0=x", "a1=x", "a2=x"]}
    environment = fake_environment("ok", 0.005)
    with Server.launch(
        site.model, flags, log=tmp_path / "log", python=sys.executable, environment=environment
    ) as started:
        yield started


def observe(*words: object, model: str = "tiny") -> list[object]:
    return ["observe", *words, "--model", model, *SERVER, "-o", "runs.csv"]


@pytest.mark.slow
def test_recorded_answers_become_a_run_to_validate_and_fit(run: Run, site: Site, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    write_profile(tmp_path / "profile")
    given = ("--workload", "recorded.yaml", "--adapters", 4, "--window", "50s", "--format", "json")
    result = run(*observe(*DUMPS, *given, model="small-llama"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["max_loras"], found["adapters_seen"], found["warnings"]) == (2, 4, [])
    assert found["rates_scaled_by"] == pytest.approx(130 / 50 / 6)
    assert (found["measured"]["completed"], found["measured"]["mean_kv_usage"]) == (130, None)
    runs = read_runs("runs.csv")
    assert (runs.set[0], runs.scenario[0], runs.max_loras[0], runs.max_cpu_loras[0]) == ("observed", "recorded", 2, 4)
    assert runs.arrival_rate_per_s(26000) == pytest.approx([130 / 50])
    assert runs.throughput_tokens_per_s == pytest.approx([(7714 + 4057) / 50])
    assert runs.tells_lengths.all()
    result = run("fit", "profile", "--runs", "runs.csv", "-o", "fitted.json", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["provenance"]["rows"]["serving_runs"] == 1
    result = run("validate", "runs.csv", "--calibration", "fitted.json", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["models"][0]["runs"] == 1


def test_table_tells_what_was_observed(run: Run, site: Site) -> None:
    given = ("--workload", "recorded.yaml", "--adapters", 3, "--window", "50s")
    result = run(*observe(*DUMPS, *given))
    assert result.exit_code == 0, result.output
    assert "3 adapters, 2 slots, observed for 50 s; added to runs.csv" in result.stdout
    assert "130 arrived, 130 completed" in result.stdout
    assert "warning: requests came for 4 adapters, more than the 3 given" in result.stdout


def test_server_is_observed_while_others_load_it(run: Run, site: Site, server: Server) -> None:
    requests = at_once(np.arange(5000) % 3, np.full(5000, 20), np.full(5000, 8))

    def load() -> None:
        run_load(server.endpoint, requests, ["a0", "a1", "a2"], base_model="fake", duration_s=6, max_pending=3)

    others = threading.Thread(target=load)
    others.start()
    result = run(*observe(server.url, "--workload", site.workload, "--adapters", 3, "--window", "3s", *JSON))
    others.join()
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["max_loras"] == 2
    assert found["measured"]["completed"] > 0
    assert f"{server.url}: observing" in result.stderr


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ((DUMPS[0], "--adapters", 4), ["--window", "the time since the server's start"]),
        ((*DUMPS, "--adapters", 1, "--window", "50s"), ["max_loras: 2", "1 to max_cpu_loras, 1"]),
        ((*DUMPS, "--adapters", 4, "--window", "50s", "--model-name", "x"), ["--model-name: 'x'", "small"]),
        ((*DUMPS, "--adapters", 4, "--window", "50s", "--engine-index", 3), ["--engine-index: 3", "allowed: 0"]),
        (
            (*DUMPS, "--adapters", 4, "--max-loras", 3, "--window", "50s"),
            ["--max-loras: 3", "2, which the metrics say"],
        ),
        (("http://127.0.0.1:9", "http://127.0.0.1:9", "--adapters", 4), ["one server, or files"]),
        (("http://127.0.0.1:9", "--adapters", 4), ["cannot be reached"]),
        ((*DUMPS, "--adapters", 4, "--window", "ten"), ["'ten' is not allowed", "10m"]),
        ((*DUMPS[::-1], "--adapters", 4, "--window", "50s"), ["started anew"]),
    ],
)
def test_what_cannot_be_observed(run: Run, site: Site, words: tuple[object, ...], texts: list[str]) -> None:
    result = run(*observe(*words, "--workload", "recorded.yaml"))
    assert result.exit_code == 2, result.output
    assert all(text in result.stderr for text in texts), result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("rank", "text"), [(7, "one of 1, 8, 16"), (1, "at least 8, the workload's largest rank")])
def test_ranks_that_no_run_has_are_refused_before_anything_is_asked(run: Run, site: Site, rank: int, text: str) -> None:
    given = ("--workload", "recorded.yaml", "--adapters", 4, "--max-lora-rank", rank)
    result = run(*observe("http://127.0.0.1:9"), *given)
    assert result.exit_code == 2, result.output
    assert text in result.stderr


def test_server_with_lora_off_is_refused(run: Run, site: Site, tmp_path: Path) -> None:
    dumps = [tmp_path / dump.name for dump in DUMPS]
    for dump, copy in zip(DUMPS, dumps, strict=True):
        copy.write_text(dump.read_text().replace('max_lora="2"', 'max_lora="0"'))
    given = ("--workload", "recorded.yaml", "--adapters", 4, "--window", "50s")
    for more in ((), ("--max-loras", 2)):
        result = run(*observe(*dumps, *given, *more))
        assert result.exit_code == 2, result.output
        assert "a server started with --enable-lora; it has LoRA off" in result.stderr
    assert Path("runs.csv").read_text().count("\n") == 1  # its header


def start(tmp_path: Path, words: list[object], **limits: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command([str(word) for word in words], **limits),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupt_keeps_what_was_observed(site: Site, server: Server, tmp_path: Path) -> None:
    requests = at_once(np.arange(30) % 3, np.full(30, 20), np.full(30, 8))
    given = ("--workload", site.workload, "--adapters", 3, "--window", "1h", "--max-loras", 2)
    with start(tmp_path, observe(server.url, *given)) as process:
        assert process.stderr is not None
        assert "observing" in process.stderr.readline()
        run_load(server.endpoint, requests, ["a0", "a1", "a2"], base_model="fake", duration_s=WAIT_S)
        while "observing, 1" not in process.stderr.readline():  # the second sample is taken after ten seconds
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted: the run is shorter, and is in runs.csv"
    runs = read_runs(tmp_path / "runs.csv")
    assert runs.completed.tolist() == [30]
    assert runs.duration_s[0] < 3600


def test_full_disk_loses_nothing(site: Site, tmp_path: Path) -> None:
    given = ("--workload", "recorded.yaml", "--adapters", 4, "--window", "50s")
    with start(tmp_path, observe(*DUMPS, *given), largest_file_bytes=800) as process:
        _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert "not saved:\nrun_id," in said
    assert "\nobserved/recorded/" in said
    assert said.splitlines()[-1].startswith("error: runs.csv: 'File too large'")
