"""Tables that commands write: whole or not at all, by the file's name as Parquet or CSV."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_capacity_cli import files

if TYPE_CHECKING:
    import pyarrow

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

    content = pyarrow.table(columns)
    files.write_whole("--output", output, lambda name: _write_as(output.suffix.lower(), content, name))


def _write_as(suffix: str, content: "pyarrow.Table", name: str) -> None:
    if suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(content, name)
    else:
        from pyarrow import parquet

        parquet.write_table(content, name)
