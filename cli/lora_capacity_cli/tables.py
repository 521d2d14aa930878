"""Tables that commands write: whole or not at all, by the file's name as Parquet or CSV."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_capacity.errors import ClusterError, InputError
from lora_capacity.files import locked_folder
from lora_capacity_cli import files
from lora_capacity_cli.output import say

_SUFFIXES = (".parquet", ".csv")


@contextlib.contextmanager
def parts_folder(output: Path) -> Iterator[Path]:
    """Keep what will become a table in a folder beside it, which is removed once the block has ended well.

    Args:
        output: The table.

    Yields:
        The folder.

    Raises:
        InputError: If the folder cannot be made, or another process makes the same table.
    """
    folder = output.with_name(f"{output.name}.parts")
    with files.writing("--output", folder):
        folder.mkdir(exist_ok=True)
        held = locked_folder(folder, wait=False)
    with held as alone:
        if not alone:
            remedy = "another process makes this one: wait for it, or name another file"
            raise InputError("--output", str(output), "a table that nobody else makes", remedy)
        try:
            yield folder
        except BaseException as error:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if there is nothing in it
            if isinstance(error, KeyboardInterrupt | ClusterError) and folder.exists():
                say(f"interrupted; the same command goes on from what is in {folder}", err=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse a table that cannot be written before anything is computed."""
    files.check_output("--output", output, _SUFFIXES)


def write_table(output: Path, columns: dict[str, Any]) -> None:
    """Write a table whole or not at all: a reader never sees half of it."""
    import pyarrow
    from pyarrow import csv, parquet

    write = csv.write_csv if output.suffix.lower() == ".csv" else parquet.write_table
    sink = pyarrow.BufferOutputStream()
    write(pyarrow.table(columns), sink)
    files.write_file("--output", output, sink.getvalue().to_pybytes())
