"""Configurations and what a simulation says of them, as one table."""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.scenarios.results import Bottleneck, EventDetails, Results
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import STARVED_SHORTFALL, Status

_SETTINGS = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")
_TOLD_APART = (
    "throughput_tokens_per_s",
    "offered_tokens_per_s",
    "class_service",
    "client",
    "limit",
    "status",
    "events",
    "windows",
)
_PREDICTED = tuple(entry.name for entry in fields(Results) if entry.name not in _TOLD_APART)
_QUANTILES = ("p50", "p95", "p99")
_DETAILS = (
    *("unanswered", "max_running", "max_adapters", "max_kv_usage", "preemptions", "disk_loads", "steps"),
    *("compute_share", "scheduling_share", "load_share", "idle_share"),
)


def table(scenarios: Scenarios, results: Results, threshold: float = STARVED_SHORTFALL) -> dict[str, NDArray[Any]]:
    """Return configurations and predictions as named columns, units in the names, codes as labels.

    Args:
        scenarios: The configurations.
        results: What an engine says of them.
        threshold: Share below the offered load from which throughput counts as starved.

    Returns:
        Columns ``[configs]``: ``max_cpu_loras``, which is the number of adapters served unless host memory holds fewer
        (then ``adapters`` comes first, how many are served), ``max_loras``, ``max_lora_rank``, ``max_num_seqs``,
        ``max_num_batched_tokens``, ``kv_cache_tokens`` (integers), ``throughput_tokens_per_s``,
        ``offered_tokens_per_s``, ``service``, ``starved`` (bool), ``completed_per_s``, ``mean_running``,
        ``mean_waiting``, ``step_time_s``, ``itl_s``, ``tpot_s``, ``ttft_s``, ``answered_ttft_s``, ``attainment``,
        ``active_adapters``, ``kv_usage``, ``loads_per_s``, ``client_ttft_s``, ``client_tpot_s``, ``client_itl_s``,
        ``limit`` and ``status`` (labels).

        Where the results have ``events``, also ``ttft_p50_s``, ``ttft_p95_s``, ``ttft_p99_s`` and the same of ``tpot``
        and ``e2e``; ``ttft_requests``, … , on how many requests each kind rests; ``unanswered``; and because of those
        ``ttft_lower_bound_from`` and ``e2e_lower_bound_from``, from which quantile on they are lower bounds (``p50``,
        ``p95``, ``p99`` or empty); ``max_running``, ``max_adapters``, ``max_kv_usage``, ``preemptions``,
        ``disk_loads``, ``steps``, ``compute_share``, ``scheduling_share``, ``load_share``, ``idle_share``,
        ``worst_service``, the smallest share of an adapter's requests that were completed, and ``worst_wait_s``, the
        longest that a request has waited for its admission.
    """
    adapters, room = np.asarray(scenarios.class_count).sum(axis=1), scenarios.max_cpu_loras
    columns = {"max_cpu_loras": adapters} if room is None else {"adapters": adapters, "max_cpu_loras": np.asarray(room)}
    columns |= {name: np.asarray(getattr(scenarios, name)) for name in _SETTINGS}
    columns = {name: np.rint(column).astype(np.int64) for name, column in columns.items()}
    columns["throughput_tokens_per_s"] = np.asarray(results.throughput_tokens_per_s)
    columns["offered_tokens_per_s"] = np.asarray(results.offered_tokens_per_s)
    columns |= {"service": np.asarray(results.service), "starved": np.asarray(results.starved(threshold))}
    columns |= {name: np.asarray(getattr(results, name)) for name in _PREDICTED}
    columns |= {f"client_{name}": np.asarray(values) for name, values in vars(results.client).items()}
    statuses = [Status(code) for code in np.asarray(results.status)]
    limits = [
        Bottleneck(code).label if status.started else ""
        for code, status in zip(np.asarray(results.limit), statuses, strict=True)
    ]
    columns["limit"] = np.array(limits, dtype=object)
    columns["status"] = np.array([status.label for status in statuses], dtype=object)
    if results.events is not None:
        columns |= _event_columns(results.events, ~np.isnan(columns["throughput_tokens_per_s"]))
    return columns


def _event_columns(events: EventDetails, told: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {}
    for time, requests in zip(("ttft", "tpot", "e2e"), np.asarray(events.quantile_requests).T, strict=True):
        quantiles_s = np.asarray(getattr(events, f"{time}_quantiles_s")).T
        columns |= {f"{time}_{name}_s": values_s for name, values_s in zip(_QUANTILES, quantiles_s, strict=True)}
        columns[f"{time}_requests"] = requests
    for time in ("ttft", "e2e"):
        bounds = np.asarray(getattr(events, f"{time}_at_least"))
        lowest = np.array([*_QUANTILES, ""], dtype=object)[np.where(bounds.any(axis=1), bounds.argmax(axis=1), 3)]
        columns[f"{time}_lower_bound_from"] = lowest
    columns |= {name: np.asarray(getattr(events, name)) for name in _DETAILS}
    arrived, completed = np.asarray(events.adapter_arrived), np.asarray(events.adapter_completed)
    service = np.divide(completed, arrived, out=np.ones(arrived.shape, np.float32), where=arrived > 0).min(axis=1)
    waited_s = np.asarray(events.adapter_worst_wait_s).max(axis=1)
    return columns | {"worst_service": np.where(told, service, np.nan), "worst_wait_s": waited_s}
