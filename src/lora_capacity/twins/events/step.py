"""A step that was put together: what it costs, how it runs, what it leaves behind."""

import jax
import jax.numpy as jnp

from lora_capacity.scenarios.results import Bottleneck
from lora_capacity.twins.events.adapter_slots import host_loads
from lora_capacity.twins.events.arrays import after, apart, put
from lora_capacity.twins.events.asynchronous import hand_back, step_times
from lora_capacity.twins.events.queue import count_skipped, note_skipped
from lora_capacity.twins.events.server import Server, compute_time_s
from lora_capacity.twins.events.shared_blocks import free_leaving
from lora_capacity.twins.events.state import (
    FAR,
    RUN,
    SEND,
    Number,
    PendingStep,
    State,
    StepInFlight,
    StepWork,
)
from lora_capacity.twins.events.statistics import record_step


def step_work(server: Server, s: State) -> StepWork:
    """Say what the step put together consists of and costs, if it is ready to run."""
    b, ready = s.pending, s.mode == RUN
    skipped = count_skipped(server, s, ready)
    loads = host_loads(server, s.adapters, s.step, b, ready)
    tokens = server.max_num_batched_tokens - b.budget
    compute_s = compute_time_s(
        server, s, tokens=tokens, prefill_tokens=b.prefill_tokens, kv_tokens=s.kv.tokens, skipped=skipped
    )
    return StepWork(
        tokens=tokens,
        prefill_tokens=b.prefill_tokens,
        kv_tokens=s.kv.tokens,
        adapters=s.adapters.active,
        skipped=skipped,
        host_loads=loads,
        disk_loads=b.first_touched,
        compute_s=compute_s,
        scheduling_s=jnp.asarray(server.costs.step.skipped_request_s * skipped, jnp.float32),
        load_s=jnp.asarray(server.costs.loads.host_to_gpu_load_s * loads + b.disk_s, jnp.float32),
    )


def run_step(server: Server, s: State) -> State:
    """Let the step that was put together run, if it is ready, and take out the requests that it finishes."""
    work, b, runs = step_work(server, s), s.pending, s.mode == RUN
    # Under asynchronous scheduling nobody may be left to be scheduled: the engine then waits for the step in flight.
    steps = runs if s.in_flight is None else runs & (work.tokens > 0)
    time = step_times(server, s, work)
    end = jnp.where(steps, time.end, s.now)
    cell = s.step & (s.calendar.shape[0] - 1)
    leaving, leaving_blocks, leaving_tokens, last_block, last_needed = (
        jnp.where(steps, value, 0) for value in apart(s.step, lambda: s.calendar[cell])
    )
    none = jnp.zeros_like(leaving)
    own = StepInFlight(jnp.where(steps, end, time.then), leaving, leaving_blocks, none, last_needed)
    freed, in_flight = hand_back(s.in_flight, runs, own)
    statistics, traced = record_step(server, s, work, time, steps, leaving, leaving_tokens)
    bottleneck = jnp.where(steps, _bottleneck(server, s), statistics.bottleneck)
    first, use, batch = s.first_tokens, s.adapters, s.batch
    fresh = PendingStep.empty(with_place=b.stop_place is not None, with_growth=b.grown is not None)
    prefixes, freed_blocks = free_leaving(server, s, runs, freed.blocks)
    return s._replace(
        mode=jnp.where(runs, SEND, s.mode),
        now=jnp.where(runs, time.then, s.now),
        step=s.step + steps,
        queue=note_skipped(s, runs),
        batch=batch._replace(
            running=batch.running - freed.places,
            completed=batch.completed + freed.completed,
            streaming=batch.streaming + jnp.where(steps, b.first_tokens, 0) - leaving,
        ),
        calendar=put(s.calendar, after(leaving, steps), (cell,), 0),
        kv=s.kv.stepped(s.step, freed_blocks, last_block, leaving_tokens - leaving),
        prefixes=prefixes,
        adapters=use._replace(
            active=use.active - last_needed, active_before=jnp.where(steps, use.active, use.active_before)
        ),
        pending=jax.tree.map(lambda new, old: jnp.where(runs, new, old), fresh, b),
        in_flight=in_flight,
        first_tokens=first._replace(ends=put(first.ends, steps, (s.step & (first.ends.shape[0] - 1),), end)),
        traced=traced,
        statistics=statistics._replace(bottleneck=bottleneck),
    )


def _bottleneck(server: Server, s: State) -> Number:
    """Why the requests left in the queue were not admitted."""
    b = s.pending
    limit = jnp.where(b.stop == FAR, Bottleneck.SLOTS, Bottleneck.KV_CACHE)
    limit = jnp.where(s.batch.running >= server.max_num_seqs, Bottleneck.SEQUENCES, limit)
    limit = jnp.where((b.budget == 0) & ~b.preempted, Bottleneck.TOKEN_BUDGET, limit)
    return jnp.where(s.waiting == 0, Bottleneck.NONE, limit).astype(jnp.int32)
