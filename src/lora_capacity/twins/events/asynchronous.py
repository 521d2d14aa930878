"""Asynchronous scheduling: the next step is put together while one is in flight, without knowing what that one gives.

The requests that the step in flight finishes are known by their count of tokens, so they are not scheduled again, but
they keep their places and blocks, and in newer versions their adapters, until the engine has looked at what it gave.

Source: ``step_with_batch_queue`` in ``vllm/v1/engine/core.py``, and ``vllm/v1/core/sched/``, vLLM 0.32 and 0.33.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from lora_capacity.twins.events.state import PREEMPTIONS, Flight, Server, State, Work, blocks


class Times(NamedTuple):
    """When the step that was put together runs; int32 ``[configs]``, ticks, unless said otherwise.

    Attributes:
        begin: From when on nothing but its own scheduling keeps it waiting.
        load: What loads of adapters take of it.
        end: When it ends.
        then: When the next step is put together.
        scheduling_s: What the scheduler takes of it while the device waits, float32 seconds.
    """

    begin: Array
    load: Array
    end: Array
    then: Array
    scheduling_s: Array


class Freed(NamedTuple):
    """What the server has back by the time when the next step is put together; int32 ``[configs]``.

    Attributes:
        completed: Requests answered.
        places: Those of them that were still running.
        blocks: Their KV blocks.
    """

    completed: Array
    places: Array
    blocks: Array


def compute_ticks(server: Server, compute_s: Array) -> Array:
    """Return what a step takes in ticks, one at least."""
    return jnp.maximum(jnp.round(compute_s / server.tick_s), 1.0).astype(jnp.int32)


def times(server: Server, s: State, work: Work) -> Times:
    """Say when the step that was put together runs: once it is scheduled, and after the one in flight."""
    load = jnp.round(work.load_s / server.tick_s).astype(jnp.int32)
    compute = compute_ticks(server, work.compute_s)
    if s.flight is None:
        end = s.now + load + compute
        return Times(s.now, load, end, end, work.scheduling_s)
    scheduling = jnp.round(work.scheduling_s / server.tick_s).astype(jnp.int32)
    begin = jnp.maximum(s.now, s.flight.end)
    start = jnp.maximum(s.now + scheduling, s.flight.end)
    end = start + load + jnp.maximum(compute - scheduling, 1)
    return Times(begin, load, end, start, (start - begin) * server.tick_s)


def hand_back(s: State, runs: Array, own: Flight) -> tuple[Freed, Flight | None]:
    """Say what the server has back once a step starts, and what is in flight then.

    Args:
        s: The state.
        runs: Whether a step that was put together starts, or turns out to be empty, ``[configs]``.
        own: What it will give back, nothing if it is empty, and when it ends.
    """
    f = s.flight
    if f is None:
        return Freed(own.leaving, own.leaving, own.blocks), None
    freed = Freed(*(jnp.where(runs, given, 0) for given in (f.leaving + f.requeued, f.leaving, f.blocks)))
    return freed, Flight(*(jnp.where(runs, new, old) for new, old in zip(own, f, strict=True)))


def slots_in_use(server: Server, s: State) -> tuple[Array, Array]:
    """Return how many adapters are in use, and from which step on one must be needed to be, ``[configs]``."""
    if s.flight is None or not server.rules.running_adapters_in_use:
        return s.active, s.step
    held = s.flight.adapters
    return s.active + held, s.step - (held > 0)


def keep_in_use(s: State, adapter_last: Array, needed: Array) -> State:
    """Take an adapter that a step needs off those that only the step in flight does."""
    if s.flight is None:
        return s
    held = needed & (adapter_last == s.step - 1) & (s.flight.adapters > 0)
    return s._replace(flight=s.flight._replace(adapters=s.flight.adapters - held))


def preempt_finished(s: State, when: Array, tokens: Array) -> State:
    """Let requests go back to the queue whose last token is in flight; they leave it when that arrives.

    Args:
        s: The state.
        when: Where, ``[configs]``.
        tokens: Tokens of their prompts and answers, ``[configs]``.
    """
    f: Any = s.flight
    freed = jnp.where(when, blocks(tokens - 1), 0)
    return s._replace(
        free=s.free + freed,
        running=s.running - when,
        flight=f._replace(leaving=f.leaving - when, blocks=f.blocks - freed, requeued=f.requeued + when),
        building=s.building._replace(preempted=s.building.preempted | when),
        counts=s.counts.at[PREEMPTIONS].add(when),
    )
