"""What the commands that work on a real server share: how it is started or found, and progress in stages."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_capacity_cli.options import FILE
from lora_capacity_cli.output import say

Command = TypeVar("Command", bound=Callable[..., Any])
Tell = Callable[[str, float, float | None], None]
"""Told which stage it is, the seconds spent in it, and how many it takes; None where nobody knows."""

_TOLD_EVERY_S = 10.0
"""Between lines of progress in a log: it stays readable over an hour."""


class Assignment(click.ParamType):
    """A name and a value with ``=`` between."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        name, equals, content = str(value).partition("=")
        if not equals or not name:
            self.fail(f"{value!r} is not allowed; allowed: NAME=VALUE", param, ctx)
        return name, content


class Flag(Assignment):
    """A flag of vLLM: ``dtype=bfloat16``; without a value it is switched on, with ``no-`` before it off."""

    name = "flag"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Return the flag's name with underscores, and its value."""
        if isinstance(value, tuple):
            return value
        name, equals, content = str(value).removeprefix("--").partition("=")
        if not name:
            self.fail(f"{value!r} is not allowed; allowed: a flag of vLLM such as dtype=bfloat16", param, ctx)
        if equals:
            from lora_capacity.errors import InputError
            from lora_capacity.reading import parse_yaml

            try:
                parsed = parse_yaml(content, name)
            except InputError:
                parsed = content
            known = isinstance(parsed, str | int | float | bool | list)
            return name.replace("-", "_"), parsed if known else content
        return name.removeprefix("no-").replace("-", "_"), not name.startswith("no-")


_PROCESS = (
    click.option(
        "--python",
        type=FILE,
        default=Path(sys.executable),
        envvar="LORA_CAPACITY_VLLM_PYTHON",
        show_envvar=True,
        metavar="FILE",
        help="Python interpreter of the environment with vLLM. [default: this one]",
    ),
    click.option(
        "--flag",
        "flags",
        type=Flag(),
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Further vLLM flag, such as dtype=bfloat16; may be repeated.",
    ),
    click.option(
        "--env",
        "environment",
        type=Assignment(),
        multiple=True,
        metavar="NAME=VALUE",
        help="Environment variable of the server, such as VLLM_CPU_KVCACHE_SPACE=1; may be repeated.",
    ),
    click.option(
        "--start-timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=1800.0,
        show_default=True,
        metavar="SECONDS",
        help="Timeout of a server start.",
    ),
)
"""Options of the process of a server."""

_START = (
    click.option("--model", metavar="DIR|NAME", help="Model to serve."),
    click.option(
        "--profile",
        "profile_dir",
        type=FILE,
        metavar="DIR",
        help="Start servers as in this profile: model, flags, environment, and settings that are not given here.",
    ),
    *_PROCESS,
    click.option("--port", type=int, help="Port of the server. [default: a free one]"),
)


def process_options(command: Command) -> Command:
    """Add the options of a server's process: ``python``, ``flags`` and ``environment`` as pairs, ``timeout_s``."""
    for option in reversed(_PROCESS):
        command = option(command)
    return command


HOW_STARTED = ("python", "flags", "environment", "port", "timeout_s")
"""Options that change nothing where a server runs already."""


def start_options(command: Command) -> Command:
    """Add how a server is started.

    The command gets it as ``start``, a dict of what `Deployment` takes, and as ``profiled`` the settings of the profile
    that is named, a dict by vLLM's names.
    """

    @functools.wraps(command)
    def with_start(**given: Any) -> Any:
        start = {name: given.pop(name) for name in ("model", "port", "timeout_s")}
        start |= {name: dict(given.pop(name)) for name in ("flags", "environment")}
        start["python"] = str(given.pop("python"))
        profile_dir, profiled = given.pop("profile_dir"), {}
        if profile_dir is not None:
            from lora_capacity_profiling.deployment import Profiled

            like = Profiled.read(profile_dir)
            start["model"] = start["model"] or like.model
            start["flags"] = {**like.flags, **start["flags"]}
            start["environment"] = {**like.environment, **start["environment"]}
            profiled = dict(like.settings)
        return command(**given, start=start, profiled=profiled)

    decorated: Any = with_start
    for option in reversed(_START):
        decorated = option(decorated)
    return decorated


class Stages:
    """What is going on with one server after the other, and how long all will yet take.

    Args:
        titles: The servers.
        each_s: About how long each takes, seconds; corrected as servers are done with.
        show: Called with a line of text, and the share that is done.
    """

    def __init__(self, titles: Sequence[str], each_s: float, show: Callable[[str, float], None]) -> None:
        self._titles, self._each_s, self._show = titles, each_s, show
        self._started_s = self._began_s = time.monotonic()
        self._done = -1

    def begin(self) -> Tell:
        """Go on to the next server; return what to tell of it."""
        self._done, self._began_s = self._done + 1, time.monotonic()
        if self._done:
            self._each_s = (self._began_s - self._started_s) / self._done
        return self._tell

    def _tell(self, stage: str, spent_s: float, takes_s: float | None) -> None:
        here_s = min(time.monotonic() - self._began_s, self._each_s)
        left_s = (len(self._titles) - self._done) * self._each_s - here_s
        part = f" ({self._done + 1} of {len(self._titles)})" if len(self._titles) > 1 else ""
        of = "" if takes_s is None else f" of {takes_s:.0f}"
        text = f"{self._titles[self._done]}{part}: {stage}, {spent_s:.0f}{of} s; about {left_s:.0f} s left"
        self._show(text, 1.0 - left_s / (len(self._titles) * self._each_s))


@contextlib.contextmanager
def stages(titles: Sequence[str], each_s: float) -> Iterator[Stages]:
    """Show on stderr what is going on until the block ends: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        titles: The servers, one after the other.
        each_s: About how long each takes, seconds.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield Stages(titles, each_s, lambda text, done: bar.update(task, description=text, completed=done))
        return
    last: list[Any] = ["", 0.0]

    def show(text: str, _: float) -> None:
        stage, now_s = text.partition(",")[0], time.monotonic()
        if stage != last[0] or now_s - last[1] >= _TOLD_EVERY_S:
            last[:] = [stage, now_s]
            say(text, err=True)

    yield Stages(titles, each_s, show)
