"""Files that commands write: whole or not at all, so that a reader never sees half of one."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_capacity.errors import InputError


def check_output(option: str, output: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written before anything is computed.

    Args:
        option: The option that names it, for the message.
        output: The file.
        suffixes: Allowed endings of its name, with the dot.

    Raises:
        InputError: If its name ends otherwise, its folder does not exist or it is a folder.
    """
    if output.suffix.lower() not in suffixes:
        raise InputError(option, str(output), f"a name that ends in {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise InputError(option, str(output), "a file in a folder that exists")
    if output.is_dir():
        raise InputError(option, str(output), "a file, not a folder")


def write_whole(option: str, output: Path, write: Callable[[str], object]) -> None:
    """Write a file under a temporary name beside it, then rename it.

    Args:
        option: The option that names it, for the message.
        output: The file.
        write: Writes the content to the file of the name that it is given.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
        try:
            write(name)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(output)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise InputError(option, str(output), f"a file that can be written ({error.strerror})") from None


def write_text(option: str, output: Path, content: str) -> None:
    """Write a text as `write_whole` does."""
    write_whole(option, output, lambda name: Path(name).write_text(content, encoding="utf-8"))


def _umask() -> int:
    """Return the mask that new files get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
