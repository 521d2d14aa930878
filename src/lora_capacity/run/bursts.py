"""What the bursts of recorded requests add to the steady twin's averages: a fluid queue over short windows.

The record says how many requests came in every ten seconds. What comes beyond the server's capacity waits, and the
queue ``queue' = max(0, queue + requests − μ · length)`` is worked off later; μ is what the twin serves in overload.
Within a window the batch takes up what comes; that adapters have bursts at different times is left out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.run.over_time import KEPT_UP, fluid_queue, served_per_s
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.workload import BASE_MODEL, Requests

Floats = NDArray[np.float64]

_WINDOW_S, _MOST_WINDOWS = 10.0, 10_000
"""Length of a window, about as long as an answer takes to write; and how many there are at most, being longer then."""

_OVERLOADS = (4.0, 1.25)
"""Loads under which the capacity is told: in times the offered load, and in times the busiest window's. Far beyond its
capacity a server loses some of it, so that the latter is tried only where the former is not beyond it."""

_AT_ONCE = 2_000_000
"""Configurations times windows that are worked on at once: some arrays of 16 MB."""


def with_bursts(
    scenarios: Scenarios, trace: Requests, horizon_s: float, results: Results, solve: Callable[[Scenarios], Results]
) -> Results:
    """Return what the steady twin says of recorded requests, with what their bursts add to the waits.

    Args:
        scenarios: The configurations, ``[configs]``; their load may be a multiple of the record's, which is then
            pressed together.
        trace: The record.
        horizon_s: Its length, in seconds.
        results: What the twin says of the mean rates.
        solve: The twin.
    """
    host: Any = scenarios.take(slice(None))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _with_bursts(host, trace, horizon_s, results, solve)


def _with_bursts(
    host: Any, trace: Requests, horizon_s: float, results: Results, solve: Callable[[Scenarios], Results]
) -> Results:
    adapters = np.rint(host.class_count.sum(axis=1)).astype(np.int64)
    counts, window_s = _counts(trace, horizon_s, int(adapters.max()))
    offered = np.asarray(host.requests_per_s, np.float64)
    recorded = counts.sum(axis=1)[adapters] / horizon_s
    busiest = counts.max(axis=1)[adapters] / window_s / recorded
    # What arrives beyond the capacity on average waits in the results already.
    capacity = np.maximum(offered, _capacity(host, np.fmax(_OVERLOADS[1] * busiest, 1.0), solve))
    slack_s = np.asarray(host.bounds.ttft_s, np.float64) - np.asarray(results.client.ttft_s, np.float64)
    rows = max(1, _AT_ONCE // counts.shape[1])
    parts = [
        _waits(counts[adapters[i : i + rows]], *(column[i : i + rows, np.newaxis] for column in columns))
        for columns in [(capacity * window_s * recorded / offered, capacity, slack_s)]
        for i in range(0, adapters.size, rows)
    ]
    # Servers that do not start, or that nobody asks, have nothing to wait for.
    waits_s, late, waiting, left = (np.nan_to_num(np.concatenate(each)) for each in zip(*parts, strict=True))
    room = np.maximum(host.max_pending - results.mean_running - results.mean_waiting, 0.0)
    kind = host.horizon_s.dtype

    def changed(values: Any, plus: Any = 0.0, times: Any = 1.0) -> Any:
        return ((np.asarray(values) + plus) * times).astype(kind)

    def later(values: Any) -> Any:
        return changed(np.minimum(np.asarray(values) + waits_s, host.horizon_s))  # as long as it is seen

    longer: Results = dataclasses.replace(
        results,
        ttft_s=later(results.ttft_s),
        answered_ttft_s=later(results.answered_ttft_s),
        client=dataclasses.replace(results.client, ttft_s=later(results.client.ttft_s)),
        attainment=changed(results.attainment, times=1.0 - late),
        mean_waiting=changed(results.mean_waiting, np.minimum(waiting, room)),
        completed_per_s=changed(results.completed_per_s, times=1.0 - left),
        throughput_tokens_per_s=changed(results.throughput_tokens_per_s, times=1.0 - left),
        class_service=changed(results.class_service, times=1.0 - left[:, np.newaxis]),
    )
    return longer


def _capacity(host: Any, most: Floats, solve: Callable[[Scenarios], Results]) -> Floats:
    """Return the requests per second that each server serves in overload, or under the highest load if it keeps up.

    Args:
        host: The configurations, ``[configs]``.
        most: Highest load, in times theirs, ``[configs]``.
        solve: The steady twin.
    """

    def served(rows: NDArray[np.int64], load: Floats) -> tuple[Floats, Floats]:
        crowded = host.take(rows).scaled(load)
        full = np.asarray(crowded.requests_per_s, np.float64)
        return served_per_s(solve(crowded), full, np.asarray(crowded.horizon_s, np.float64)), full

    load = np.minimum(_OVERLOADS[0], most)
    capacity, full = served(np.arange(most.size), load)
    again = np.flatnonzero((capacity >= KEPT_UP * full) & (load < most))
    if again.size:
        capacity[again] = np.maximum(capacity[again], served(again, most[again])[0])
    return capacity


def _counts(trace: Requests, horizon_s: float, adapters: int) -> tuple[Floats, float]:
    """Return the requests in each window of the first so many adapters and of the base model, and a window's length.

    Returns:
        Float64 ``[adapters + 1, windows]``: in row A those of A adapters.
    """
    window_s = max(_WINDOW_S, horizon_s / _MOST_WINDOWS)
    windows = max(1, int(np.ceil(horizon_s / window_s)))
    place = np.minimum((trace.arrival_s / window_s).astype(np.int64), windows - 1)
    own = trace.adapter - BASE_MODEL
    served = own <= adapters
    count = np.bincount(own[served] * windows + place[served], minlength=(adapters + 1) * windows)
    return np.cumsum(count.reshape(adapters + 1, windows), axis=0, dtype=np.float64), window_s


def _waits(arrived: Floats, room: Floats, capacity: Floats, slack_s: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return mean wait, share of the requests that wait longer than allowed, mean queue, and share left at the end.

    Args:
        arrived: Requests in each window, ``[configs, windows]``.
        room: How many are served in a window, ``[configs, 1]``, as the next.
        capacity: Requests served per second.
        slack_s: Longest wait allowed.
    """
    passed = np.cumsum(arrived - room, axis=1)
    end = fluid_queue(passed)
    end = np.where(end > 1e-9 * room, end, 0.0)
    start = np.pad(end[:, :-1], [(0, 0), (1, 0)])
    first_s, last_s = start / capacity, end / capacity
    total = arrived.sum(axis=1)
    longest_s, shortest_s = np.maximum(first_s, last_s), np.minimum(first_s, last_s)
    late = np.clip((longest_s - slack_s) / np.maximum(longest_s - shortest_s, 1e-9), 0.0, 1.0)
    late = np.where(longest_s > 0, late, 0.0)
    return (
        (arrived * 0.5 * (first_s + last_s)).sum(axis=1) / total,
        (arrived * late).sum(axis=1) / total,
        0.5 * (start + end).mean(axis=1),
        end[:, -1] / total,
    )
