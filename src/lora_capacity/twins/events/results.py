"""What the event twin says of each configuration."""

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.scenarios.results import EventDetails, Results, Series
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events.requests import RequestTables
from lora_capacity.twins.events.state import (
    ADAPTER,
    ADAPTERS,
    BINS_PER_DOUBLING,
    COMPUTING,
    KV_BLOCKS,
    LOADING,
    RUNNING,
    SCHEDULING,
    SHORTEST_S,
    STREAMING,
    TTFT,
    WAITING,
    Server,
    State,
)


def summarise(scenarios: Scenarios, server: Server, requests: RequestTables, s: State, turns: Array) -> Results:
    """Divide sums by what they are sums over, and blank what does not start."""
    observed_s = (server.horizon - server.warmup) * server.tick_s
    status = jnp.where(s.overflow, Status.STEP_LIMIT, scenarios.status)
    told = status <= Status.OUTSIDE_CALIBRATION
    requests_done, tokens, next_tokens, steps, host_loads, disk_loads, preemptions = s.counts
    sums = jnp.where(told, s.sums, jnp.nan)
    mean = sums / observed_s
    nan = jnp.where(told, 0.0, jnp.nan)
    arrived, completed = requests.arrived, _completed(requests, s)
    first, later, whole = jnp.moveaxis(s.histogram.reshape(s.histogram.shape[0], 3, -1), 1, 0)
    max_running, max_adapters, max_blocks = s.most
    offered_per_s = (scenarios.class_count * scenarios.class_rate_per_s).sum(axis=1) + scenarios.base_rate_per_s
    classes = scenarios.class_count.shape[1]
    member = requests.class_of[:, :, None] == jnp.arange(classes)
    class_arrived, class_completed = ((count[:, :, None] * member).sum(axis=1) for count in (arrived, completed))
    events = EventDetails(
        ttft_quantiles_s=_quantiles_s(first) + nan[:, None],
        tpot_quantiles_s=_quantiles_s(later) + nan[:, None],
        e2e_quantiles_s=_quantiles_s(whole) + nan[:, None],
        adapter_worst_wait_s=_worst_wait_s(server, s) + nan[:, None],
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
        iterations=turns,
        series=_series(server, s),
    )
    return Results(
        throughput_tokens_per_s=tokens / observed_s + nan,
        offered_tokens_per_s=offered_per_s * (scenarios.mean_input_tokens + scenarios.mean_output_tokens),
        completed_per_s=requests_done / observed_s + nan,
        class_service=jnp.where(class_arrived > 0, class_completed / class_arrived, jnp.nan) + nan[:, None],
        mean_running=mean[RUNNING],
        mean_waiting=mean[WAITING],
        step_time_s=(sums[COMPUTING] + sums[LOADING]) / steps,
        itl_s=sums[STREAMING] / next_tokens,
        ttft_s=sums[TTFT] / first.sum(axis=1),
        active_adapters=mean[ADAPTERS],
        kv_usage=mean[KV_BLOCKS] / server.kv_blocks,
        loads_per_s=host_loads / observed_s + nan,
        limit=s.limit,
        status=status,
        events=events,
    )


def _worst_wait_s(server: Server, s: State) -> Array:
    """Longest wait of each adapter's requests, of the first one that still waits too; ``[configs, adapters]``."""
    head = s.head.T
    since = jnp.take_along_axis(s.sent_at, jnp.minimum(head, s.sent_at.shape[1] - 1), axis=1)
    waits = jnp.where(head < s.sent[:, None], server.horizon[:, None] - since, 0)
    return (jnp.maximum(s.worst_wait.T, waits) * server.tick_s[:, None])[:, :-1]


def _series(server: Server, s: State) -> Series:
    """Means between samples, from what had added up by each."""
    summed = jax.lax.cummax(s.series, axis=1)
    grown = jnp.diff(summed, axis=1, prepend=jnp.zeros_like(summed[:, :1]))
    time_s, *rest = jnp.moveaxis(grown, 2, 0)
    running, waiting, kv_blocks, adapters, completed, tokens = (
        jnp.where(time_s > 0, growth / time_s, jnp.nan) for growth in rest
    )
    return Series(
        end_s=summed[..., 0],
        running=running,
        waiting=waiting,
        kv_usage=kv_blocks / server.kv_blocks[:, None],
        active_adapters=adapters,
        completed_per_s=completed,
        throughput_tokens_per_s=tokens,
    )


def _completed(requests: RequestTables, s: State) -> Array:
    """Count the requests of each adapter that have left the server, ``[configs, adapters]``."""
    row = jnp.arange(s.step.shape[0])[:, None]
    running = (jnp.arange(s.log.shape[1]) < s.logged[:, None]) & (s.log[..., 1] >= s.step[:, None])
    request, owner, _ = (column.T for column in s.preempted)
    preempted = (request >= 0) & (jnp.arange(request.shape[1]) < s.places[:, None])
    part = s.partial.request[:, None]
    adapter = requests.table[..., ADAPTER].astype(jnp.int32)
    completed = s.admitted_by_adapter.T
    for index, member in (
        (adapter[row, s.log[..., 0]], running),
        (owner, preempted),
        (adapter[row, part], part >= 0),
    ):
        completed = completed.at[row, index].add(-member.astype(jnp.int32))
    return completed[:, :-1]


def _quantiles_s(histogram: Array) -> Array:
    """50, 95 and 99 % quantile, at the middle of their bins; ``[configs, 3]``."""
    shares = jnp.array([0.5, 0.95, 0.99])
    reached = jnp.cumsum(histogram, axis=1)
    wanted = shares * reached[:, -1:]
    place = jnp.sum(reached[:, :, None] < wanted[:, None, :], axis=1)
    value_s = SHORTEST_S * 2.0 ** ((place + 0.5) / BINS_PER_DOUBLING)
    return jnp.where(reached[:, -1:] > 0, value_s, jnp.nan)
