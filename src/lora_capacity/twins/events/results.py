"""What the event twin says of each configuration."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from lora_capacity.costs import FrontEndCosts
from lora_capacity.scenarios.results import ClientView, EventDetails, Results, Series
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.clients import seen_by_clients
from lora_capacity.twins.events.arrays import indices
from lora_capacity.twins.events.server import Server
from lora_capacity.twins.events.state import (
    ADAPTER,
    ADAPTERS,
    ANSWERED,
    BINS_PER_DOUBLING,
    COMPUTING,
    KV_BLOCKS,
    LOADING,
    RUNNING,
    SCHEDULING,
    SHORTEST_S,
    STREAMING,
    TPOT,
    TTFT,
    WAITING,
    Flag,
    Number,
    Seconds,
    State,
)
from lora_capacity.twins.events.statistics import delay_histogram, place_among_bins


class Observed(NamedTuple):
    """What was seen of one server within the horizon; whole numbers int32, times float32 seconds.

    Attributes:
        status: Status of its start-up, or `Status.STEP_LIMIT`.
        observed_s: Time observed.
        kv_blocks: KV blocks that requests could have.
        sums: Integrals over time and sums of times, in the order of ``Statistics.sums``, ``[10]``.
        counts: What happened, in the order of ``Statistics.counts``, ``[7]``.
        kept_bounds: In the order of ``Statistics.kept_bounds``, ``[4]``.
        most: Most running requests, adapters of a step and KV blocks in use, ``[3]``.
        histograms: Requests by time to the first token, time of each later one, time to the last, ``[3, BINS]``.
        arrived: Requests that arrived in the time observed.
        unanswered: Requests sent without a first token at its end.
        unanswered_s: How long they have waited, together.
        unanswered_histogram: Requests by that, ``[BINS]``.
        worst_wait_s: Longest wait of each adapter's requests, of those that still wait too, ``[adapters]``.
        adapter_arrived: Requests of each adapter that arrived, ``[adapters]``.
        adapter_completed: Those that have left, ``[adapters]``.
        class_of: Class of each adapter, -1 for none, ``[adapters]``.
        series: As of ``Statistics.series``, ``[samples, 7]``.
        bottleneck: What ended admission in the latest step.
        iterations: Iterations of the simulation's loop.
    """

    status: Number
    observed_s: Seconds
    kv_blocks: Number
    sums: Float[Array, "10"]
    counts: Int[Array, "7"]
    kept_bounds: Int[Array, "4"]
    most: Int[Array, "3"]
    histograms: Shaped[Array, "3 bins"]
    arrived: Number
    unanswered: Number
    unanswered_s: Seconds
    unanswered_histogram: Float[Array, " bins"]
    worst_wait_s: Float[Array, " adapters"]
    adapter_arrived: Int[Array, " adapters"]
    adapter_completed: Int[Array, " adapters"]
    class_of: Int[Array, " adapters"]
    series: Float[Array, "samples 7"]
    bottleneck: Number
    iterations: Number


def observed(scenario: Scenarios, server: Server, s: State) -> Observed:
    """Return what was seen of a server.

    Args:
        scenario: The configuration, without an axis of configurations.
        server: The server.
        s: Its state at the end.
    """
    r, requests = s.statistics, server.requests
    arrived = ((requests.arrival >= server.warmup) & (requests.arrival < server.horizon)).sum()
    unanswered = _unanswered(server, s)
    return Observed(
        status=jnp.where(s.overflow, Status.STEP_LIMIT, scenario.status),
        observed_s=(server.horizon - server.warmup) * server.tick_s,
        kv_blocks=server.kv_blocks,
        sums=r.sums,
        counts=r.counts,
        kept_bounds=r.kept_bounds,
        most=r.most,
        histograms=r.histogram.reshape(3, -1),
        arrived=arrived,
        unanswered=unanswered.number,
        unanswered_s=unanswered.waited_s,
        unanswered_histogram=unanswered.histogram,
        worst_wait_s=_worst_wait_s(server, s),
        adapter_arrived=requests.arrived,
        adapter_completed=_completed(server, s),
        class_of=requests.class_of,
        series=r.series,
        bottleneck=r.bottleneck,
        iterations=r.iterations,
    )


def summarise(scenario: Scenarios, front_end: FrontEndCosts, o: Observed) -> Results:
    """Divide one server's sums by what they are sums over, and blank what does not start.

    Args:
        scenario: The configuration, without an axis of configurations, as the results.
        front_end: What clients see besides.
        o: What was seen of the server.
    """
    told = o.status <= Status.OUTSIDE_CALIBRATION
    requests_done, tokens, next_tokens, steps, host_loads, disk_loads, preemptions = o.counts
    sums = jnp.where(told, o.sums, jnp.nan)
    mean = sums * (1.0 / o.observed_s)
    nan = jnp.where(told, 0.0, jnp.nan)
    first, later, whole = o.histograms
    waits = o.unanswered_histogram
    ttft_s, ttft_at_least = _quantiles_s(first, waits)
    tpot_s, _ = _quantiles_s(later)
    e2e_s, e2e_at_least = _quantiles_s(whole * (requests_done / jnp.maximum(whole.sum(), 1)), waits)
    max_running, max_adapters, max_blocks = o.most
    offered_per_s = (scenario.class_count * scenario.class_rate_per_s).sum() + scenario.base_rate_per_s
    member = o.class_of[:, None] == jnp.arange(scenario.class_count.shape[0])
    class_arrived, class_completed = (
        (count[:, None] * member).sum(axis=0) for count in (o.adapter_arrived, o.adapter_completed)
    )
    events = EventDetails(
        ttft_quantiles_s=ttft_s + nan,
        tpot_quantiles_s=tpot_s + nan,
        e2e_quantiles_s=e2e_s + nan,
        quantile_requests=jnp.stack([first.sum() + o.unanswered, later.sum(), whole.sum()]).astype(jnp.int32),
        unanswered=o.unanswered,
        ttft_at_least=ttft_at_least,
        e2e_at_least=e2e_at_least,
        adapter_worst_wait_s=o.worst_wait_s + nan,
        max_running=max_running,
        max_adapters=max_adapters,
        max_kv_usage=max_blocks / o.kv_blocks + nan,
        adapter_arrived=o.adapter_arrived,
        adapter_completed=o.adapter_completed,
        disk_loads=disk_loads,
        preemptions=preemptions,
        steps=steps,
        compute_share=mean[COMPUTING],
        scheduling_share=mean[SCHEDULING],
        load_share=mean[LOADING],
        iterations=o.iterations,
        series=_series(o),
    )
    bounds = scenario.bounds
    max_ttft_s, max_tpot_s, max_e2el_s = (
        [jnp.asarray(jnp.inf, jnp.float32)] * 3 if bounds is None else (bounds.ttft_s, bounds.tpot_s, bounds.e2el_s)
    )
    results = Results(
        throughput_tokens_per_s=tokens / o.observed_s + nan,
        offered_tokens_per_s=offered_per_s * (scenario.mean_input_tokens + scenario.mean_output_tokens),
        completed_per_s=requests_done / o.observed_s + nan,
        class_service=jnp.where(class_arrived > 0, class_completed / class_arrived, jnp.nan) + nan,
        mean_running=mean[RUNNING],
        mean_waiting=mean[WAITING],
        step_time_s=(sums[COMPUTING] + sums[LOADING]) / steps,
        itl_s=sums[STREAMING] / next_tokens,
        tpot_s=sums[TPOT] / later.sum(),
        ttft_s=(sums[TTFT] + o.unanswered_s) / (first.sum() + o.unanswered),
        answered_ttft_s=sums[TTFT] / first.sum(),
        attainment=_attainment(o, jnp.isfinite(max_tpot_s) | jnp.isfinite(max_e2el_s)) + nan,
        active_adapters=mean[ADAPTERS],
        kv_usage=mean[KV_BLOCKS] / o.kv_blocks,
        loads_per_s=host_loads / o.observed_s + nan,
        client=ClientView(ttft_s=nan, tpot_s=nan, itl_s=nan),
        limit=o.bottleneck,
        status=o.status,
        events=events,
    )
    client = seen_by_clients(front_end, scenario, results)
    later_s = client.ttft_s - results.answered_ttft_s
    still = _still_within(first, max_ttft_s, later_s) * _still_within(whole, max_e2el_s, later_s)
    seen: Results = dataclasses.replace(results, client=client, attainment=results.attainment * still)
    return seen


def _worst_wait_s(server: Server, s: State) -> Float[Array, " adapters"]:
    """Longest wait of each adapter's requests, of the first one that still waits too."""
    head, sent_at = s.queue.head, s.clients.sent_at
    since = sent_at[jnp.minimum(head, sent_at.shape[0] - 1)]
    waits = jnp.where(head < s.clients.sent, server.horizon - since, 0)
    return (jnp.maximum(s.statistics.worst_wait, waits) * server.tick_s)[:-1]


def _series(o: Observed) -> Series:
    """Means between samples, from what had added up by each."""
    summed = jax.lax.cummax(o.series, axis=0)
    grown = jnp.diff(summed, axis=0, prepend=jnp.zeros_like(summed[:1]))
    time_s, *rest = grown.T
    running, waiting, kv_blocks, adapters, completed, tokens = (
        jnp.where(time_s > 0, growth / time_s, jnp.nan) for growth in rest
    )
    return Series(
        end_s=summed[:, 0],
        running=running,
        waiting=waiting,
        kv_usage=kv_blocks / o.kv_blocks,
        active_adapters=adapters,
        completed_per_s=completed,
        throughput_tokens_per_s=tokens,
    )


def _completed(server: Server, s: State) -> Int[Array, " adapters"]:
    """Count the requests of each adapter that have left the server: those admitted, less those still there."""
    batch, preempted = s.batch, s.queue.preempted
    adapter = server.requests.table[:, ADAPTER].astype(jnp.int32)
    running = (indices(batch.log) < batch.logged) & (batch.log[:, 1] >= s.step)
    waiting = (preempted.request >= 0) & (indices(preempted.request) < s.queue.places)
    chunked = batch.chunked.request
    completed = s.statistics.admitted_by_adapter
    for index, member in (
        (adapter[batch.log[:, 0]], running),
        (preempted.adapter, waiting),
        (adapter[chunked], chunked >= 0),
    ):
        completed = completed.at[index].add(-member.astype(jnp.int32))
    return completed[:-1]


class _Unanswered(NamedTuple):
    """Requests sent without a first token at the horizon: their number, and a histogram and the sum of their waits."""

    number: Number
    histogram: Float[Array, " bins"]
    waited_s: Seconds


def _unanswered(server: Server, s: State) -> _Unanswered:
    """Look for those that wait; the few in whose step the horizon falls count as just sent."""
    request = indices(s.clients.sent_at)
    sent = (request < s.clients.sent) & (s.clients.sent_at < server.horizon)
    bit = (s.queue.admitted[request >> 5] >> (request & 31).astype(jnp.uint32)) & 1
    waits = (sent & (bit == 0)).astype(jnp.float32)
    waited_s = (server.horizon - s.clients.sent_at) * server.tick_s
    # Sums by `cumsum`: XLA's older code generator, which compiles loops in one piece, cannot fuse several reductions.
    waiting, total_s = jnp.cumsum(jnp.stack([waits, jnp.where(waits > 0, waited_s, 0.0)]), axis=1)[:, -1]
    number = jnp.maximum(sent.sum() - s.statistics.kept_bounds[ANSWERED], 0).astype(jnp.int32)
    histogram = delay_histogram(waited_s, waits).at[0].add(jnp.maximum(number - waiting, 0.0))
    return _Unanswered(number, histogram, total_s)


def _attainment(o: Observed, bounded: Flag) -> Float[Array, ""]:
    """Share of arriving requests that keep all bounds.

    First tokens are all counted; whether a request whose first token came in time keeps the other bounds too is told by
    those that have ended.

    Args:
        o: What was seen.
        bounded: Whether there are other bounds.
    """
    _, prompt, traced, good = o.kept_bounds
    unknown = jnp.where(bounded & (prompt > 0), jnp.nan, 1.0)
    return jnp.minimum(prompt / o.arrived, 1.0) * jnp.where(traced > 0, good / traced, unknown)


def _still_within(histogram: Int[Array, " bins"], bound_s: Seconds, later_s: Seconds) -> Seconds:
    """Share of those within a bound that are within it still if all end so much later."""
    edges = jnp.arange(histogram.shape[0] + 1.0)
    reached = jnp.append(0, jnp.cumsum(histogram)).astype(jnp.float32)

    def within(most_s: Seconds) -> Seconds:
        return jnp.interp(place_among_bins(most_s), edges, reached)

    kept = within(bound_s)
    return jnp.where(jnp.isfinite(bound_s) & (kept > 0), within(bound_s - later_s) / jnp.maximum(kept, 1.0), 1.0)


def _quantiles_s(
    histogram: Shaped[Array, " bins"], waits: Float[Array, " bins"] | None = None
) -> tuple[Float[Array, "3"], Bool[Array, "3"]]:
    """50, 95 and 99 % quantile at the middle of their bins, and whether they are lower bounds.

    They are where it matters how much longer the unanswered requests will wait than they have.
    """
    shares = jnp.array([0.5, 0.95, 0.99])
    least = histogram if waits is None else histogram + waits
    wanted = shares * least.sum()
    places = [jnp.sum(jnp.cumsum(each)[:, None] < wanted, axis=0) for each in (least, histogram)]
    value_s = SHORTEST_S * 2.0 ** ((places[0] + 0.5) / BINS_PER_DOUBLING)
    return jnp.where(least.sum() > 0, value_s, jnp.nan), places[1] > places[0]
