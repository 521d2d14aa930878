"""Requests as they arrive at the server, and recorded ones read from a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.tables import Frame
from lora_capacity.workload._fields import FloatArray, Int32Array, read_only
from lora_capacity.workload.adapters import AdapterList
from lora_capacity.workload.recordings import Recording, TraceSource, ranks_in_turn, read_recording

BASE_MODEL = -1
"""Index that stands for a request without an adapter."""


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
        assumptions: What is taken for granted of them, one sentence each.
    """

    requests: Requests
    adapters: AdapterList
    base_rate_per_s: float
    horizon_s: float
    cv: float
    assumptions: tuple[str, ...] = ()

    @classmethod
    def from_file(
        cls,
        path: Path | Frame,
        source: TraceSource,
        *,
        horizon_s: float | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> Self:
        """Read a table of requests.

        Times may be of any origin: the earliest is time 0. Rows may stand in any order.

        Args:
            path: The table: CSV, JSON lines, Parquet, or in memory.
            source: What its columns are. Ranks that it gives are assigned round-robin.
            horizon_s: Time looked at, in seconds; None: until the last request.
            ranks: Rank of each adapter by name, in order of importance. Without it adapters are ordered by falling
                number of requests, equal ones by name, and ranks are those of the source or of the table.

        Raises:
            InputError: If the table is malformed, covers no time, has no request for an adapter, an adapter has no rank
                or two of them, or the names of ``ranks`` and of the table differ.
        """
        recording = read_recording(path, source)
        order = np.argsort(recording.time_s, kind="stable")
        arrival_s = recording.time_s[order]
        arrival_s -= arrival_s[0]
        if arrival_s[-1] <= 0:
            raise InputError(
                f"{path}, {recording.time_column}", float(recording.time_s[0]), "requests at two times or more"
            )
        if ranks is not None:
            _check_same_names(path, set(recording.adapter.names) - {""}, ranks)

        horizon_s = float(arrival_s[-1] if horizon_s is None else horizon_s)
        order = order[: np.searchsorted(arrival_s, horizon_s, side="right")]
        arrival_s = arrival_s[: order.size]
        index = recording.adapter.index[order]
        count = np.bincount(index, minlength=len(recording.adapter.names))
        names = _served(recording.adapter.names, count, ranks)
        if not names:
            raise InputError(f"{path}, adapter", "", f"a request for an adapter in the first {horizon_s:g} s")
        if ranks is None and source.ranks is not None:
            ranks = dict(zip(names, ranks_in_turn(source.ranks, len(names)).tolist(), strict=True))
        elif ranks is None:
            ranks = _recorded_ranks(path, recording, order)
        number = {name: i for i, name in enumerate(names)}
        adapter = np.array([number.get(name, BASE_MODEL) for name in recording.adapter.names], np.int32)[index]
        requests = np.bincount(adapter[adapter != BASE_MODEL], minlength=len(names))
        return cls(
            Requests(arrival_s, adapter, recording.input_tokens[order], recording.output_tokens[order]),
            AdapterList(names, requests / horizon_s, np.array([ranks[name] for name in names])),
            float(np.count_nonzero(adapter == BASE_MODEL)) / horizon_s,
            horizon_s,
            _gap_cv(arrival_s, adapter),
            recording.assumptions,
        )


def _served(names: Sequence[str], count: Int[np.ndarray, " names"], order: Mapping[str, int] | None) -> list[str]:
    """Return the names of adapters that have requests: in the order given, else the most requested first."""
    requests: dict[str, int] = {}
    for name, each in zip(names, count.tolist(), strict=True):
        requests[name] = requests.get(name, 0) + each
    present = [name for name, each in requests.items() if each and name]
    if order is not None:
        return [name for name in order if requests.get(name)]
    return sorted(present, key=lambda name: (-requests[name], name))


def _recorded_ranks(path: Path | Frame, recording: Recording, rows: np.ndarray) -> dict[str, int]:
    """Return the rank of each adapter from the trace's own column."""
    index = recording.adapter.index[rows]
    least, most = np.full((2, len(recording.adapter.names)), np.nan)
    if recording.rank is not None:
        np.fmin.at(least, index, recording.rank[rows])
        np.fmax.at(most, index, recording.rank[rows])
    found = {}
    for i in np.unique(index):
        name = recording.adapter.names[i]
        if name and least[i] != most[i]:
            known = np.isfinite(least[i])
            value = f"{least[i]:g} and {most[i]:g}" if known else None
            remedy = "" if known else "add a column rank, say which ranks, or give an adapters.list with one"
            raise InputError(f"{path}, rank of adapter {name!r}", value, "one whole number >= 1", remedy)
        if name:
            found[name] = int(least[i])
    return found


def _check_same_names(path: Path | Frame, in_trace: set[str], ranks: Mapping[str, int]) -> None:
    """Refuse an adapter that stands in only one of trace and list."""
    for name in sorted(in_trace - set(ranks)):
        hint = nearest_hint(name, ranks)
        raise InputError(f"{path}, adapter", name, "a name of adapters.list", hint)
    for name in ranks:
        if name not in in_trace:
            raise InputError("adapters.list", name, f"a name that has requests in {path}", nearest_hint(name, in_trace))


def _gap_cv(arrival_s: Float[np.ndarray, " requests"], index: Int[np.ndarray, " requests"]) -> float:
    """Return the pooled coefficient of variation of the gaps of each adapter, relative to that adapter's mean gap.

    1 (Poisson) where no adapter has the three requests that it takes to see a variation.
    """
    narrow = index.astype(np.int16) if index.max(initial=0) <= np.iinfo(np.int16).max else index
    order = np.argsort(narrow, kind="stable")  # radix sort if narrow
    same = index[order[1:]] == index[order[:-1]]
    gap_s, whose = np.diff(arrival_s[order])[same], index[order[1:]][same] - BASE_MODEL
    gaps, total_s = np.bincount(whose), np.bincount(whose, weights=gap_s)
    told = (gaps >= 2) & (total_s > 0)
    if not told.any():
        return 1.0
    kept = told[whose]
    relative = gap_s[kept] * (gaps / np.where(told, total_s, 1.0))[whose[kept]] - 1.0
    return float(np.sqrt(np.sum(relative**2) / np.sum(gaps[told] - 1)))
