"""The event twin: every engine step of a server under requests of its own.

State stands in arrays of fixed size, and one loop goes on until the server is done
(`lora_capacity.twins.events.scheduler` says what an iteration is). Arrivals, lengths and the order of touching adapters
are given, so equal inputs give equal results. Everything is written for one server and mapped over many: then one loop
goes on until the last of them is done.

What it leaves out: eviction from host memory, which holds all adapters; ``long_prefill_token_threshold``, with which
several prompts are computed in part; requests that exceed ``max_model_len``; prefix caching where no requests share a
prefix.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.costs import Costs
from lora_capacity.engines import SchedulerRules
from lora_capacity.scenarios.results import Results
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events.adapter_slots import note_distance
from lora_capacity.twins.events.arrays import on_any, seldom
from lora_capacity.twins.events.fast_forward import fast_forward
from lora_capacity.twins.events.kv_cache import BLOCK_SIZE, KvCache
from lora_capacity.twins.events.prefix_cache import no_prefixes
from lora_capacity.twins.events.requests import RequestTables
from lora_capacity.twins.events.results import observed, summarise
from lora_capacity.twins.events.scheduler import arrange, send
from lora_capacity.twins.events.server import Server, build_server
from lora_capacity.twins.events.state import (
    BINS,
    DONE,
    FAR,
    NEVER,
    RUN,
    SEND,
    TRACED,
    AdapterUse,
    Batch,
    ChunkedPrefill,
    Clients,
    FirstTokens,
    Flag,
    PendingStep,
    PreemptedRequests,
    Queue,
    SkippedQueue,
    State,
    Statistics,
    StepInFlight,
    TracedRequests,
)
from lora_capacity.twins.events.statistics import record_first_token
from lora_capacity.twins.events.step import run_step

FIRST = 4096
"""First tokens whose delay can wait to be noted: twice as many as a step of the usual budget can start."""

LOG = 8192
"""Admissions remembered, to know which request was admitted last: four times the 2,048 running requests of the largest
servers that were measured, since entries of requests that have left stand between the others."""

PREEMPTED_PLACES = 128
"""Places for preempted requests in the queue: nobody is admitted in front of them, so few wait at a time; a server that
needs more ends with ``step_limit``."""


def simulate_events(
    costs: Costs,
    scenarios: Scenarios,
    requests: RequestTables,
    *,
    rules: SchedulerRules = SchedulerRules(),
    block_size: int = BLOCK_SIZE,
    warmup_s: ArrayLike = 0.0,
    samples: int = 0,
) -> Results:
    """Simulate every engine step of every configuration up to its horizon; pure, to be jitted.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``. Their rates and mean lengths only serve to compare with.
        requests: The requests of each.
        rules: What the scheduler of their vLLM version does; static.
        block_size: Tokens of a KV block, as the scenarios say; static.
        warmup_s: Time at the beginning that means, quantiles, maxima and counts leave out, but for those by adapter or
            class; one value or ``[configs]``.
        samples: Parts of the horizon whose means are told as a series; 0 for none.

    Returns:
        What happened, ``[configs]``.

    Status: ``step_limit`` where more preempted requests wait, or are more deeply nested, than there is room for.
    """
    results, _ = simulate_with_clients(costs, scenarios, requests, rules, block_size, warmup_s, samples)
    return results


def simulate_with_clients(
    costs: Costs,
    scenarios: Scenarios,
    requests: RequestTables,
    rules: SchedulerRules,
    block_size: int,
    warmup_s: ArrayLike,
    samples: int,
) -> tuple[Results, Clients]:
    """Return what `simulate_events` does, and what clients have sent; that can take the memory of the arrivals."""
    simulate = partial(_simulate_one, costs, rules=rules, block_size=block_size, samples=samples)
    columns = scenarios, requests, jnp.broadcast_to(jnp.asarray(warmup_s), scenarios.status.shape)
    if scenarios.status.shape[0] > 1:
        return jax.vmap(simulate)(*columns)
    results: tuple[Results, Clients] = jax.tree.map(
        lambda leaf: leaf[jnp.newaxis], simulate(*jax.tree.map(lambda leaf: jnp.reshape(leaf, leaf.shape[1:]), columns))
    )
    return results


def _simulate_one(
    costs: Costs,
    scenario: Scenarios,
    requests: RequestTables,
    warmup_s: Array,
    *,
    rules: SchedulerRules,
    block_size: int,
    samples: int,
) -> tuple[Results, Clients]:
    server = build_server(costs, scenario, requests, rules=rules, block_size=block_size, warmup_s=warmup_s)
    start = initial_state(server, scenario.status, block_size, samples)
    # A series samples at the end of each step; a step in flight is not known when the next one is put together.
    forwards = samples == 0 and start.in_flight is None

    def body(s: State) -> State:
        s = iterate(server, s)
        return fast_forward(server, s) if forwards else s

    state: State = jax.lax.while_loop(lambda s: on_any(alive(s)), body, start)
    return summarise(scenario, costs.front_end, observed(scenario, server, state)), state.clients


def alive(s: State) -> Flag:
    """Say whether a server has more to do."""
    noting = (s.first_tokens.got < s.first_tokens.put) & ~s.overflow
    return (s.mode != DONE) | noting


def iterate(server: Server, s: State) -> State:
    """Go on by one iteration."""
    s = s._replace(statistics=s.statistics._replace(iterations=s.statistics.iterations + alive(s)))
    s = seldom(s.mode == RUN, lambda s: run_step(server, s), s)
    s = record_first_token(server, s)
    s = seldom(s.mode == SEND, lambda s: send(server, s), s)
    s, newcomer = arrange(server, s)
    # Where every adapter has a slot, nobody has to know how recently each was used.
    newcomer = jnp.where(server.crowded, newcomer, -1)
    return s._replace(adapters=note_distance(s.adapters, s.step, s.pending.newcomers, newcomer))


def initial_state(server: Server, status: Array, block_size: int = BLOCK_SIZE, samples: int = 0) -> State:
    """Return an empty server before the first arrival; one that does not start is done."""
    requests = server.requests
    size, adapters = requests.following.shape[0], requests.rank.shape[0]
    none = jnp.zeros((), jnp.int32)

    def filled(value: int, *shape: int) -> Array:
        return jnp.full(shape, value, jnp.int32)

    per_adapter, places = adapters + 1, PREEMPTED_PLACES
    skipped = SkippedQueue(none, none, filled(0, places)) if server.rules.skipped_first else None
    # A request is known from its first token to its last: one cell more than the longest output, a power of two.
    cells, shares = 1 << requests.longest_output.bit_length(), requests.shared_blocks is not None
    return State(
        mode=jnp.where(status <= Status.OUTSIDE_CALIBRATION, SEND, DONE).astype(jnp.int32),
        now=none,
        step=none + 1,
        clients=Clients(sent_at=requests.arrival, sent=none, room=server.max_pending),
        queue=Queue(
            taken=none,
            head=requests.head,
            key=requests.head if skipped is None else filled(0, 0),
            preempted=PreemptedRequests(filled(-1, places), filled(0, places), filled(0, places)),
            places=none,
            preempted_waiting=none,
            skipped=skipped,
            admitted=jnp.zeros(size // 32, jnp.uint32),
            admitted_by_block=filled(0, size // 1024),
        ),
        batch=Batch(
            running=none,
            completed=none,
            streaming=none,
            chunked=ChunkedPrefill(none - 1, none, none, none),
            log=filled(0, LOG, 3),
            logged=none,
            log_lost=none,
        ),
        calendar=filled(0, cells, 5),
        kv=KvCache(free=server.kv_blocks, tokens=none, phase=filled(0, block_size)),
        prefixes=no_prefixes(adapters, max(requests.longest_prefix, 1), cells, size, places) if shares else None,
        adapters=AdapterUse(
            active=none,
            active_before=none,
            last=filled(NEVER, per_adapter).at[adapters].set(FAR),
            since=filled(0, per_adapter),
            earlier=filled(NEVER, per_adapter),
            distance=filled(0, per_adapter),
        ),
        pending=PendingStep.empty(with_place=skipped is not None, with_growth=shares),
        in_flight=StepInFlight(none, none, none, none, none) if server.rules.async_scheduling else None,
        first_tokens=FirstTokens(pending=filled(0, FIRST, 2), put=none, got=none, ends=filled(0, FIRST)),
        traced=TracedRequests(
            request=filled(-1, TRACED),
            sent=filled(0, TRACED),
            first_step=filled(0, TRACED),
            first_end=filled(0, TRACED),
            finish=filled(0, TRACED),
            later_tokens=filled(0, TRACED),
            undisturbed=filled(0, TRACED) > 0,
        ),
        statistics=Statistics(
            histogram=filled(0, 3 * BINS),
            worst_wait=filled(0, per_adapter),
            admitted_by_adapter=filled(0, per_adapter),
            most=filled(0, 3),
            kept_bounds=filled(0, 4),
            sums=jnp.zeros(10, jnp.float32),
            sums_lost=jnp.zeros(10, jnp.float32),
            series=jnp.zeros((samples, 7), jnp.float32),
            counts=filled(0, 7),
            bottleneck=none,
            iterations=none,
        ),
        overflow=none > 0,
    )
