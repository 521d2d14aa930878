"""What a command sets up before it calls the library: JAX's compilation cache, and progress on stderr."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_capacity_cli.options import refuse_given

if TYPE_CHECKING:
    from lora_capacity.workload import Goodput, Workload

Progress = Callable[[int, int], None]


def prepare(*, on_cpu: bool = False, ray: str | None = None) -> None:
    """Let JAX keep what it compiles from one command to the next, and find those who do the work.

    Args:
        on_cpu: Whether to leave the GPU alone, for commands that start a server on it.
        ray: Address of the cluster that does the work until the command ends, as `ray_option` takes it.

    Raises:
        InputError: If there is no such cluster.
    """
    from lora_capacity.run.cache import keep_compiled_code

    if on_cpu or ray is not None:
        import jax

        config: Any = jax.config
        config.update("jax_platforms", "cpu")

    keep_compiled_code()
    if ray is not None:
        import click

        from lora_capacity.run import on_ray

        click.get_current_context().with_resource(on_ray(ray))


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
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Times(ProgressColumn):
        """How long it has taken and, once that can be told, will yet take."""

        def render(self, task: Task) -> Text:
            left = "" if not task.time_remaining else f", about {_clock(task.time_remaining)} to go"
            return Text(f"{_clock(task.elapsed or 0.0)}{left}")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), Times())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, count="")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, count=f"{done:,}/{total:,}" if total > 1 else "")

        yield progress


def _clock(value_s: float) -> str:
    """Return seconds as minutes and seconds, and hours where there are any: ``1:05``."""
    minutes, seconds = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
