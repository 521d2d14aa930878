"""``lora-capacity profile`` on a server that answers as vLLM does, and on what cannot be profiled."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lora_capacity_cli.profile import _watcher
from lora_capacity_profiling.planning import ServerPlan

from tests.cli.conftest import Run
from tests.cli.test_bad_input import assert_refused
from tests.unit.profiling.conftest import write_packages
from tests.unit.profiling.test_campaign import SMALL
from tests.unit.profiling.test_server import WAIT_S, command_lines, wait_until

CAMPAIGN = """
server: {max_num_seqs: 4, max_num_batched_tokens: 64}
decode: {batch_size: [1, 4], output_tokens: 16}
adapters: {max_loras: 2, max_lora_rank: 8, served_adapters: 2, batch_size: 4, output_tokens: 16}
"""

ENDLESS = """
server: {max_num_seqs: 4, max_num_batched_tokens: 64}
decode: [{batch_size: 1, output_tokens: 16}, {batch_size: 4, output_tokens: 100000000}]
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment in which a fake vLLM for CPUs is installed; returns its PYTHONPATH."""
    path = write_packages(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FAKE_VLLM", "ok")
    monkeypatch.setenv("FAKE_VLLM_STEP_S", "0.005")
    return path


def test_plan_alone_starts_nothing(run: Run, vllm: str) -> None:
    result = run("profile", "--random-model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Campaign quick-cpu" in result.stdout
    assert "time needed" in result.stdout
    assert [path.name for path in Path().iterdir() if path.is_dir()] == ["packages"]


def test_profile_says_what_it_does_and_goes_on_where_it_stopped(run: Run, vllm: str) -> None:
    Path("tiny.yaml").write_text(CAMPAIGN)
    variables = ("--env", "API_KEY=x", "--env", "TEXT=yes")
    command = ("profile", "--random-model", "--campaign", "tiny.yaml", "-o", "p", *variables)
    result = run(*command)
    assert result.exit_code == 0, result.output
    for point in ("decode/batch1", "decode/batch4", "start/slots2-rank8: ok", "adapters/slots2-rank8/adapters2-batch4"):
        assert point in result.stderr
    assert "lora-capacity fit p" in result.stdout
    assert Path("p/adapter_latency.csv").read_text().count("\n") == 2
    content = json.loads(Path("p/profile.json").read_text())
    assert (content["complete"], content["device"], content["environment"]["API_KEY"]) == (True, "cpu", "(secret)")
    assert content["environment"]["TEXT"] == "yes"  # as it was written, not as YAML reads it
    again = run(*command)
    assert again.exit_code == 0
    assert "already measured" in again.stdout
    assert again.stderr == ""


def test_waiting_for_a_server_to_end_is_told_once_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watcher = _watcher()
    plan = ServerPlan("no-lora", 0, 0, 0, {}, ())
    for waited_s in (1.0, 1.1):
        watcher.stopping(plan, waited_s, 3)
    assert capsys.readouterr().err == "no-lora: waiting for 3 processes to end, 1 s\n"


def test_failed_points_are_listed(run: Run, vllm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "oom")
    Path("tiny.yaml").write_text(CAMPAIGN)
    result = run("profile", "--random-model", "--campaign", "tiny.yaml", "-o", "p")
    assert result.exit_code == 0
    assert "start/slots2-rank8: oom" in result.stderr
    assert "its server did not start (oom)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("m",), ["--output", "-o FOLDER"]),
        (("-o", "p"), ["MODEL", "--random-model"]),
        (("m", "--random-model", "-o", "p"), ["MODEL", "cannot be combined with --random-model"]),
        (("owner/model", "-o", "p"), ["owner/model", "--config"]),
        (("packages", "-o", "p"), ["config.json"]),
        (("--random-model", "-o", "p", "--campaign", "quik"), ["campaign", "did you mean 'quick'"]),
        (("--random-model", "-o", "p", "--flag", "max_num_seqs"), ["--flag", "NAME=VALUE"]),
        (("--random-model", "-o", "p", "--flag", "max_num_seqs=many"), ["--flag max_num_seqs: 'many'", "whole number"]),
        (("--random-model", "-o", "p", "--flag", "max_num_seqs=4"), ["batch_size: 16", "at most max_num_seqs, 4"]),
        (("--random-model", "-o", "p", "--env", "A"), ["'A' is not allowed; allowed: NAME=VALUE"]),
        (("--random-model", "-o", "p", "--python", "nowhere"), ["python", "nowhere"]),
        (("--random-model", "-o", "p", "--device", "gpu"), ["--device", "cpu, which vLLM there is for"]),
        (("--random-model", "-o", "p", "--max-loras", "4"), ["--max-loras", "only with --url"]),
        (("--random-model", "-o", "no-folder"), ["no-folder", "a folder that can be written"]),
    ],
)
def test_what_cannot_be_profiled(run: Run, vllm: str, arguments: tuple[str, ...], fragments: list[str]) -> None:
    assert_refused(run("profile", *arguments), *fragments)


def test_environment_without_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    planned = run("profile", "--dry-run", "--campaign", "standard")
    assert (planned.exit_code, planned.stderr.count("\n")) == (0, 1), planned.output
    assert "an interpreter with vLLM" in planned.stderr
    assert "unknown" in planned.stdout
    # Told before an interpreter is asked.
    assert_refused(run("profile", "m", "-o", "p", "--python", "nowhere", "--campaign", "quik"), "did you mean 'quick'")
    assert_refused(run("profile", "--random-model", "-o", "p"), sys.executable, "an interpreter with vLLM")


def test_url_where_nothing_answers(run: Run, vllm: str) -> None:
    Path("small.yaml").write_text(SMALL)
    result = run("profile", "--random-model", "--campaign", "small.yaml", "-o", "p", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: no point could be measured; decode/batch1:")
    assert "cannot be reached" in last


@pytest.mark.parametrize(("mode", "stage"), [("slow", "logs/no-lora.log"), ("ok", "profile.json")])
def test_interrupt_leaves_what_is_measured_and_no_process(
    run: Run, vllm: str, monkeypatch: pytest.MonkeyPatch, mode: str, stage: str
) -> None:
    # The second point never ends, so that the interrupt comes while it is measured however slow the machine is.
    Path("long.yaml").write_text(ENDLESS)
    monkeypatch.setenv("FAKE_VLLM", mode)
    folder = Path.cwd() / "p"
    path = os.pathsep.join([vllm, *sys.path])
    words = ["profile", "--random-model", "--campaign", "long.yaml", "-o", str(folder)]
    # A shell's background jobs, of which the tests may be one, ignore the signal.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from lora_capacity_cli.main import main; main()"
    command = [sys.executable, "-c", start, *words]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert wait_until(lambda: (folder / stage).exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].startswith("interrupted; what is measured is in")
    assert "Traceback" not in stderr
    assert wait_until(lambda: not any(f"--model {folder}" in line for line in command_lines().values()))
    if mode == "ok":
        lines = (folder / "points.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["decode/batch1"]
        assert json.loads((folder / "profile.json").read_text())["complete"] is False
