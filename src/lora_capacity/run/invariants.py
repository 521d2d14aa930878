"""What is true of every simulation, checked on its results before anyone sees them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import ImpossibleResultError
from lora_capacity.scenarios import Results, Scenarios

_ROUNDING = 1e-3
"""Relative distance beyond a bound that single precision explains, summed over the steps of a horizon."""

_BALANCE = 0.02
"""Relative distance above the offered load at which the steady twin's balance may lie: it is found by iteration."""

_ALWAYS_FINITE = (
    *("throughput_tokens_per_s", "offered_tokens_per_s", "completed_per_s", "mean_running", "mean_waiting"),
    *("active_adapters", "kv_usage", "loads_per_s"),
)
"""Results that are numbers whenever a server starts; others are NaN where there was nothing to measure."""

_NOT_NEGATIVE = (*_ALWAYS_FINITE, "step_time_s", "itl_s", "tpot_s", "ttft_s", "answered_ttft_s", "attainment")
_SETTINGS = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "max_pending", "horizon_s")


def check_results(scenarios: Scenarios, results: Results) -> None:
    """Refuse results that no server can have.

    Numbers are finite where a server starts; none is negative; nothing that is in use exceeds what there is; shares are
    at most 1; no more requests are completed than arrived.

    Args:
        scenarios: The configurations, ``[configs]``.
        results: What an engine says of them.

    Raises:
        ImpossibleResultError: Names the first such configuration, its number and the bound.
    """
    given: Any = scenarios
    told: Any = results
    starts = np.asarray(given.starts) & (np.asarray(told.status) == np.asarray(given.status))
    for name in _ALWAYS_FINITE:
        _refuse(scenarios, name, np.asarray(getattr(told, name)), starts & ~np.isfinite(getattr(told, name)), "finite")
    for name in _NOT_NEGATIVE:
        values = np.asarray(getattr(told, name))
        _refuse(scenarios, name, values, starts & (values < 0.0), "at least 0")
    for name, values, most in _bounded(given, told):
        limit = np.broadcast_to(most, values.shape)
        slack = _BALANCE if name == "throughput_tokens_per_s" else _ROUNDING
        with np.errstate(invalid="ignore"):
            beyond = values > limit * (1.0 + slack) + slack
        _refuse(scenarios, name, values, beyond & starts.reshape(-1, *[1] * (values.ndim - 1)), "at most", limit)


def _bounded(given: Any, told: Any) -> list[tuple[str, NDArray[Any], Any]]:
    """Return what has an upper bound: its name, values ``[configs, …]``, and the bound."""
    held = np.asarray(told.mean_running) + np.asarray(told.mean_waiting)
    rows: list[tuple[str, Any, Any]] = [
        ("mean_running", told.mean_running, given.max_num_seqs),
        ("mean_running + mean_waiting", held, given.max_pending),
        ("active_adapters", told.active_adapters, given.max_loras),
        ("kv_usage", told.kv_usage, 1.0),
        ("ttft_s", told.ttft_s, given.horizon_s),
        ("attainment", told.attainment, 1.0),
        ("class_service", told.class_service, 1.0),
    ]
    if told.events is None:
        # Averages: what arrives in a mean hour is the most that can be completed.
        rows.append(("throughput_tokens_per_s", told.throughput_tokens_per_s, told.offered_tokens_per_s))
    else:
        events = told.events
        rows += [
            ("max_running", events.max_running, given.max_num_seqs),
            ("max_adapters", events.max_adapters, given.max_loras),
            ("max_kv_usage", events.max_kv_usage, 1.0),
            ("adapter_completed", events.adapter_completed, events.adapter_arrived),
            ("compute_share + load_share", np.asarray(events.compute_share) + np.asarray(events.load_share), 1.0),
            ("scheduling_share", events.scheduling_share, events.compute_share),
        ]
    return [(name, np.asarray(values, np.float64), np.asarray(most, np.float64)) for name, values, most in rows]


def _refuse(
    scenarios: Any,
    name: str,
    values: NDArray[Any],
    wrong: NDArray[np.bool_],
    allowed: str,
    limit: NDArray[np.float64] | None = None,
) -> None:
    if not wrong.any():
        return
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    row = place[0]
    settings = {"max_cpu_loras": float(np.asarray(scenarios.class_count)[row].sum())}
    settings |= {each: float(np.asarray(getattr(scenarios, each))[row]) for each in _SETTINGS}
    bound = "" if limit is None else f" {limit[place]:g}"
    where = ", ".join(f"{each} {value:g}" for each, value in settings.items())
    raise ImpossibleResultError(f"{name} is {values[place]:g}, which has to be {allowed}{bound} ({where})")
