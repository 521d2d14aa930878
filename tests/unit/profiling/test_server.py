import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_capacity_profiling import _processes
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.server import Server

from lora_capacity.errors import InputError
from tests.unit.profiling.conftest import FAKE, WAIT_S, fake_environment

Launch = Callable[..., Server]


def command_lines() -> dict[int, str]:
    """Return the command lines of all live processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text:  # a zombie has none
                found[int(entry.name)] = text
    return found


def wait_until(true: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_server_starts_tells_about_itself_and_stops(launch: Launch) -> None:
    told = []
    server = launch(on_progress=lambda elapsed_s, line: told.append((elapsed_s, line)))
    assert (server.version, server.models, server.adapters) == ("0.32.0", ("fake", "a0", "a1"), ("a0", "a1"))
    assert told
    assert told == sorted(told)
    server.check()
    record = server.to_json()
    assert record["flags"] == {"enable_lora": True, "max_loras": 2, "lora_modules": ["a0=x", "a1=x"]}
    assert record["environment"]["FAKE_VLLM"] == "ok"
    assert record["environment"]["HF_TOKEN"] == "(secret)"
    assert "hf_x" not in str(record)
    assert record["start_s"] > 0
    assert server.report().outcome == "ok"
    pids = server.processes()
    assert len(pids) == 2  # guard and server
    server.stop()
    server.stop()
    assert not pids & command_lines().keys()
    with pytest.raises(ServerError, match=r"the server died with exit code"):
        server.check()


def test_process_that_got_the_number_of_a_leader_is_not_taken_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as process:
        try:
            leader = _processes.identify(process.pid)
            assert _processes.members(leader) == {leader}
            assert _processes.end(leader._replace(start_ticks=leader.start_ticks - 1), 0.0) == set()
            assert process.poll() is None
        finally:
            process.kill()


LAST_WORD = """
import os, signal, subprocess, sys
def leave_a_child(number, frame):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]], start_new_session=True)
    os._exit(0)
signal.signal(signal.SIGTERM, leave_a_child)
print("ready", flush=True)
signal.pause()
"""


def test_child_that_is_made_as_the_server_ends_is_found(tmp_path: Path) -> None:
    guard = [sys.executable, "-I", "-S", _processes.__file__, "10"]
    with subprocess.Popen(
        [*guard, sys.executable, "-c", LAST_WORD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert _processes.end(_processes.identify(process.pid), 600) == set()
        assert not [line for line in command_lines().values() if str(tmp_path) in line]


def test_stubborn_children_are_killed_too_and_waiting_for_them_is_told(launch: Launch) -> None:
    told: list[tuple[float, int]] = []
    server = launch("stubborn", on_stop=lambda waited_s, left: told.append((waited_s, left)))
    pids = server.processes()
    assert len(pids) == 4  # guard, server, a child in its session and one in another
    server.stop(grace_s=1.5)
    assert not pids & command_lines().keys()
    assert told == sorted(told, key=lambda each: each[0])
    assert told[0][0] >= 1.0
    assert told[0][1] == 4


def test_interrupt_of_a_patient_stop_kills_at_once(launch: Launch) -> None:
    server = launch("stubborn", on_stop=lambda waited_s, left: signal.raise_signal(signal.SIGINT))
    pids = server.processes()
    with pytest.raises(KeyboardInterrupt):
        server.stop(grace_s=600)
    assert not pids & command_lines().keys()


def test_interrupt_while_a_process_is_made_leaves_none(
    launch: Launch, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, made = subprocess.Popen, []

    def interrupted(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        if "-c" in arguments[0]:  # asks whether there is a command
            return popen(*arguments, **options)
        made.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGINT)  # nobody knows yet what has been made
        return made[0]

    monkeypatch.setattr("lora_capacity_profiling.server.subprocess.Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch("slow")
    assert made
    assert not [line for line in command_lines().values() if str(model_dir) in line]


def test_children_are_gone_when_the_server_itself_was_killed(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_capacity_profiling.server._GUARD_GRACE_S", 0.5)
    server = launch("stubborn")
    pids = server.processes()
    lines = command_lines()
    (main,) = [pid for pid in pids if "vllm.entrypoints" in lines[pid] and "_processes" not in lines[pid]]
    os.kill(main, signal.SIGKILL)
    assert wait_until(lambda: not pids & command_lines().keys())


def test_exception_inside_the_context_stops_the_server(launch: Launch) -> None:
    server = launch()
    pids = server.processes()
    assert pids
    with pytest.raises(ZeroDivisionError), server:
        _ = 1 / 0
    assert not pids & command_lines().keys()


@pytest.mark.parametrize(
    ("mode", "outcome", "text"),
    [
        ("no_kv_cache", "no_kv_cache", "To serve at least one request with the model's max seq len (131072)"),
        ("oom", "oom", "torch.OutOfMemoryError: CUDA out of memory"),
        ("killed", "oom", "as the kernel does when memory runs out"),
    ],
)
def test_refused_start_is_told_in_one_line(launch: Launch, model_dir: Path, mode: str, outcome: str, text: str) -> None:
    with pytest.raises(ServerError) as error:
        launch(mode)
    message = str(error.value)
    assert error.value.outcome == outcome
    assert f"({outcome}): " in message
    assert text in message
    assert "\n" not in message
    assert not [line for line in command_lines().values() if str(model_dir) in line]


def test_refused_start_keeps_the_last_lines_of_the_log(launch: Launch) -> None:
    with pytest.raises(ServerError) as error:
        launch("no_kv_cache")
    assert error.value.log_tail[-1] == "RuntimeError: Engine core initialization failed. See root cause above."
    assert error.value.log_tail[0].startswith("vLLM API server version")


def test_unknown_flag_is_told_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"\(failed\): .*error: unrecognized arguments: --max-lorax 3"):
        Server.launch(
            model_dir, {"max_lorax": 3}, log=tmp_path / "log", python=sys.executable, environment=fake_environment()
        )


def test_environment_without_vllm_is_told_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="No module named"):
        Server.launch(model_dir, {}, log=tmp_path / "log", python=sys.executable, environment={"PYTHONPATH": ""})


def test_start_that_takes_too_long_is_ended(launch: Launch, model_dir: Path) -> None:
    with pytest.raises(ServerError, match="not healthy after 2 s"):
        launch("slow", timeout_s=2.0)
    assert not [line for line in command_lines().values() if str(model_dir) in line]


def test_port_in_use_is_refused(launch: Launch, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(InputError, match=f"port: {port} is not allowed; allowed: a free port"):
        launch(port=port)


@pytest.mark.parametrize(
    ("field", "options"),
    [("python", {"python": "/no/such/python"}), ("model", {"model": "/tmp"}), ("flags.port", {"flags": {"port": 1}})],
)
def test_what_cannot_be_started_is_refused(tmp_path: Path, model_dir: Path, field: str, options: dict) -> None:
    arguments = {"model": model_dir, "flags": {}, "log": tmp_path / "log", **options}
    with pytest.raises(InputError) as error:
        Server.launch(**arguments)
    assert error.value.field == field
    assert not (tmp_path / "log").exists()


def test_log_that_cannot_be_written_is_refused(launch: Launch, tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file that can be written"):
        Server.launch(model_dir, {}, log=tmp_path / "file" / "log")


def test_command_line_too_long_is_told(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ServerError, match="vLLM cannot be started: Argument list too long"):
        Server.launch(model_dir, {"lora_modules": ["a=x" * 100_000]}, log=tmp_path / "log")


def test_attached_server_is_left_running(launch: Launch) -> None:
    server = launch()
    with Server.attach(server.url) as attached:
        assert (attached.version, attached.models, attached.flags) == ("0.32.0", ("fake", "a0", "a1"), {})
    server.check()
    with pytest.raises(ServerError, match="was not started here"):
        attached.report()


@pytest.mark.parametrize("mode", ["sick", "odd"])
def test_attaching_to_an_ill_server_is_refused(
    model_dir: Path, tmp_path: Path, mode: str, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, **fake_environment(mode)}) as process:
        try:
            assert wait_until(lambda: listens(port))
            with pytest.raises(ServerError, match="status 500" if mode == "sick" else "no JSON object"):
                Server.attach(f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def test_attaching_to_nothing_is_refused(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(ServerError, match="cannot be reached: Connection refused"):
        Server.attach(f"http://127.0.0.1:{port}")


def test_attaching_to_a_server_that_hangs_ends(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_capacity_profiling.server._ANSWER_S", 0.5)
    with pytest.raises(ServerError, match=r"/health did not answer within 0\.5 s"):
        Server.attach(f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:x", "http://h/?a"])
def test_bad_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="an address such as"):
        Server.attach(url)


SCRIPT = """
import sys, time
from pathlib import Path
from lora_capacity_profiling.server import Server
say = lambda elapsed_s, line: print("starting", flush=True)
with Server.launch(Path(sys.argv[1]), {}, log=Path(sys.argv[2]), on_progress=say) as server:
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("stage", ["starting", "up"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_at_any_stage_leaves_no_process(
    model_dir: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    environment = {**os.environ, **fake_environment("slow" if stage == "starting" else "ok")}
    environment["PYTHONPATH"] = os.pathsep.join([str(FAKE), *sys.path])
    log = tmp_path / "server.log"
    command = [sys.executable, "-c", SCRIPT, str(model_dir), str(log)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != stage.encode():
            assert process.poll() is None
        process.send_signal(number)
        process.wait(timeout=WAIT_S)
    servers = f"--model {model_dir} "
    assert wait_until(lambda: not any(servers in line for line in command_lines().values()))
