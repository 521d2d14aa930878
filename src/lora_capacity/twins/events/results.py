"""What the event twin says of each configuration."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

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
    Number,
    Seconds,
    State,
)
from lora_capacity.twins.events.statistics import delay_histogram, place_among_bins


def summarise(scenario: Scenarios, server: Server, s: State) -> Results:
    """Divide one server's sums by what they are sums over, and blank what does not start.

    Args:
        scenario: The configuration, without an axis of configurations, as the results.
        server: The server.
        s: Its state at the end.
    """
    r, requests = s.statistics, server.requests
    observed_s = (server.horizon - server.warmup) * server.tick_s
    status = jnp.where(s.overflow, Status.STEP_LIMIT, scenario.status)
    told = status <= Status.OUTSIDE_CALIBRATION
    requests_done, tokens, next_tokens, steps, host_loads, disk_loads, preemptions = r.counts
    sums = jnp.where(told, r.sums, jnp.nan)
    mean = sums * (1.0 / observed_s)
    nan = jnp.where(told, 0.0, jnp.nan)
    arrived, completed = requests.arrived, _completed(server, s)
    first, later, whole = r.histogram.reshape(3, -1)
    unanswered = _unanswered(server, s)
    ttft_s, ttft_at_least = _quantiles_s(first, unanswered)
    tpot_s, _ = _quantiles_s(later)
    e2e_s, e2e_at_least = _quantiles_s(whole * (requests_done / jnp.maximum(whole.sum(), 1)), unanswered)
    max_running, max_adapters, max_blocks = r.most
    offered_per_s = (scenario.class_count * scenario.class_rate_per_s).sum() + scenario.base_rate_per_s
    member = requests.class_of[:, None] == jnp.arange(scenario.class_count.shape[0])
    class_arrived, class_completed = ((count[:, None] * member).sum(axis=0) for count in (arrived, completed))
    events = EventDetails(
        ttft_quantiles_s=ttft_s + nan,
        tpot_quantiles_s=tpot_s + nan,
        e2e_quantiles_s=e2e_s + nan,
        quantile_requests=jnp.stack([first.sum() + unanswered.number, later.sum(), whole.sum()]).astype(jnp.int32),
        unanswered=unanswered.number,
        ttft_at_least=ttft_at_least,
        e2e_at_least=e2e_at_least,
        adapter_worst_wait_s=_worst_wait_s(server, s) + nan,
        max_running=max_running,
        max_adapters=max_adapters,
        max_kv_usage=max_blocks / server.kv_blocks + nan,
        adapter_arrived=arrived,
        adapter_completed=completed,
        disk_loads=disk_loads,
        preemptions=preemptions,
        steps=steps,
        compute_share=mean[COMPUTING],
        scheduling_share=mean[SCHEDULING],
        load_share=mean[LOADING],
        iterations=r.iterations,
        series=_series(server, s),
    )
    results = Results(
        throughput_tokens_per_s=tokens / observed_s + nan,
        offered_tokens_per_s=offered_per_s * (scenario.mean_input_tokens + scenario.mean_output_tokens),
        completed_per_s=requests_done / observed_s + nan,
        class_service=jnp.where(class_arrived > 0, class_completed / class_arrived, jnp.nan) + nan,
        mean_running=mean[RUNNING],
        mean_waiting=mean[WAITING],
        step_time_s=(sums[COMPUTING] + sums[LOADING]) / steps,
        itl_s=sums[STREAMING] / next_tokens,
        tpot_s=sums[TPOT] / later.sum(),
        ttft_s=(sums[TTFT] + unanswered.waited_s) / (first.sum() + unanswered.number),
        answered_ttft_s=sums[TTFT] / first.sum(),
        attainment=_attainment(server, s) + nan,
        active_adapters=mean[ADAPTERS],
        kv_usage=mean[KV_BLOCKS] / server.kv_blocks,
        loads_per_s=host_loads / observed_s + nan,
        client=ClientView(ttft_s=nan, tpot_s=nan, itl_s=nan),
        limit=r.bottleneck,
        status=status,
        events=events,
    )
    client = seen_by_clients(server.costs.front_end, scenario, results)
    later_s = client.ttft_s - results.answered_ttft_s
    still = _still_within(first, server.max_ttft_s, later_s) * _still_within(whole, server.max_e2el_s, later_s)
    seen: Results = dataclasses.replace(results, client=client, attainment=results.attainment * still)
    return seen


def _worst_wait_s(server: Server, s: State) -> Float[Array, " adapters"]:
    """Longest wait of each adapter's requests, of the first one that still waits too."""
    head, sent_at = s.queue.head, s.clients.sent_at
    since = sent_at[jnp.minimum(head, sent_at.shape[0] - 1)]
    waits = jnp.where(head < s.clients.sent, server.horizon - since, 0)
    return (jnp.maximum(s.statistics.worst_wait, waits) * server.tick_s)[:-1]


def _series(server: Server, s: State) -> Series:
    """Means between samples, from what had added up by each."""
    summed = jax.lax.cummax(s.statistics.series, axis=0)
    grown = jnp.diff(summed, axis=0, prepend=jnp.zeros_like(summed[:1]))
    time_s, *rest = grown.T
    running, waiting, kv_blocks, adapters, completed, tokens = (
        jnp.where(time_s > 0, growth / time_s, jnp.nan) for growth in rest
    )
    return Series(
        end_s=summed[:, 0],
        running=running,
        waiting=waiting,
        kv_usage=kv_blocks / server.kv_blocks,
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


def _attainment(server: Server, s: State) -> Float[Array, ""]:
    """Share of arriving requests that keep all bounds.

    First tokens are all counted; whether a request whose first token came in time keeps the other bounds too is told by
    the traced ones.
    """
    _, prompt, traced, good = s.statistics.kept_bounds
    arrival = server.requests.arrival
    arrived = ((arrival >= server.warmup) & (arrival < server.horizon)).sum()
    bounded = jnp.isfinite(server.max_tpot_s) | jnp.isfinite(server.max_e2el_s)
    unknown = jnp.where(bounded & (prompt > 0), jnp.nan, 1.0)
    return jnp.minimum(prompt / arrived, 1.0) * jnp.where(traced > 0, good / traced, unknown)


def _still_within(histogram: Int[Array, " bins"], bound_s: Seconds, later_s: Seconds) -> Seconds:
    """Share of those within a bound that are within it still if all end so much later."""
    edges = jnp.arange(histogram.shape[0] + 1.0)
    reached = jnp.append(0, jnp.cumsum(histogram)).astype(jnp.float32)

    def within(most_s: Seconds) -> Seconds:
        return jnp.interp(place_among_bins(most_s), edges, reached)

    kept = within(bound_s)
    return jnp.where(jnp.isfinite(bound_s) & (kept > 0), within(bound_s - later_s) / jnp.maximum(kept, 1.0), 1.0)


def _quantiles_s(
    histogram: Shaped[Array, " bins"], unanswered: _Unanswered | None = None
) -> tuple[Float[Array, "3"], Bool[Array, "3"]]:
    """50, 95 and 99 % quantile at the middle of their bins, and whether they are lower bounds.

    They are where it matters how much longer the unanswered requests will wait than they have.
    """
    shares = jnp.array([0.5, 0.95, 0.99])
    least = histogram if unanswered is None else histogram + unanswered.histogram
    wanted = shares * least.sum()
    places = [jnp.sum(jnp.cumsum(each)[:, None] < wanted, axis=0) for each in (least, histogram)]
    value_s = SHORTEST_S * 2.0 ** ((places[0] + 0.5) / BINS_PER_DOUBLING)
    return jnp.where(least.sum() > 0, value_s, jnp.nan), places[1] > places[0]
