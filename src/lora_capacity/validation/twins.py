"""The steady twin held against the event twin: where they differ, and why."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.errors import check_number
from lora_capacity.run import simulate
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Scenarios, table
from lora_capacity.search import assess
from lora_capacity.workload import Workload

COMPARED = ("throughput_tokens_per_s", "itl_s", "ttft_s", "mean_running", "kv_usage")
"""Figures that are compared."""

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")
_NEAR, _LOADING, _PREEMPTING, _FEW_SLOTS, _STANDARD_ERRORS = 0.1, 0.05, 0.01, 16, 2.0
"""From where on a cause is named for a difference between the twins: how near to saturation the load is, the share of
time that loads take, preemptions per request, slots that adapters contend for, standard errors of the seeds' mean."""


def compare_twins(
    calibration: Calibration,
    scenarios: Scenarios,
    workload: Workload,
    *,
    seeds: Sequence[int] = (0, 1),
    tolerance: float = 0.02,
    parts: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """Predict configurations with both twins.

    A *regime* is what the steady twin says of a server: ``does_not_start``; ``near_capacity`` if it starves at 0.9 to
    1.1 times the load; else ``keeps_up``, or its `Bottleneck`. *Why* throughputs differ is told by the
    first of these that holds: ``chance`` (no more than two standard errors of the event twin's mean), ``preemptions``
    (over 1 % of the completed requests), ``loads`` (over 5 % of the time), ``few_slots`` (fewer than 16, contended),
    ``near_capacity``, ``other``.

    Args:
        calibration: Whose costs hold.
        scenarios: The configurations as `build_scenarios` lays them out, ``[configs]``.
        workload: Their workload.
        seeds: Of the requests that the event twin runs; what it says is the mean over them.
        tolerance: Share of the event twin's figure beyond which a difference counts, > 0.
        parts: As in `simulate`.
        progress: As in `simulate`.

    Returns:
        Columns ``[configs]``: the settings; of every figure ``throughput_tokens_per_s``, ``itl_s``, ``ttft_s``,
        ``mean_running``, ``kv_usage`` that of the event twin under its own name, the steady twin's as ``steady_…`` and
        ``difference_…``, steady over event less 1; ``standard_error``, that of the event twin's throughput as a share
        of it, from what the seeds differ by, and at least what the drawn requests make of the load;
        ``critical_load`` by the steady twin, ``preemptions``, ``load_share``, ``regime``, ``differs`` (in throughput,
        bool), ``why`` (empty if it does not).

    Raises:
        InputError: As `simulate`, or if the tolerance is not above 0.
    """
    check_number("tolerance", tolerance, minimum=0, exclusive=True)
    steady = assess(calibration, scenarios, workload)
    shape = (scenarios.status.shape[0], len(seeds))
    repeated = scenarios.take(np.repeat(np.arange(len(scenarios.status)), len(seeds)))
    seed = np.broadcast_to(np.asarray(seeds), shape).ravel()
    found = simulate(
        calibration, repeated, workload, engine="event", seed=seed, checkpoint_dir=parts, progress=progress
    )
    events = table(repeated, found)
    columns = {name: steady[name] for name in _SETTINGS}
    for name in (*COMPARED, "preemptions", "load_share", "completed_per_s"):
        columns[name] = events[name].reshape(shape).mean(axis=1)
    for name in COMPARED:
        columns[f"steady_{name}"] = steady[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            columns[f"difference_{name}"] = steady[name] / columns[name] - 1.0
    throughput = events["throughput_tokens_per_s"].reshape(shape)
    arrived = np.maximum(np.asarray(steady["offered_tokens_per_s"]) / _mean_tokens(workload), 1e-9) * workload.horizon_s
    drawn = np.sqrt((workload.arrival_cv**2 + _tokens_cv2(workload)) / arrived / len(seeds))
    columns["standard_error"] = np.fmax(_standard_error(throughput) / columns["throughput_tokens_per_s"], drawn)
    columns["critical_load"] = steady["critical_load"]
    columns["regime"] = _regime(steady)
    columns["differs"] = np.abs(columns["difference_throughput_tokens_per_s"]) > tolerance
    completed = columns.pop("completed_per_s") * np.asarray(scenarios.horizon_s)
    return columns | {"why": np.where(columns["differs"], _why(columns, steady, completed), "").astype(object)}


def _mean_tokens(workload: Workload) -> float:
    return workload.mean_input_tokens + workload.mean_output_tokens


def _tokens_cv2(workload: Workload) -> float:
    """Squared coefficient of variation of the tokens of a request."""
    squares = workload.second_moment_input_tokens + workload.second_moment_output_tokens
    return (squares + 2.0 * workload.mean_input_output_tokens) / _mean_tokens(workload) ** 2 - 1.0


def _standard_error(values: NDArray[Any]) -> NDArray[np.float64]:
    """Standard error of the mean over the second axis, NaN where there is but one value."""
    count = values.shape[1]
    if count == 1:
        return np.full(len(values), np.nan)
    return np.asarray(values.std(axis=1, ddof=1) / np.sqrt(count), np.float64)


def _regime(steady: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    critical = steady["critical_load"]
    near = np.abs(np.log(critical)) <= _NEAR
    regime = np.where(steady["limit"] == "none", "keeps_up", steady["limit"])
    regime = np.where(near & (critical < _largest(critical)), "near_capacity", regime)
    return np.where(np.isnan(critical), "does_not_start", regime).astype(object)


def _largest(critical: NDArray[np.float64]) -> float:
    """The largest load tried, which is told of those that it does not starve."""
    return float(np.nanmax(critical, initial=0.0)) or np.inf


def _why(columns: Mapping[str, NDArray[Any]], steady: Mapping[str, NDArray[Any]], completed: NDArray[Any]) -> Any:
    off = np.abs(columns["difference_throughput_tokens_per_s"])
    contended = (columns["max_cpu_loras"] > columns["max_loras"]) & (
        steady["active_adapters"] > 0.9 * columns["max_loras"]
    )
    reasons = {
        "chance": off <= _STANDARD_ERRORS * columns["standard_error"],
        "preemptions": columns["preemptions"] > _PREEMPTING * completed,
        "loads": columns["load_share"] > _LOADING,
        "few_slots": contended & (columns["max_loras"] < _FEW_SLOTS),
        "near_capacity": columns["regime"] == "near_capacity",
    }
    return np.select(list(reasons.values()), list(reasons), "other")


def summarise_comparison(columns: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return how far the twins differ in each regime, the regimes with the most configurations first.

    Args:
        columns: What `compare_twins` returns.

    Returns:
        Per regime ``regime``, ``configurations``, ``differ`` (how many, in throughput), ``why`` (how many of them by
        reason), ``mean_difference`` and ``mean_absolute_difference`` (by figure), and ``worst``: ``max_cpu_loras``,
        ``max_loras`` and ``difference`` of the throughput.
    """
    labels, counts = np.unique(columns["regime"].astype(str), return_counts=True)
    summary = []
    for label in labels[np.argsort(-counts, kind="stable")].tolist():
        rows = np.flatnonzero(columns["regime"] == label)
        entry: dict[str, Any] = {
            "regime": label,
            "configurations": rows.size,
            "differ": int(columns["differs"][rows].sum()),
        }
        if label != "does_not_start":
            reasons, often = np.unique(columns["why"][rows][columns["differs"][rows]].astype(str), return_counts=True)
            off = {name: columns[f"difference_{name}"][rows] for name in COMPARED}
            worst = rows[np.argmax(np.nan_to_num(np.abs(off["throughput_tokens_per_s"])))]
            entry |= {
                "why": dict(zip(reasons.tolist(), often.tolist(), strict=True)),
                "mean_difference": {name: _mean(values) for name, values in off.items()},
                "mean_absolute_difference": {name: _mean(np.abs(values)) for name, values in off.items()},
                "worst": {
                    "max_cpu_loras": int(columns["max_cpu_loras"][worst]),
                    "max_loras": int(columns["max_loras"][worst]),
                    "difference": float(columns["difference_throughput_tokens_per_s"][worst]),
                },
            }
        summary.append(entry)
    return summary


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of what is a number."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
