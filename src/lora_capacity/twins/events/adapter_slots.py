"""Which adapters have to be brought onto the GPU: LRU eviction, without keeping what is in the slots.

The slots hold the ``max_loras`` adapters used last, so an adapter is there if fewer others were used since its own use.

Source: ``vllm/lora/worker_manager.py`` and the LRU lists of ``vllm/lora/models.py``, vLLM 0.8.5.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from lora_capacity.twins.events.arrays import add, indices, least, on_any, put, running_total, seldom, total
from lora_capacity.twins.events.asynchronous import keep_in_use
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.state import (
    FAR,
    LAST_NEEDED,
    NEVER,
    AdapterUse,
    Flag,
    Move,
    Number,
    PendingStep,
    State,
)


def note_use(server: Server, s: State, move: Move, before: Number) -> tuple[State, Number, Number]:
    """Note how long a request needs its adapter; a preempted one takes its claim back.

    Args:
        server: The server.
        s: Its state.
        move: The request, and whether it joins, goes on or leaves.
        before: ``last`` of its adapter before its admission, if it leaves.

    Returns:
        The state; the adapter that became active, -1 if none did; ``last`` of the request's adapter until now.
    """
    use, b, mask = s.adapters, s.pending, s.calendar.shape[0] - 1
    adapter = jnp.minimum(move.adapter, use.last.shape[0] - 2)
    own = move.adapter < use.last.shape[0] - 1
    last = use.last[adapter]
    claim = jnp.maximum(last, jnp.where(move.sign > 0, move.finish, s.step))
    value = jnp.where(move.needed, claim, jnp.maximum(before, s.step - 1))
    changes = own & (move.needed | (move.sign < 0))
    was, will = changes & (last >= s.step), changes & (value >= s.step)
    new = own & move.needed & (last < s.step - 1)
    never = new & (last == NEVER)
    calendar = add(s.calendar, was, (last & mask, LAST_NEEDED), -1)
    calendar = add(calendar, will, (value & mask, LAST_NEEDED), 1)
    s = s._replace(
        calendar=calendar,
        adapters=use._replace(
            active=use.active + will - was,
            last=put(use.last, changes, (adapter,), value),
            since=put(use.since, new, (adapter,), s.step),
            earlier=put(use.earlier, new, (adapter,), last),
        ),
        pending=b._replace(
            newcomers=b.newcomers + new,
            first_touched=b.first_touched + never,
            disk_s=b.disk_s + jnp.where(never, server.disk_s[adapter], 0.0),
        ),
        in_flight=keep_in_use(s, last, own & move.needed),
    )
    return s, jnp.where(new, adapter, -1), last


def note_distance(use: AdapterUse, step: Number, newcomers: Number, newcomer: Number) -> AdapterUse:
    """Note for an adapter that became active how many others were used since, in the order of touching.

    An adapter is on the GPU if fewer than ``max_loras`` others were used since its last use; here use is counted as it
    will be when the step touches the newcomer. Others that this step made active count if they come before it.

    Args:
        use: The use of adapters.
        step: The step being put together.
        newcomers: Adapters that it made active so far.
        newcomer: The one that this iteration made active, -1 for none.
    """
    order, comes = indices(use.last), newcomer >= 0
    own = jnp.maximum(newcomer, 0)
    own_last = use.earlier[own]

    def counts(order: Array, last: Array, since: Array, earlier: Array) -> Array:
        new = since == step
        used = jnp.where(new, earlier, jnp.minimum(last, step - 1))
        later = (used > own_last) | ((used == own_last) & (order > own))
        return jnp.where(new, later | (order < own), later) & (order != own) & (last < FAR)

    def of_newcomer(distance: Array) -> Array:
        return put(distance, comes, (own,), total(order, use.last, use.since, use.earlier, of=counts))

    def of_others(distance: Array) -> Array:
        return distance + (comes & (use.since == step) & (order > own) & (use.earlier >= own_last))

    distance = seldom(comes & (newcomers > 1), of_others, use.distance)
    return use._replace(distance=seldom(comes, of_newcomer, distance))


def host_loads(server: Server, use: AdapterUse, step: Number, b: PendingStep, ready: Flag) -> Number:
    """Count the adapters that a step copies from host memory to the GPU; one may come twice.

    Args:
        server: The server.
        use: The use of adapters.
        step: The step that was put together.
        b: What it consists of.
        ready: Whether it is ready to run.
    """
    none = jnp.zeros_like(step)
    new = ready & server.crowded & (b.newcomers > 0)
    evicting = new & (b.newcomers > server.max_loras - use.active_before)
    several = evicting & (b.newcomers > 1)
    evicted = jax.lax.switch(
        on_any(evicting).astype(jnp.int32) + on_any(several),
        (
            lambda: none,
            lambda: _loads_of_evicted(server, use, step, one=True),
            lambda: _loads_of_evicted(server, use, step, one=False),
        ),
    )
    missing = jax.lax.cond(on_any(new), lambda: _loads_of_newcomers(server, use, step), lambda: none)
    return jnp.where(new, missing, b.first_touched) + jnp.where(evicting, evicted, 0)


def _loads_of_newcomers(server: Server, use: AdapterUse, step: Number) -> Number:
    """Count the adapters that this step made active and that are not on the GPU any more, or never were."""

    def missing(since: Array, earlier: Array, distance: Array) -> Array:
        return (since == step) & ((earlier == NEVER) | (distance >= server.max_loras))

    return total(use.since, use.earlier, use.distance, of=missing)


def _loads_of_evicted(server: Server, use: AdapterUse, step: Number, *, one: bool) -> Number:
    """Count the adapters that stay active but are evicted by newcomers that the step touches first, and loaded again.

    Going through the adapters in the order of touching, each newcomer takes a slot and each adapter that has left since
    the step before gives one; where more are taken than were free, the next active adapter has been evicted.

    Args:
        server: The server.
        use: The use of adapters.
        step: The step that was put together.
        one: Whether no step has more than one newcomer: then a comparison of places does.
    """
    order = indices(use.last)
    new = use.since == step
    stays = (use.last >= step) & (use.last < FAR) & ~new
    left = use.last == step - 1
    free = server.max_loras - use.active_before
    if one:
        after = least(jnp.where(new, order, FAR))
        until = least(jnp.where(left, order, FAR))
        return jnp.where(free == 0, total(stays & (order > after) & (order < until)), 0)
    return total(stays & (_added_up(new.astype(jnp.int32) - left) > free))


def _added_up(values: Int[Array, " adapters"]) -> Int[Array, " adapters"]:
    """Add up along an axis whose size is a multiple of 16, in groups: a scan of all would go one by one."""
    groups = running_total(values.reshape(-1, 16).T)
    before = running_total(groups[-1]) - groups[-1]
    return (groups + before).T.reshape(values.shape)
