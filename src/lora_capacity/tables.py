"""Strict reading of small tables, of files and in memory: complaints name place, column and what is allowed."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from lora_capacity.errors import InputError, check_number, nearest_hint, number_words
from lora_capacity.reading import read_text
from lora_capacity.text import number_of


@runtime_checkable
class ArrowStream(Protocol):
    """A table that Arrow can read: of pandas, polars, Arrow itself and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


@runtime_checkable
class Interchange(Protocol):
    """A table of a library that has the older interchange protocol only."""

    def __dataframe__(self, nan_as_null: bool = False, allow_copy: bool = True) -> Any: ...


FrameLike = ArrowStream | Interchange
"""Tables in memory that are taken in the place of a file."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A table in memory.

    Attributes:
        table: The table, of `pyarrow`.
        name: What messages call it; `str` of it, as of a file's path.
    """

    table: Any
    name: str = "table"

    @classmethod
    def of(cls, given: FrameLike) -> Self:
        """Return a table in memory as Arrow has it.

        Raises:
            InputError: If Arrow cannot read it.
        """
        import pyarrow  # not at the top: what reads no frame should not wait for it
        from pyarrow.interchange import from_dataframe

        try:
            table = pyarrow.table(given) if isinstance(given, ArrowStream) else from_dataframe(given)
        except (pyarrow.ArrowException, NotImplementedError, TypeError, ValueError) as error:
            raise InputError("", type(given).__name__, "a table that Arrow can read", str(error)) from None
        for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
            if pyarrow.types.is_dictionary(column.type):  # Arrow decodes none of views, which polars has
                texts = [each.dictionary.cast("string").take(each.indices.cast("int64")) for each in column.chunks]
                table = table.set_column(place, name, pyarrow.chunked_array(texts, "string"))
        return cls(table)

    def named(self, name: str) -> Self:
        """Return the same table under another name."""
        return replace(self, name=name)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        kind: ``number``, ``integer`` or ``text``.
        required: Whether the table must have the column; an absent optional column is returned as missing.
        blank: Whether a cell may be empty; an empty cell becomes NaN (numbers) or an empty string (text).
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        exclusive: Whether ``minimum`` itself is refused.
    """

    kind: str = "number"
    required: bool = True
    blank: bool = False
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False

    @property
    def allowed(self) -> str:
        """The allowed cell contents in words."""
        words = "text"
        if self.kind != "text":
            words = number_words(self.minimum, self.maximum, exclusive=self.exclusive, integer=self.kind == "integer")
        return f"{words} or empty" if self.blank else words

    def checked(self, field: str, number: object) -> float:
        """Return a number that the column may hold.

        Raises:
            InputError: If it may not.
        """
        return check_number(
            field,
            number,
            minimum=self.minimum,
            maximum=self.maximum,
            exclusive=self.exclusive,
            integer=self.kind == "integer",
        )


def read_table(path: Path | Frame, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Read the named columns of a CSV file, or of a table in memory; other columns are ignored.

    Args:
        path: The file, whose first line names the columns; or the table.
        columns: What each wanted column holds.

    Returns:
        One array per wanted column, ``[rows]``: float64 for numbers and integers (NaN where blank), object for text.

    Raises:
        InputError: If the file cannot be read, has no rows or lacks a required column, or a cell does not hold what it
            should.
    """
    if not isinstance(path, Frame):
        return parse_table(read_text(path, "a readable CSV file"), str(path), columns)
    names = path.table.column_names
    _check_columns(str(path), names, columns)
    rows = path.table.select([name for name in columns if name in names]).to_pylist()
    return _columns(str(path), [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)], columns)


def parse_table(text: str, path: str, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Read the named columns of a CSV file's text, as `read_table` does.

    Args:
        text: What the file holds.
        path: Where it is from, for messages.
        columns: What each wanted column holds.

    Raises:
        InputError: As of `read_table`.
    """
    try:
        with io.StringIO(text, newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            _check_columns(path, names, columns)
            rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(path, str(error), "a readable CSV file") from None
    for line, row in rows:
        if None in row:
            cells = f"{len(names) + len(row[None])} cells"
            raise InputError(f"{path} line {line}", cells, f"{len(names)}, one a column", "decimals have a point")
    return _columns(path, [(f"{path} line {line}", row) for line, row in rows], columns)


def _columns(
    path: str, rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Mapping[str, Column]
) -> dict[str, np.ndarray]:
    """Return columns from rows and where each stands."""
    if not rows:
        raise InputError(path, "no rows", "at least one row")
    return {
        name: np.array(
            [_cell(f"{where}, {name}", row.get(name), column) for where, row in rows],
            dtype=object if column.kind == "text" else np.float64,
        )
        for name, column in columns.items()
    }


def _cell(field: str, value: Any, column: Column) -> float | str:
    text = value.strip() if isinstance(value, str) else value
    if text is None or text == "" or text != text:  # not a number: what pandas writes for none
        if column.blank or not column.required:
            return "" if column.kind == "text" else np.nan
        raise InputError(field, "", column.allowed)
    if column.kind == "text":
        return str(text)
    try:
        return column.checked(field, number_of(text) if isinstance(text, str) else text)
    except ValueError:  # which an InputError is too; what stands in the cell is told, not what it was read as
        raise InputError(field, text, column.allowed) from None


def _check_columns(path: str, names: Sequence[str], columns: Mapping[str, Column]) -> None:
    """Refuse a table with a column twice, or without one that it must have."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} line 1", name, "every column once")
    for name, column in columns.items():
        if column.required and name not in names:
            found = f"columns {', '.join(names) or 'none'}"
            raise InputError(path, found, f"a table with a column {name!r}", nearest_hint(name, names))
