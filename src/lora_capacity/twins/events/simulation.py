"""The event twin: every engine step of many servers at once, each under requests of its own.

State stands in arrays of fixed size, one row a server, and one loop turns all of them until the last is done
(`lora_capacity.twins.events.scheduler` says what a turn is). Arrivals, lengths and the order of touching adapters are
given, so equal inputs give equal results.

What it leaves out: eviction from host memory, which holds all adapters served; requests that
exceed ``max_model_len``; prefix caching.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.costs import Costs
from lora_capacity.engines import SchedulerRules
from lora_capacity.scenarios.results import Results
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events.adapter_slots import loads_of_evicted, loads_of_newcomers, note_distance
from lora_capacity.twins.events.arrays import seldom
from lora_capacity.twins.events.fast_forward import skip_quiet_steps
from lora_capacity.twins.events.queue import passed_over
from lora_capacity.twins.events.requests import TICKS, RequestTables
from lora_capacity.twins.events.results import summarise
from lora_capacity.twins.events.scheduler import arrange, send
from lora_capacity.twins.events.state import (
    BINS,
    BLOCK_TOKENS,
    DONE,
    FAR,
    FOLLOWED,
    NEVER,
    RUN,
    SEND,
    Flight,
    Followed,
    Partial,
    Passed,
    Preempted,
    Server,
    State,
    Work,
    new_building,
)
from lora_capacity.twins.events.step import compute_time_s, note_first_token, run

FIRST = 4096
"""First tokens whose delay can wait to be noted: twice as many as a step of the usual budget can start."""


LOG = 8192
"""Admissions remembered, to know which request was admitted last."""

PREEMPTED_PLACES = 128
"""Places for preempted requests in the queue."""


def simulate_events(
    costs: Costs,
    scenarios: Scenarios,
    requests: RequestTables,
    *,
    rules: SchedulerRules = SchedulerRules(),
    warmup_s: ArrayLike = 0.0,
    samples: int = 0,
) -> Results:
    """Play every engine step of every configuration up to its horizon; pure, to be jitted.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``. Their rates and mean lengths only serve to compare with.
        requests: The requests of each.
        rules: What the scheduler of their vLLM version does; static.
        warmup_s: Time at the beginning that means, quantiles, maxima and counts leave out, but for those by adapter or
            class; one value or ``[configs]``.
        samples: Parts of the horizon whose means are told as a series; 0 for none.

    Returns:
        What happened, ``[configs]``.

    Status: ``step_limit`` where more preempted requests wait, or are more deeply nested, than there is room for.
    """
    results, _ = play_out(costs, scenarios, requests, rules, warmup_s, samples)
    return results


def play_out(
    costs: Costs,
    scenarios: Scenarios,
    requests: RequestTables,
    rules: SchedulerRules,
    warmup_s: ArrayLike,
    samples: int,
) -> tuple[Results, Array]:
    """Return what `simulate_events` does, and when requests were sent; that can take the memory of the arrivals."""
    server = lay_out_servers(scenarios, rules, warmup_s)
    adapters = jnp.asarray(scenarios.class_count.sum(axis=1), jnp.int32)
    disk_s = jnp.asarray(costs.loads.disk_s + costs.loads.disk_rank_s * requests.rank, jnp.float32)
    state = initial_state(scenarios, server, requests, samples)
    skips = samples == 0 and state.flight is None

    def unfinished(carry: tuple[State, Array]) -> Array:
        return alive(carry[0]).any()

    def turn(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, turns = carry
        turns = turns + alive(state)
        state = turn_all(costs, server, adapters, requests, disk_s, state)
        if skips:
            state = skip_quiet_steps(costs, server, adapters, state)
        return state, turns

    none = jnp.zeros_like(adapters)
    state, turns = jax.lax.while_loop(unfinished, turn, (state, none))
    return summarise(scenarios, server, requests, state, turns), state.sent_at


def alive(state: State) -> Array:
    """Say whether a server has more to do, ``[configs]``."""
    noting = (state.first_got < state.first_put) & ~state.overflow
    return (state.mode != DONE) | noting


def turn_all(costs: Costs, server: Server, adapters: Array, requests: RequestTables, disk_s: Array, s: State) -> State:
    """Take one turn of every server.

    Args:
        costs: What steps and loads cost.
        server: The configurations.
        adapters: Adapters of each, ``[configs]``.
        requests: The requests of each.
        disk_s: Time to read each adapter from disk, s, ``[configs, adapters]``.
        s: The state, ``[configs, …]``.
    """
    crowded = adapters > server.max_loras
    s = seldom(s.mode == RUN, lambda s: run(server, s, assembled(costs, server, adapters, s)), s)
    s = note_first_token(server, s)
    s = seldom(s.mode == SEND, lambda s: send(server, s), s)
    s, newcomer = arrange(server, requests, disk_s, s)
    return note_distance(s, jnp.where(crowded, newcomer, -1))


def assembled(costs: Costs, server: Server, adapters: Array, s: State) -> Work:
    """Say what the steps put together consist of and cost, where they are ready to run, ``[configs]``."""
    crowded = adapters > server.max_loras
    b = s.building
    ready = s.mode == RUN
    none = jnp.zeros_like(s.step)
    passed = passed_over(server, s, ready)
    new = ready & crowded & (b.newcomers > 0)
    evicting = new & (b.newcomers > server.max_loras - s.active_before)
    several = evicting & (b.newcomers > 1)
    evicted = jax.lax.switch(
        evicting.any().astype(jnp.int32) + several.any(),
        (
            lambda: none,
            lambda: loads_of_evicted(server, s, one=True),
            lambda: loads_of_evicted(server, s, one=False),
        ),
    )
    missing = jax.lax.cond(new.any(), lambda: loads_of_newcomers(server, s), lambda: none)
    host_loads = jnp.where(new, missing, b.first_touched) + jnp.where(evicting, evicted, 0)
    tokens = server.max_num_batched_tokens - b.budget
    compute_s = compute_time_s(
        costs,
        server,
        adapters,
        s,
        tokens=tokens,
        prefill_tokens=b.prefill_tokens,
        kv_tokens=s.kv_tokens,
        passed_over=passed,
    )
    return Work(
        tokens=tokens,
        prefill_tokens=b.prefill_tokens,
        kv_tokens=s.kv_tokens,
        adapters=s.active,
        passed_over=passed,
        host_loads=host_loads,
        disk_loads=b.first_touched,
        compute_s=compute_s,
        scheduling_s=jnp.asarray(costs.step.skipped_request_s * passed, jnp.float32),
        load_s=jnp.asarray(costs.loads.host_to_gpu_load_s * host_loads + b.disk_s, jnp.float32),
    )


def lay_out_servers(
    scenarios: Scenarios, rules: SchedulerRules = SchedulerRules(), warmup_s: ArrayLike = 0.0
) -> Server:
    """Return the configurations as whole numbers, ``[configs]``; vLLM keeps one KV block for itself."""

    def whole(values: Array) -> Array:
        return jnp.minimum(values, FAR).astype(jnp.int32)

    none = jnp.zeros(scenarios.horizon_s.shape, jnp.int32)
    return Server(
        max_num_batched_tokens=whole(scenarios.max_num_batched_tokens),
        max_num_seqs=whole(jnp.minimum(scenarios.max_num_seqs, scenarios.max_num_batched_tokens)),
        kv_blocks=whole(scenarios.kv_cache_tokens) // BLOCK_TOKENS - 1,
        max_loras=whole(scenarios.max_loras),
        max_lora_rank=whole(scenarios.max_lora_rank),
        max_pending=whole(scenarios.max_pending),
        warmup=none + jnp.round(jnp.asarray(warmup_s) / scenarios.horizon_s * TICKS).astype(jnp.int32),
        horizon=none + TICKS,
        tick_s=jnp.asarray(scenarios.horizon_s / TICKS, jnp.float32),
        rules=rules,
    )


def initial_state(scenarios: Scenarios, server: Server, requests: RequestTables, samples: int = 0) -> State:
    """Return empty servers before the first arrival; those that do not start are done."""
    configs, adapters = requests.rank.shape
    size = requests.arrival.shape[1]
    most_first = FIRST

    def filled(value: int, *shape: int) -> Array:
        return jnp.full((configs, *shape), value, jnp.int32)

    def across(value: int, size: int) -> Array:
        return jnp.full((size, configs), value, jnp.int32)

    none = filled(0)
    flight = Flight(none, none, none, none, none) if server.rules.async_scheduling else None
    passed = Passed(none, none, across(0, PREEMPTED_PLACES)) if server.rules.passed_over_first else None
    starts = scenarios.status <= Status.OUTSIDE_CALIBRATION
    return State(
        mode=jnp.where(starts, SEND, DONE).astype(jnp.int32),
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
        flight=flight,
        streaming=none,
        building=new_building(none, passed is not None),
        partial=Partial(none - 1, none, none, none),
        sent_at=requests.arrival,
        head=requests.head.T,
        key=requests.head.T if passed is None else across(0, 0),
        last=across(NEVER, adapters + 1).at[adapters].set(FAR),
        since=across(0, adapters + 1),
        earlier=across(NEVER, adapters + 1),
        distance=across(0, adapters + 1),
        ring=filled(0, 1 << requests.longest_output.bit_length(), 5),
        followed=Followed(
            request=across(-1, FOLLOWED),
            sent=across(0, FOLLOWED),
            first_step=across(0, FOLLOWED),
            first_end=across(0, FOLLOWED),
            finish=across(0, FOLLOWED),
            later_tokens=across(0, FOLLOWED),
            undisturbed=across(0, FOLLOWED) > 0,
        ),
        phase=across(0, BLOCK_TOKENS),
        limit=none,
        log=filled(0, LOG, 3),
        logged=none,
        log_lost=none,
        preempted=Preempted(*(across(value, PREEMPTED_PLACES) for value in (-1, 0, 0))),
        passed=passed,
        places=none,
        preempted_waiting=none,
        admitted=jnp.zeros((configs, size // 32), jnp.uint32),
        admitted_by_block=across(0, size // 1024),
        admitted_by_adapter=across(0, adapters + 1),
        first=filled(0, most_first, 2),
        first_put=none,
        first_got=none,
        ends=filled(0, most_first),
        histogram=filled(0, 3 * BINS),
        worst_wait=across(0, adapters + 1),
        most=across(0, 3),
        sums=jnp.zeros((9, configs), jnp.float32),
        sums_lost=jnp.zeros((9, configs), jnp.float32),
        series=jnp.zeros((configs, samples, 7), jnp.float32),
        counts=across(0, 7),
        overflow=none > 0,
    )
