"""The queue: fresh requests in order of arrival, and preempted ones.

A preempted request goes to the very front, so that the last one comes first. Where the version keeps those that it
skipped in a queue of their own, tried before the others, it goes to the front of the others instead: `SkippedQueue`
says how far that is, and each preempted request which fresh one comes next behind it.

A *key* says where a request stands: smaller ones come first. That of a fresh request is its number; that of a preempted
one is ``-1 - place``. With `SkippedQueue` it is the number of the next fresh request, and a place besides.

Source: ``vllm/v1/core/sched/scheduler.py``, vLLM 0.8.5, and 0.26 for the two queues.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from lora_capacity.twins.events.arrays import add, indices, largest, least, on_any, put, seldom, total, when_any
from lora_capacity.twins.events.asynchronous import slots_in_use
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.state import (
    FAR,
    Flag,
    Move,
    Number,
    PendingStep,
    PreemptedRequests,
    Queue,
    SkippedQueue,
    State,
)

Adapters = Int[Array, " adapters+1"]


class Candidate(NamedTuple):
    """The first request of the queue whose adapter has a slot.

    Attributes:
        key: Its key; with `SkippedQueue`, the number of the first fresh request that does not stand in front of it.
        place: Its place if it was preempted; with `SkippedQueue`, else how many that were stand in front of it.
        request: Its number.
        sampled: Tokens that it had sampled.
        from_preempted: Whether it was, bool.
        found: Whether there is one, bool.
    """

    key: Number
    place: Number
    request: Number
    sampled: Number
    from_preempted: Flag
    found: Flag


def first_with_slot(server: Server, s: State) -> Candidate:
    """Find the first waiting request whose adapter is in use, or any while a slot is free.

    That is ``scheduled_loras`` against ``max_loras`` in the admission loop of ``Scheduler.schedule``.
    """
    q, last = s.queue, s.adapters.last
    slots, since = slots_in_use(server, s)
    free = slots < server.max_loras

    def with_slot(last: Array, key: Array) -> Array:
        return jnp.where((last >= since) | free, key, FAR)

    if q.skipped is None:
        key = least(last, q.key, of=with_slot)
        place = jnp.clip(-1 - key, 0, q.preempted.request.shape[0] - 1)
        return _candidate(q, key, place, place, key < 0, key < s.clients.sent)
    number = least(last, q.head, of=with_slot)
    before = q.skipped.before

    def among_preempted() -> tuple[Array, Array]:
        row = indices(before)
        stands = row < q.preempted_waiting
        owns = (last[q.preempted.adapter] >= since) | free
        return least(jnp.where(stands & owns, row, FAR)), total(stands & (before <= number))

    def nobody() -> tuple[Array, Array]:
        return jnp.full_like(number, FAR), jnp.zeros_like(number)

    place, in_front = jax.lax.cond(on_any(q.preempted_waiting > 0), among_preempted, nobody)
    row_of_it = jnp.minimum(place, before.shape[0] - 1)
    behind = before[row_of_it]
    from_preempted = (place < FAR) & (behind <= number)
    return _candidate(
        q,
        jnp.where(from_preempted, behind, number),
        jnp.where(from_preempted, place, in_front),
        row_of_it,
        from_preempted,
        from_preempted | (number < s.clients.sent),
    )


def _candidate(q: Queue, key: Number, place: Number, row: Number, from_preempted: Flag, found: Flag) -> Candidate:
    return Candidate(
        key=key,
        place=place,
        request=jnp.where(from_preempted, q.preempted.request[row], key),
        sampled=jnp.where(from_preempted, q.preempted.sampled[row], 0),
        from_preempted=from_preempted,
        found=found,
    )


def requeue(q: Queue, move: Move, preempt: Flag, sampled: Number) -> tuple[Queue, Flag]:
    """Put a preempted request in front of the queue, or behind those skipped; say whether there is no place for it."""
    overflow = preempt & (q.places == q.preempted.request.shape[0])
    new = PreemptedRequests(move.request, move.adapter, sampled)
    q = _put_in_front(q, preempt, new) if q.skipped is None else _put_behind(q, q.skipped, preempt, new)
    return q._replace(places=q.places + preempt, preempted_waiting=q.preempted_waiting + preempt), overflow


def dequeue(q: Queue, move: Move, admit: Flag, candidate: Candidate) -> Queue:
    """Take an admitted request out of the queue."""
    fresh, again = admit & ~candidate.from_preempted, admit & candidate.from_preempted
    place = candidate.place
    head = jnp.where(fresh, move.following, q.head[move.adapter])
    q = _leave(q, move, admit, again, place, head) if q.skipped is None else _close_up(q, q.skipped, again, place)
    bit = jnp.left_shift(jnp.uint32(1), (move.request & 31).astype(jnp.uint32))
    return q._replace(
        taken=q.taken + fresh,
        head=put(q.head, fresh, (move.adapter,), head),
        preempted_waiting=q.preempted_waiting - again,
        admitted=add(q.admitted, fresh, (move.request >> 5,), bit),
        admitted_by_block=add(q.admitted_by_block, fresh, (move.request >> 10,), 1),
    )


def _leave(q: Queue, move: Move, admit: Flag, again: Flag, place: Number, head: Number) -> Queue:
    """Take a request out of the preempted ones and leave its place empty; say who is first of its adapter."""
    adapter = q.preempted.adapter
    request = put(q.preempted.request, again, (place,), -1)
    filled = (request >= 0) & (indices(request) < q.places)
    next_place = largest(jnp.where(filled & (adapter == move.adapter), indices(request), -1))
    used = 1 + largest(jnp.where(filled, indices(request), -1))
    key = jnp.where(again & (next_place >= 0), -1 - next_place, head)
    return q._replace(
        key=put(q.key, admit, (move.adapter,), key),
        preempted=q.preempted._replace(request=request),
        places=jnp.where(again, used, q.places),
    )


def _put_in_front(q: Queue, preempt: Flag, new: PreemptedRequests) -> Queue:
    """Give a preempted request the next place; without one it is dropped, and the simulation breaks off."""
    columns = (put(old, preempt, (q.places,), one) for old, one in zip(q.preempted, new, strict=True))
    key = put(q.key, preempt, (new.adapter,), -1 - q.places)
    return q._replace(key=key, preempted=PreemptedRequests(*columns))


def _put_behind(q: Queue, skipped: SkippedQueue, preempt: Flag, new: PreemptedRequests) -> Queue:
    """Put a preempted request behind those skipped; those behind it move on."""

    def insert(columns: list[Array]) -> list[Array]:
        row, at = indices(skipped.before), skipped.preempted
        return [
            jnp.where(preempt & (row >= at), jnp.where(row == at, one, jnp.roll(old, 1)), old)
            for old, one in zip(columns, (*new, skipped.fresh), strict=True)
        ]

    *columns, before = seldom(preempt, insert, [*q.preempted, skipped.before])
    return q._replace(preempted=PreemptedRequests(*columns), skipped=skipped._replace(before=before))


def _close_up(q: Queue, skipped: SkippedQueue, again: Flag, place: Number) -> Queue:
    """Take a request out of the preempted ones; those behind it move up."""

    def remove(columns: list[Array]) -> list[Array]:
        gone = again & (indices(skipped.before) >= place)
        return [jnp.where(gone, jnp.roll(old, -1).at[-1].set(-1), old) for old in columns]

    *columns, before = seldom(again, remove, [*q.preempted, skipped.before])
    return q._replace(
        preempted=PreemptedRequests(*columns),
        skipped=skipped._replace(before=before, preempted=skipped.preempted - (again & (place < skipped.preempted))),
        places=q.places - again,
    )


def count_skipped(server: Server, s: State, ready: Flag) -> Number:
    """Count the waiting requests that admission has skipped.

    Args:
        server: The server.
        s: Its state.
        ready: Whether a step is put together.
    """
    stop = s.pending.stop
    slots, _ = slots_in_use(server, s)
    behind = ready & (jnp.abs(stop) < FAR) & (slots >= server.max_loras)
    before = when_any(behind, lambda: _standing_before(s.queue, stop, s.pending.stop_place))
    return jnp.where(behind, before, jnp.where(stop == FAR, s.waiting, 0))


def _standing_before(q: Queue, stop: Number, stop_place: Number | None) -> Number:
    """Count the waiting requests that stand before the one at which admission stopped."""
    request = q.preempted.request
    block = jnp.clip(stop >> 10, 0, q.admitted_by_block.shape[0] - 1)
    admitted = total(jnp.where(indices(q.admitted_by_block) < block, q.admitted_by_block, 0))
    word = jnp.arange(32, dtype=jnp.int32)
    words = jax.lax.dynamic_slice_in_dim(q.admitted, block * 32, 32)
    room = jnp.clip(stop - block * 1024 - 32 * word, 0, 32)
    mask = jnp.where(room >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << room.astype(jnp.uint32)) - 1)
    admitted = admitted + total(jax.lax.population_count(words & mask))
    if stop_place is not None:
        return stop_place + stop - admitted
    in_front = total((request >= 0) & (indices(request) < q.places) & (indices(request) > -1 - stop))
    return jnp.where(stop < 0, in_front, q.preempted_waiting + stop - admitted)


def stopped(b: PendingStep, when: Flag, nobody: Flag, candidate: Candidate) -> PendingStep:
    """Note at which request admission has arrived, or that nobody who waits has a slot."""
    stop_place = b.stop_place
    if stop_place is not None:
        stop_place = jnp.where(when, candidate.place, stop_place)
    return b._replace(stop=jnp.where(when, jnp.where(nobody, FAR, candidate.key), b.stop), stop_place=stop_place)


def note_skipped(s: State, runs: Flag) -> Queue:
    """Say who has been skipped once a step is put together."""
    skipped, b = s.queue.skipped, s.pending
    if skipped is None or b.stop_place is None:
        return s.queue
    all_of_them = b.stop == FAR
    fresh = jnp.where(all_of_them, s.clients.sent, b.stop)
    preempted = jnp.where(all_of_them, s.queue.preempted_waiting, b.stop_place)
    further = runs & ((fresh > skipped.fresh) | ((fresh == skipped.fresh) & (preempted > skipped.preempted)))
    return s.queue._replace(
        skipped=skipped._replace(
            fresh=jnp.where(further, fresh, skipped.fresh), preempted=jnp.where(further, preempted, skipped.preempted)
        )
    )
