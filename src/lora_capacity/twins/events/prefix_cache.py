"""Prefix caching: which blocks of each adapter's shared prefix the KV cache holds, and of the requests preempted.

A free block can be found again until it is taken, and free blocks are taken in the order in which they were freed. So
each gets a *place* as it is freed, one more than the block before it, and is still there as long as no fewer blocks are
free than stand behind it. One that is found leaves a gap, which is closed: whatever stands in front moves up by one.
Nothing has to be known of blocks that nobody will look for.

The requests of an adapter share the first blocks of a prefix, the blocks of a request are freed last block first, and
only a request that finds or computes a block holds it; so of a prefix there are always the first blocks, those in use
in front of those that are free.

Source: ``get_computed_blocks`` and ``allocate_slots`` in ``vllm/v1/core/kv_cache_manager.py``, ``free_blocks`` in
``vllm/v1/core/block_pool.py``, vLLM 0.8.5 to 0.33.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from lora_capacity.twins.events.arrays import indices, largest, least, on_any, put, seldom, total

Number = Int[Array, ""]
Flag = Bool[Array, ""]

GONE = -(2**30)
"""Place of a block that has never been freed: before any other."""


class OwnBlocks(NamedTuple):
    """Blocks that only a preempted request will look for; int32 ``[places]``.

    Attributes:
        request: Its number, -1 if there is none.
        place: Place of the first of them, which was freed last.
        number: How many were freed.
    """

    request: Int[Array, " places"]
    place: Int[Array, " places"]
    number: Int[Array, " places"]


class LeavingRequests(NamedTuple):
    """The running requests by the step of their last token, in the order of the batch; int32.

    Attributes:
        first: First request that leaves in a step, -1 for none, by step modulo the length of the calendar, ``[steps]``.
        last: The last one, ``[steps]``.
        before: The one in front of each request, -1 for none, ``[requests]``.
        behind: The one behind it, ``[requests]``.
    """

    first: Int[Array, " steps"]
    last: Int[Array, " steps"]
    before: Int[Array, " requests"]
    behind: Int[Array, " requests"]

    def enter(self, when: Flag, cell: Number, request: Number) -> "LeavingRequests":
        """Let a request leave in a step, behind all others."""
        last = self.last[cell]
        return LeavingRequests(
            first=put(self.first, when & (last < 0), (cell,), request),
            last=put(self.last, when, (cell,), request),
            before=put(self.before, when, (request,), last),
            behind=put(put(self.behind, when & (last >= 0), (jnp.maximum(last, 0),), request), when, (request,), -1),
        )

    def drop_last(self, when: Flag, cell: Number) -> "LeavingRequests":
        """Take out the last request that leaves in a step."""
        before = self.before[jnp.maximum(self.last[cell], 0)]
        return self._replace(
            first=put(self.first, when & (before < 0), (cell,), -1),
            last=put(self.last, when, (cell,), before),
            behind=put(self.behind, when & (before >= 0), (jnp.maximum(before, 0),), -1),
        )


class Prefixes(NamedTuple):
    """What the prefix cache of one server holds; int32.

    Attributes:
        users: Running requests that hold each block of each prefix, the base model's last, ``[adapters + 1, blocks]``.
        place: Place of each, if it is free, ``[adapters + 1, blocks]``.
        appended: Blocks that have been freed to the end of the queue, scalar; the next place.
        front: Blocks that nobody will look for in front of all places, scalar.
        own: Other blocks of preempted requests.
        leaving: Who leaves when.
        joined_tokens: Tokens that each request had in the cache as it began to decode, ``[requests]``.
    """

    users: Int[Array, "adapters+1 blocks"]
    place: Int[Array, "adapters+1 blocks"]
    appended: Number
    front: Number
    own: OwnBlocks
    leaving: LeavingRequests
    joined_tokens: Int[Array, " requests"]

    def taken(self, blocks: Number) -> "Prefixes":
        """Let requests take free blocks, those in front first."""
        return self._replace(front=jnp.maximum(self.front - blocks, 0))


class Found(NamedTuple):
    """Blocks that a waiting request finds.

    Attributes:
        shared: Those of its adapter's prefix.
        free: Those of them that no running request holds.
        own: Its own, if it was preempted.
        row: Where these are noted.
    """

    shared: Number
    free: Number
    own: Number
    row: Number

    @property
    def blocks(self) -> Number:
        """All that it finds."""
        return self.shared + self.own

    @property
    def freed(self) -> Number:
        """Those of them that are free until it holds them."""
        return self.free + self.own


class Holding(NamedTuple):
    """The blocks of a request.

    Attributes:
        shared: Those of its adapter's prefix, all full.
        full: Those that are full and can be found again, these included.
        blocks: All.
    """

    shared: Number
    full: Number
    blocks: Number


def no_prefixes(adapters: int, blocks: int, steps: int, requests: int, places: int) -> Prefixes:
    """Return the cache of a server that has not begun; the sizes are those of the arrays."""

    def filled(value: int, *shape: int) -> Array:
        return jnp.full(shape, value, jnp.int32)

    return Prefixes(
        users=filled(0, adapters + 1, blocks),
        place=filled(GONE, adapters + 1, blocks),
        appended=filled(0),
        front=filled(0),
        own=OwnBlocks(filled(-1, places), filled(0, places), filled(0, places)),
        leaving=LeavingRequests(filled(-1, steps), filled(-1, steps), filled(-1, requests), filled(-1, requests)),
        joined_tokens=filled(0, requests),
    )


def look_up(p: Prefixes, free: Number, adapter: Number, request: Number, shared: Number) -> Found:
    """Find the blocks that hold the first tokens of a waiting request.

    Args:
        p: The cache; ``front`` as it is with so many free blocks.
        free: Free blocks.
        adapter: The request's adapter.
        request: Its number.
        shared: Blocks at its start that are those of its adapter's prefix.
    """
    first = p.appended + p.front - free
    users, place = p.users[adapter], p.place[adapter]
    within = indices(users) < shared
    held = within & (users > 0)
    waits = within & (users == 0) & (place >= first)
    row = largest(jnp.where(p.own.request == request, indices(p.own.request), -1))
    noted = jnp.maximum(row, 0)
    left = jnp.clip(p.own.place[noted] - first + 1, 0, p.own.number[noted])
    return Found(shared=total(held | waits), free=total(waits), own=jnp.where(row >= 0, left, 0), row=row)


def hold(p: Prefixes, when: Flag, adapter: Number, found: Found, begin: Number, end: Number) -> Prefixes:
    """Let a request that is admitted hold what it found, and one that goes on what it computes of its prefix.

    Args:
        p: The cache.
        when: Whether to.
        adapter: The request's adapter.
        found: What it found; nothing if it goes on.
        begin: Blocks of its prefix that it holds already.
        end: Those that it holds then.
    """
    finds = when & (found.freed > 0)

    def closed(carry: tuple[Array, OwnBlocks]) -> tuple[Array, OwnBlocks]:
        return _without_gaps(*carry, finds, adapter, found)

    place, own = seldom(finds, closed, (p.place, p.own))
    forgets = when & (found.row >= 0)
    own = own._replace(request=put(own.request, forgets, (jnp.maximum(found.row, 0),), -1))
    users = p.users[adapter]
    col = indices(users)
    users = users + ((col >= begin) & (col < end))
    return p._replace(users=put(p.users, when & (end > begin), (adapter,), users), place=place, own=own)


def _without_gaps(place: Array, own: OwnBlocks, finds: Flag, adapter: Number, found: Found) -> tuple[Array, OwnBlocks]:
    """Close the gaps that found blocks leave, those in a row at once."""
    stop = jnp.where(finds, found.shared, 0)

    def some_left(carry: tuple[Array, Array, Number]) -> Array:
        some: Array = on_any(carry[2] < stop)
        return some

    def close(carry: tuple[Array, Array, Number]) -> tuple[Array, Array, Number]:
        place, own_place, at = carry
        row = place[adapter]
        col = indices(row)
        begin = row[jnp.minimum(at, row.shape[0] - 1)]
        in_a_row = (col < stop) & (row == begin - (col - at))
        end = least(jnp.where((col >= at) & ~in_a_row, col, stop))
        gap = jnp.where(at < stop, end - at, 0)
        in_front = begin - gap + 1
        return place + gap * (place < in_front), own_place + gap * (own_place < in_front), at + gap

    begin = jnp.where(finds, found.shared - found.free, 0)
    place, own_place, _ = jax.lax.while_loop(some_left, close, (place, own.place, begin))
    gap = jnp.where(finds, found.own, 0)
    in_front = own_place[jnp.maximum(found.row, 0)] - gap + 1
    own = own._replace(place=own_place + gap * (own_place < in_front))
    closed: Array = place + gap * (place < in_front)
    return closed, own


def give_back(
    p: Prefixes, when: Flag, preempted: Flag, adapter: Number, request: Number, holding: Holding, uncached_first: bool
) -> tuple[Prefixes, Number]:
    """Let a request hold its blocks no more; return how many are free for that.

    Args:
        p: The cache.
        when: Whether to.
        preempted: Whether it will look for them again.
        adapter: Its adapter.
        request: Its number.
        holding: Its blocks.
        uncached_first: Whether blocks that are not full go to the front of the queue; static.
    """
    users = p.users[adapter]
    col = indices(users)
    own = col < holding.shared
    users = users - own
    freed = own & (users == 0)
    uncached = jnp.where(when, holding.blocks - holding.full, 0)
    others = holding.full - holding.shared
    behind_shared = p.appended + others + (0 if uncached_first else uncached)
    place = jnp.where(freed, behind_shared + holding.shared - 1 - col, p.place[adapter])
    count = total(freed)
    row = least(jnp.where(p.own.request < 0, indices(p.own.request), p.own.request.shape[0] - 1))
    noted = when & preempted & (others > 0)
    columns = zip(p.own, (request, behind_shared - 1, others), strict=True)
    return p._replace(
        own=OwnBlocks(*(put(column, noted, (row,), value) for column, value in columns)),
        users=put(p.users, when & (holding.shared > 0), (adapter,), users),
        place=put(p.place, when & (count > 0), (adapter,), place),
        appended=jnp.where(when, behind_shared + count, p.appended),
        front=p.front + (uncached if uncached_first else 0),
    ), jnp.where(when, holding.blocks - holding.shared + count, 0)
