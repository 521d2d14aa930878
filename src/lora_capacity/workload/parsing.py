"""From the content of a workload file to the parts of a workload."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_capacity.errors import InputError, check_number
from lora_capacity.tables import Column, read_table
from lora_capacity.units import S_PER_HOUR
from lora_capacity.workload._fields import Int32Array, briefly, section, table_path
from lora_capacity.workload.adapters import AdapterList, AdapterMix, Adapters, check_distinct
from lora_capacity.workload.arrivals import Arrivals
from lora_capacity.workload.lengths import LengthDistribution
from lora_capacity.workload.requests import Trace

_KEYS = ("adapters", "base_model", "requests", "arrivals", "horizon_s", "max_pending")
_LIST_COLUMNS = {"adapter": Column("text"), "rank": Column("integer", minimum=1)}
_RATE_COLUMN = {"rate_per_s": Column(minimum=0, exclusive=True)}
_HISTOGRAM_COLUMNS = {"tokens": Column("integer", minimum=1), "weight": Column(minimum=0)}


def parse_workload(mapping: object, base_dir: Path) -> dict[str, Any]:
    """Return the fields of ``Workload`` from the content of a workload file.

    Args:
        mapping: The content.
        base_dir: Folder that relative paths of tables start from.

    Raises:
        InputError: If anything cannot be used.
    """
    given = section("", mapping, _KEYS)
    requests = section("requests", given.get("requests"), ("input_tokens", "output_tokens", "trace"))
    fields = (
        _parse_trace(given, requests, base_dir) if "trace" in requests else _parse_sampled(given, requests, base_dir)
    )
    return fields | {"max_pending": _parse_max_pending(given.get("max_pending"))}


def _parse_sampled(given: Mapping[str, Any], requests: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """Return the fields of a workload whose requests are drawn."""
    base_model = section("base_model", given.get("base_model", {}), ("rate_per_s",))
    return {
        "adapters": _parse_adapters(given.get("adapters"), base_dir),
        "input_tokens": _parse_lengths("requests.input_tokens", requests.get("input_tokens"), base_dir),
        "output_tokens": _parse_lengths("requests.output_tokens", requests.get("output_tokens"), base_dir),
        "base_rate_per_s": check_number("base_model.rate_per_s", base_model.get("rate_per_s", 0.0), minimum=0),
        "arrivals": _parse_arrivals(given.get("arrivals", {})),
        "horizon_s": _parse_horizon(given.get("horizon_s", S_PER_HOUR)),
    }


def _parse_trace(given: Mapping[str, Any], requests: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """Return the fields of a workload whose requests are recorded; what the record tells must not be given again."""
    for key in ("input_tokens", "output_tokens"):
        if key in requests:
            raise InputError(
                f"requests.{key}", briefly(requests[key]), "nothing beside requests.trace, which has its own lengths"
            )
    if "base_model" in given:
        allowed = "nothing beside requests.trace, where rows without adapter are the base model's"
        raise InputError("base_model", briefly(given["base_model"]), allowed)
    arrivals = section("arrivals", given.get("arrivals", {}), ("process",))
    if arrivals.get("process", "trace") != "trace":
        raise InputError("arrivals.process", briefly(arrivals["process"]), "trace, beside requests.trace")
    horizon_s = _parse_horizon(given["horizon_s"]) if "horizon_s" in given else None
    path = table_path("requests.trace", requests["trace"], base_dir)
    trace = Trace.from_csv(path, horizon_s=horizon_s, ranks=_parse_ranks(given, base_dir))
    return {
        "adapters": trace.adapters,
        "input_tokens": _recorded_lengths(trace.requests.input_tokens),
        "output_tokens": _recorded_lengths(trace.requests.output_tokens),
        "base_rate_per_s": trace.base_rate_per_s,
        "arrivals": Arrivals("trace", trace.cv),
        "horizon_s": trace.horizon_s,
        "trace": trace.requests,
    }


def _parse_adapters(value: object, base_dir: Path) -> Adapters:
    adapters = section("adapters", value, ("mix", "list"))
    if len(adapters) != 1:
        raise InputError("adapters", " and ".join(adapters) or "neither", "one of mix and list")
    if "list" in adapters:
        table = _read_list(adapters["list"], base_dir, _LIST_COLUMNS | _RATE_COLUMN)
        return AdapterList(table["adapter"].tolist(), table["rate_per_s"], table["rank"])
    mix = section("adapters.mix", adapters["mix"], ("rates_per_s", "ranks"))
    return AdapterMix(mix.get("rates_per_s"), mix.get("ranks"))  # type: ignore[arg-type]  # checked there


def _parse_ranks(given: Mapping[str, Any], base_dir: Path) -> dict[str, int] | None:
    """Return the ranks by name of an adapter list beside a trace; its rates, if any, give way to the trace's."""
    if "adapters" not in given:
        return None
    adapters = section("adapters", given["adapters"], ("mix", "list"))
    if list(adapters) != ["list"]:
        raise InputError(
            "adapters", " and ".join(adapters) or "neither", "a list beside requests.trace, which has its own rates"
        )
    table = _read_list(adapters["list"], base_dir, _LIST_COLUMNS)
    return dict(zip(table["adapter"].tolist(), map(int, table["rank"].tolist()), strict=True))


def _read_list(value: object, base_dir: Path, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    path = table_path("adapters.list", value, base_dir)
    table = read_table(path, columns)
    check_distinct(f"{path}, adapter", table["adapter"].tolist())
    return table


def _parse_lengths(field: str, value: object, base_dir: Path) -> LengthDistribution:
    moments = ("mean", "std", "min", "max")
    lengths = section(field, value, (*moments, "histogram"))
    if "histogram" in lengths:
        if len(lengths) > 1:
            raise InputError(field, " and ".join(lengths), "either histogram or mean, std, min, max")
        path = table_path(f"{field}.histogram", lengths["histogram"], base_dir)
        table = read_table(path, _HISTOGRAM_COLUMNS)
        return LengthDistribution.from_histogram(table["tokens"], table["weight"], field=str(path))
    for key in moments:
        if key not in lengths:
            raise InputError(f"{field}.{key}", None, "a number of tokens", "mean, std, min and max are all needed")
    return LengthDistribution.from_moments(lengths["mean"], lengths["std"], lengths["min"], lengths["max"], field=field)


def _recorded_lengths(tokens: Int32Array) -> LengthDistribution:
    return LengthDistribution.from_histogram(*np.unique(tokens, return_counts=True))


def _parse_arrivals(value: object) -> Arrivals:
    arrivals = section("arrivals", value, ("process", "cv"))
    process = arrivals.get("process", "poisson")
    if process == "trace":
        raise InputError("arrivals.process", process, "poisson, gamma", "trace needs requests.trace")
    if process == "gamma" and "cv" not in arrivals:
        raise InputError("arrivals.cv", None, "a number > 0", "gamma needs a cv; 1 is Poisson, above 1 is bursty")
    return Arrivals(process, arrivals.get("cv", 1.0))


def _parse_horizon(value: object) -> float:
    return check_number("horizon_s", value, minimum=0, exclusive=True)


def _parse_max_pending(value: object) -> int | None:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    return int(check_number("max_pending", value, minimum=1, integer=True))
