"""Steps in which nothing happens but that every running request gets a token: several of them in one turn.

Nobody arrives or leaves, nobody who waits could be admitted, and all prompts are computed: what the steps change is
known beforehand.
"""

import jax.numpy as jnp
from jax import Array

from lora_capacity.costs import Costs
from lora_capacity.twins.events.arrays import least, pick, pick_across, read, running_total, seldom, total
from lora_capacity.twins.events.asynchronous import compute_ticks
from lora_capacity.twins.events.queue import passed_over
from lora_capacity.twins.events.state import FAR, NEXT_TOKENS, RUN, STEPS, Server, State
from lora_capacity.twins.events.step import accumulate, compute_time_s

MOST_SKIPPED = 8
"""Most steps that are skipped at once, at most the tokens of a block: then each needs the blocks of another phase."""


def skip_quiet_steps(costs: Costs, server: Server, adapters: Array, s: State) -> State:
    """Let steps run as long as nothing happens in them, with all that they change, and put the next one together.

    Args:
        costs: What steps cost.
        server: The configurations.
        adapters: Adapters of each, ``[configs]``.
        s: The state between two turns.
    """
    b = s.building
    quiet = (s.mode == RUN) & (s.partial.request < 0) & (s.running > 0) & (s.now >= server.warmup)
    quiet &= (b.prefill_tokens + b.rejoined == 0) & ~b.preempted & (s.first_got == s.first_put)
    leaving, _, _, last_block, last_needed = read(s, s.ring, s.step & (s.ring.shape[1] - 1)).T
    quiet &= leaving + last_block + last_needed == 0
    return seldom(quiet, lambda s: _skipped(costs, server, adapters, quiet, s), s)


def _skipped(costs: Costs, server: Server, adapters: Array, quiet: Array, s: State) -> State:
    passed = passed_over(server, s, quiet)
    number = jnp.arange(MOST_SKIPPED, dtype=jnp.int32)[:, None]
    step = s.step + number
    leaving, _, _, last_block, last_needed = jnp.moveaxis(read(s, s.ring, step & (s.ring.shape[1] - 1)), 2, 0)
    growth = pick_across(s.phase, (step + 1) & 15)
    kv_tokens = s.kv_tokens + s.running * number
    compute_s = compute_time_s(
        costs, server, adapters, s, tokens=s.running, prefill_tokens=0, kv_tokens=kv_tokens, passed_over=passed
    )
    ticks = compute_ticks(server, compute_s)
    end, grown = s.now + running_total(ticks), running_total(growth)
    arrival = jnp.where(s.sent < s.completed + server.max_pending, pick(s.sent_at, s.sent), FAR)
    until = jnp.minimum(arrival, server.horizon)
    goes_on = quiet & (leaving + last_block + last_needed == 0) & (end < until) & (grown <= s.free)
    steps = least(jnp.where(goes_on, MOST_SKIPPED, number))
    skipped = number < steps

    taken = total(jnp.where(skipped, ticks, 0))
    blocks = total(jnp.where(skipped, growth, 0))
    used = server.kv_blocks - s.free
    block_ticks = jnp.sum(jnp.where(skipped, ticks * (used + grown - growth).astype(jnp.float32), 0.0), axis=0)
    taken_s = taken * server.tick_s
    none = jnp.zeros_like(taken_s)
    requests_s, adapters_s = (s.running * taken_s, s.waiting * taken_s), (s.active * taken_s, s.streaming * taken_s)
    scheduling_s = jnp.asarray(costs.step.skipped_request_s * passed * steps, jnp.float32)
    added = jnp.stack([taken_s, none, *requests_s, block_ticks * server.tick_s, *adapters_s, scheduling_s, none])
    sums, lost = accumulate(s.sums, s.sums_lost, added)
    return s._replace(
        now=s.now + taken,
        step=s.step + steps,
        free=s.free - blocks,
        kv_tokens=s.kv_tokens + s.running * steps,
        active_before=jnp.where(steps > 0, s.active, s.active_before),
        most=s.most.at[2].max(jnp.where(steps > 0, used + blocks, 0)),
        sums=sums,
        sums_lost=lost,
        counts=s.counts.at[STEPS].add(steps).at[NEXT_TOKENS].add(s.running * steps),
    )
