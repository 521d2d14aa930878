"""Requests as they arrive at the server, and recorded ones read from a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.tables import Column, read_table
from lora_capacity.workload._fields import MAX_TOKENS, FloatArray, Int32Array, read_only
from lora_capacity.workload.adapters import AdapterList

BASE_MODEL = -1
"""Index that stands for a request without an adapter."""

_TRACE_COLUMNS = {
    "arrival_s": Column(),
    "adapter": Column("text", blank=True),
    "input_tokens": Column("integer", minimum=1),
    "output_tokens": Column("integer", minimum=1),
    "rank": Column("integer", required=False, minimum=1),
}


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests in order of arrival; the arrays cannot be written to.

    Attributes:
        arrival_s: Arrival times in seconds from the start, ascending, float64 ``[requests]``.
        adapter: Index of the adapter, ``BASE_MODEL`` (-1) for none, int32 ``[requests]``.
        input_tokens: Prompt lengths in tokens, int32 ``[requests]``.
        output_tokens: Output lengths in tokens, int32 ``[requests]``.
        shared_prefix_tokens: Tokens at the start of each prompt with which others of its adapter begin too, those of
            them that are as long, int32 ``[requests]``; none by default.
        cached_tokens: Tokens of each prompt that a prefix cache is taken to hold, whatever it does, at most all but
            one, int32 ``[requests]``; none by default.
    """

    arrival_s: FloatArray
    adapter: Int32Array
    input_tokens: Int32Array
    output_tokens: Int32Array
    shared_prefix_tokens: Int32Array = field(default_factory=lambda: np.zeros((), np.int32))
    cached_tokens: Int32Array = field(default_factory=lambda: np.zeros((), np.int32))

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrival_s", read_only(self.arrival_s, np.float64))
        for name in ("adapter", "input_tokens", "output_tokens"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.int32))
        for name in ("shared_prefix_tokens", "cached_tokens"):
            tokens = np.broadcast_to(getattr(self, name), self.arrival_s.shape)
            object.__setattr__(self, name, read_only(tokens, np.int32))

    def __len__(self) -> int:
        return int(self.arrival_s.size)

    def select(self, rows: np.ndarray | slice) -> Self:
        """Return the requests at ``rows`` (indices, mask ``[requests]`` or slice), in that order."""
        return type(self)(*(getattr(self, entry.name)[rows] for entry in fields(self)))


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded requests and what follows from them.

    Attributes:
        requests: The requests within the horizon; adapter indices are those of ``adapters``.
        adapters: The adapters that occur, by name, with rate = requests / horizon and rank.
        base_rate_per_s: Requests per second without an adapter.
        horizon_s: Length of the record in seconds.
        cv: Coefficient of variation of the gaps of an adapter.
    """

    requests: Requests
    adapters: AdapterList
    base_rate_per_s: float
    horizon_s: float
    cv: float

    @classmethod
    def from_csv(cls, path: Path, *, horizon_s: float | None = None, ranks: Mapping[str, int] | None = None) -> Self:
        """Read a table of requests.

        Its columns are ``arrival_s`` (of any origin: the earliest is time 0), ``adapter`` (empty: the base model),
        ``input_tokens``, ``output_tokens`` and, unless ``ranks`` is given, ``rank``. Rows may stand in any order.

        Args:
            path: The table.
            horizon_s: Time looked at, in seconds; None: until the last request.
            ranks: Rank of each adapter by name, in order of importance. Without it adapters are ordered by falling
                number of requests, equal ones by name.

        Raises:
            InputError: If the table is malformed, covers no time, has no request for an adapter, an adapter has no rank
                or two of them, or the names of ``ranks`` and of the table differ.
        """
        table = read_table(path, _TRACE_COLUMNS)
        order = np.argsort(table["arrival_s"], kind="stable")
        table = {name: column[order] for name, column in table.items()}
        for column in ("input_tokens", "output_tokens"):
            if table[column].max() > MAX_TOKENS:
                raise InputError(
                    f"{path}, {column}", int(table[column].max()), f"a whole number from 1 to {MAX_TOKENS}"
                )
        arrival_s = table["arrival_s"] - table["arrival_s"][0]
        if arrival_s[-1] <= 0:
            raise InputError(f"{path}, arrival_s", float(table["arrival_s"][0]), "requests at two times or more")
        if ranks is not None:
            _check_same_names(path, set(table["adapter"]) - {""}, ranks)

        horizon_s = float(arrival_s[-1] if horizon_s is None else horizon_s)
        seen = {name: column[arrival_s <= horizon_s] for name, column in table.items()}
        arrival_s = arrival_s[arrival_s <= horizon_s]
        if ranks is None:
            ranks = _recorded_ranks(path, seen)
        names, index, count = _number_adapters(seen["adapter"], ranks)
        if not names:
            raise InputError(f"{path}, adapter", "", f"a request for an adapter in the first {horizon_s:g} s")
        return cls(
            Requests(arrival_s, index, seen["input_tokens"], seen["output_tokens"]),
            AdapterList(names, count / horizon_s, np.array([ranks[name] for name in names])),
            float(np.count_nonzero(index == BASE_MODEL)) / horizon_s,
            horizon_s,
            _gap_cv(arrival_s, index),
        )


def _recorded_ranks(path: Path, table: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the rank of each adapter from the trace's own column, most requested adapter first."""
    served = table["adapter"] != ""
    names, place, count = np.unique(table["adapter"][served].astype(str), return_inverse=True, return_counts=True)
    least, most = np.full((2, names.size), np.nan)
    np.fmin.at(least, place, table["rank"][served])
    np.fmax.at(most, place, table["rank"][served])
    for i in np.flatnonzero(~(least == most)):
        known = np.isfinite(least[i])
        value = f"{least[i]:g} and {most[i]:g}" if known else None
        remedy = "" if known else "add a column rank, or an adapters.list with one"
        raise InputError(f"{path}, rank of adapter {str(names[i])!r}", value, "one whole number >= 1", remedy)
    return {str(names[i]): int(least[i]) for i in np.argsort(-count, kind="stable")}


def _check_same_names(path: Path, in_trace: set[str], ranks: Mapping[str, int]) -> None:
    """Refuse an adapter that stands in only one of trace and list."""
    for name in sorted(in_trace - set(ranks)):
        hint = nearest_hint(name, ranks)
        raise InputError(f"{path}, adapter", name, "a name of adapters.list", hint)
    for name in ranks:
        if name not in in_trace:
            raise InputError("adapters.list", name, f"a name that has requests in {path}", nearest_hint(name, in_trace))


def _number_adapters(
    column: np.ndarray, order: Mapping[str, int]
) -> tuple[list[str], Int[np.ndarray, " requests"], Int[np.ndarray, " adapters"]]:
    """Return the names that occur, in the given order, each row's index among them, and the rows of each."""
    present, place, count = np.unique(column.astype(str), return_inverse=True, return_counts=True)
    rows = dict(zip(present.tolist(), count.tolist(), strict=True))
    names = [name for name in order if name in rows]
    number = {name: i for i, name in enumerate(names)}
    index = np.array([number.get(name, BASE_MODEL) for name in present.tolist()], dtype=np.int32)[place]
    return names, index, np.array([rows[name] for name in names], dtype=np.int64)


def _gap_cv(arrival_s: Float[np.ndarray, " requests"], index: Int[np.ndarray, " requests"]) -> float:
    """Return the pooled coefficient of variation of the gaps of each adapter, relative to that adapter's mean gap.

    1 (Poisson) where no adapter has the three requests that it takes to see a variation.
    """
    squares, degrees = 0.0, 0
    order = np.lexsort((arrival_s, index))
    for times in np.split(arrival_s[order], np.flatnonzero(np.diff(index[order])) + 1):
        gap_s = np.diff(times)
        if gap_s.size >= 2 and gap_s.mean() > 0:
            squares += float(np.sum((gap_s / gap_s.mean() - 1.0) ** 2))
            degrees += gap_s.size - 1
    return float(np.sqrt(squares / degrees)) if degrees else 1.0
