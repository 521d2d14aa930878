"""Asynchronous scheduling: the next step is put together while one is in flight, without knowing what that one gives.

The requests that the step in flight finishes are known by their count of tokens, so they are not scheduled again, but
they keep their places and blocks, and in newer versions their adapters, until the engine has looked at what it gave.

Source: ``step_with_batch_queue`` in ``vllm/v1/engine/core.py``, and ``vllm/v1/core/sched/``, vLLM 0.32 and 0.33.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_capacity.twins.events.server import Server, compute_ticks
from lora_capacity.twins.events.state import Flag, Number, Seconds, State, StepInFlight, StepWork


class StepTimes(NamedTuple):
    """When the step that was put together runs; ticks, unless said otherwise.

    Attributes:
        begin: From when on nothing but its own scheduling keeps it waiting.
        load: What loads of adapters take of it.
        end: When it ends.
        then: When the next step is put together.
        scheduling_s: What the scheduler takes of it while the device waits, float32 seconds.
    """

    begin: Number
    load: Number
    end: Number
    then: Number
    scheduling_s: Seconds


class Freed(NamedTuple):
    """What the server has back by the time when the next step is put together.

    Attributes:
        completed: Requests completed.
        places: Those of them that were still running.
        blocks: Their KV blocks.
    """

    completed: Number
    places: Number
    blocks: Number


def step_times(server: Server, s: State, work: StepWork) -> StepTimes:
    """Say when the step that was put together runs: once it is scheduled, and after the one in flight."""
    load = server.ticks(work.load_s)
    compute = compute_ticks(server, work.compute_s)
    if s.in_flight is None:
        end = s.now + load + compute
        return StepTimes(s.now, load, end, end, work.scheduling_s)
    scheduling = server.ticks(work.scheduling_s)
    begin = jnp.maximum(s.now, s.in_flight.end)
    start = jnp.maximum(s.now + scheduling, s.in_flight.end)
    end = start + load + jnp.maximum(compute - scheduling, 1)
    return StepTimes(begin, load, end, start, (start - begin) * server.tick_s)


def hand_back(f: StepInFlight | None, runs: Flag, own: StepInFlight) -> tuple[Freed, StepInFlight | None]:
    """Say what the server has back once a step starts, and what is in flight then.

    Args:
        f: The step in flight.
        runs: Whether a step that was put together starts, or turns out to be empty.
        own: What it will give back, nothing if it is empty, and when it ends.
    """
    if f is None:
        return Freed(own.leaving, own.leaving, own.blocks), None
    freed = Freed(*(jnp.where(runs, given, 0) for given in (f.leaving + f.requeued, f.leaving, f.blocks)))
    return freed, StepInFlight(*(jnp.where(runs, new, old) for new, old in zip(own, f, strict=True)))


def slots_in_use(server: Server, s: State) -> tuple[Number, Number]:
    """Return how many adapters are in use, and from which step on one must be needed to be.

    In newer versions the scheduler counts the adapters of all running requests (``scheduled_loras`` in ``schedule`` of
    ``vllm/v1/core/sched/scheduler.py``), those whose last token is in flight among them.
    """
    if s.in_flight is None or not server.rules.running_adapters_in_use:
        return s.adapters.active, s.step
    held = s.in_flight.adapters
    return s.adapters.active + held, s.step - (held > 0)


def keep_in_use(s: State, adapter_last: Number, needed: Flag) -> StepInFlight | None:
    """Take an adapter that a step needs off those that only the step in flight does."""
    if s.in_flight is None:
        return None
    held = needed & (adapter_last == s.step - 1) & (s.in_flight.adapters > 0)
    return s.in_flight._replace(adapters=s.in_flight.adapters - held)


def preempt_finished(s: State, when: Flag, tokens: Number) -> State:
    """Let a request go back to the queue whose last token is in flight; it leaves the queue when that arrives.

    Args:
        s: The state.
        when: Whether to.
        tokens: Tokens of its prompt and output.
    """
    f: Any = s.in_flight
    # With prefix caching the blocks of each request are given back by themselves.
    freed = jnp.where(when & (s.prefixes is None), s.kv.blocks(tokens - 1), 0)
    return s._replace(
        kv=s.kv._replace(free=s.kv.free + freed),
        batch=s.batch._replace(running=s.batch.running - when),
        in_flight=f._replace(leaving=f.leaving - when, blocks=f.blocks - freed, requeued=f.requeued + when),
        pending=s.pending._replace(preempted=s.pending.preempted | when),
    )
