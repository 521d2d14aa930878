"""When requests find, hold and give back the blocks of shared prefixes.

Source: ``schedule`` and ``update_from_output`` in ``vllm/v1/core/sched/scheduler.py``, vLLM 0.8.5 to 0.33.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.arrays import on_any, put
from lora_capacity.twins.events.prefix_cache import Found, Holding, Prefixes, give_back, hold, look_up
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.state import Flag, Move, Number, State


def find(
    server: Server, s: State, when: Flag, front: Number | None, free: Number, request: Number, adapter: Number
) -> Found | None:
    """Return what a waiting request finds; None without prefix caching.

    Args:
        server: The server.
        s: Its state.
        when: Whether there is such a request.
        front: Blocks in front of all places.
        free: Free blocks.
        request: Its number.
        adapter: Its adapter.
    """
    if s.prefixes is None or front is None:
        return None
    found = look_up(s.prefixes._replace(front=front), free, adapter, request, _shared_blocks(server, request))
    return Found(*(jnp.where(when, value, none) for value, none in zip(found, (0, 0, 0, -1), strict=True)))


def move_blocks(
    server: Server,
    s: State,
    move: Move,
    found: Found | None,
    goes_on: Flag,
    held: Number,
    computed: Number | None,
    preempt: Flag,
) -> State:
    """Let the request that an iteration moves hold blocks, or give them back if it is preempted.

    Args:
        server: The server.
        s: Its state.
        move: The request.
        found: What it finds if it is admitted.
        goes_on: Whether its prompt, which was cut, goes on.
        held: Tokens of it that were computed before, if so.
        computed: Those that are once the step has run, if it is admitted or goes on.
        preempt: Whether it is preempted.
    """
    if s.prefixes is None or found is None or computed is None:
        return s
    p, size, mask = s.prefixes, s.kv.block_size, s.calendar.shape[0] - 1
    shared = _shared_blocks(server, move.request)
    begin = jnp.where(goes_on, jnp.minimum(held // size, shared), 0)
    p = hold(p, move.needed, move.adapter, found, begin, jnp.minimum(computed // size, shared))
    leaving = p.leaving.enter(move.sign > 0, move.finish & mask, move.request)
    p = p._replace(
        leaving=leaving.drop_last(move.sign < 0, move.finish & mask),
        joined_tokens=put(p.joined_tokens, move.sign > 0, (move.request,), move.computed),
    )
    return _given_back(server, s._replace(prefixes=p), move, preempt, move.computed, move.sign < 0, preempt)


def free_finished(server: Server, s: State, move: Move, when: Flag) -> State:
    """Let a request that is preempted while its last token is in flight give its blocks back."""
    if s.prefixes is None:
        return s
    p, cell = s.prefixes, (s.step - 1) & (s.calendar.shape[0] - 1)
    s = s._replace(prefixes=p._replace(leaving=p.leaving.drop_last(when, cell)))
    return _given_back(server, s, move, when, move.input + move.output - 1, when, when & False)


def free_leaving(server: Server, s: State, when: Flag, blocks: Number) -> tuple[Prefixes | None, Number]:
    """Let the requests that a step finishes give their blocks back, one after the other.

    Args:
        server: The server.
        s: Its state.
        when: Whether a step that was put together starts; what it finishes is free then, or, under asynchronous
            scheduling, what the step before did.
        blocks: Blocks that they hold, each counted as often as it is held.

    Returns:
        The cache, and how many blocks are free for that.
    """
    if s.prefixes is None:
        return None, blocks
    step = s.step if s.in_flight is None else s.step - 1
    cell = step & (s.calendar.shape[0] - 1)
    first = jnp.where(when, s.prefixes.leaving.first[cell], -1)

    def any_left(carry: tuple[Prefixes, Number, Number]) -> Array:
        some: Array = on_any(carry[1] >= 0)
        return some

    def free_one(carry: tuple[Prefixes, Number, Number]) -> tuple[Prefixes, Number, Number]:
        p, request, count = carry
        number = jnp.maximum(request, 0)
        adapter, prompt, output = server.requests.table[number].astype(jnp.int32)
        tokens = prompt + output - 1
        holding = Holding(_shared_blocks(server, number), tokens // s.kv.block_size, s.kv.blocks(tokens))
        leaves = request >= 0
        p, freed = give_back(p, leaves, leaves & False, adapter, number, holding, server.rules.uncached_blocks_first)
        return p, jnp.where(leaves, p.leaving.behind[number], -1), count + freed

    p, _, count = jax.lax.while_loop(any_left, free_one, (s.prefixes, first, jnp.zeros_like(blocks)))
    leaving = p.leaving
    emptied = (put(column, when, (cell,), -1) for column in (leaving.first, leaving.last))
    return p._replace(leaving=leaving._replace(**dict(zip(("first", "last"), emptied, strict=True)))), count


def _given_back(
    server: Server, s: State, move: Move, when: Flag, computed: Number, decoding: Flag, again: Flag
) -> State:
    """Free the blocks of a request of which so many tokens are computed, or will be once the step in flight ends."""
    p: Any = s.prefixes
    full = computed
    if s.in_flight is not None:
        # A token in flight fills no block yet; only those of the prompt are known before they are computed.
        full = jnp.where(decoding, jnp.maximum(computed - 1, p.joined_tokens[move.request]), computed)
    full = full // s.kv.block_size
    shared = jnp.minimum(_shared_blocks(server, move.request), full)
    holding = Holding(shared, full, s.kv.blocks(computed))
    p, freed = give_back(p, when, again, move.adapter, move.request, holding, server.rules.uncached_blocks_first)
    return s._replace(prefixes=p, kv=s.kv._replace(free=s.kv.free + freed))


def _shared_blocks(server: Server, request: Number) -> Number:
    every: Any = server.requests.shared_blocks
    blocks: Number = every[request].astype(jnp.int32)
    return blocks
