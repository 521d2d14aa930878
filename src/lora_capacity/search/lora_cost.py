"""What LoRA costs: the same requests on servers of which each has one thing more than another."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search.margin import judged_columns, load_headroom
from lora_capacity.search.objective import KEPT_UP
from lora_capacity.workload import AdapterList, Workload, WorkloadLike, load_workload

FIGURES = (
    *("step_time_s", "itl_s", "tpot_s", "ttft_s", "throughput_tokens_per_s", "saturates_at_tokens_per_s"),
    "kv_cache_tokens",
)
"""What is told of every server, and compared."""

_LOADS = np.concatenate([[1.0], np.geomspace(1 / 16, 1024, 200)])
"""Times its load that a server is tried with: the offered one, and those between which it saturates, 5 % apart; between
them what is served falls along a line."""


@dataclass(frozen=True)
class ServerCost:
    """A server under the workload's requests, and what it costs beside another.

    Attributes:
        server: ``base_model``, ``one_adapter``, ``idle_slots``, ``adapters``, ``next_adapter`` or ``next_slot``, see
            `lora_cost`.
        adapters: Adapters that have the requests, A.
        max_loras: Slots, S; 0: without LoRA.
        max_lora_rank: Rank that they are reserved for.
        figures: Values by the names of `FIGURES`: mean times of a step, between tokens (of all requests, and per
            request) and to the first token, s; tokens of completed requests per second; load up to which the server
            keeps up, tokens per second; tokens that the KV cache holds. NaN where it does not start.
        compared_with: ``server`` of the one that has one thing less; None for the first.
        difference: Figures less those of that one.
        status: `Status` label.
    """

    server: str
    adapters: int
    max_loras: int
    max_lora_rank: int
    figures: Mapping[str, float]
    compared_with: str | None
    difference: Mapping[str, float]
    status: str


def lora_cost(
    workload: WorkloadLike, calibration: CalibrationLike, adapters: int, max_loras: int, **settings: Any
) -> list[ServerCost]:
    """Say what LoRA costs a server, step by step, and what the next adapter and the next slot cost.

    All servers get as many requests per second of the same lengths, by the steady twin:

    - ``base_model``: started without LoRA, all requests are the base model's;
    - ``one_adapter``: with one slot, and one adapter that has all requests of adapters;
    - ``idle_slots``: the same with S slots, of which one is used;
    - ``adapters``: the workload itself, A adapters on S slots;
    - ``next_adapter``, ``next_slot``: with one adapter, which brings its own requests, or one slot more than that; the
      former where the workload has one more.

    Requests of one adapter or of the base model come in one stream: where arrivals are not Poisson, that is burstier
    than the streams of many. Of traffic that changes over time it is told as in its peak window.

    Args:
        workload: Adapters and traffic, as `load_workload` takes them.
        calibration: Model, GPU and coefficients, or their name or file.
        adapters: A, at least 1.
        max_loras: S, at least 1.
        **settings: As of `build_scenarios`.

    Returns:
        The servers in this order.

    Raises:
        InputError: If a setting is not allowed, or there are fewer adapters.
    """
    workload, calibration = load_workload(workload).at_peak(), load_calibration(calibration)
    rates_per_s, ranks = workload.adapters.deal(adapters)
    total_per_s = float(rates_per_s.sum())
    prefixes = workload.shared_prefixes(adapters)[:-1]
    shared = round(float(np.average(prefixes, weights=rates_per_s)))
    in_one = AdapterList(("all",), np.array([total_per_s]), ranks.max(keepdims=True), np.array([shared]))
    one = dataclasses.replace(workload, adapters=in_one)
    alone = dataclasses.replace(
        workload, base_rate_per_s=total_per_s + workload.base_rate_per_s, shared_prefix_tokens=shared
    )
    whole = _predict("adapters", "idle_slots", workload, calibration, adapters, max_loras, settings)
    # Host memory has room for one adapter, and slots are as wide as the workload's adapters need.
    few = {name: value for name, value in settings.items() if name not in ("max_cpu_loras", "loaded_at_start")}
    few["max_lora_rank"] = whole.max_lora_rank
    found = [
        _predict("base_model", None, alone, calibration, 0, 0, few),
        _predict("one_adapter", "base_model", one, calibration, 1, 1, few),
        _predict("idle_slots", "one_adapter", one, calibration, 1, max_loras, few),
        whole,
    ]
    if adapters != workload.adapters.max_count:
        found.append(_predict("next_adapter", "adapters", workload, calibration, adapters + 1, max_loras, settings))
    wider = dict(settings)
    if settings.get("max_cpu_loras") is not None:
        wider["max_cpu_loras"] = max(settings["max_cpu_loras"], max_loras + 1)
    found.append(_predict("next_slot", "adapters", workload, calibration, adapters, max_loras + 1, wider))
    by_name = {each.server: each for each in found}
    return [_compared(each, by_name.get(each.compared_with or "")) for each in found]


def _predict(
    server: str,
    compared_with: str | None,
    workload: Workload,
    calibration: Calibration,
    adapters: int,
    max_loras: int,
    settings: Mapping[str, Any],
) -> ServerCost:
    """Predict one server under its load, and look for the load at which it saturates."""
    one = build_scenarios(workload, calibration, adapters, max_loras, **settings)
    tried = one.take(np.zeros(_LOADS.size, int)).scaled(_LOADS)
    columns = judged_columns(tried, simulate(calibration, tried, workload))
    saturates = load_headroom(columns["served"][np.newaxis, 1:] / KEPT_UP, _LOADS[1:])[0]
    told = {name: float(columns[name][0]) for name in FIGURES if name in columns}
    told["saturates_at_tokens_per_s"] = float(saturates * columns["offered_tokens_per_s"][0])
    return ServerCost(
        server=server,
        adapters=adapters,
        max_loras=max_loras,
        max_lora_rank=int(columns["max_lora_rank"][0]),
        figures={name: told[name] for name in FIGURES},
        compared_with=compared_with,
        difference={},
        status=str(columns["status"][0]),
    )


def _compared(cost: ServerCost, other: ServerCost | None) -> ServerCost:
    if other is None:
        return cost
    difference = {name: value - other.figures[name] for name, value in cost.figures.items()}
    return dataclasses.replace(cost, difference=difference)
