"""Traffic over time by the steady twin: window after window, with the queue carried from each into the next.

Each window is solved by itself from an empty server, and once more under more load than any window has, which tells
its capacity μ. The queue between windows is a fluid: ``queue' = max(0, queue + (λ − μ) · length)``. A window that
begins with a queue runs as in overload until that is gone, and its requests wait for it first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.scenarios import ClientView, Results, Scenarios, WindowDetails
from lora_capacity.workload import Windows, Workload
from lora_capacity.workload.adapters import IDLE_PER_S

Floats = NDArray[np.float64]

_IDLE_SHARE = 0.01
"""Share of the busiest window's rate below which a window is too idle to tell a capacity."""

_OVERLOAD = 1.25
"""Load under which the capacity is told, in times the busiest window's: where the server keeps up even then, no queue
builds up in any window, and little more than what some window asks for leaves its queues as they are there."""

KEPT_UP = 0.999
"""Share of the requests served or in service above which a window leaves no queue: below is more than rounding."""


def windows_in_series(traffic: object) -> int:
    """Return the windows of traffic over time where a series can have a part for each, all being as long; else 0."""
    windows = traffic.over_time if isinstance(traffic, Workload) else None
    if windows is None or not np.allclose(windows.lengths_s, windows.lengths_s[0], rtol=1e-6):
        return 0
    return len(windows)


def steady_over_time(scenarios: Scenarios, workload: Workload, solve: Callable[[Scenarios], Results]) -> Results:
    """Return what the steady twin says of configurations over all windows, and of each.

    Rates, times and shares are means over the horizon: over time, or over requests. The bottleneck and the class of
    status are those of the worst window. What the server's front end gathers over hours is told of each window alone.

    Args:
        scenarios: The configurations under mean rates, ``[configs]``.
        workload: With traffic over time.
        solve: The steady twin.
    """
    windows: Any = workload.over_time
    host: Any = scenarios.take(slice(None))
    shape, length_s = (host.status.size, len(windows)), windows.lengths_s
    each = _by_window(host, workload, windows)
    solved = solve(each)
    own = busy = _Shaped(solved, shape)
    offered = capacity = np.asarray(each.requests_per_s, np.float64).reshape(shape)
    served = served_per_s(solved, offered, length_s)
    queue = np.zeros((shape[0], shape[1] + 1))  # at the edges of windows
    if np.any(served < KEPT_UP * offered):
        # A window with next to no requests works off a queue that is made up as the busiest window's.
        most = offered.max(axis=1, keepdims=True)
        busiest = np.where(offered < _IDLE_SHARE * most, offered.argmax(axis=1)[:, np.newaxis], np.arange(shape[1]))
        rows = (np.arange(shape[0])[:, np.newaxis] * shape[1] + busiest).ravel()
        load = _OVERLOAD * most / np.take_along_axis(offered, busiest, axis=1)
        crowded = each.take(rows).scaled(load.ravel())
        solved = solve(crowded)
        busy = _Shaped(solved, shape)
        full = served_per_s(solved, np.asarray(crowded.requests_per_s, np.float64).reshape(shape), length_s)
        capacity = np.maximum(full, served)
        passed = np.cumsum((offered - capacity) * length_s, axis=1)
        queue[:, 1:] = fluid_queue(passed)
    return _told(host, workload, own, busy, offered, capacity, queue)


def fluid_queue(passed: Floats) -> Floats:
    """Return the queue at the end of each window, ``queue' = max(0, queue + more)``, ``[configs, windows]``.

    Args:
        passed: What has come so far less what there was room for, likewise.
    """
    return np.asarray(passed - np.minimum(np.minimum.accumulate(passed, axis=1), 0.0))


def served_per_s(results: Any, offered: Floats, length_s: Floats) -> Floats:
    """Return the requests per second that are completed or in service at the end, in the shape of those offered."""
    per_request = np.asarray(results.offered_tokens_per_s, np.float64).reshape(offered.shape) / offered
    completed = np.asarray(results.throughput_tokens_per_s, np.float64).reshape(offered.shape) / per_request
    running = np.asarray(results.mean_running, np.float64).reshape(offered.shape)
    return np.asarray(np.minimum(completed + running / length_s, offered))


def windows_played(scenarios: Scenarios, results: Results, workload: Workload, load: ArrayLike) -> WindowDetails | None:
    """Return what a series of the event twin tells of windows; None unless it has a part for each.

    Args:
        scenarios: The configurations, ``[configs]``.
        results: With a series.
        workload: With traffic over time.
        load: Times the workload's rates that they were played with, one or ``[configs]``.
    """
    windows, events = workload.over_time, results.events
    parts = 0 if events is None else np.shape(events.series.running)[1]
    if windows is None or events is None or not 0 < parts == windows_in_series(workload):
        return None
    adapters = np.rint(np.asarray(scenarios.class_count).sum(axis=1)).astype(int).tolist()
    rates = np.stack([workload.rates_over_time(each).sum(axis=1) for each in adapters])
    rates = rates * np.reshape(np.broadcast_to(load, len(adapters)), (-1, 1))
    series: Any = events.series
    told: Any = (series.completed_per_s, series.running, series.waiting, series.kv_usage)
    unknown = np.full(rates.shape, np.nan)
    return _details(windows, rates, *told, unknown, unknown)


def _details(windows: Windows, *columns: Any) -> WindowDetails:
    """Return columns ``[configs, windows]`` with where windows begin and end before them."""
    edges_s: Any = [np.broadcast_to(each, columns[0].shape) for each in (windows.edges_s[:-1], windows.edges_s[1:])]
    return WindowDetails(*edges_s, *columns)


class _Shaped:
    """Results by configuration and window, float64 ``[configs, windows]``."""

    def __init__(self, results: Results, shape: tuple[int, int]) -> None:
        self._results: Any = results
        self._shape = shape

    def __getitem__(self, name: str) -> Floats:
        values = getattr(self._results.client, name[7:]) if name[:7] == "client_" else getattr(self._results, name)
        return np.asarray(values, np.float64).reshape(*self._shape, *np.shape(values)[1:])


def _by_window(host: Any, workload: Workload, windows: Windows) -> Scenarios:
    """Return every configuration in every window, ``[configs · windows]``."""
    configs, count = host.status.size, len(windows)
    served = np.rint(host.class_count.sum(axis=1)).astype(int)
    rate = np.zeros((configs, count, host.class_count.shape[1]))
    gaps_cv = np.zeros((configs, count))
    means, ranks = workload.adapters.deal(int(served.max()))
    factors = windows.factors(int(served.max()))
    pairs = np.stack([means, ranks], axis=1).astype(host.class_rate_per_s.dtype)
    for adapters in np.unique(served):
        rows = np.flatnonzero(served == adapters)
        classes = np.stack([host.class_rate_per_s[rows[0]], host.class_rank[rows[0]]], axis=1)
        member = (pairs[:adapters, np.newaxis] == classes).all(axis=2)
        total = (means * factors[:, : means.size])[:, :adapters] @ member
        own = total / np.maximum(member.sum(axis=0), 1)
        # Classes of a profile that changes all alike are right even where adapters were merged into fewer.
        alike = windows.factor.shape[1] == 1
        rate[rows] = host.class_rate_per_s[rows][:, np.newaxis] * windows.factor if alike else own
        gaps_cv[rows] = windows.gaps_cv(means[:adapters], workload.arrival_cv)
    each: Any = host.take(np.repeat(np.arange(configs), count))
    base = host.base_rate_per_s[:, np.newaxis] * windows.base_factor
    kind = host.class_rate_per_s.dtype
    changed: Scenarios = dataclasses.replace(
        each,
        class_rate_per_s=np.maximum(rate, IDLE_PER_S).reshape(configs * count, -1).astype(kind),
        base_rate_per_s=base.ravel().astype(kind),
        horizon_s=np.tile(windows.lengths_s, configs).astype(kind),
        arrival_cv=gaps_cv.ravel().astype(kind),
    )
    return changed


def _told(
    host: Any, workload: Workload, own: _Shaped, busy: _Shaped, offered: Floats, capacity: Floats, queue: Floats
) -> Results:
    """Put windows, and the queues that they begin and end with, together."""
    windows: Any = workload.over_time
    length_s, arrived = windows.lengths_s, offered * windows.lengths_s
    carried = _Carried.of(queue[:, :-1], offered, capacity, length_s)
    done = np.maximum(queue[:, :-1] + arrived - queue[:, 1:], 0.0)
    names = ("mean_running", "step_time_s", "active_adapters", "kv_usage", "loads_per_s", "itl_s", "tpot_s")
    # A window that works off a queue runs as in overload for so long.
    state = {
        name: own[name] + carried.share * (busy[name] - own[name]) for name in (*names, "client_tpot_s", "client_itl_s")
    }
    room = np.asarray(host.max_pending, np.float64)[:, np.newaxis] - state["mean_running"]
    waiting = np.minimum(own["mean_waiting"] + carried.wait_s * capacity, np.maximum(room, 0.0))
    horizon_s = float(workload.horizon_s)
    wait = {
        name: np.minimum(own[name] + carried.wait_s, horizon_s)  # as long as it is seen
        for name in ("ttft_s", "answered_ttft_s", "client_ttft_s")
    }
    slack_s = np.asarray(host.bounds.ttft_s, np.float64)[:, np.newaxis] - own["client_ttft_s"]
    attainment = own["attainment"] * carried.within(slack_s)
    seen = (offered, done / length_s, state["mean_running"], waiting, state["kv_usage"], wait["ttft_s"], attainment)
    told = _details(windows, *seen)
    completed = np.maximum(done.sum(axis=1) - state["mean_running"][:, -1], 0.0)
    completed = np.minimum(completed, arrived.sum(axis=1)) / horizon_s
    offered_tokens = _mean(own["offered_tokens_per_s"], length_s)
    later = np.minimum(done.sum(axis=1) / np.maximum((own["completed_per_s"] * length_s).sum(axis=1), 1e-9), 1.0)
    values: dict[str, Floats] = {
        "throughput_tokens_per_s": completed * horizon_s / arrived.sum(axis=1) * offered_tokens,
        "offered_tokens_per_s": offered_tokens,
        "completed_per_s": completed,
        "class_service": _mean(own["class_service"], arrived) * later[:, np.newaxis],
        "mean_waiting": _mean(waiting, length_s),
        "attainment": _mean(attainment, arrived),
        **{name: _mean(wait[name], arrived) for name in ("ttft_s", "answered_ttft_s", "client_ttft_s")},
        **{name: _mean(state[name], length_s) for name in names[:-2]},
        **{name: _mean(state[name], done) for name in (*names[-2:], "client_tpot_s", "client_itl_s")},
    }
    kind = np.asarray(host.horizon_s).dtype
    leaves: Any = {name: each.astype(kind) for name, each in values.items()}
    client = ClientView(**{name: leaves.pop(f"client_{name}") for name in ("ttft_s", "tpot_s", "itl_s")})
    rows = np.arange(len(offered))
    codes: Any = {name: own[name][rows, told.worst].astype(np.int32) for name in ("limit", "status")}
    return Results(**leaves, client=client, **codes, windows=told)


class _Carried(NamedTuple):
    """What a queue does to the window that begins with it, each ``[configs, windows]``.

    Attributes:
        first_s: Wait behind it of a request at the window's beginning; less and less until it is gone.
        last_s: The same when it is gone, or at the window's end.
        share: Share of the window until then.
    """

    first_s: Floats
    last_s: Floats
    share: Floats

    @classmethod
    def of(cls, queue: Floats, offered: Floats, capacity: Floats, length_s: Floats) -> "_Carried":
        falls_per_s = np.maximum(capacity - offered, 0.0)
        gone_s = np.where(queue > falls_per_s * length_s, length_s, queue / np.maximum(falls_per_s, IDLE_PER_S))
        left = np.maximum(queue - falls_per_s * gone_s, 0.0)
        return cls(queue / capacity, left / capacity, gone_s / length_s)

    @property
    def wait_s(self) -> Floats:
        """Mean over the window."""
        return 0.5 * (self.first_s + self.last_s) * self.share

    def within(self, slack_s: Floats) -> Floats:
        """Return the share of the window in which the wait is no longer than that."""
        fall_s = np.maximum(self.first_s - self.last_s, 1e-12)  # seconds of wait; what is less is none
        late = self.share * np.clip((self.first_s - slack_s) / fall_s, 0.0, 1.0)
        return 1.0 - np.where(self.first_s > 0, late, 0.0)


def _mean(values: Floats, weight: Floats) -> Floats:
    """Return the mean over windows; of windows without weight nothing counts."""
    weight = np.broadcast_to(weight, values.shape[:2])
    weight = weight.reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    total = np.where(weight > 0, values * weight, 0.0).sum(axis=1)
    return np.asarray(total / np.maximum(weight.sum(axis=1), 1e-300))
