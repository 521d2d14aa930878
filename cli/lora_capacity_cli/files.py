"""Files that commands write: whole or not at all, so that a reader never sees half of one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lora_capacity.errors import InputError
from lora_capacity.files import write_whole


def check_output(option: str, output: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written, or may not be written over, before anything is computed.

    Args:
        option: The option that names it, for the message.
        output: The file.
        suffixes: Allowed endings of its name, with the dot.

    Raises:
        InputError: If its name ends otherwise, its folder does not exist, it is a folder or a device, or another option
            of the running command names the same file, or the folder that it is in: to be read, or to be written too.
    """
    if output.suffix.lower() not in suffixes:
        raise InputError(option, str(output), f"a name that ends in {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise InputError(option, str(output), "a file in a folder that exists")
    if output.exists() and not output.is_file():
        raise InputError(option, str(output), "a file, not a folder or device")
    for name, other in _other_files(option):
        if _same(output, other):
            raise InputError(option, str(output), f"another file than {name}", "it would be written over")


def _other_files(option: str) -> Iterator[tuple[str, Path]]:
    """Yield the files that other options of the running command name, and those that their files refer to."""
    ctx = click.get_current_context(silent=True)
    for param in [] if ctx is None else ctx.command.params:
        if option in param.opts or ctx is None:
            continue
        given = ctx.params.get(param.name or "")
        for value in given if isinstance(given, tuple) else (given,):
            if value and isinstance(value, str | Path):  # no text is no path, though it reads as this folder's
                name = param.opts[-1] if param.opts[-1].startswith("-") else param.human_readable_name
                path = Path(value)
                yield name, path
                if path.is_dir():
                    yield from ((f"a file in {name}", each) for each in path.iterdir())
                elif param.name == "workload":
                    yield from ((f"a table of {name}", each) for each in _tables(path))


def _tables(workload: Path) -> list[Path]:
    """Return the tables that a workload file refers to; none where it cannot be read, which is told elsewhere."""
    from lora_capacity.reading import read_mapping

    try:
        content: Any = read_mapping(workload)
        requests = content.get("requests") or {}
        lengths = [requests.get(name) or {} for name in ("input_tokens", "output_tokens")]
        trace = requests.get("trace")
        names = [
            *((content.get("adapters") or {}).get(name) for name in ("list", "rates")),
            trace.get("file") if isinstance(trace, dict) else trace,
            *(x.get("histogram") for x in lengths),
        ]
    except (InputError, AttributeError):
        return []
    return [workload.parent / name for name in names if isinstance(name, str)]


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return one.absolute() == other.absolute()


@contextlib.contextmanager
def writing(option: str, output: Path) -> Iterator[None]:
    """Say which option names a file that cannot be written.

    Args:
        option: The option, for the message.
        output: The file.

    Raises:
        InputError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(option, str(output), f"a file that can be written ({error.strerror})") from None


def write_file(option: str, output: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; faults as `writing` tells them."""
    with writing(option, output):
        write_whole(output, content)
