"""A serving run as a row of a table that ``fit --runs`` and ``validate`` read, and adding rows to such a table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_capacity.errors import InputError, check_keys
from lora_capacity.files import locked_folder, write_whole
from lora_capacity.measurements.runs import runs_of
from lora_capacity.measurements.schemas import MEASURED_RUN_COLUMNS, RUN_COLUMNS, SERVING_RUNS


def run_row(about: Mapping[str, object], measured: Mapping[str, float]) -> dict[str, object]:
    """Return one row with all columns; what is not known, or NaN, is empty text.

    Args:
        about: What was run, by names of ``RUN_COLUMNS``; lists as text with blanks between.
        measured: What was measured, by names of ``MEASURED_RUN_COLUMNS``; others are left out.

    Raises:
        InputError: If a name of ``about`` is unknown.
    """
    check_keys("about", about, RUN_COLUMNS)
    row = {name: about.get(name, "") for name in RUN_COLUMNS}
    known = {name: value for name, value in measured.items() if not math.isnan(value)}
    return row | {name: known.get(name, "") for name in MEASURED_RUN_COLUMNS}


def check_row(row: Mapping[str, object]) -> None:
    """Refuse a row that ``validate`` and ``fit`` would refuse.

    Raises:
        InputError: As of `read_runs`.
    """
    runs_of(SERVING_RUNS.parse(as_csv([row]), "observed"), Path("observed"))


def append_runs(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a table of serving runs, made if absent; whatever happens, the file is the old or the new one.

    Columns that the table lacks are added to it; those that a row lacks are left empty. Several processes may add to
    one table at once.

    Args:
        path: The table, CSV.
        rows: Rows as `run_row` makes them; none: only makes sure that the table can be written.

    Raises:
        InputError: If the file is no table of serving runs, or cannot be written. The rows are then the note of the
            exception, lest they be lost.
    """
    append_rows(path, rows, SERVING_RUNS.names, "max_cpu_loras", "a table of serving runs")


def append_rows(
    path: Path, rows: Sequence[Mapping[str, object]], names: Sequence[str], needs: str, allowed: str
) -> None:
    """Add rows to a table, as `append_runs` does.

    Args:
        path: The table, CSV.
        rows: The rows.
        names: Columns that the table shall have.
        needs: A column that tells such a table from others.
        allowed: What the file must be, in words.

    Raises:
        InputError: If the file is no such table, or cannot be written; as of `append_runs`.
    """
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked_folder(path.parent):  # of two that read the same rows, one would lose the other's
                columns, lines = _read(path, needs, allowed)
                columns += [name for name in names if name not in columns]
                write_whole(path, as_csv([*lines, *rows], columns))
        except OSError as error:
            raise InputError(str(path), error.strerror or str(error), "a table that can be written") from None
    except InputError as error:
        if rows:
            error.add_note(f"not saved:\n{as_csv(rows, names)}")
        raise


def as_csv(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = SERVING_RUNS.names) -> str:
    """Return a table as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(path: Path, needs: str, allowed: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows of a table; none where there is no file."""
    if not path.exists():
        return [], []
    if not path.is_file():  # writing would put a file in place of a device
        raise InputError(str(path), "no ordinary file", allowed)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(path), getattr(error, "strerror", None) or str(error), allowed) from None
    columns = list(reader.fieldnames or [])
    if columns and needs not in columns:
        raise InputError(str(path), f"columns {', '.join(columns)}", allowed, "give another file")
    if any(None in row or None in row.values() for row in rows):
        raise InputError(str(path), "rows of different lengths", allowed)
    return columns, rows
