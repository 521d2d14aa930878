"""Steps in which nothing happens but that every running request gets a token: several of them in one iteration.

Nobody arrives or leaves, nobody who waits could be admitted, and all prompts are computed: what the steps change is
known beforehand.
"""

import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.arrays import apart, least, running_total, seldom, total
from lora_capacity.twins.events.queue import count_skipped
from lora_capacity.twins.events.server import Server, compute_time_s
from lora_capacity.twins.events.state import FAR, LAST_BLOCK, LAST_NEEDED, LEAVING, NEXT_TOKENS, RUN, STEPS, State
from lora_capacity.twins.events.statistics import accumulate

MOST_SKIPPED = 8
"""Most steps that are skipped at once, at most the tokens of a block: then each needs the blocks of another phase."""


def fast_forward(server: Server, s: State) -> State:
    """Let steps run as long as nothing happens in them, with all that they change, and put the next one together."""
    b, first = s.pending, s.first_tokens
    quiet = (s.mode == RUN) & (s.batch.chunked.request < 0) & (s.batch.running > 0) & (s.now >= server.warmup)
    quiet &= (b.prefill_tokens + b.rejoined == 0) & ~b.preempted & (first.got == first.put)
    cell = s.step & (s.calendar.shape[0] - 1)
    quiet &= _nothing_ends(apart(s.step, lambda: s.calendar[cell]))
    return seldom(quiet, lambda s: _forwarded(server, s, quiet), s)


def _nothing_ends(cells: Array) -> Array:
    return cells[..., LEAVING] + cells[..., LAST_BLOCK] + cells[..., LAST_NEEDED] == 0


def _forwarded(server: Server, s: State, quiet: Array) -> State:
    clients, kv, r, running = s.clients, s.kv, s.statistics, s.batch.running
    skipped = count_skipped(server, s, quiet)
    number = jnp.arange(min(MOST_SKIPPED, kv.block_size), dtype=jnp.int32)
    step = s.step + number
    cells = apart(s.step, lambda: s.calendar[step & (s.calendar.shape[0] - 1)])
    growth = kv.of_decoding(step + 1)
    compute_s = compute_time_s(
        server, s, tokens=running, prefill_tokens=0, kv_tokens=kv.tokens + running * number, skipped=skipped
    )
    ticks = jnp.maximum(jnp.round(compute_s * (1.0 / server.tick_s)), 1.0).astype(jnp.int32)
    end, grown = s.now + running_total(ticks), running_total(growth)
    has_room = clients.sent < s.batch.completed + server.max_pending
    until = jnp.minimum(jnp.where(has_room, clients.sent_at[clients.sent], FAR), server.horizon)
    goes_on = quiet & _nothing_ends(cells) & (end < until) & (grown <= kv.free)
    steps = least(jnp.where(goes_on, number.size, number))
    taken = number < steps

    ticks_taken = total(jnp.where(taken, ticks, 0))
    blocks = total(jnp.where(taken, growth, 0))
    used = server.kv_blocks - kv.free
    block_ticks = jnp.sum(jnp.where(taken, ticks * (used + grown - growth).astype(jnp.float32), 0.0))
    taken_s = ticks_taken * server.tick_s
    none = jnp.zeros_like(taken_s)
    requests_s = running * taken_s, s.waiting * taken_s
    adapters_s = s.adapters.active * taken_s, s.batch.streaming * taken_s
    scheduling_s = jnp.asarray(server.costs.step.skipped_request_s * skipped * steps, jnp.float32)
    added = jnp.stack([taken_s, none, *requests_s, block_ticks * server.tick_s, *adapters_s, scheduling_s, none, none])
    sums, lost = accumulate(r.sums, r.sums_lost, added)
    return s._replace(
        now=s.now + ticks_taken,
        step=s.step + steps,
        kv=kv._replace(free=kv.free - blocks, tokens=kv.tokens + running * steps),
        prefixes=None if s.prefixes is None else s.prefixes.taken(blocks),
        adapters=s.adapters._replace(active_before=jnp.where(steps > 0, s.adapters.active, s.adapters.active_before)),
        statistics=r._replace(
            most=r.most.at[2].max(jnp.where(steps > 0, used + blocks, 0)),
            sums=sums,
            sums_lost=lost,
            counts=r.counts.at[STEPS].add(steps).at[NEXT_TOKENS].add(running * steps),
        ),
    )
