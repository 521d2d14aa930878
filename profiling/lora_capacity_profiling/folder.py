"""The profile folder while it is written: every finished point is on disk at once, whole or not at all.

``points.jsonl`` is the journal: one line a finished or failed point, only ever appended to. The tables and
``profile.json`` are made from it anew after each point, under a temporary name that is then renamed.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lora_capacity.errors import InputError
from lora_capacity.files import write_whole
from lora_capacity.measurements.schemas import PROFILE_TABLES, SERVING_RUNS, TableSchema
from lora_capacity.reading import parse_json, read_json
from lora_capacity.schema import JsonModel, NotNegative, Number, validated
from lora_capacity_profiling.runs import as_csv

JOURNAL = "points.jsonl"
DESCRIPTION = "profile.json"
TABLES: Mapping[str, TableSchema] = {**PROFILE_TABLES, "serving_runs": SERVING_RUNS}
"""The tables by the names of their files; what a server does not tell is left empty."""


@dataclass(frozen=True)
class Finished:
    """One point that was measured, or failed.

    Attributes:
        id: Its name, see :attr:`~lora_capacity_profiling.points.Point.id`.
        table: Table of its row; empty if it failed.
        row: Its row.
        repeats: What each repeat gave, in the unit of ``unit``.
        unit: Unit of ``repeats``.
        took_s: Seconds that it took.
        failure: Why it failed; empty if it did not.
    """

    id: str
    table: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    repeats: tuple[float, ...] = ()
    unit: str = "ms"
    took_s: float = 0.0
    failure: str = ""

    @property
    def spread(self) -> float | None:
        """Largest over smallest repeat, less 1; None where there are no two."""
        if len(self.repeats) < 2 or min(self.repeats) <= 0:
            return None
        return max(self.repeats) / min(self.repeats) - 1.0


class _JournalLine(JsonModel):
    """A line of the journal, as `Finished` has it."""

    id: str
    table: str = ""
    row: dict[str, Any] = Field(default_factory=dict)
    repeats: list[Annotated[float, Number()]] = Field(default_factory=list)
    unit: str = "ms"
    took_s: NotNegative = 0.0
    failure: str = ""


class ProfileFolder:
    """A profile folder that points are added to.

    Attributes:
        path: Where it is.
        finished: What it holds, by the points' names; a later attempt at a point takes the place of an earlier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, Finished] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = (path / JOURNAL).read_text(encoding="utf-8") if (path / JOURNAL).exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(str(path), _reason(error), "a folder that can be written") from None
        for line in text.splitlines():
            # The last line is torn where a write was cut short; its point is measured again.
            with contextlib.suppress(InputError):
                self._take(_finished(line))
        self._torn = bool(text) and not text.endswith("\n")

    def description(self) -> dict[str, Any]:
        """Return what ``profile.json`` holds; empty if there is none yet.

        Raises:
            InputError: If it cannot be read.
        """
        file = self.path / DESCRIPTION
        if not file.exists():
            return {}
        content = read_json(file, "the description of a profile; choose another -o")
        return content if isinstance(content, dict) else {}

    def is_done(self, point_id: str) -> bool:
        """Whether a point has been measured; one that failed may be tried again."""
        found = self.finished.get(point_id)
        return found is not None and not found.failure

    def add(self, point: Finished, description: Mapping[str, Any]) -> None:
        """Put a point on disk, its table and the description with it.

        Raises:
            InputError: If the disk is full or cannot be written; what was there before is unharmed.
        """
        line = json.dumps(asdict(point), allow_nan=False)
        try:
            with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(("\n" if self._torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._torn = False
            self._take(point)
            if point.table:
                self._write_table(point.table)
            self.describe(description)
        except OSError as error:
            self._torn = True
            raise _unwritable(self.path, error) from None

    def complete(self, description: Mapping[str, Any]) -> None:
        """Write all tables and the description; a kill may have come between a point's line and its table.

        Raises:
            InputError: As `add`.
        """
        try:
            for table in dict.fromkeys(each.table for each in self.finished.values() if each.table):
                self._write_table(table)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.describe(description)

    def _write_table(self, table: str) -> None:
        rows = [each.row for each in self.finished.values() if each.table == table]
        write_whole(self.path / f"{table}.csv", as_csv(rows, TABLES[table].names))

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write ``profile.json`` with the points' repeats and the failures beside what is given.

        Raises:
            InputError: If it cannot be written.
        """
        done = [each for each in self.finished.values() if not each.failure]
        points = [
            {
                "id": each.id,
                "took_s": round(each.took_s, 2),
                f"repeats_{each.unit}": each.repeats,
                "spread": each.spread,
            }
            for each in done
        ]
        failed = [{"id": each.id, "reason": each.failure} for each in self.finished.values() if each.failure]
        content = {**description, "points": points, "failed": failed}
        try:
            write_whole(self.path / DESCRIPTION, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _take(self, point: Finished) -> None:
        self.finished.pop(point.id, None)  # its row moves to the end, as it does in the journal
        self.finished[point.id] = point


def _finished(line: str) -> Finished:
    """Return the point that a line of the journal tells.

    Raises:
        InputError: If it is torn, or tells something else.
    """
    known = validated(_JournalLine, parse_json(line, JOURNAL), JOURNAL)
    return Finished(**dict(known) | {"repeats": tuple(known.repeats)})


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(str(path), _reason(error), "a folder with room that can be written")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
