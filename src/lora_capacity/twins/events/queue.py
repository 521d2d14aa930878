"""The queue: fresh requests in order of arrival, and preempted ones.

A preempted request goes to the very front, so that the last one comes first. Where the version keeps those that it
passed over in a queue of their own, tried before the others, it goes to the front of the others instead: `Passed` says
how far that is, and each preempted request which fresh one comes next behind it.

Source: ``vllm/v1/core/sched/scheduler.py``, vLLM 0.8.5, and 0.26 for the two queues.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.arrays import (
    add,
    add_across,
    after,
    largest,
    least,
    pick,
    pick_across,
    places,
    put_across,
    seldom,
    total,
    when_any,
)
from lora_capacity.twins.events.asynchronous import slots_in_use
from lora_capacity.twins.events.state import DONE, FAR, PREEMPTIONS, Building, Move, Passed, Preempted, Server, State


class Waiting(NamedTuple):
    """The first request of the queue that has a slot; ``[configs]``.

    Attributes:
        key: Its key; with `Passed`, the number of the first fresh request that does not stand in front of it.
        place: Its place if it was preempted; with `Passed`, else how many that were stand in front of it.
        request: Its number.
        sampled: Tokens that it had sampled.
        from_preempted: Whether it was, bool.
        found: Whether there is one, bool.
    """

    key: Array
    place: Array
    request: Array
    sampled: Array
    from_preempted: Array
    found: Array


def first_waiting(s: State, since: Array, free: Array) -> Waiting:
    """Find the first request whose adapter has a slot.

    Args:
        s: The state.
        since: Adapters needed in this step or later have one, ``[configs]``.
        free: Whether there is one for any adapter, bool ``[configs]``.
    """

    def with_slot(last: Array, key: Array) -> Array:
        return jnp.where((last >= since) | free, key, FAR)

    if s.passed is None:
        key = least(s.last, s.key, of=with_slot)
        place = jnp.clip(-1 - key, 0, s.preempted.request.shape[0] - 1)
        return _waiting(s, key, place, place, key < 0, key < s.sent)
    number = least(s.last, s.head, of=with_slot)
    before, row = s.passed.before, places(s.passed.before)

    def among_preempted() -> tuple[Array, Array]:
        stands = row < s.preempted_waiting
        owns = (jnp.take_along_axis(s.last, s.preempted.adapter, axis=0) >= since) | free
        return least(jnp.where(stands & owns, row, FAR)), total(stands & (before <= number))

    none = jnp.full_like(number, FAR), jnp.zeros_like(number)
    place, in_front = jax.lax.cond((s.preempted_waiting > 0).any(), among_preempted, lambda: none)
    row_of_it = jnp.minimum(place, before.shape[0] - 1)
    behind = pick_across(before, row_of_it)
    from_preempted = (place < FAR) & (behind <= number)
    return _waiting(
        s,
        jnp.where(from_preempted, behind, number),
        jnp.where(from_preempted, place, in_front),
        row_of_it,
        from_preempted,
        from_preempted | (number < s.sent),
    )


def _waiting(s: State, key: Array, place: Array, row: Array, from_preempted: Array, found: Array) -> Waiting:
    request, sampled = (pick_across(column, row) for column in (s.preempted.request, s.preempted.sampled))
    return Waiting(
        key=key,
        place=place,
        request=jnp.where(from_preempted, request, key),
        sampled=jnp.where(from_preempted, sampled, 0),
        from_preempted=from_preempted,
        found=found,
    )


def requeue(s: State, move: Move, preempt: Array, sampled: Array) -> State:
    """Put a preempted request in front of the queue, or behind those passed over."""
    size = s.preempted.request.shape[0]
    overflow = preempt & (s.places == size)
    new = Preempted(move.request, move.adapter, sampled)
    s = _put_in_front(s, preempt, new) if s.passed is None else _put_behind(s, s.passed, preempt, new)
    return s._replace(
        mode=jnp.where(overflow, DONE, s.mode),
        overflow=s.overflow | overflow,
        places=s.places + preempt,
        preempted_waiting=s.preempted_waiting + preempt,
        counts=s.counts.at[PREEMPTIONS].add(preempt),
    )


def dequeue(s: State, move: Move, admit: Array, from_preempted: Array, place: Array) -> State:
    """Take an admitted request out of the queue."""
    fresh, again = admit & ~from_preempted, admit & from_preempted
    head = jnp.where(fresh, move.following, pick_across(s.head, move.adapter))
    s = _leave(s, move, admit, again, place, head) if s.passed is None else _close_up(s, s.passed, again, place)
    waited = s.now - move.sent
    worst = pick_across(s.worst_wait, move.adapter)
    bit = jnp.left_shift(jnp.uint32(1), (move.request & 31).astype(jnp.uint32))
    return s._replace(
        taken=s.taken + fresh,
        head=put_across(s.head, fresh, move.adapter, head),
        preempted_waiting=s.preempted_waiting - again,
        worst_wait=put_across(s.worst_wait, after(worst, fresh), move.adapter, jnp.maximum(worst, waited)),
        admitted=add(s.admitted, fresh, move.request >> 5, bit),
        admitted_by_block=add_across(s.admitted_by_block, fresh, move.request >> 10, 1),
        admitted_by_adapter=add_across(s.admitted_by_adapter, fresh, move.adapter, 1),
    )


def _leave(s: State, move: Move, admit: Array, again: Array, place: Array, head: Array) -> State:
    """Take a request out of the preempted ones and leave its place empty; say who is first of its adapter."""
    adapter = s.preempted.adapter
    request = put_across(s.preempted.request, again, place, -1)
    filled = (request >= 0) & (places(request) < s.places)
    next_place = largest(jnp.where(filled & (adapter == move.adapter), places(request), -1))
    used = 1 + largest(jnp.where(filled, places(request), -1))
    key = jnp.where(again & (next_place >= 0), -1 - next_place, head)
    return s._replace(
        key=put_across(s.key, admit, move.adapter, key),
        preempted=s.preempted._replace(request=request),
        places=jnp.where(again, used, s.places),
    )


def _put_in_front(s: State, preempt: Array, new: Preempted) -> State:
    """Give a preempted request the next place; without one it is dropped, and the simulation breaks off."""
    columns = (put_across(old, preempt, s.places, one) for old, one in zip(s.preempted, new, strict=True))
    return s._replace(key=put_across(s.key, preempt, new.adapter, -1 - s.places), preempted=Preempted(*columns))


def _put_behind(s: State, passed: Passed, preempt: Array, new: Preempted) -> State:
    """Put a preempted request behind those passed over; those behind it move on."""

    def insert(columns: list[Array]) -> list[Array]:
        row, at = places(passed.before), passed.preempted
        return [
            jnp.where(preempt & (row >= at), jnp.where(row == at, one, jnp.roll(old, 1, axis=0)), old)
            for old, one in zip(columns, (*new, passed.fresh), strict=True)
        ]

    *columns, before = seldom(preempt, insert, [*s.preempted, passed.before])
    return s._replace(preempted=Preempted(*columns), passed=passed._replace(before=before))


def _close_up(s: State, passed: Passed, again: Array, place: Array) -> State:
    """Take a request out of the preempted ones; those behind it move up."""

    def remove(columns: list[Array]) -> list[Array]:
        gone = again & (places(passed.before) >= place)
        return [jnp.where(gone, jnp.roll(old, -1, axis=0).at[-1].set(-1), old) for old in columns]

    *columns, before = seldom(again, remove, [*s.preempted, passed.before])
    return s._replace(
        preempted=Preempted(*columns),
        passed=passed._replace(before=before, preempted=passed.preempted - (again & (place < passed.preempted))),
        places=s.places - again,
    )


def passed_over(server: Server, s: State, ready: Array) -> Array:
    """Count the waiting requests that admission has passed over, ``[configs]``.

    Args:
        server: The configurations.
        s: The state.
        ready: Where a step is put together.
    """
    slots, _ = slots_in_use(server, s)
    behind = ready & (jnp.abs(s.building.stop) < FAR) & (slots >= server.max_loras)
    before: Array = when_any(behind, lambda: _standing_before_the_stop(s))
    return jnp.where(behind, before, jnp.where(s.building.stop == FAR, s.waiting, 0))


def _standing_before_the_stop(s: State) -> Array:
    """Count the waiting requests that stand before the one at which admission stopped."""
    stop, request = s.building.stop, s.preempted.request
    block = jnp.clip(stop >> 10, 0, s.admitted_by_block.shape[0] - 1)
    admitted = total(jnp.where(places(s.admitted_by_block) < block, s.admitted_by_block, 0))
    word = jnp.arange(32, dtype=jnp.int32)[:, None]
    words = pick(s.admitted, block * 32 + word)
    room = jnp.clip(stop - block * 1024 - 32 * word, 0, 32)
    mask = jnp.where(room >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << room.astype(jnp.uint32)) - 1)
    admitted = admitted + total(jax.lax.population_count(words & mask))
    if s.building.stop_place is not None:
        return s.building.stop_place + stop - admitted
    in_front = total((request >= 0) & (places(request) < s.places) & (places(request) > -1 - stop))
    return jnp.where(stop < 0, in_front, s.preempted_waiting + stop - admitted)


def stopped(b: Building, when: Array, nobody: Array, waiting: Waiting) -> Building:
    """Note at which request admission has arrived, or that nobody who waits has a slot."""
    stop_place = b.stop_place
    if stop_place is not None:
        stop_place = jnp.where(when, waiting.place, stop_place)
    return b._replace(stop=jnp.where(when, jnp.where(nobody, FAR, waiting.key), b.stop), stop_place=stop_place)


def look_further(s: State, runs: Array) -> Passed | None:
    """Say who has been passed over once a step is put together."""
    passed, b = s.passed, s.building
    if passed is None or b.stop_place is None:
        return None
    all_of_them = b.stop == FAR
    fresh = jnp.where(all_of_them, s.sent, b.stop)
    preempted = jnp.where(all_of_them, s.preempted_waiting, b.stop_place)
    further = runs & ((fresh > passed.fresh) | ((fresh == passed.fresh) & (preempted > passed.preempted)))
    return passed._replace(
        fresh=jnp.where(further, fresh, passed.fresh), preempted=jnp.where(further, preempted, passed.preempted)
    )
