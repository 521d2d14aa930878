"""Which adapters have to be brought onto the GPU: least recently used slots, without keeping what is in them.

The slots hold the ``max_loras`` adapters used last, so an adapter is there if fewer others were used since its own use.

Source: ``vllm/lora/worker_manager.py`` and the LRU lists of ``vllm/lora/models.py``, vLLM 0.8.5.
"""

import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.arrays import least, pick_across, places, put_across, running_total, seldom, total
from lora_capacity.twins.events.state import FAR, NEVER, Server, State


def note_distance(s: State, newcomer: Array) -> State:
    """Note for an adapter that became active how many others were used since, in the order of touching.

    An adapter is on the GPU if fewer than ``max_loras`` others were used since its last use; here use is counted as it
    will be when the step touches the newcomer. Others that this step made active count if they come before it.

    Args:
        s: The state.
        newcomer: The adapter that this turn made active, -1 for none, ``[configs]``.
    """
    order, comes = places(s.last), newcomer >= 0
    own = jnp.maximum(newcomer, 0)
    own_last = pick_across(s.earlier, own)

    def counts(order: Array, last: Array, since: Array, earlier: Array) -> Array:
        new = since == s.step
        used = jnp.where(new, earlier, jnp.minimum(last, s.step - 1))
        later = (used > own_last) | ((used == own_last) & (order > own))
        return jnp.where(new, later | (order < own), later) & (order != own) & (last < FAR)

    def of_newcomer(distance: Array) -> Array:
        return put_across(distance, comes, own, total(order, s.last, s.since, s.earlier, of=counts))

    def of_others(distance: Array) -> Array:
        return distance + (comes & (s.since == s.step) & (order > own) & (s.earlier >= own_last))

    distance = seldom(comes & (s.building.newcomers > 1), of_others, s.distance)
    return s._replace(distance=seldom(comes, of_newcomer, distance))


def loads_of_newcomers(server: Server, s: State) -> Array:
    """Count the adapters that this step made active and that are not on the GPU any more, or never were."""

    def missing(since: Array, earlier: Array, distance: Array) -> Array:
        return (since == s.step) & ((earlier == NEVER) | (distance >= server.max_loras))

    return total(s.since, s.earlier, s.distance, of=missing)


def loads_of_evicted(server: Server, s: State, *, one: bool) -> Array:
    """Count the adapters that stay active but are evicted by newcomers that the step touches first, and loaded again.

    Going through the adapters in the order of touching, each newcomer takes a slot and each adapter that has left since
    the step before gives one; where more are taken than were free, the next active adapter has been evicted.

    Args:
        server: The configurations.
        s: The state.
        one: Whether no step has more than one newcomer: then a comparison of places does.
    """
    order = places(s.last)
    new = s.since == s.step
    stays = (s.last >= s.step) & (s.last < FAR) & ~new
    left = s.last == s.step - 1
    free = server.max_loras - s.active_before
    if one:
        after = least(jnp.where(new, order, FAR))
        until = least(jnp.where(left, order, FAR))
        return jnp.where(free == 0, total(stays & (order > after) & (order < until)), 0)
    return total(stays & (_added_up(new.astype(jnp.int32) - left) > free))


def _added_up(values: Array) -> Array:
    """Add up along the first axis, whose size is a multiple of 16, in groups."""
    groups = running_total(jnp.moveaxis(values.reshape(-1, 16, values.shape[1]), 1, 0))
    before = running_total(groups[-1]) - groups[-1]
    return jnp.moveaxis(groups + before, 0, 1).reshape(values.shape)
