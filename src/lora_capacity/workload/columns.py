"""Large tables of traffic, read column by column: CSV and JSON lines, compressed or not, Parquet, and in memory.

Arrow reads and converts them in blocks. Only where it meets a cell that is not what its column holds, or a number out
of its range, rows are read once more in plain Python up to the first such cell, which the message then names.
"""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_capacity.errors import InputError, check_number, nearest_hint
from lora_capacity.reading import check_ordinary
from lora_capacity.tables import Column, Frame
from lora_capacity.text import number_of
from lora_capacity.workload._fields import FloatArray, Int32Array

MAX_ROWS = 20_000_000
"""Most rows of a table: a guard for memory (20 bytes each, several times while sorting)."""

FORMS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""What a table is, by the end of its name, ``.gz`` and the like left out."""

_COMPRESSED = (".gz", ".bz2", ".zst")

_FIRST_LINES = 1000
"""Lines of JSON whose keys are taken for the columns: any of them may be left out where it is empty."""

_TIME = "a number, or a date and time such as 2026-01-31T12:00:00"


Names = tuple[str, ...]
"""Names that a column may have, the first that a table has being taken."""


@dataclass(frozen=True)
class Clock:
    """A column of times: numbers, or dates and times of day."""

    allowed: str = _TIME


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of text, each text once.

    Attributes:
        names: The different texts, in order of their first row; an empty cell is the empty text.
        index: Which of them each row holds, int32 ``[rows]``.
    """

    names: list[str]
    index: Int32Array


@dataclass(frozen=True, eq=False)
class Times:
    """A column of times.

    Attributes:
        values: Numbers in whatever unit the table has; of dates, seconds since the earliest, float64 ``[rows]``.
        are_dates: Whether they are dates and times of day, which need no unit.
    """

    values: FloatArray
    are_dates: bool


def is_recording(path: Path) -> bool:
    """Whether a file is a table by the end of its name, rather than a workload file."""
    return form_of(path) is not None


def form_of(path: Path) -> str | None:
    """Return ``csv``, ``jsonl`` or ``parquet`` by the end of a file's name, None if it is none of them."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return FORMS.get(suffixes[-1]) if suffixes else None


def read_columns(path: Path | Frame, columns: Mapping[Names, Column | Clock]) -> dict[Names, Any]:
    """Read the named columns of a table; other columns are ignored.

    Args:
        path: A file whose name ends in ``.csv``, ``.jsonl``, ``.ndjson`` or ``.parquet``, of which all but the last may
            end in ``.gz``, ``.bz2`` or ``.zst`` besides; or a table in memory. The first line of CSV names the columns.
        columns: What each wanted column holds, by the names that it may have, of which the first that the table has is
            taken. A required column must be there; one that is not and may be absent is left out of what is returned.

    Returns:
        By these names: float64 ``[rows]`` of numbers, NaN where blank; `Texts`; `Times`.

    Raises:
        InputError: If the file cannot be read, has no rows or too many or lacks a column, or a cell does not hold what
            it should; names its row (the first below the names is 1) and column.
    """
    import pyarrow  # not at the top: workloads without such a table should not wait for it

    form = "frame" if isinstance(path, Frame) else form_of(path)
    if not isinstance(path, Frame):
        check_ordinary(path, "a readable table")
    if form is None:
        raise InputError(str(path), path.name, f"a name that ends in {', '.join(FORMS)}, with or without .gz")
    reader: Any = _READERS[form]
    wanted: dict[str, Column | Clock] = {}
    try:
        held = reader.columns(path)
        chosen = {names: name for names in columns if (name := _first(path, names, columns[names], held))}
        wanted = {name: columns[names] for names, name in chosen.items()}
        types = {name: _arrow_type(column, held[name]) for name, column in wanted.items()}
        found = _gathered(path, reader.batches(path, types), wanted)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        _tell_first_bad(path, form, wanted)
        raise InputError(str(path), " ".join(str(error).split()), "a readable table") from None
    if not all(map(_rows, found.values())):
        raise InputError(str(path), "no rows", "at least one row")
    for name, column in wanted.items():
        bad = _bad_rows(found[name], column)
        if bad.any():
            row = int(np.argmax(bad))
            _tell_first_bad(path, form, wanted)
            values = found[name].values if isinstance(found[name], Times) else found[name]
            value = "" if isinstance(values, Texts) else float(values[row])
            raise InputError(f"{path} row {row + 1}, {name}", value, column.allowed)
    return {names: found[name] for names, name in chosen.items()}


def _first(path: Path | Frame, names: Names, column: Column | Clock, held: Mapping[str, Any]) -> str | None:
    """Return the first of the names that a column may have which a table has."""
    for name in names:
        if name in held:
            return name
    if isinstance(column, Column) and not column.required:
        return None
    allowed = f"a table with a column {' or '.join(map(repr, names))}"
    raise InputError(str(path), f"columns {', '.join(held) or 'none'}", allowed, nearest_hint(names[0], held))


def _rows(column: Any) -> int:
    return len(column.index if isinstance(column, Texts) else column.values if isinstance(column, Times) else column)


def _csv_columns(path: Path) -> dict[str, Any]:
    """Return the columns of a CSV file with Arrow's types, as the first row has them."""
    with _text_of(path) as text:
        reader = csv.DictReader(text)
        try:
            names = list(reader.fieldnames or [])
            first = next(reader, None)
        except csv.Error as error:
            raise InputError(str(path), str(error), "a readable CSV file") from None
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}, first line", name, "every column once")
    if names and first is None:
        raise InputError(str(path), "no rows", "at least one row")
    return {name: _type_of((first or {}).get(name)) for name in names}


def _csv_batches(path: Path, types: Mapping[str, Any]) -> Iterator[Any]:
    import pyarrow
    from pyarrow import csv as arrow_csv

    options = arrow_csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""])
    with pyarrow.input_stream(str(path), compression="detect") as stream:
        yield from arrow_csv.open_csv(stream, convert_options=options)


def _jsonl_columns(path: Path) -> dict[str, Any]:
    """Return the keys of the first lines with Arrow's types."""
    held: dict[str, Any] = {}
    with _text_of(path) as text:
        for cells in itertools.islice(_rows_of(path, "jsonl", text), _FIRST_LINES):
            for name, value in cells.items():
                if held.get(name) is None:
                    held[name] = None if value is None else _type_of(value)
    return held


def _type_of(value: object) -> Any:
    """Return Arrow's type of dates for one, that of numbers for anything else."""
    import pyarrow

    try:
        date = datetime.fromisoformat(value.strip()) if isinstance(value, str) else None
    except ValueError:
        date = None
    if date is None or (isinstance(value, str) and value.strip().isdigit()):
        return pyarrow.float64()
    return pyarrow.timestamp("ns", None if date.tzinfo is None else "UTC")


def _jsonl_batches(path: Path, types: Mapping[str, Any]) -> Iterator[Any]:
    import pyarrow
    from pyarrow import json as arrow_json

    dated = {name: pyarrow.string() if pyarrow.types.is_timestamp(kind) else kind for name, kind in types.items()}
    plain = {name: pyarrow.string() if pyarrow.types.is_dictionary(kind) else kind for name, kind in dated.items()}
    options = arrow_json.ParseOptions(
        explicit_schema=pyarrow.schema(list(plain.items())), unexpected_field_behavior="ignore"
    )
    with pyarrow.input_stream(str(path), compression="detect") as stream:
        table = arrow_json.read_json(stream, parse_options=options)
    yield from table.select(list(types)).cast(pyarrow.schema(list(types.items()))).to_batches()


def _parquet_columns(path: Path) -> dict[str, Any]:
    from pyarrow import parquet

    schema = parquet.read_schema(path)
    return dict(zip(schema.names, schema.types, strict=True))


def _parquet_batches(path: Path, types: Mapping[str, Any]) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(columns=list(types)):
        yield from _converted(pyarrow.Table.from_batches([batch]), types)


def _frame_columns(frame: Frame) -> dict[str, Any]:
    return dict(zip(frame.table.schema.names, frame.table.schema.types, strict=True))


def _frame_batches(frame: Frame, types: Mapping[str, Any]) -> Iterator[Any]:
    yield from _converted(frame.table, types)


def _converted(table: Any, types: Mapping[str, Any]) -> Any:
    """Return batches of a table's columns in other types."""
    import pyarrow

    plain = {  # a column of few texts has numbers of its own
        name: kind.value_type if pyarrow.types.is_dictionary(kind) else kind for name, kind in types.items()
    }
    schemas = [pyarrow.schema(list(each.items())) for each in (plain, types)]
    return table.select(list(types)).cast(schemas[0]).cast(schemas[1]).to_batches()


class _Reader(NamedTuple):
    """How tables of a form are read: their columns with Arrow's types, and batches of some in the types wanted."""

    columns: Callable[[Any], dict[str, Any]]
    batches: Callable[[Any, Mapping[str, Any]], Iterator[Any]]


_READERS = {
    "csv": _Reader(_csv_columns, _csv_batches),
    "jsonl": _Reader(_jsonl_columns, _jsonl_batches),
    "parquet": _Reader(_parquet_columns, _parquet_batches),
    "frame": _Reader(_frame_columns, _frame_batches),
}


def _arrow_type(column: Column | Clock, found: Any) -> Any:
    """Return the type that a column is read as."""
    import pyarrow

    if isinstance(column, Column):
        is_text = column.kind == "text"
        return pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if is_text else pyarrow.float64()
    if pyarrow.types.is_timestamp(found) or pyarrow.types.is_date(found):
        return pyarrow.timestamp("ns", getattr(found, "tz", None))
    return pyarrow.float64()


def _gathered(path: Path | Frame, batches: Iterator[Any], columns: Mapping[str, Column | Clock]) -> dict[str, Any]:
    """Return what batches hold, column by column."""
    numbers: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    texts: dict[str, dict[str, int]] = {name: {} for name in columns}
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        if rows > MAX_ROWS:
            raise InputError(str(path), f"more than {MAX_ROWS} rows", f"at most {MAX_ROWS}")
        for name, column in columns.items():
            values = batch.column(name)
            if isinstance(column, Column) and column.kind == "text":
                numbers[name].append(_numbered(values, texts[name]))
            elif isinstance(column, Clock) and hasattr(values.type, "tz"):
                # A blank one becomes the earliest of all, which no date is.
                numbers[name].append(values.cast("int64").fill_null(np.iinfo(np.int64).min).to_numpy())
            else:
                numbers[name].append(values.to_numpy(zero_copy_only=False))
    return {name: _column(numbers[name], texts[name], column) for name, column in columns.items()}


def _numbered(values: Any, known: dict[str, int]) -> Int32Array:
    """Return the number of each text among those known, to which new ones are added."""
    encoded = values.combine_chunks() if hasattr(values, "combine_chunks") else values
    own = [known.setdefault((name or "").strip(), len(known)) for name in encoded.dictionary.to_pylist()]
    blank = known.setdefault("", len(known)) if encoded.null_count else 0
    index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    found: Int32Array = np.array([*own, blank], np.int32)[index]
    return found


def _column(parts: list[np.ndarray], names: Mapping[str, int], column: Column | Clock) -> Any:
    whole = np.concatenate(parts) if parts else np.zeros(0)
    if isinstance(column, Column):
        return Texts(list(names), whole.astype(np.int32)) if column.kind == "text" else whole.astype(np.float64)
    if whole.dtype.kind != "i":
        return Times(whole.astype(np.float64), False)
    blank = whole == np.iinfo(np.int64).min
    earliest = whole[~blank].min(initial=np.iinfo(np.int64).max)
    return Times(np.where(blank, np.nan, (whole - earliest) / 1e9), True)


def _bad_rows(values: Any, column: Column | Clock) -> np.ndarray:
    """Return which rows hold what the column does not, bool ``[rows]``."""
    if isinstance(column, Clock):
        return np.asarray(~np.isfinite(values.values))
    if isinstance(values, Texts):
        blank = values.names.index("") if "" in values.names and not column.blank else -1
        return np.asarray(values.index == blank)
    bad = ~np.isfinite(values)
    bad &= ~(np.isnan(values) & (column.blank or not column.required))
    with np.errstate(invalid="ignore"):
        if column.minimum is not None:
            bad |= values <= column.minimum if column.exclusive else values < column.minimum
        if column.maximum is not None:
            bad |= values > column.maximum
        if column.kind == "integer":
            bad |= np.isfinite(values) & (values != np.floor(values))
    return np.asarray(bad)


def _tell_first_bad(path: Path | Frame, form: str, columns: Mapping[str, Column | Clock]) -> None:
    """Read rows in plain Python and raise `InputError` at the first cell that is not what its column holds."""
    if isinstance(path, Frame) or form == "parquet":
        return
    # What cannot be unpacked is told by whoever called.
    with contextlib.suppress(OSError), _text_of(path) as text:
        for row, cells in enumerate(_rows_of(path, form, text), start=1):
            for name, column in columns.items():
                _check_cell(f"{path} row {row}, {name}", cells.get(name), column)


def _rows_of(path: Path, form: str, text: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    if form == "csv":
        reader = csv.DictReader(text)
        try:
            for row, cells in enumerate(reader, start=1):
                if None in cells:
                    wide = len(reader.fieldnames or ()) + len(cells[None])
                    raise InputError(f"{path} row {row}", f"{wide} cells", "one a column", "decimals have a point")
                yield cells
        except csv.Error as error:
            raise InputError(str(path), str(error), "a readable CSV file") from None
        return
    for row, line in enumerate(filter(str.strip, text), start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path} row {row}", line.strip(), "a JSON object a line")
        yield found


def _check_cell(field: str, value: Any, column: Column | Clock) -> None:
    text = value.strip() if isinstance(value, str) else value
    if text is None or text == "":
        if isinstance(column, Column) and (column.blank or not column.required):
            return
        raise InputError(field, text, column.allowed)
    if isinstance(column, Column) and column.kind == "text":
        return
    try:
        number: object = number_of(text) if isinstance(text, str) else text
        check_number(field, number) if isinstance(column, Clock) else column.checked(field, number)
    except ValueError:  # which an InputError is too; what stands in the cell is told, not what it was read as
        if not (isinstance(column, Clock) and isinstance(text, str) and _is_date(text)):
            raise InputError(field, text, column.allowed) from None


def _is_date(text: str) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_timestamp(_type_of(text)))


@contextlib.contextmanager
def _text_of(path: Path) -> Iterator[io.TextIOWrapper]:
    """Yield a table's text, to be read line by line."""
    import pyarrow

    with pyarrow.input_stream(str(path), compression="detect") as stream:
        buffered = io.BufferedReader(_Readable(stream))
        yield io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="", errors="replace")


class _Readable(io.RawIOBase):
    """An Arrow stream as Python's text readers take it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return by how many bytes."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
