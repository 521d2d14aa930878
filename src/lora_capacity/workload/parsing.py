"""Workload files: their schema, and from their content to the parts of a workload."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from jaxtyping import Int
from pydantic import BeforeValidator, WithJsonSchema, model_validator

from lora_capacity.errors import InputError, check_keys
from lora_capacity.schema import ABSENT, Count, Model, Number, Numbers, Positive, Share, briefly, validated
from lora_capacity.tables import Column, Frame, read_table
from lora_capacity.units import S_PER_HOUR
from lora_capacity.workload._fields import HORIZON, RATE, FloatArray
from lora_capacity.workload.adapters import RANK, SHARED, AdapterList, AdapterMix, Adapters, check_distinct
from lora_capacity.workload.arrivals import MIN_CV, PROCESSES, Arrivals
from lora_capacity.workload.goodput import Goodput
from lora_capacity.workload.lengths import LengthDistribution
from lora_capacity.workload.over_time import Windows, read_rates
from lora_capacity.workload.recordings import TableSource, TraceSource, located, ranks_in_turn, table_source
from lora_capacity.workload.requests import Trace

_LIST = "adapters.list"
"""What messages call a list of adapters in memory."""

_LIST_COLUMNS = {"adapter": Column("text"), "rank": Column("integer", minimum=1)}
_SHARED_COLUMN = {"shared_prefix_tokens": Column("integer", required=False, minimum=0)}
_RATE_COLUMN = {"rate_per_s": Column(minimum=0, exclusive=True)}
_HISTOGRAM_COLUMNS = {"tokens": Column("integer", minimum=1), "weight": Column(minimum=0)}


MAX_MULTIPLIER = 1e6
"""Largest factor of `arrivals.profile`: with it the lowest rates become the highest that are taken."""


def _trace(value: object) -> object:
    """Return a trace's description: a path alone is its file."""
    return value if isinstance(value, Mapping) else {"file": table_source(value)}


def _bound(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "none" else value


_Tokens = Annotated[Any, WithJsonSchema({"type": "number"})]
"""A moment or a bound of lengths, which `LengthDistribution.from_moments` checks together with the others."""


class Mix(Model):
    """``adapters.mix``: rates and ranks assigned round-robin."""

    rates_per_s: Annotated[FloatArray, Numbers(RATE)]
    ranks: Annotated[FloatArray, Numbers(RANK, whole=True)]


class AdapterSource(Model):
    """``adapters``: a mix, a list, or rates over time with ranks, their own or those of a list."""

    mix: Mix = ABSENT
    list: TableSource = ABSENT
    rates: TableSource = ABSENT
    ranks: Annotated[FloatArray, Numbers(RANK, whole=True)] = ABSENT

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = self.model_fields_set
        if "rates" not in given and (len(given) != 1 or given == {"ranks"}):
            raise InputError("", self.given or "neither", "one of mix, list and rates")
        if "rates" in given and given not in ({"rates", "list"}, {"rates", "ranks"}):
            raise InputError("", self.given, "rates with a list, or with ranks, in turn from the busiest adapter on")
        return self

    @property
    def given(self) -> str:
        """The keys given, in words."""
        return " and ".join(name for name in type(self).model_fields if name in self.model_fields_set)


class Lengths(Model):
    """``requests.input_tokens`` or ``requests.output_tokens``: moments within bounds, or a histogram."""

    mean: _Tokens = None
    std: _Tokens = None
    min: _Tokens = None
    max: _Tokens = None
    histogram: TableSource = ABSENT

    @model_validator(mode="after")
    def _one(self) -> Self:
        moments = [name for name in type(self).model_fields if name != "histogram"]
        given = [name for name in type(self).model_fields if name in self.model_fields_set]
        if "histogram" in given and len(given) > 1:
            raise InputError("", " and ".join(given), "either histogram or mean, std, min, max")
        for name in moments:
            if given != ["histogram"] and name not in given:
                raise InputError(name, None, "a number of tokens", "mean, std, min and max are all needed")
        return self


class RequestSource(Model):
    """``requests``: lengths, or a trace that has its own."""

    input_tokens: Lengths = ABSENT
    output_tokens: Lengths = ABSENT
    trace: Annotated[TraceSource, BeforeValidator(_trace)] = ABSENT
    shared_prefix_tokens: Annotated[int, SHARED] = 0
    cached_share: Annotated[float, Number(minimum=0)] = 0.0

    @model_validator(mode="after")
    def _one(self) -> Self:
        for name in ("input_tokens", "output_tokens"):
            given = name in self.model_fields_set
            if self.trace is not None and given:
                allowed = "nothing beside requests.trace, which has its own lengths"
                raise InputError(name, "a mapping", allowed)
            if self.trace is None and not given:
                raise InputError(name, None, f"a mapping with the keys {', '.join(Lengths.model_fields)}")
        return self


class BaseModelTraffic(Model):
    """``base_model``: traffic without an adapter."""

    rate_per_s: Annotated[float, Number(minimum=0, maximum=RATE.maximum)] = 0.0


class ArrivalProcess(Model):
    """``arrivals``; `Arrivals` checks the values."""

    process: Annotated[Any, WithJsonSchema({"enum": list(PROCESSES)})] = "poisson"
    cv: _Tokens = 1.0
    profile: Annotated[FloatArray, Numbers(Number(minimum=0, maximum=MAX_MULTIPLIER))] = ABSENT

    @model_validator(mode="after")
    def _some_traffic(self) -> Self:
        if self.profile is not None and not self.profile.any():
            raise InputError("profile", self.profile.tolist(), "at least one number > 0")
        return self


class LatencyBoundsMs(Model):
    """``goodput``: bounds in milliseconds, as in ``vllm bench serve --goodput``."""

    ttft: Positive = ABSENT
    tpot: Positive = ABSENT
    e2el: Positive = ABSENT


class WorkloadFile(Model):
    """A workload file; its ``model_json_schema`` is the JSON schema of the format."""

    adapters: AdapterSource = ABSENT
    base_model: BaseModelTraffic = BaseModelTraffic()
    requests: RequestSource
    arrivals: ArrivalProcess = ArrivalProcess()
    goodput: LatencyBoundsMs = ABSENT
    attainment: Share = Goodput.attainment
    horizon_s: Annotated[float, HORIZON] = S_PER_HOUR
    max_pending: Annotated[Count | None, BeforeValidator(_bound)] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.requests.trace is not None:
            self._check_beside_trace()
        elif self.adapters is None:
            raise InputError("adapters", None, f"a mapping with the keys {', '.join(AdapterSource.model_fields)}")
        elif self.arrivals.process == "trace":
            raise InputError("arrivals.process", "trace", "poisson, gamma", "trace needs requests.trace")
        elif self.arrivals.process == "gamma" and "cv" not in self.arrivals.model_fields_set:
            remedy = "gamma needs a cv; 1 is Poisson, above 1 is bursty"
            raise InputError("arrivals.cv", None, "a number > 0", remedy)
        elif self.arrivals.profile is not None and self.adapters.rates is not None:
            raise InputError("arrivals.profile", "a list", "nothing beside adapters.rates, which change over time")
        return self

    def _check_beside_trace(self) -> None:
        """Refuse what the record tells already."""
        if "base_model" in self.model_fields_set:
            allowed = "nothing beside requests.trace, where rows without adapter are the base model's"
            raise InputError("base_model", "a mapping", allowed)
        check_keys("arrivals", self.arrivals.model_fields_set, ["process"])
        if self.arrivals.model_fields_set and self.arrivals.process != "trace":
            raise InputError("arrivals.process", briefly(self.arrivals.process), "trace, beside requests.trace")
        if self.adapters is not None and self.adapters.given != "list":
            raise InputError("adapters", self.adapters.given, "a list beside requests.trace, which has its own rates")


def parse_workload(mapping: object, base_dir: Path) -> dict[str, Any]:
    """Return the fields of ``Workload`` from the content of a workload file.

    Args:
        mapping: The content.
        base_dir: Folder that relative paths of tables start from.

    Raises:
        InputError: If anything cannot be used.
    """
    file = validated(WorkloadFile, mapping, "" if isinstance(mapping, Mapping) else "workload")
    fields = _recorded(file, base_dir) if file.requests.trace is not None else _sampled(file, base_dir)
    caching = {name: getattr(file.requests, name) for name in ("shared_prefix_tokens", "cached_share")}
    return fields | caching | {"max_pending": file.max_pending, "goodput": _goodput(file)}


def _goodput(file: WorkloadFile) -> Goodput:
    """Return the bounds given, else the default ones."""
    if file.goodput is None:
        return Goodput(attainment=file.attainment)
    return Goodput.from_ms(file.goodput.model_dump(exclude_unset=True), file.attainment)


def _sampled(file: WorkloadFile, base_dir: Path) -> dict[str, Any]:
    """Return the fields of a workload whose requests are drawn."""
    mean, fields = 1.0, dict[str, Any](horizon_s=file.horizon_s)
    if file.arrivals.profile is not None:
        fields["over_time"], mean = Windows.from_profile(file.arrivals.profile, file.horizon_s)
    if file.adapters.rates is not None:
        fields = _over_time(file, base_dir)
    else:
        fields["adapters"] = _adapters(file.adapters, base_dir).times(np.array([mean]))
    return fields | {
        "input_tokens": _lengths("requests.input_tokens", file.requests.input_tokens, base_dir),
        "output_tokens": _lengths("requests.output_tokens", file.requests.output_tokens, base_dir),
        "base_rate_per_s": file.base_model.rate_per_s * mean,
        "arrivals": Arrivals(file.arrivals.process, file.arrivals.cv),
    }


def _over_time(file: WorkloadFile, base_dir: Path) -> dict[str, Any]:
    """Return the fields that follow from rates over time; adapters have their means."""
    source, order, shared = file.adapters, None, None
    if source.list is not None:
        path = located(base_dir, source.list, _LIST)
        table = _read_list(path, _LIST_COLUMNS | _SHARED_COLUMN)
        order, shared = table["adapter"].tolist(), _shared(path, table)
    horizon_s = file.horizon_s if "horizon_s" in file.model_fields_set else None
    found = read_rates(located(base_dir, source.rates, "adapters.rates"), order, horizon_s)
    if order is None:
        ranks = ranks_in_turn(source.ranks, len(found.names))
    else:
        rows = np.array([order.index(name) for name in found.names])
        ranks, shared = table["rank"][rows].astype(np.int64), None if shared is None else shared[rows]
    return {
        "adapters": AdapterList(found.names, found.mean_per_s, ranks, shared),
        "over_time": found.windows,
        "horizon_s": float(found.windows.edges_s[-1]),
        "assumptions": found.assumptions,
    }


def _recorded(file: WorkloadFile, base_dir: Path) -> dict[str, Any]:
    """Return the fields of a workload whose requests are recorded; ranks are those of an adapter list, if there is."""
    ranks, shared = None, None
    if file.adapters is not None:
        path = located(base_dir, file.adapters.list, _LIST)
        table = _read_list(path, _LIST_COLUMNS | _SHARED_COLUMN)
        ranks = dict(zip(table["adapter"].tolist(), map(int, table["rank"].tolist()), strict=True))
        shared = _shared(path, table)
    horizon_s = file.horizon_s if "horizon_s" in file.model_fields_set else None
    source = file.requests.trace
    if ranks is not None and source.ranks is not None:
        raise InputError("requests.trace.ranks", source.ranks.tolist(), "nothing beside adapters.list, which has ranks")
    trace = Trace.from_file(located(base_dir, source.file, "requests.trace"), source, horizon_s=horizon_s, ranks=ranks)
    adapters = trace.adapters
    if shared is not None and ranks is not None:
        own = dict(zip(ranks, shared.tolist(), strict=True))
        adapters = replace(adapters, shared_prefix_tokens=np.array([own[name] for name in adapters.names]))
    return {
        "adapters": adapters,
        "input_tokens": _recorded_lengths(trace.requests.input_tokens),
        "output_tokens": _recorded_lengths(trace.requests.output_tokens),
        "base_rate_per_s": trace.base_rate_per_s,
        "arrivals": Arrivals("trace", max(trace.cv, MIN_CV)),
        "horizon_s": trace.horizon_s,
        "trace": trace.requests,
        "assumptions": trace.assumptions,
    }


def _adapters(source: AdapterSource, base_dir: Path) -> Adapters:
    if source.mix is not None:
        return AdapterMix(source.mix.rates_per_s, source.mix.ranks.astype(np.int64))
    path = located(base_dir, source.list, _LIST)
    table = _read_list(path, _LIST_COLUMNS | _RATE_COLUMN | _SHARED_COLUMN)
    return AdapterList(table["adapter"].tolist(), table["rate_per_s"], table["rank"], _shared(path, table))


def _shared(path: Path | Frame, table: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the column of shared tokens, None if there is none; each cell has to be filled or none."""
    shared = table["shared_prefix_tokens"]
    blank = np.isnan(shared)
    if blank.any() and not blank.all():
        adapter = table["adapter"][blank][0]
        raise InputError(f"{path}, shared_prefix_tokens of {adapter}", "", "a whole number >= 0", "write 0 for none")
    return None if blank.all() else shared


def _read_list(path: Path | Frame, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    table = read_table(path, columns)
    check_distinct(f"{path}, adapter", table["adapter"].tolist())
    return table


def _lengths(field: str, lengths: Lengths, base_dir: Path) -> LengthDistribution:
    if lengths.histogram is not None:
        path = located(base_dir, lengths.histogram, f"{field}.histogram")
        table = read_table(path, _HISTOGRAM_COLUMNS)
        return LengthDistribution.from_histogram(table["tokens"], table["weight"], field=str(path))
    return LengthDistribution.from_moments(lengths.mean, lengths.std, lengths.min, lengths.max, field=field)


def _recorded_lengths(tokens: Int[np.ndarray, " requests"]) -> LengthDistribution:
    count = np.bincount(tokens)
    return LengthDistribution.from_histogram(np.flatnonzero(count), count[count > 0])
