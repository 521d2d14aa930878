"""Tables that commands write: whole or not at all, by the file's name as Parquet or CSV."""

from pathlib import Path
from typing import Any

from lora_capacity_cli import files

_SUFFIXES = (".parquet", ".csv")


def parts_folder(output: Path) -> Path:
    """Return the folder in which is kept what will become a table."""
    return output.with_name(f"{output.name}.parts")


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
