"""Files that commands write: whole or not at all, so that a reader never sees half of one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lora_capacity.errors import InputError
from lora_capacity.files import write_whole


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
