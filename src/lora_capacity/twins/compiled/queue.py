"""The queue: fresh requests in order of arrival, and preempted ones among them.

A preempted request goes to the very front. Where the version keeps those that it skipped in a queue of their own, tried
before the others, it goes behind these; the boundary says how far that is.

Source: ``vllm/v1/core/sched/scheduler.py``, vLLM 0.8.5, and 0.26 for the two queues.
"""

from typing import Any

import numpy as np

from lora_capacity.twins.compiled.jit import compiled
from lora_capacity.twins.compiled.state import NOBODY, STOPPED, Server


@compiled
def is_in_use(s: Server, adapter: Any) -> bool:
    """Say whether an adapter that waits needs no further slot."""
    use, n = s.adapters, s.numbers[0]
    if adapter == use.size - 1 or use[adapter].need > 0:
        return True
    return bool(n.held > 0 and use[adapter].held_at == n.step - 1)


@compiled
def send(s: Server, now: float) -> None:
    """Let requests enter that have arrived by now, as many as clients may have unanswered."""
    n, use = s.numbers[0], s.adapters
    while n.sent < s.requests.size and s.requests[n.sent].sent_s <= now and n.unanswered < n.max_pending:
        request = s.requests[n.sent]
        # One that found no room counts as sent when the latest answer came.
        request.sent_s = max(request.sent_s, n.room_since)
        adapter = np.int64(request.adapter)
        use[adapter].queued += 1
        n.eligible += is_in_use(s, adapter)
        n.waiting += 1
        n.sent += 1
        n.unanswered += 1
        n.settled = 0


@compiled
def put_back(s: Server, entry: int) -> None:
    """Put a preempted entry into the queue."""
    n, use, at = s.numbers[0], s.adapters, s.numbers[0].boundary_preempted
    for i in range(n.preempted, at, -1):
        s.entries[i].queued, s.entries[i].queued_before = s.entries[i - 1].queued, s.entries[i - 1].queued_before
    s.entries[at].queued, s.entries[at].queued_before = entry, n.boundary_fresh
    adapter = s.entries[entry].adapter
    n.preempted += 1
    n.waiting += 1
    use[adapter].queued += 1
    n.eligible += is_in_use(s, adapter)


@compiled
def first_with_slot(s: Server) -> tuple[int, int]:
    """Find the first waiting request whose adapter is in use, or any while a slot is free.

    That is ``scheduled_loras`` against ``max_loras`` in the admission loop of ``Scheduler.schedule``.

    Returns:
        The number of a fresh request and -1, or how many fresh ones stand before a preempted one and its place; beyond
        all requests if there is none.
    """
    n = s.numbers[0]
    if n.active + n.held >= n.max_loras:
        return _first_in_use(s) if n.eligible > 0 else (s.requests.size, -1)
    while n.first_fresh < n.sent and is_admitted(s, n.first_fresh):
        n.first_fresh += 1
    fresh = n.first_fresh if n.first_fresh < n.sent else s.requests.size
    if n.preempted > 0 and s.entries[0].queued_before <= fresh:
        return s.entries[0].queued_before, 0
    return fresh, -1


@compiled
def _first_in_use(s: Server) -> tuple[int, int]:
    """Find the first waiting request whose adapter is in use."""
    n, use = s.numbers[0], s.adapters
    fresh = use[use.size - 1].head
    for i in range(n.active):
        fresh = min(fresh, use[use[i].active].head)
    if n.held > 0:
        for i in range(use.size):
            if use[i].held < 0:
                break
            if use[use[i].held].held_at == n.step - 1:
                fresh = min(fresh, use[use[i].held].head)
    if fresh >= n.sent:
        fresh = s.requests.size
    for i in range(n.preempted):
        if s.entries[i].queued_before > fresh:
            break
        if is_in_use(s, s.entries[s.entries[i].queued].adapter):
            return s.entries[i].queued_before, i
    return fresh, -1


@compiled
def is_admitted(s: Server, number: int) -> bool:
    """Say whether a fresh request has been admitted: its adapter's queue has gone on beyond it."""
    return bool(s.adapters[np.int64(s.requests[number].adapter)].head > number)


@compiled
def take_fresh(s: Server, number: int) -> None:
    """Take a fresh request out of the queue."""
    adapter = np.int64(s.requests[number].adapter)
    s.adapters[adapter].head = s.requests[number].following
    leave(s, adapter)
    at = number + 1
    while at <= s.requests.size:
        s.requests[at - 1].admitted += 1
        at += at & -at


@compiled
def take_preempted(s: Server, place: int) -> None:
    """Take a preempted request out of the queue."""
    n = s.numbers[0]
    leave(s, s.entries[s.entries[place].queued].adapter)
    n.preempted -= 1
    for i in range(place, n.preempted):
        s.entries[i].queued, s.entries[i].queued_before = s.entries[i + 1].queued, s.entries[i + 1].queued_before
    n.boundary_preempted -= place < n.boundary_preempted


@compiled
def leave(s: Server, adapter: Any) -> None:
    """Count one waiting request of an adapter less."""
    n = s.numbers[0]
    s.adapters[adapter].queued -= 1
    n.eligible -= is_in_use(s, adapter)
    n.waiting -= 1


@compiled
def count_skipped(s: Server) -> int:
    """Count the waiting requests that admission has skipped."""
    n = s.numbers[0]
    if n.stop == NOBODY:
        return int(n.waiting)
    if n.stop != STOPPED or n.active + n.held < n.max_loras:
        return 0
    admitted, at = 0, n.stop_fresh
    while at > 0:
        admitted += s.requests[at - 1].admitted
        at -= at & -at
    return int(_preempted_in_front(s) + n.stop_fresh - admitted)


@compiled
def _preempted_in_front(s: Server) -> int:
    """Count the preempted requests that stand in front of the one at which admission stopped."""
    n, count = s.numbers[0], s.numbers[0].stop_preempted
    if count < 0:
        count = 0
        while count < n.preempted and s.entries[count].queued_before <= n.stop_fresh:
            count += 1
    return int(count)


@compiled
def note_skipped(s: Server) -> None:
    """Say how far the queue has been skipped, once a step is put together."""
    n: Any = s.numbers[0]
    if not n.skipped_first:
        return
    fresh, preempted = n.boundary_fresh, n.boundary_preempted
    if n.stop == NOBODY:
        fresh, preempted = n.sent, n.preempted
    elif n.stop == STOPPED:
        fresh, preempted = n.stop_fresh, _preempted_in_front(s)
    if fresh > n.boundary_fresh or (fresh == n.boundary_fresh and preempted > n.boundary_preempted):
        n.boundary_fresh, n.boundary_preempted = fresh, preempted
