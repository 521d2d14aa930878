"""Tables that commands write: whole or not at all, by the file's name as Parquet or CSV."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_capacity.errors import InputError

if TYPE_CHECKING:
    import pyarrow

_SUFFIXES = (".parquet", ".csv")


def parts_folder(output: Path) -> Path:
    """Return the folder in which is kept what will become a table."""
    return output.with_name(f"{output.name}.parts")


def check_output(output: Path) -> None:
    """Refuse a table that cannot be written before anything is computed."""
    if output.suffix.lower() not in _SUFFIXES:
        raise InputError("--output", str(output), f"a name that ends in {' or '.join(_SUFFIXES)}")
    if not output.parent.is_dir():
        raise InputError("--output", str(output), "a file in a folder that exists")
    if output.is_dir():
        raise InputError("--output", str(output), "a file, not a folder")


def write_table(output: Path, columns: dict[str, Any]) -> None:
    """Write a table whole or not at all: a reader never sees half of it."""
    import pyarrow

    content = pyarrow.table(columns)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
        try:
            _write_as(output.suffix.lower(), content, name)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(output)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise InputError("--output", str(output), f"a file that can be written ({error.strerror})") from None


def _write_as(suffix: str, content: "pyarrow.Table", name: str) -> None:
    if suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(content, name)
    else:
        from pyarrow import parquet

        parquet.write_table(content, name)


def _umask() -> int:
    """Return the mask that new files get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
