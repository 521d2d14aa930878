"""What the event twin says of each configuration."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from lora_capacity.status import Status
from lora_capacity.twin.events._state import (
    ADAPTER,
    ADAPTERS,
    BINS_PER_DOUBLING,
    COMPUTING,
    KV_BLOCKS,
    LOADING,
    RUNNING,
    SHORTEST_S,
    STREAMING,
    TTFT,
    WAITING,
    Server,
    State,
)
from lora_capacity.twin.events.requests import RequestTables
from lora_capacity.twin.inputs import Scenarios
from lora_capacity.twin.results import Results


@struct.dataclass
class EventResults:
    """What happened in each configuration; NaN where the server does not start or the simulation broke off.

    Attributes:
        settled: What the steady twin predicts too. ``itl_s`` counts the time of unfinished requests, and ``ttft_s`` is
            over all requests that got their first token.
        ttft_quantiles_s: 50, 95 and 99 % quantile of the time to first token, to 4 %, ``[configs, 3]``.
        adapter_arrived: Requests that arrived for each adapter, int32 ``[configs, adapters]``.
        adapter_completed: Those completed by the end of the last step, int32 ``[configs, adapters]``.
        disk_loads: Adapters read from disk, int32 ``[configs]``.
        preemptions: Preemptions, int32 ``[configs]``.
        steps: Engine steps, int32 ``[configs]``.
        compute_share: Share of the time in which a step ran, scheduling included, ``[configs]``.
        load_share: Share of the time in which adapters were loaded, ``[configs]``.
        turns: Turns that the simulation took, int32 ``[configs]``.
    """

    settled: Results
    ttft_quantiles_s: Array
    adapter_arrived: Array
    adapter_completed: Array
    disk_loads: Array
    preemptions: Array
    steps: Array
    compute_share: Array
    load_share: Array
    turns: Array

    @property
    def idle_share(self) -> Array:
        """Share of the time in which there was nothing to do, ``[configs]``."""
        return 1.0 - self.compute_share - self.load_share


def summarise(scenarios: Scenarios, server: Server, requests: RequestTables, s: State, turns: Array) -> EventResults:
    """Divide sums by what they are sums over, and blank what does not start."""
    horizon_s = scenarios.horizon_s
    status = jnp.where(s.overflow, Status.STEP_LIMIT, scenarios.status)
    told = status <= Status.OUTSIDE_CALIBRATION
    requests_done, tokens, next_tokens, steps, host_loads, disk_loads, preemptions = s.counts
    sums = jnp.where(told, s.sums, jnp.nan)
    mean = sums / horizon_s
    nan = jnp.where(told, 0.0, jnp.nan)
    arrived, completed = requests.arrived, _completed(requests, s)
    noted = s.histogram.sum(axis=1)
    offered_per_s = (scenarios.class_count * scenarios.class_rate_per_s).sum(axis=1) + scenarios.base_rate_per_s
    classes = scenarios.class_count.shape[1]
    member = requests.class_of[:, :, None] == jnp.arange(classes)
    class_arrived, class_completed = ((count[:, :, None] * member).sum(axis=1) for count in (arrived, completed))
    settled = Results(
        throughput_tokens_per_s=tokens / horizon_s + nan,
        offered_tokens_per_s=offered_per_s * (scenarios.mean_input_tokens + scenarios.mean_output_tokens),
        completed_per_s=requests_done / horizon_s + nan,
        class_service=jnp.where(class_arrived > 0, class_completed / class_arrived, jnp.nan) + nan[:, None],
        mean_running=mean[RUNNING],
        mean_waiting=mean[WAITING],
        step_time_s=(sums[COMPUTING] + sums[LOADING]) / steps,
        itl_s=sums[STREAMING] / next_tokens,
        ttft_s=sums[TTFT] / noted,
        active_adapters=mean[ADAPTERS],
        kv_usage=mean[KV_BLOCKS] / server.kv_blocks,
        loads_per_s=host_loads / horizon_s + nan,
        limit=s.limit,
        status=status,
    )
    return EventResults(
        settled=settled,
        ttft_quantiles_s=_quantiles_s(s.histogram) + nan[:, None],
        adapter_arrived=arrived,
        adapter_completed=completed,
        disk_loads=disk_loads,
        preemptions=preemptions,
        steps=steps,
        compute_share=mean[COMPUTING],
        load_share=mean[LOADING],
        turns=turns,
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
