"""Which adapters have to be brought onto the GPU: least recently used slots, without keeping what is in them.

The slots hold the ``max_loras`` adapters used last, so an adapter is there if fewer others were used since its own use.

Source: ``vllm/lora/worker_manager.py`` and the LRU lists of ``vllm/lora/models.py``, vLLM 0.8.5.
"""

import jax.numpy as jnp
from jax import Array

from lora_capacity.twin.events._arrays import pick_across, places, total
from lora_capacity.twin.events._state import FAR, NEVER, Server, State


def distances(s: State, newcomer: Array) -> Array:
    """Note for an adapter that became active how many others were used since, in the order of touching.

    An adapter is on the GPU if fewer than ``max_loras`` others were used since its last use; here use is counted as it
    will be when the step touches the newcomer. Others that this step made active count if they come before it.
    """
    order = places(s.last)
    own = jnp.maximum(newcomer, 0)
    new = (s.since == s.step) & (order != own)
    used = jnp.where(new, s.earlier, jnp.minimum(s.last, s.step - 1))
    last = pick_across(s.earlier, own)
    later = (used > last) | ((used == last) & (order > own))
    counted = jnp.where(new, later | (order < own), later) & (order != own) & (s.last < FAR)
    distance = s.distance + (new & later & (order > own))
    distance = jnp.where(order == own, total(counted), distance)
    return jnp.where(newcomer >= 0, distance, s.distance)


def loads_of_newcomers(server: Server, s: State) -> Array:
    """Count the adapters that this step made active and that are not on the GPU any more, or never were."""
    new = s.since == s.step
    return total(new & ((s.earlier == NEVER) | (s.distance >= server.max_loras)))


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
        after = jnp.min(jnp.where(new, order, FAR), axis=0)
        until = jnp.min(jnp.where(left, order, FAR), axis=0)
        return jnp.where(free == 0, total(stays & (order > after) & (order < until)), 0)
    return total(stays & (_running_total(new.astype(jnp.float32) - left.astype(jnp.float32)) > free))


def _running_total(values: Array) -> Array:
    """Add up along the first axis, whose size is a multiple of 16, by products with triangular matrices."""
    groups = values.reshape(-1, 16, values.shape[1])
    inside = jnp.einsum("ij,gjc->gic", jnp.tril(jnp.ones((16, 16))), groups)
    number = groups.shape[0]
    before = jnp.tril(jnp.ones((number, number)), -1) @ inside[:, -1]
    return (inside + before[:, None]).reshape(values.shape)
