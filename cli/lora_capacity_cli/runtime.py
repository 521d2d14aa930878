"""What a command sets up before it calls the library: JAX's compilation cache, and progress on stderr."""

import contextlib
import dataclasses
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_capacity_cli.options import refuse_given
from lora_capacity_cli.output import say

if TYPE_CHECKING:
    from lora_capacity.workload import Goodput, Workload

Progress = Callable[[int, int], None]


def cache_dir() -> Path:
    """Return the folder for what is compiled: under ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lora-capacity" / "jax"


def prepare(*, on_cpu: bool = False) -> None:
    """Let JAX keep what it compiles from one command to the next.

    A folder that cannot be written is done without; so is one that others can write to, with a warning, since code is
    loaded from it. Entries in it that are damaged are compiled anew.

    Args:
        on_cpu: Whether to leave the GPU alone, for commands that start a server on it.
    """
    from lora_capacity.run.steady import enable_compilation_cache

    if on_cpu:
        import jax

        config: Any = jax.config
        config.update("jax_platforms", "cpu")

    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = cache_dir()
        folder.parents[1].mkdir(parents=True, exist_ok=True)
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(each):
                whose = "belongs to others, or they can write to it: delete it"
                say(f"warning: compiled code is not kept: {each} {whose}", err=True)
                return
        if os.access(folder, os.W_OK):
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            enable_compilation_cache(folder)


def _is_private(folder: Path) -> bool:
    """Whether a folder is the user's own, not a link, and nobody else can write to it."""
    status = folder.lstat()
    others_write = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & others_write


def read_workload(path: Path, bounds: dict[str, Any], recording: dict[str, Any] | None = None) -> "Workload":
    """Read a workload file or a table of requests, with latency bounds that were given in place of its own.

    Args:
        path: The file.
        bounds: What `goodput_options` gathered.
        recording: What `recording_options` gathered.

    Raises:
        InputError: If the file or a bound cannot be used, or options of a table are beside a workload file.
    """
    from lora_capacity.workload import is_recording, load_workload

    if recording and not is_recording(path):
        remedy = "it is for a table of requests; in a workload file it stands under requests.trace"
        refuse_given([f"trace_{name}" for name in recording], "a workload file", remedy)
    workload = load_workload(path, recording=recording)
    return dataclasses.replace(workload, goodput=bounds_over(workload.goodput, bounds))


def bounds_over(asked: "Goodput", bounds: dict[str, Any]) -> "Goodput":
    """Return latency bounds with those that were given in place of a file's own.

    Args:
        asked: Those of the file.
        bounds: What `goodput_options` gathered.

    Raises:
        InputError: If a bound cannot be used.
    """
    from lora_capacity.errors import InputError

    bounds_ms = dict(bounds["goodput"])
    if len(bounds_ms) < len(bounds["goodput"]):
        raise InputError("--goodput", " ".join(key for key, _ in bounds["goodput"]), "each key once")
    return asked.changed(bounds_ms or None, bounds["attainment"])


def join_processes(address: str | None) -> bool:
    """Become one of several processes that share the work, before JAX is used for anything else.

    Args:
        address: ``auto`` for what JAX finds out from the cluster's scheduler; or the coordinator's address, the number
            of this process and of all: ``HOST:PORT,NUMBER/ALL``; None for a process alone.

    Returns:
        Whether this is the process that answers: the first, or the only one.

    Raises:
        InputError: If the address is neither, or the others cannot be found.
    """
    if address is None:
        return True
    import jax

    from lora_capacity.errors import InputError

    allowed = "auto, or HOST:PORT,NUMBER/ALL such as 10.0.0.1:1234,0/2"
    host, _, place = address.partition(",")
    number, _, every = place.partition("/")
    try:
        given = (None, None, None) if address == "auto" else (host, int(every), int(number))
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise InputError("--processes", address, allowed, " ".join(str(error).split())) from None
    return jax.process_index() == 0


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Show a bar on stderr, where that is a terminal, until the block ends.

    Yields:
        What to call with the parts done and their total.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class TimeLeft(TimeRemainingColumn):
        """How long it will take, once that can be told."""

        def render(self, task: Task) -> Text:
            return Text() if task.time_remaining is None else super().render(task).append(" left")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeLeft(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, count="")
        yield lambda done, total: bar.update(task, completed=done, total=total, count=f"{done:,}/{total:,}")
