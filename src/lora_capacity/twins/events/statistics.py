"""What is reported of a server: means as integrals over time, quantiles as histograms, counts and maxima."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lora_capacity.twins.events.arrays import add, after, apart, indices, least, put, seldom
from lora_capacity.twins.events.asynchronous import StepTimes
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.state import (
    ADAPTERS,
    BINS,
    BINS_PER_DOUBLING,
    FAR,
    FIRST_TOKEN,
    KV_BLOCKS,
    LATER_TOKENS,
    PREEMPTIONS,
    REQUESTS,
    RUNNING,
    SHORTEST_S,
    TOKENS,
    TPOT,
    TRACED,
    TRACED_PROMPT,
    TTFT,
    WAITING,
    WHOLE_OUTPUT,
    FirstTokens,
    Flag,
    Move,
    Number,
    State,
    Statistics,
    StepWork,
    TracedRequests,
)


def record_step(
    server: Server, s: State, work: StepWork, time: StepTimes, steps: Flag, leaving: Number, leaving_tokens: Number
) -> tuple[Statistics, TracedRequests]:
    """Record a step and the traced requests that it ends.

    Args:
        server: The server.
        s: Its state before the step.
        work: The step.
        time: When it runs.
        steps: Whether it does.
        leaving: Requests that it finishes.
        leaving_tokens: Tokens of their prompts and outputs.
    """
    used_blocks = server.kv_blocks - s.kv.free
    end = jnp.where(steps, time.end, s.now)
    r, traced = _record_traced(server, s, steps, time.begin, end)
    observed_s = jnp.maximum(jnp.minimum(end, server.horizon) - jnp.maximum(time.begin, server.warmup), 0)
    observed_s = observed_s * server.tick_s
    inside = steps & (end <= server.horizon) & (time.begin >= server.warmup)
    loading_s = jnp.minimum(time.load * server.tick_s, observed_s)
    scheduling_s = jnp.where(steps, jnp.minimum(time.scheduling_s, observed_s - loading_s), 0.0)
    rates = (s.batch.running, s.waiting, used_blocks, work.adapters, s.batch.streaming)
    integrals, none = [rate * observed_s for rate in rates], jnp.zeros_like(observed_s)
    added = jnp.stack([observed_s - loading_s, loading_s, *integrals, scheduling_s, none, none])
    sums, lost = accumulate(r.sums, r.sums_lost, added)
    next_tokens = work.tokens - work.prefill_tokens + s.pending.rejoined
    events = (leaving, leaving_tokens, next_tokens, 1, work.host_loads, work.disk_loads, 0)
    counts = r.counts + jnp.where(inside, jnp.stack([jnp.asarray(event, jnp.int32) for event in events]), 0)
    used = jnp.stack([s.batch.running, work.adapters, used_blocks])
    return r._replace(
        most=jnp.where(inside, jnp.maximum(r.most, used), r.most),
        sums=sums,
        sums_lost=lost,
        series=_sample(server, r.series, steps, end, sums, counts),
        counts=counts,
    ), traced


def record_move(s: State, move: Move, fresh: Flag, preempted: Number) -> Statistics:
    """Record how long a request has waited that is admitted for the first time, and preemptions."""
    r = s.statistics
    worst = r.worst_wait[move.adapter]
    return r._replace(
        worst_wait=put(r.worst_wait, after(worst, fresh), (move.adapter,), jnp.maximum(worst, s.now - move.sent)),
        admitted_by_adapter=add(r.admitted_by_adapter, fresh, (move.adapter,), 1),
        counts=r.counts.at[PREEMPTIONS].add(preempted),
    )


def expect_first_token(f: FirstTokens, started: Flag, sent: Number, step: Number) -> tuple[FirstTokens, Flag]:
    """Let a first token's delay be noted once its step has run; say whether too many wait for that."""
    size = f.pending.shape[0]
    pending = put(f.pending, started, (f.put & (size - 1),), jnp.stack([sent, step]))
    first_put = f.put + started
    return f._replace(pending=pending, put=first_put), first_put - f.got > size


def record_first_token(server: Server, s: State) -> State:
    """Note the delay of a first token whose step has run, one an iteration."""
    f = s.first_tokens
    sent, when = apart(s.step, lambda: f.pending[f.got & (f.pending.shape[0] - 1)])
    end = apart(s.step, lambda: f.ends[when & (f.ends.shape[0] - 1)])
    ready = (f.got < f.put) & (when < s.step)
    answered = ready & (end <= server.horizon)
    counts = answered & (end > server.warmup)
    delay_s = jnp.where(counts, (end - sent) * server.tick_s, 0.0)
    total_s, lost_s = accumulate(s.statistics.sums[TTFT], s.statistics.sums_lost[TTFT], delay_s)

    def noted(s: State) -> State:
        r = s.statistics
        return s._replace(
            first_tokens=s.first_tokens._replace(got=f.got + ready),
            statistics=r._replace(
                histogram=add(r.histogram, counts, (_bin(delay_s, FIRST_TOKEN),), 1),
                kept_bounds=r.kept_bounds.at[:2].add(jnp.stack([answered, counts & (delay_s <= server.max_ttft_s)])),
                sums=r.sums.at[TTFT].set(total_s),
                sums_lost=r.sums_lost.at[TTFT].set(lost_s),
            ),
        )

    return seldom(ready, noted, s)


def trace(server: Server, f: TracedRequests, move: Move, started: Flag, step: Number) -> TracedRequests:
    """Begin to trace a request that starts, if there is a place; one that is traced may be preempted and rejoin."""
    sign = move.sign
    own = (f.request == move.request) & (sign != 0)
    row = indices(f.request)
    place = least(jnp.where(f.request < 0, row, TRACED))
    # Fibonacci hashing: 2^32 over the golden ratio spreads neighbouring numbers evenly.
    drawn = (move.request.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)) >> 16
    begins = (row == place) & started & (drawn % server.traced_one_in == 0)
    return TracedRequests(
        request=jnp.where(begins, move.request, f.request),
        sent=jnp.where(begins, move.sent, f.sent),
        first_step=jnp.where(begins, step, f.first_step),
        first_end=f.first_end,
        finish=jnp.where(begins | (own & (sign > 0)), move.finish, jnp.where(own, FAR, f.finish)),
        later_tokens=jnp.where(begins, move.output - 1, f.later_tokens),
        undisturbed=begins | (f.undisturbed & ~(own & (sign < 0))),
    )


def _record_traced(
    server: Server, s: State, steps: Flag, begin: Number, end: Number
) -> tuple[Statistics, TracedRequests]:
    """Record the times of traced requests that a step ends."""
    f, r = s.traced, s.statistics
    first_end = jnp.where(steps & (f.first_step == s.step), end, f.first_end)
    ends = steps & (f.request >= 0) & (f.finish == s.step)
    told = ends & (end <= server.horizon) & (begin >= server.warmup)
    first_s, whole_s = (first_end - f.sent) * server.tick_s, (end - f.sent) * server.tick_s
    later_s = (whole_s - first_s) / jnp.maximum(f.later_tokens, 1)
    prompt = told & (first_s <= server.max_ttft_s)
    good = prompt & (later_s <= server.max_tpot_s) & (whole_s <= server.max_e2el_s)
    streamed = told & f.undisturbed & (f.later_tokens > 0)

    def noted(r: Statistics) -> Statistics:
        histogram = _add_each(r.histogram, streamed, _bin(later_s, LATER_TOKENS))
        kept = jnp.stack([prompt.sum(), good.sum()]).astype(jnp.int32)
        return r._replace(
            histogram=_add_each(histogram, told, _bin(whole_s, WHOLE_OUTPUT)),
            kept_bounds=r.kept_bounds.at[TRACED_PROMPT:].add(kept),
            sums=r.sums.at[TPOT].add(jnp.where(streamed, later_s, 0.0).sum()),
        )

    return seldom(told.any(), noted, r), f._replace(first_end=first_end, request=jnp.where(ends, -1, f.request))


def place_among_bins(time_s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return how many bins lie below a time, the part of its own included."""
    return jnp.log2(jnp.maximum(time_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_DOUBLING


def delay_histogram(times_s: Float[Array, " times"], weights: Float[Array, " times"]) -> Float[Array, " bins"]:
    """Count times in bins as those of the histograms."""
    return jnp.zeros(BINS).at[_bin(times_s, 0)].add(weights)


def _add_each(histogram: Array, when: Array, place: Array) -> Array:
    for i in range(when.shape[0]):
        histogram = add(histogram, when[i], (place[i],), 1)
    return histogram


def _bin(time_s: Float[Array, "*shape"], which: int) -> Int[Array, "*shape"]:
    place = place_among_bins(time_s)
    return which * BINS + jnp.minimum(place.astype(jnp.int32), BINS - 1)


def _sample(server: Server, series: Array, steps: Flag, end: Number, sums: Array, counts: Array) -> Array:
    """Overwrite the sample of the part of the horizon in which a step ends."""
    samples = series.shape[0]
    if samples == 0:
        return series
    part = jnp.minimum((end / server.horizon * samples).astype(jnp.int32), samples - 1)
    added = [sums[place] for place in (RUNNING, WAITING, KV_BLOCKS, ADAPTERS)]
    row = jnp.stack([end * server.tick_s, *added, *counts[jnp.array([REQUESTS, TOKENS])].astype(jnp.float32)])
    return put(series, steps & (end <= server.horizon), (part,), row)


def accumulate(
    sums: Float[Array, "*shape"], lost: Float[Array, "*shape"], values: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Compensated summation (Kahan): float32 would lose what a step adds to hours."""
    values = values - lost
    total = sums + values
    return total, (total - sums) - values
