"""Whatever goes wrong while a server is tried: one clear line, runs that ended are kept, no process is left behind."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_capacity_profiling.material import write_adapter
from lora_capacity_profiling.runs import append_runs
from lora_capacity_profiling.server import Server

from tests.cli.conftest import Run
from tests.cli.fake_site import Site, command, write_site
from tests.unit.profiling.conftest import fake_environment
from tests.unit.profiling.test_server import WAIT_S, command_lines, wait_until

pytestmark = pytest.mark.slow

RUN_ID = "verify/short/"
ONE = ("--adapters", 2, "--max-loras", 2)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return write_site(tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(site: Site) -> Iterator[None]:
    yield
    servers = f"--model {site.model} "
    assert wait_until(lambda: not any(servers in line for line in command_lines().values()))


def rows(path: str | Path = "verify/serving_runs.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_refused(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr


def test_port_in_use(run: Run, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert_refused(run(*site.verify(*ONE, "--port", port)), f"port: {port}", "a free port", "in use")


def test_server_that_dies_midway_keeps_the_runs_before(run: Run, site: Site, tmp_path: Path) -> None:
    result = run(*site.verify(*ONE, "--seconds", 30, mode="dies", dies_at=10))
    assert_refused(result, "20 requests in a row failed; the last: ")
    # Of two configurations the first was measured while the server lived.
    died = site.verify("--adapters", 2, "--max-loras", "1,2", "--seconds", 2)
    script = tmp_path / "python"
    # Started with -m it is a server; before that it is asked (-c) whether it has vLLM's command.
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then\n[ -e {tmp_path}/second ] && export FAKE_VLLM=oom\n'
        f'touch {tmp_path}/second\nfi\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    words = [str(script) if word == sys.executable else word for word in died]
    assert run(*words).exit_code == 3
    assert [row["status"] for row in rows()] == ["ok", "oom"]


def test_model_folder_without_config(run: Run, site: Site) -> None:
    (site.model / "config.json").unlink()
    assert_refused(run(*site.verify(*ONE)), "config.json", "file not found")


def test_adapter_of_too_large_a_rank(run: Run, site: Site) -> None:
    assert_refused(run(*site.verify(*ONE, "--max-lora-rank", 1)), "max_lora_rank", "the largest adapter rank served")
    result = run(*site.verify(*ONE, "--flag", "max_lora_rank=4"))
    assert_refused(result, "vLLM did not start", "LoRA rank 8 is greater than max_lora_rank 4", "its log is")


@pytest.fixture
def serve(site: Site, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    servers: list[Server] = []

    def start(mode: str) -> Server:
        folder = write_adapter(tmp_path / "a8", site.model, rank=8)
        server = Server.launch(
            site.model,
            {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "lora_modules": [f"a0={folder}", "a1=x"]},
            log=tmp_path / "attached.log",
            python=sys.executable,
            environment=fake_environment(mode, 0.005),
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def test_server_that_answers_errors(run: Run, site: Site, serve: Callable[[str], Server]) -> None:
    result = run(*site.attach(serve("failing").url, "--max-loras", 2))
    assert_refused(result, "does not answer for every adapter", "the server answered 500: Internal Server Error")
    assert rows() == []


def test_server_that_never_answers(
    run: Run, site: Site, serve: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_capacity_profiling.serving._WARM_UP_S", 1.0)
    result = run(*site.attach(serve("mute").url, "--max-loras", 2))
    assert_refused(result, "does not answer for every adapter: no answer within 1 s")


def test_address_that_hangs_or_refuses(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_capacity_profiling.server._ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert_refused(run(*site.attach(url, "--max-loras", 2)), "/health did not answer within 0.5 s")
    assert_refused(run(*site.attach(url, "--max-loras", 2)), "cannot be reached: Connection refused")


@pytest.mark.parametrize("path", ["/dev/full", "verify", "workload.yaml"])
def test_table_that_is_none_is_refused_before_anything_starts(run: Run, site: Site, workload: Path, path: str) -> None:
    Path("verify").mkdir()
    assert_refused(run(*site.verify(*ONE, "--runs", path, "--seconds", 600)), path, "serving runs")
    assert not list(Path("verify").iterdir())  # a server would have written its log


def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "no-cache").touch()
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path / "no-cache")}


def test_full_disk_loses_no_run(site: Site, serve: Callable[[str], Server], tmp_path: Path) -> None:
    url = serve("ok").url
    table = tmp_path / "runs.csv"
    append_runs(table, [{"run_id": "before", "max_loras": 1}])
    before = table.read_bytes()

    words = site.attach(url, "--max-loras", 2, "--runs", table)
    done = subprocess.run(
        command(words, largest_file_bytes=len(before) + 100),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == f"error: {table}: 'File too large' is not allowed; allowed: a table that can be written"
    )
    assert table.read_bytes() == before
    assert not list(tmp_path.glob(".runs*"))
    # The run that could not be saved is told, so that it can be.
    (told,) = [line for line in done.stderr.splitlines() if line.startswith(RUN_ID)]
    header = next(line for line in done.stderr.splitlines() if line.startswith("run_id,"))
    (row,) = csv.DictReader([header, told])
    assert int(row["completed"]) > 0


def test_disk_full_of_adapters_is_told(site: Site, tmp_path: Path) -> None:
    done = subprocess.run(
        command(site.verify(*ONE), largest_file_bytes=4096),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "a folder with room for" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("said", "options", "mode", "step_s", "kept"),
    [
        ("starting vLLM", (), "slow", 0.0, 0),
        ("asking every adapter", (), "ok", 5.0, 0),
        ("warming up", ("--warm-up", 60), "ok", 0.005, 0),
        ("measuring", ("--seconds", 60), "ok", 0.005, 0),
        ("(2 of 2): starting vLLM", ("--max-loras", "1,2", "--seconds", 1), "ok", 0.005, 1),
    ],
)
def test_interrupt_at_any_stage(
    site: Site, tmp_path: Path, said: str, options: tuple[object, ...], mode: str, step_s: float, kept: int
) -> None:
    words = site.verify(*ONE, *options, mode=mode, step_s=step_s)
    with subprocess.Popen(
        command(words),
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while said not in (line := process.stderr.readline()):
            assert process.poll() is None, line
        process.send_signal(signal.SIGINT)
        _, left = process.communicate(timeout=WAIT_S)
    total = 2 if kept else 1
    assert process.returncode == 130
    assert left.splitlines()[-1] == f"interrupted: {kept} of {total} runs are in verify/serving_runs.csv"
    assert "Traceback" not in left
    assert len(rows(tmp_path / "verify" / "serving_runs.csv")) == kept


WRITER = """
import sys
from pathlib import Path
from lora_capacity_profiling.runs import append_runs
append_runs(Path(sys.argv[1]), [])
print("ready", flush=True)
for number in range(100_000):
    append_runs(Path(sys.argv[1]), [{"run_id": number, "max_cpu_loras": 1}])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupt_while_writing_leaves_a_whole_table(tmp_path: Path, number: signal.Signals) -> None:
    table = tmp_path / "runs.csv"
    for wait_s in (0.0, 0.05, 0.11, 0.3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(table)],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(wait_s)
            process.send_signal(number)
            process.wait(timeout=WAIT_S)
        numbers = [int(row["run_id"]) for row in rows(table)]
        assert numbers == list(range(len(numbers)))
        table.unlink()
