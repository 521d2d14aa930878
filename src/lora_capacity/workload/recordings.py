"""Recorded requests as people have them: which columns mean what, in which unit, and whose requests they are."""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import PlainValidator, WithJsonSchema, model_validator

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.schema import ABSENT, Model, Number, Numbers, briefly
from lora_capacity.tables import ArrowStream, Column, Frame, Interchange
from lora_capacity.workload._fields import MAX_TOKENS, FloatArray, Int32Array, IntArray
from lora_capacity.workload.adapters import MAX_ADAPTERS, MAX_RANK, RANK
from lora_capacity.workload.columns import Clock, Texts, Times, read_columns

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of the units that a column of times may have."""

_MEANINGS = ("time", "adapter", "input", "output", "rank")


def table_path(value: object) -> str:
    """Return the path of a table.

    Raises:
        InputError: If it is none.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise InputError("", briefly(value), "the path of a table")
    return value


def table_source(value: object) -> str | Frame:
    """Return the path of a table, or a table in memory.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(value, Frame):
        return value
    return Frame.of(value) if isinstance(value, ArrowStream | Interchange) else table_path(value)


def located(base_dir: Path, table: str | Frame, name: str) -> Path | Frame:
    """Return where a table is: a path from a folder on, or in memory under the name of its key."""
    return table.named(name) if isinstance(table, Frame) else base_dir / table


TableSource = Annotated[str | Frame, PlainValidator(table_source), WithJsonSchema({"type": "string"})]
"""Path of a table; a relative one starts at the workload file's folder. From Python, also a table in memory."""

Name = Annotated[str, PlainValidator(table_path), WithJsonSchema({"type": "string"})]


class Deal(Model):
    """How requests that name no adapter are dealt to some: each by itself, adapter i with a probability.

    That is ``1/n`` (``uniform``), proportional to ``1/i^parameter`` (``zipf``), or drawn once with the seed from a
    Dirichlet distribution of this concentration (``dirichlet``). The parameter is 1 where none is given: Zipf's law of
    words, and a Dirichlet distribution in which all divisions are equally likely.
    """

    adapters: Annotated[int, Number(minimum=1, maximum=MAX_ADAPTERS)]
    law: Literal["uniform", "zipf", "dirichlet"] = "zipf"
    parameter: Annotated[float, Number(minimum=0, exclusive=True)] = ABSENT
    seed: Annotated[int, Number(minimum=0)] = 0

    @model_validator(mode="after")
    def _parameter_of_law(self) -> Self:
        if self.law == "uniform" and self.parameter is not None:
            raise InputError("parameter", self.parameter, "nothing beside uniform, which has none")
        return self

    @property
    def words(self) -> str:
        """The law in words."""
        name = {
            "uniform": "uniformly",
            "zipf": f"by Zipf's law, exponent {self._parameter:g}",
            "dirichlet": f"by shares drawn from a Dirichlet distribution, concentration {self._parameter:g}",
        }
        return f"{name[self.law]}, seed {self.seed}"

    @property
    def _parameter(self) -> float:
        return 1.0 if self.parameter is None else self.parameter

    def draw(self, requests: int) -> tuple[list[str], Int32Array]:
        """Return the adapters' names and which of them each request is for."""
        rng = np.random.default_rng(self.seed)
        share = np.ones(self.adapters)
        if self.law == "zipf":
            share = np.arange(1, self.adapters + 1, dtype=np.float64) ** -self._parameter
        elif self.law == "dirichlet":
            share = rng.standard_gamma(self._parameter, self.adapters)
        edges = np.cumsum(share)
        place = np.searchsorted(edges, rng.random(requests) * edges[-1], side="right")
        width = len(str(self.adapters))
        names = [f"adapter-{i:0{width}d}" for i in range(1, self.adapters + 1)]
        return names, np.minimum(place, self.adapters - 1).astype(np.int32)


class TraceSource(Model):
    """``requests.trace``: a table of requests, one a row, and what its columns are."""

    file: TableSource
    format: Name = "lora-capacity"
    time_column: Name = ABSENT
    adapter_column: Name = ABSENT
    input_column: Name = ABSENT
    output_column: Name = ABSENT
    time_unit: Literal["s", "ms", "us", "ns"] = ABSENT
    base_model: Name = ABSENT
    deal: Deal = ABSENT
    ranks: Annotated[FloatArray, Numbers(RANK, whole=True)] = ABSENT

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.format not in formats():
            allowed = ", ".join(formats())
            raise InputError("format", self.format, allowed, nearest_hint(self.format, formats()))
        if self.deal is not None and self.adapter_column is not None:
            raise InputError(
                "deal", "a mapping", "nothing beside adapter_column", "requests are assigned, or name their adapter"
            )
        if self.deal is not None and self.base_model is not None:
            raise InputError(
                "base_model", self.base_model, "nothing beside deal", "every request is assigned to an adapter"
            )
        return self


@dataclass(frozen=True, eq=False)
class Recording:
    """Requests in the order of the table.

    Attributes:
        time_s: When they came, seconds from an origin of the table's, float64 ``[requests]``.
        adapter: Whose they are: names, and an index for each; the empty name is the base model's.
        input_tokens: Prompt lengths, int32 ``[requests]``.
        output_tokens: Output lengths, likewise.
        rank: Ranks of the adapters, NaN where there is none, ``[requests]``; None: the table has no such column.
        time_column: Name of the column of times.
        assumptions: What is taken for granted of them, one sentence each.
    """

    time_s: FloatArray
    adapter: Texts
    input_tokens: Int32Array
    output_tokens: Int32Array
    rank: FloatArray | None
    time_column: str
    assumptions: tuple[str, ...]


@functools.cache
def formats() -> Mapping[str, Any]:
    """Return the formats that are known by name, as `formats.json` has them.

    Each has the names that columns of a meaning may have, the unit of its times, and whether rows without an answer
    (0 output tokens), failed requests, are left out.
    """
    text = resources.files("lora_capacity.workload").joinpath("formats.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def read_recording(path: Path | Frame, source: TraceSource) -> Recording:
    """Read recorded requests.

    Args:
        path: The table, as `read_columns` takes it.
        source: What its columns are; its own file does not matter.

    Raises:
        InputError: As `read_columns`; if the unit of times is not known, or nothing says whose the requests are.
    """
    known = formats()[source.format]
    leaves_out = "without_answer" in known
    meant = {name: getattr(source, f"{name}_column", None) or known["columns"].get(name, []) for name in _MEANINGS}
    if source.deal is not None:
        meant["adapter"] = []
    names = {meaning: [name] if isinstance(name, str) else name for meaning, name in meant.items()}
    tokens = Column("integer", minimum=1, maximum=MAX_TOKENS)
    kinds: dict[str, Column | Clock] = {
        "time": Clock(),
        "adapter": Column("text", blank=True),
        "input": tokens,
        "output": Column("integer", minimum=0, maximum=MAX_TOKENS) if leaves_out else tokens,
        "rank": Column("integer", required=False, minimum=1, maximum=MAX_RANK),
    }
    if not names["adapter"] and source.deal is None:
        allowed = "adapter_column, or deal, which assigns requests to adapters"
        raise InputError(f"{path}, adapter", None, allowed, f"{source.format} names no adapters")
    found = read_columns(path, {tuple(names[meaning]): kinds[meaning] for meaning in kinds if names[meaning]})
    columns: dict[str, Any] = {meaning: found.get(tuple(names[meaning])) for meaning in kinds}
    assumptions = []
    answered = columns["output"] > 0
    if not answered.all():
        count = int(np.count_nonzero(~answered))
        assumptions.append(f"{count} of {answered.size} requests have no answer (0 output tokens) and are ignored.")
    if not answered.any():
        raise InputError(f"{path}, {names['output'][0]}", 0, "at least one request with an answer")
    if source.deal is not None:
        adapter = Texts(*source.deal.draw(answered.size))
        assumptions.append(
            f"The requests name no adapter: they are assigned to {source.deal.adapters} {source.deal.words}; real "
            "adapters have bursts of their own."
        )
    else:
        adapter = columns["adapter"]
        blank = {"", source.base_model}
        adapter = Texts(["" if name in blank else name for name in adapter.names], adapter.index)
    rank = columns["rank"]
    return Recording(
        _seconds(path, names["time"][0], columns["time"], source)[answered],
        Texts(adapter.names, adapter.index[answered]),
        columns["input"][answered].astype(np.int32),
        columns["output"][answered].astype(np.int32),
        None if rank is None else rank[answered],
        names["time"][0],
        tuple(assumptions),
    )


def _seconds(path: Path | Frame, name: str, times: Times, source: TraceSource) -> FloatArray:
    """Return times in seconds: of dates, of the unit asked for, of the column's name, or of the format."""
    if times.are_dates:
        if source.time_unit is not None:
            raise InputError("time_unit", source.time_unit, f"nothing for dates, as {name} holds them")
        return times.values
    ending = name.rpartition("_")[2]
    unit = source.time_unit
    if unit is None and source.time_column is not None:
        unit = ending if ending in UNITS_S else None
    elif unit is None:
        unit = formats()[source.format]["time_unit"]
    if unit is None:
        allowed = f"time_unit {', '.join(UNITS_S)}, or a column whose name ends in _s, _ms, _us or _ns"
        raise InputError(f"{path}, {name}", "numbers without a unit", allowed)
    return np.asarray(times.values * UNITS_S[unit])


def ranks_in_turn(ranks: FloatArray, adapters: int) -> IntArray:
    """Return ranks of so many adapters, assigned round-robin."""
    return np.resize(ranks, adapters).astype(np.int64)
