"""The event twin: every engine step of many servers at once, each under requests of its own.

State stands in arrays of fixed size, one row a server, and one loop turns all of them until the last is done
(`lora_capacity.twin._scheduler` says what a turn is). Arrivals, lengths and the order of touching adapters are given,
so equal inputs give equal results.

What it leaves out: asynchronous scheduling; eviction from host memory, which holds all adapters served; requests that
exceed ``max_model_len``; prefix caching.
"""

from collections.abc import Sequence
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from numpy.typing import ArrayLike

from lora_capacity.costs import Costs, step_time_s
from lora_capacity.errors import InputError
from lora_capacity.status import Status
from lora_capacity.twin import _scheduler as engine
from lora_capacity.twin.inputs import Scenarios
from lora_capacity.twin.results import Results
from lora_capacity.workload import BASE_MODEL, Requests

TICKS = engine.FAR
"""Ticks of a horizon; an hour's are of 3.4 µs. Durations are rounded to them, without bias."""

FIRST = 4096
LOG = 8192
"""Admissions remembered, to know which request was admitted last."""

PREEMPTED_PLACES = 128
"""Places for preempted requests in the queue."""


@struct.dataclass
class RequestTables:
    """The requests of each configuration in order of arrival, and its adapters in order of touching.

    Attributes:
        arrival: Arrival in ticks of the configuration's horizon, int32 ``[configs, requests]``.
        table: Adapter, prompt tokens, answer tokens, next request of the same adapter, int32
            ``[configs, requests, 4]``.
        head: First request of each adapter, the base model last, int32 ``[configs, adapters + 1]``.
        rank: Rank of each adapter, ``[configs, adapters]``; padding has 0.
        class_of: Class of each adapter in the scenarios, int32 ``[configs, adapters]``; padding has -1.
        arrived: Requests of each adapter, int32 ``[configs, adapters]``.
        longest_output: Longest answer of all, tokens; fixes the size of arrays.
    """

    arrival: Array
    table: Array
    head: Array
    rank: Array
    class_of: Array
    arrived: Array
    longest_output: int = field(metadata={"pytree_node": False})


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


def draw_requests(
    scenarios: Scenarios, input_tokens: ArrayLike, output_tokens: ArrayLike, *, seed: int, most: int | None = None
) -> RequestTables:
    """Draw Poisson arrivals for every configuration, and their lengths from a sample.

    Args:
        scenarios: The configurations.
        input_tokens: Prompt lengths to draw from, paired with the next, ``[sample]`` or ``[configs, sample]``.
        output_tokens: Answer lengths.
        seed: Configuration ``i`` depends on it and ``i`` alone.
        most: Most requests of a configuration, those beyond are never sent; for clients that hold requests back, since
            a server completes far fewer than arrive.

    Raises:
        InputError: As `lay_out_requests`.
    """
    configs = scenarios.horizon_s.shape[0]
    inputs, outputs = (
        np.broadcast_to(column, (configs, np.shape(column)[-1])) for column in (input_tokens, output_tokens)
    )
    counts, rates = np.asarray(scenarios.class_count, dtype=int), np.asarray(scenarios.class_rate_per_s, dtype=float)
    base, horizon_s = np.asarray(scenarios.base_rate_per_s, dtype=float), np.asarray(scenarios.horizon_s, dtype=float)
    requests, classes = [], []
    for i in range(configs):
        rng = np.random.default_rng([seed, i])
        own = np.repeat(np.arange(counts.shape[1]), counts[i])
        rate = np.append(rates[i][own], base[i])
        arrival_s = np.sort(rng.random(rng.poisson(rate.sum() * horizon_s[i]))[:most] * horizon_s[i])
        if most is not None and arrival_s.size == most:
            arrival_s = np.cumsum(rng.exponential(1.0 / rate.sum(), most))
            arrival_s = arrival_s[arrival_s < horizon_s[i]]
        place = np.searchsorted(np.cumsum(rate), rng.random(arrival_s.size) * rate.sum(), side="right")
        place = np.minimum(place, np.flatnonzero(rate)[-1])
        pair = rng.integers(inputs.shape[1], size=arrival_s.size)
        adapter = np.where(place == own.size, BASE_MODEL, place)
        requests.append(Requests(arrival_s, adapter, inputs[i][pair], outputs[i][pair]))
        classes.append(own)
    return lay_out_requests(scenarios, requests, classes, seed=seed)


def lay_out_requests(
    scenarios: Scenarios, requests: Sequence[Requests], classes: Sequence[ArrayLike], *, seed: int | None
) -> RequestTables:
    """Lay out given requests, which stay as they are.

    Args:
        scenarios: The configurations, ``[configs]``.
        requests: The requests of each, in order of arrival.
        classes: For each configuration the class of every adapter, in the order in which requests number adapters.
        seed: For the order in which a step touches adapters, which is that of a hash set in vLLM; None for that of
            their numbers.

    Raises:
        InputError: If a request needs more KV blocks than a server that starts has.
    """
    blocks = np.asarray(scenarios.kv_cache_tokens, dtype=int) // engine.BLOCK_TOKENS - 1
    starts = np.asarray(scenarios.status) <= Status.OUTSIDE_CALIBRATION
    for i, given in enumerate(requests):
        longest = int((given.input_tokens + given.output_tokens).max(initial=1)) - 1
        if starts[i] and -(-longest // engine.BLOCK_TOKENS) > blocks[i]:
            allowed = f"at most the KV cache, {blocks[i] * engine.BLOCK_TOKENS} tokens"
            raise InputError(
                "input_tokens + output_tokens", longest + 1, allowed, "use fewer slots or shorter requests"
            )
    size = 1024 * -(-max(max(len(given) for given in requests) + engine.WINDOW, 1) // 1024)
    adapters = 16 * -(-(max(np.size(own) for own in classes) + 1) // 16) - 1
    configs = len(requests)
    arrival = np.full((configs, size), np.iinfo(np.int32).max, dtype=np.int32)
    table = np.zeros((configs, size, 4), dtype=np.int32)
    head = np.full((configs, adapters + 1), TICKS, dtype=np.int32)
    rank, class_of = np.zeros((configs, adapters)), np.full((configs, adapters), -1, dtype=np.int32)
    arrived = np.zeros((configs, adapters), dtype=np.int32)
    for i, (given, own) in enumerate(zip(requests, map(np.asarray, classes), strict=True)):
        order = np.arange(own.size) if seed is None else np.random.default_rng([seed, i, 1]).permutation(own.size)
        place = np.empty_like(order)
        place[order] = np.arange(own.size)
        count = len(given)
        adapter = np.where(given.adapter == BASE_MODEL, adapters, np.append(place, 0)[given.adapter])
        ticks = np.round(given.arrival_s / float(scenarios.horizon_s[i]) * TICKS)
        arrival[i, :count] = np.minimum(ticks, np.iinfo(np.int32).max)
        table[i, :count] = np.stack([adapter, given.input_tokens, given.output_tokens, _following(adapter)], axis=1)
        present, first = np.unique(adapter, return_index=True)
        head[i, present] = first
        arrived[i] = np.bincount(adapter, minlength=adapters + 1)[:adapters]
        class_of[i, : own.size] = own[order]
        rank[i, : own.size] = np.asarray(scenarios.class_rank)[i][own[order]]
    longest = max(int(given.output_tokens.max(initial=1)) for given in requests)
    return RequestTables(
        arrival=jnp.asarray(arrival),
        table=jnp.asarray(table),
        head=jnp.asarray(head),
        rank=jnp.asarray(rank),
        class_of=jnp.asarray(class_of),
        arrived=jnp.asarray(arrived),
        longest_output=longest,
    )


def _following(adapter: np.ndarray) -> np.ndarray:
    """Return the next request of the same adapter for each."""
    order = np.argsort(adapter, kind="stable")
    following = np.full(adapter.size, TICKS, dtype=np.int32)
    same = adapter[order[1:]] == adapter[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def simulate_events(
    costs: Costs, scenarios: Scenarios, requests: RequestTables, *, full_prompt_must_fit: bool = False
) -> EventResults:
    """Play every engine step of every configuration up to its horizon; pure, to be jitted.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``. Their rates and mean lengths only serve to compare with.
        requests: The requests of each.
        full_prompt_must_fit: Whether a request is admitted only if there are KV blocks for its whole prompt, not just
            for its first chunk.

    Returns:
        What happened, ``[configs]``.

    Status: ``step_limit`` where more preempted requests wait, or are more deeply nested, than there is room for.
    """
    server = lay_out_servers(scenarios, full_prompt_must_fit)
    adapters = jnp.asarray(scenarios.class_count.sum(axis=1), jnp.int32)
    disk_s = jnp.asarray(costs.loads.disk_s + costs.loads.disk_rank_s * requests.rank, jnp.float32)
    state = initial_state(scenarios, server, requests)

    def unfinished(carry: tuple[engine.State, Array]) -> Array:
        return alive(carry[0]).any()

    def turn(carry: tuple[engine.State, Array]) -> tuple[engine.State, Array]:
        state, turns = carry
        turns = turns + alive(state)
        return turn_all(costs, server, adapters, requests.arrival, disk_s, state), turns

    none = jnp.zeros_like(adapters)
    state, turns = jax.lax.while_loop(unfinished, turn, (state, none))
    return _summarise(scenarios, server, requests, state, turns)


def alive(state: engine.State) -> Array:
    """Say whether a server has more to do, ``[configs]``."""
    noting = (state.first_got < state.first_put) & ~state.overflow
    return (state.mode != engine.DONE) | noting


def turn_all(
    costs: Costs, server: engine.Server, adapters: Array, arrival: Array, disk_s: Array, s: engine.State
) -> engine.State:
    """Take one turn of every server.

    Args:
        costs: What steps and loads cost.
        server: The configurations.
        adapters: Adapters of each, ``[configs]``.
        arrival: Arrivals, ticks, ``[configs, requests]``.
        disk_s: Time to read each adapter from disk, s, ``[configs, adapters]``.
        s: The state, ``[configs, …]``.
    """
    crowded = adapters > server.max_loras
    work = engine.apart(lambda s: assembled(costs, server, crowded, s), s)
    s = engine.run(server, s, work)
    s = engine.send(server, arrival, s)
    s, newcomer = engine.arrange(server, disk_s, s)
    newcomer = jnp.where(crowded, newcomer, -1)

    def note(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.zeros_like(carry[0]), engine.distances(s._replace(distance=carry[1]), newcomer)

    # A loop of at most one turn, since a conditional would copy the array.
    _, distance = jax.lax.while_loop(lambda carry: carry[0], note, (jnp.any(newcomer >= 0), s.distance))
    return s._replace(distance=distance)


def assembled(costs: Costs, server: engine.Server, crowded: Array, s: engine.State) -> engine.Work:
    """Say what the steps put together consist of and cost, where they are ready to run, ``[configs]``."""
    b = s.building
    ready = s.mode == engine.RUN
    none = jnp.zeros_like(s.step)
    behind = ready & (jnp.abs(b.stop) < engine.FAR) & (s.active >= server.max_loras)
    passed = jax.lax.cond(behind.any(), lambda: engine.passed_over(s), lambda: none)
    passed = jnp.where(behind, passed, jnp.where(b.stop == engine.FAR, s.waiting, 0))
    new = ready & crowded & (b.newcomers > 0)
    evicting = new & (b.newcomers > server.max_loras - s.active_before)
    several = evicting & (b.newcomers > 1)
    evicted = jax.lax.switch(
        evicting.any().astype(jnp.int32) + several.any(),
        (
            lambda: none,
            lambda: engine.loads_of_evicted(server, s, one=True),
            lambda: engine.loads_of_evicted(server, s, one=False),
        ),
    )
    missing = jax.lax.cond(new.any(), lambda: engine.loads_of_newcomers(server, s), lambda: none)
    host_loads = jnp.where(new, missing, b.first_touched) + jnp.where(evicting, evicted, 0)
    tokens = server.max_num_batched_tokens - b.budget
    compute_s = step_time_s(
        costs,
        tokens=tokens.astype(jnp.float32),
        prefill_tokens=b.prefill_tokens,
        kv_tokens=s.kv_tokens,
        adapters=s.active,
        passed_over=passed,
        max_loras=server.max_loras,
        max_lora_rank=server.max_lora_rank,
    )
    return engine.Work(
        tokens=tokens,
        prefill_tokens=b.prefill_tokens,
        kv_tokens=s.kv_tokens,
        adapters=s.active,
        passed_over=passed,
        host_loads=host_loads,
        disk_loads=b.first_touched,
        compute_s=compute_s.astype(jnp.float32),
        load_s=jnp.asarray(costs.loads.host_s * host_loads + b.disk_s, jnp.float32),
    )


def lay_out_servers(scenarios: Scenarios, full_prompt_must_fit: bool = False) -> engine.Server:
    """Return the configurations as whole numbers, ``[configs]``; vLLM keeps one KV block for itself."""

    def whole(values: Array) -> Array:
        return jnp.minimum(values, engine.FAR).astype(jnp.int32)

    none = jnp.zeros(scenarios.horizon_s.shape, jnp.int32)
    return engine.Server(
        max_num_batched_tokens=whole(scenarios.max_num_batched_tokens),
        max_num_seqs=whole(jnp.minimum(scenarios.max_num_seqs, scenarios.max_num_batched_tokens)),
        kv_blocks=whole(scenarios.kv_cache_tokens) // engine.BLOCK_TOKENS - 1,
        max_loras=whole(scenarios.max_loras),
        max_lora_rank=whole(scenarios.max_lora_rank),
        max_pending=whole(scenarios.max_pending),
        horizon=none + TICKS,
        tick_s=jnp.asarray(scenarios.horizon_s / TICKS, jnp.float32),
        full_prompt_must_fit=none + full_prompt_must_fit > 0,
    )


def initial_state(scenarios: Scenarios, server: engine.Server, requests: RequestTables) -> engine.State:
    """Return empty servers before the first arrival; those that do not start are done."""
    configs, adapters = requests.rank.shape
    size = requests.arrival.shape[1]
    most_first = FIRST

    def filled(value: int, *shape: int) -> Array:
        return jnp.full((configs, *shape), value, jnp.int32)

    def across(value: int, size: int) -> Array:
        return jnp.full((size, configs), value, jnp.int32)

    none = filled(0)
    fresh = engine.Building(none, none, none, none, none > 0, none - engine.FAR, none, none, jnp.zeros(configs))
    starts = scenarios.status <= Status.OUTSIDE_CALIBRATION
    return engine.State(
        mode=jnp.where(starts, engine.SEND, engine.DONE).astype(jnp.int32),
        now=none,
        step=none + 1,
        sent=none,
        room=server.max_pending,
        taken=none,
        completed=none,
        free=server.kv_blocks,
        running=none,
        active=none,
        active_before=none,
        kv_tokens=none,
        streaming=none,
        building=fresh,
        partial=engine.Partial(none - 1, none, none, none),
        table=jnp.concatenate([requests.table, requests.arrival[..., None]], axis=2),
        head=requests.head.T,
        key=requests.head.T,
        last=across(engine.NEVER, adapters + 1).at[adapters].set(engine.FAR),
        since=across(0, adapters + 1),
        earlier=across(engine.NEVER, adapters + 1),
        distance=across(0, adapters + 1),
        ring=filled(0, 1 << requests.longest_output.bit_length(), 5),
        phase=across(0, engine.BLOCK_TOKENS),
        limit=none,
        log=filled(0, LOG, 3),
        logged=none,
        log_lost=none,
        preempted=(across(-1, PREEMPTED_PLACES), across(0, PREEMPTED_PLACES), across(0, PREEMPTED_PLACES)),
        places=none,
        preempted_waiting=none,
        admitted=jnp.zeros((configs, size // 32), jnp.uint32),
        admitted_by_block=across(0, size // 1024),
        admitted_by_adapter=across(0, adapters + 1),
        first=filled(0, most_first, 2),
        first_put=none,
        first_got=none,
        ends=filled(0, most_first),
        histogram=filled(0, engine.BINS),
        sums=jnp.zeros((8, configs), jnp.float32),
        sums_lost=jnp.zeros((8, configs), jnp.float32),
        counts=across(0, 7),
        overflow=none > 0,
    )


def _summarise(
    scenarios: Scenarios, server: engine.Server, requests: RequestTables, s: engine.State, turns: Array
) -> EventResults:
    """Divide sums by what they are sums over, and blank what does not start."""
    horizon_s = scenarios.horizon_s
    status = jnp.where(s.overflow, Status.STEP_LIMIT, scenarios.status)
    told = status <= Status.OUTSIDE_CALIBRATION
    requests_done, tokens, next_tokens, steps, host_loads, disk_loads, preemptions = s.counts
    sums = jnp.where(told, s.sums, jnp.nan)
    mean = sums / horizon_s
    nan = jnp.where(told, 0.0, jnp.nan)
    arrived, completed = requests.arrived, _completed(s)
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
        mean_running=mean[engine.RUNNING],
        mean_waiting=mean[engine.WAITING],
        step_time_s=(sums[engine.COMPUTING] + sums[engine.LOADING]) / steps,
        itl_s=sums[engine.STREAMING] / next_tokens,
        ttft_s=sums[engine.TTFT] / noted,
        active_adapters=mean[engine.ADAPTERS],
        kv_usage=mean[engine.KV_BLOCKS] / server.kv_blocks,
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
        compute_share=mean[engine.COMPUTING],
        load_share=mean[engine.LOADING],
        turns=turns,
    )


def _completed(s: engine.State) -> Array:
    """Count the requests of each adapter that were admitted and are in batch and queue no more, ``[configs, adapters]``."""
    row = jnp.arange(s.step.shape[0])[:, None]
    running = (jnp.arange(s.log.shape[1]) < s.logged[:, None]) & (s.log[..., 1] >= s.step[:, None])
    request, owner, _ = (column.T for column in s.preempted)
    preempted = (request >= 0) & (jnp.arange(request.shape[1]) < s.places[:, None])
    part = s.partial.request[:, None]
    adapter = s.table[..., engine.ADAPTER]
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
    value_s = engine.SHORTEST_S * 2.0 ** ((place + 0.5) / engine.BINS_PER_DOUBLING)
    return jnp.where(reached[:, -1:] > 0, value_s, jnp.nan)
