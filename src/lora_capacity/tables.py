"""Strict reading of small CSV tables: every complaint names file, line, column and what is allowed."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_capacity.errors import InputError, check_number, nearest_hint, number_words
from lora_capacity.reading import read_text
from lora_capacity.text import number_of


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


def read_table(path: Path, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Read the named columns of a CSV file; other columns are ignored.

    Args:
        path: The file; its first line names the columns.
        columns: What each wanted column holds.

    Returns:
        One array per wanted column, ``[rows]``: float64 for numbers and integers (NaN where blank), object for text.

    Raises:
        InputError: If the file cannot be read, has no rows or lacks a required column, or a cell does not hold what it
            should.
    """
    return parse_table(read_text(path, "a readable CSV file"), str(path), columns)


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
            _check_distinct(path, names)
            for name, column in columns.items():
                if column.required and name not in names:
                    raise InputError(
                        path,
                        f"columns {', '.join(names) or 'none'}",
                        f"a table with a column {name!r}",
                        nearest_hint(name, names),
                    )
            rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(path, str(error), "a readable CSV file") from None
    for line, row in rows:
        if None in row:
            cells = f"{len(names) + len(row[None])} cells"
            raise InputError(f"{path} line {line}", cells, f"{len(names)}, one a column", "decimals have a point")
    if not rows:
        raise InputError(path, "no rows", "at least one row")
    return {
        name: np.array(
            [_cell(f"{path} line {line}, {name}", row.get(name), column) for line, row in rows],
            dtype=object if column.kind == "text" else np.float64,
        )
        for name, column in columns.items()
    }


def _cell(field: str, text: str | None, column: Column) -> float | str:
    text = (text or "").strip()
    if not text:
        if column.blank or not column.required:
            return "" if column.kind == "text" else np.nan
        raise InputError(field, text, column.allowed)
    if column.kind == "text":
        return text
    try:
        return column.checked(field, number_of(text))
    except ValueError:  # which an InputError is too; what stands in the cell is told, not what it was read as
        raise InputError(field, text, column.allowed) from None


def _check_distinct(path: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} line 1", name, "every column once")
