"""A step that was put together: how it runs, what it leaves behind."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.costs import Costs, step_time_s
from lora_capacity.scenarios.results import Bottleneck
from lora_capacity.twins.events.arrays import add, add_several, after, places, put, read, seldom
from lora_capacity.twins.events.asynchronous import hand_back, times
from lora_capacity.twins.events.queue import look_further
from lora_capacity.twins.events.state import (
    ADAPTERS,
    BINS,
    BINS_PER_DOUBLING,
    FAR,
    FIRST_TOKEN,
    KV_BLOCKS,
    LATER_TOKENS,
    REQUESTS,
    RUN,
    RUNNING,
    SEND,
    SHORTEST_S,
    TOKENS,
    TTFT,
    WAITING,
    WHOLE_ANSWER,
    Flight,
    Server,
    State,
    Work,
    new_building,
)


def compute_time_s(
    costs: Costs,
    server: Server,
    adapters: Array,
    s: State,
    *,
    tokens: Array,
    prefill_tokens: ArrayLike,
    kv_tokens: Array,
    passed_over: Array,
) -> Array:
    """Return what a step takes with the adapters and the queue as they are, float32 seconds, in the shape of its parts.

    Args:
        costs: What steps cost.
        server: The configurations.
        adapters: Adapters of each, ``[configs]``.
        s: The state.
        tokens: Tokens of the step.
        prefill_tokens: Those of prompts.
        kv_tokens: Tokens in the KV cache.
        passed_over: Waiting requests that admission has passed over.
    """
    seconds = step_time_s(
        costs,
        tokens=tokens.astype(jnp.float32),
        prefill_tokens=prefill_tokens,
        kv_tokens=kv_tokens,
        adapters=s.active,
        skipped=passed_over,
        queued=s.waiting,
        loaded=adapters,
        max_loras=server.max_loras,
        max_lora_rank=server.max_lora_rank,
    )
    return seconds.astype(jnp.float32)


def run(server: Server, s: State, work: Work) -> State:
    """Let the step that was put together run, if it is ready, and take out the requests that it finishes."""
    b = s.building
    runs = s.mode == RUN
    # Under asynchronous scheduling nobody may be left to be scheduled: the engine then waits for the step in flight.
    steps = runs if s.flight is None else runs & (work.tokens > 0)
    time = times(server, s, work)
    end = jnp.where(steps, time.end, s.now)
    start = jnp.maximum(time.begin, server.warmup)
    observed_s = jnp.maximum(jnp.minimum(end, server.horizon) - start, 0) * server.tick_s
    cell = s.step & (s.ring.shape[1] - 1)
    leaving, leaving_blocks, leaving_tokens, last_block, last_needed = (
        jnp.where(steps, value, 0) for value in read(s, s.ring, cell).T
    )
    freed, flight = hand_back(
        s, runs, Flight(jnp.where(steps, end, time.then), leaving, leaving_blocks, jnp.zeros_like(leaving), last_needed)
    )
    inside = steps & (end <= server.horizon) & (time.begin >= server.warmup)
    rates = (s.running, s.waiting, server.kv_blocks - s.free, work.adapters, s.streaming)
    loading_s = jnp.minimum(time.load * server.tick_s, observed_s)
    scheduling_s = jnp.where(steps, jnp.minimum(time.scheduling_s, observed_s - loading_s), 0.0)
    s = _note_followed(server, s, steps, time.begin, end)
    integrals, none = [rate * observed_s for rate in rates], jnp.zeros_like(observed_s)
    added = jnp.stack([observed_s - loading_s, loading_s, *integrals, scheduling_s, none])
    sums, lost = accumulate(s.sums, s.sums_lost, added)
    events = (
        leaving,
        leaving_tokens,
        work.tokens - work.prefill_tokens + b.rejoined,
        1,
        work.host_loads,
        work.disk_loads,
        0,
    )
    counts = s.counts + jnp.where(inside, jnp.stack([jnp.broadcast_to(event, s.step.shape) for event in events]), 0)
    used = jnp.stack([s.running, work.adapters, server.kv_blocks - s.free])
    here = places(s.phase) == s.step & 15
    zero = jnp.zeros_like(s.step)
    fresh = new_building(zero, b.stop_place is not None)
    return s._replace(
        mode=jnp.where(runs, SEND, s.mode),
        now=jnp.where(runs, time.then, s.now),
        step=s.step + steps,
        completed=s.completed + freed.completed,
        free=s.free + freed.blocks,
        running=s.running - freed.places,
        active=s.active - last_needed,
        active_before=jnp.where(steps, s.active, s.active_before),
        kv_tokens=s.kv_tokens - (leaving_tokens - leaving),
        flight=flight,
        streaming=s.streaming + jnp.where(steps, b.first_tokens, 0) - leaving,
        passed=look_further(s, runs),
        building=jax.tree.map(lambda a, c: jnp.where(runs, a, c), fresh, b),
        ring=put(s.ring, after(leaving, steps), cell, jnp.zeros((cell.shape[0], s.ring.shape[2]))),
        phase=s.phase - jnp.where(here, last_block, 0),
        limit=jnp.where(steps, _limit(server, s), s.limit),
        ends=put(s.ends, steps, s.step & (s.ends.shape[1] - 1), end),
        most=jnp.where(inside, jnp.maximum(s.most, used), s.most),
        sums=sums,
        sums_lost=lost,
        series=_sample(server, s, steps, end, sums, counts),
        counts=counts,
    )


def _limit(server: Server, s: State) -> Array:
    """Why the requests left in the queue were not admitted."""
    b = s.building
    limit = jnp.where(b.stop == FAR, Bottleneck.SLOTS, Bottleneck.KV_CACHE)
    limit = jnp.where(s.running >= server.max_num_seqs, Bottleneck.SEQUENCES, limit)
    limit = jnp.where((b.budget == 0) & ~b.preempted, Bottleneck.TOKEN_BUDGET, limit)
    return jnp.where(s.waiting == 0, Bottleneck.NONE, limit).astype(jnp.int32)


def note_first_token(server: Server, s: State) -> State:
    """Note the delay of a first token whose step has run, one a turn."""
    sent, when = read(s, s.first, s.first_got & (s.first.shape[1] - 1)).T
    end = read(s, s.ends, when & (s.ends.shape[1] - 1))
    ready = (s.first_got < s.first_put) & (when < s.step)
    counts = ready & (end <= server.horizon) & (end > server.warmup)
    delay_s = jnp.where(counts, (end - sent) * server.tick_s, 0.0)
    total_s, lost_s = accumulate(s.sums[TTFT], s.sums_lost[TTFT], delay_s)

    def noted(s: State) -> State:
        return s._replace(
            histogram=add(s.histogram, counts, _bin(delay_s, FIRST_TOKEN), 1),
            sums=s.sums.at[TTFT].set(total_s),
            sums_lost=s.sums_lost.at[TTFT].set(lost_s),
            first_got=s.first_got + ready,
        )

    return seldom(ready, noted, s)


def _note_followed(server: Server, s: State, steps: Array, begin: Array, end: Array) -> State:
    """Note the times of followed requests that the step ends."""
    f = s.followed
    first_end = jnp.where(steps & (f.first_step == s.step), end, f.first_end)
    ends = steps & (f.request >= 0) & (f.finish == s.step)
    told = ends & (end <= server.horizon) & (begin >= server.warmup)
    later_s = (end - first_end) * server.tick_s / jnp.maximum(f.later_tokens, 1)

    def noted(histogram: Array) -> Array:
        whole = told & f.undisturbed & (f.later_tokens > 0)
        histogram = add_several(histogram, whole, _bin(later_s, LATER_TOKENS), 1)
        return add_several(histogram, told, _bin((end - f.sent) * server.tick_s, WHOLE_ANSWER), 1)

    return s._replace(
        histogram=seldom(told, noted, s.histogram),
        followed=f._replace(first_end=first_end, request=jnp.where(ends, -1, f.request)),
    )


def _bin(time_s: Array, which: int) -> Array:
    place = jnp.log2(jnp.maximum(time_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_DOUBLING
    return which * BINS + jnp.minimum(place.astype(jnp.int32), BINS - 1)


def _sample(server: Server, s: State, steps: Array, end: Array, sums: Array, counts: Array) -> Array:
    """Overwrite the sample of the part of the horizon in which a step ends."""
    samples = s.series.shape[1]
    if samples == 0:
        return s.series
    part = jnp.minimum((end / server.horizon * samples).astype(jnp.int32), samples - 1)
    added = [sums[place] for place in (RUNNING, WAITING, KV_BLOCKS, ADAPTERS)]
    row = jnp.stack([end * server.tick_s, *added, *counts[jnp.array([REQUESTS, TOKENS])].astype(jnp.float32)], axis=1)
    return put(s.series, steps & (end <= server.horizon), part, row)


def accumulate(sums: Array, lost: Array, values: Array) -> tuple[Array, Array]:
    """Compensated summation (Kahan): float32 would lose what a step adds to hours."""
    values = values - lost
    total = sums + values
    return total, (total - sums) - values
