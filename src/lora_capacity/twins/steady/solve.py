"""The steady twin: where a server settles, and how it gets there, without playing single steps.

The horizon is cut into a few intervals that lengthen with time. In each, the server is taken to be in balance: the
batch follows from Little's law, the step time from the batch, the number of different adapters from how long each
stays busy. From one interval to the next the queue, the active adapters and the adapters touched so far are carried
by implicit Euler steps.

While slots are free nothing waits for one. When all are in use, adapters take turns
(`lora_capacity.twins.steady.slots`): a slot goes to the adapter whose oldest request has waited longest, with its
whole backlog. While the batch is full, requests are admitted in the order of arrival.

What it leaves out: chance fluctuations around the balance, so that nothing waits for a slot while the mean demand is
below the slots; preemptions; the start-up of the batch itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.costs import Costs, step_time_s
from lora_capacity.costs.kernels import SMALL_STEP_TOKENS
from lora_capacity.scenarios.results import Bottleneck, Results
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.steady.residence import ResidenceTime
from lora_capacity.twins.steady.slots import (
    TINY,
    Cycle,
    Fixed,
    State,
    burst_width,
    crowded_share,
    cycle_slots_free,
    cycle_slots_taken,
    resident_share,
)

KV_CACHE_FILL = 0.97
"""Share of the KV cache in use when it bounds the batch: a prompt must fit whole, so the last blocks stay free.

Source: mean of the overloaded runs of the published H100 measurements (arXiv 2508.08343)."""

PASSED_OVER_KV_SHARE = 0.5
"""Share of the queue that the scheduler looks at in a step that a full KV cache ends: it stops at the first request
that has its slot but no blocks, which stands anywhere in the queue."""

_INTERVALS = 16
_STRETCH = 2.2
_ITERATIONS = 8
_MAX_LOADING_SHARE = 0.85


class _Observed(NamedTuple):
    """What is averaged over the intervals; ``[configs]``, the last ``[classes, configs]``."""

    running: Array
    waiting: Array
    completed_per_s: Array
    ttft_s: Array
    step_s: Array
    active_adapters: Array
    loads_per_s: Array
    limit: Array
    class_completed_per_s: Array


def simulate_steady(costs: Costs, scenarios: Scenarios, stays: ResidenceTime) -> Results:
    """Predict every configuration by the steady twin; pure, differentiable in its floating-point inputs, to be jitted.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``.
        stays: The law of the output lengths, shared by all configurations.

    Returns:
        Predictions, ``[configs]``; NaN where the server does not start.

    Valid for: servers that start; rates and lengths that do not change over the horizon.
    """
    fixed = _fix(costs, scenarios)
    fractions = (jnp.arange(_INTERVALS + 1) / _INTERVALS) ** _STRETCH
    edges_s = fractions[:, None] * scenarios.horizon_s
    duration_s = jnp.diff(edges_s, axis=0)
    none = jnp.zeros_like(fixed.offered_per_s)
    no_adapter = jnp.zeros_like(fixed.rate)
    start = State(no_adapter, no_adapter, none, none + costs.step.base_s + costs.step.lora_s, none + 1.0, none + 1.0)

    def interval(state: State, dt: Array) -> tuple[State, _Observed]:
        return _balance(costs, scenarios, stays, fixed, state, dt)

    _, observed = jax.lax.scan(interval, start, duration_s)
    return _summarise(scenarios, fixed, duration_s, observed)


def _fix(costs: Costs, scenarios: Scenarios) -> Fixed:
    count, rate = scenarios.class_count.T, scenarios.class_rate_per_s.T
    tokens_per_sequence = 1.0 + scenarios.mean_input_tokens / scenarios.mean_output_tokens
    bounds = jnp.stack(
        [
            KV_CACHE_FILL * scenarios.kv_cache_tokens / scenarios.kv_tokens_per_request,
            scenarios.max_num_batched_tokens / tokens_per_sequence,
            scenarios.max_num_seqs + 0.0 * tokens_per_sequence,
        ]
    )
    most_running = jnp.minimum(bounds.min(axis=0), scenarios.max_pending)
    return Fixed(
        adapters=count,
        rate=rate,
        offered_per_s=(count * rate).sum(axis=0) + scenarios.base_rate_per_s,
        tokens_per_sequence=tokens_per_sequence,
        bounds=bounds,
        most_running=most_running,
        most_waiting=jnp.maximum(scenarios.max_pending - most_running, 0.0),
        disk_s=jnp.asarray(costs.loads.disk_s + costs.loads.disk_rank_s * scenarios.class_rank.T),
        resident=resident_share(count, rate, scenarios.max_loras),
    )


def _balance(
    costs: Costs, scenarios: Scenarios, stays: ResidenceTime, fixed: Fixed, start: State, dt: Array
) -> tuple[State, _Observed]:
    """Find the balance of one interval by damped fixed-point iteration on step time, queue and accepted share."""
    crowded = crowded_share(scenarios, stays, fixed, start)

    def iterate(guess: State, _: None) -> tuple[State, tuple[State, _Observed]]:
        state, observed = _iterate(costs, scenarios, stays, fixed, start, guess, crowded, dt)
        return state, (state, observed)

    guess = start._replace(waiting=jnp.maximum(start.waiting, TINY))
    _, (states, observed) = jax.lax.scan(iterate, guess, length=_ITERATIONS)
    # Where the iteration ends in a cycle of two, its middle is the best answer.
    middle: tuple[State, _Observed] = jax.tree.map(_middle_of_last_two, (states, observed))
    return middle


def _middle_of_last_two(values: Array) -> Array:
    return values[-1] if jnp.issubdtype(values.dtype, jnp.integer) else 0.5 * (values[-1] + values[-2])


def _iterate(
    costs: Costs,
    scenarios: Scenarios,
    stays: ResidenceTime,
    fixed: Fixed,
    start: State,
    guess: State,
    crowded: Array,
    dt: Array,
) -> tuple[State, _Observed]:
    stay_s = scenarios.mean_output_tokens * guess.step_s
    free = cycle_slots_free(stays, fixed, start, guess, stay_s, dt)
    contended = fixed.adapters.sum(axis=0) > scenarios.max_loras
    limited = contended & (free.active.sum(axis=0) > scenarios.max_loras)
    taken = cycle_slots_taken(scenarios, stays, fixed, start, guess, crowded, stay_s, dt)
    cycle = Cycle(*(jnp.where(limited, a, b) for a, b in zip(taken, free, strict=True)))

    most_per_s = fixed.most_running / stay_s
    class_wanted = cycle.active * cycle.served_per_s * stay_s
    wanted = class_wanted.sum(axis=0) + scenarios.base_rate_per_s * guess.accepted * stay_s
    fitting, full_share = _fit_in(wanted, fixed.most_running, burst_width(scenarios.max_loras))
    overfull = jnp.maximum(start.waiting + dt * (fixed.offered_per_s - most_per_s), 0.0)
    bound_share = jnp.where(limited, full_share, jnp.where(overfull > 0.0, 1.0, 0.0))
    drained_per_s = (cycle.activations_per_s * (1.0 + cycle.backlog)).sum(axis=0)
    passed_per_s = (jnp.maximum(fixed.adapters - cycle.active * cycle.open_share, 0.0) * fixed.rate).sum(axis=0)
    for_slots = (start.waiting + dt * passed_per_s) / (1.0 + dt * drained_per_s / guess.waiting)
    left_over = jnp.maximum(start.waiting + dt * (fixed.offered_per_s - fitting / stay_s), 0.0)
    unbounded_waiting = jnp.where(limited, for_slots + full_share * (left_over - for_slots), overfull)
    waiting = jnp.minimum(unbounded_waiting, fixed.most_waiting)
    mean_waiting = 0.5 * (start.waiting + waiting)
    full = unbounded_waiting >= fixed.most_waiting
    conserved_per_s = jnp.clip(fixed.offered_per_s + (start.waiting - waiting) / dt, 0.0, most_per_s)
    completed_per_s = jnp.where(
        limited,
        jnp.where(full, jnp.minimum(fitting / stay_s, fixed.offered_per_s + start.waiting / dt), conserved_per_s),
        jnp.minimum(most_per_s, fixed.offered_per_s + start.waiting / dt),
    )
    running = completed_per_s * stay_s
    accepted = jnp.where(full, jnp.minimum(1.0, completed_per_s / fixed.offered_per_s), 1.0)
    fill = jnp.where(limited, 1.0, jnp.minimum(1.0, completed_per_s / (fixed.offered_per_s * guess.accepted)))

    touched, loads_per_s, loading_share = _loads(costs, scenarios, fixed, start, cycle, limited, dt)
    tightest = jnp.argmin(fixed.bounds, axis=0)
    kv_bound_share = jnp.where(tightest == 0, PASSED_OVER_KV_SHARE, 0.0)
    own, own_adapter = _own_part(fixed, cycle, running, limited)
    adapters = jnp.minimum(cycle.active.sum(axis=0), running)
    step_s = step_time_s(
        costs,
        tokens=running * fixed.tokens_per_sequence + own,
        prefill_tokens=running * (fixed.tokens_per_sequence - 1.0),
        kv_tokens=(running + own) * scenarios.kv_tokens_per_request,
        adapters=adapters + own_adapter,
        skipped=jnp.where(limited, mean_waiting * (1.0 - bound_share * (1.0 - kv_bound_share)), 0.0),
        queued=mean_waiting,
        loaded=fixed.adapters.sum(axis=0),
        max_loras=scenarios.max_loras,
        max_lora_rank=scenarios.max_lora_rank,
        small_share=_small_step_share(running, running / scenarios.mean_output_tokens, scenarios.mean_input_tokens),
    ) / (1.0 - loading_share)
    state = State(
        active=cycle.active,
        touched=touched,
        waiting=jnp.maximum(waiting, TINY),
        step_s=jnp.sqrt(guess.step_s * step_s),
        accepted=jnp.sqrt(guess.accepted * accepted),
        fill=fill,
    )
    in_order = completed_per_s * fixed.adapters * fixed.rate / fixed.offered_per_s
    by_slot = class_wanted * completed_per_s / jnp.maximum(wanted, TINY)
    observed = _Observed(
        running=running,
        waiting=mean_waiting,
        completed_per_s=completed_per_s,
        ttft_s=_ttft_s(costs, scenarios, fixed, cycle, limited, mean_waiting, guess.accepted, step_s),
        step_s=step_s,
        active_adapters=adapters,
        loads_per_s=loads_per_s,
        limit=jnp.where(
            bound_share > 0.5, tightest + Bottleneck.KV_CACHE, jnp.where(limited, Bottleneck.SLOTS, Bottleneck.NONE)
        ),
        class_completed_per_s=jnp.where(limited, by_slot, in_order),
    )
    return state, observed


def _own_part(fixed: Fixed, cycle: Cycle, running: Array, limited: Array) -> tuple[Array, Array]:
    """Requests and adapters by which the steps that a running request sees exceed those of a moment picked at random.

    Requests come at random, so that one finds the mean batch there and adds itself to it, and its adapter unless that
    is active. A full batch has no room to vary, nor have slots that are all in use.
    """
    own = 1.0 - jnp.minimum(running / fixed.most_running, 1.0)
    idle_per_s = (jnp.maximum(fixed.adapters - cycle.active, 0.0) * fixed.rate).sum(axis=0)
    return own, jnp.where(limited, 0.0, own * idle_per_s / fixed.offered_per_s)


def _fit_in(wanted: Array, most: Array, width: Array) -> tuple[Array, Array]:
    """Mean of ``min(X, most)``, chance of ``X > most``; ``X`` log-normal with mean ``wanted``, ``width`` of its log."""
    margin = jnp.log(most / jnp.maximum(wanted, TINY)) / width
    over = jax.scipy.stats.norm.cdf(-margin - 0.5 * width)
    return wanted * jax.scipy.stats.norm.cdf(margin - 0.5 * width) + most * over, over


def _loads(
    costs: Costs, scenarios: Scenarios, fixed: Fixed, start: State, cycle: Cycle, limited: Array, dt: Array
) -> tuple[Array, Array, Array]:
    """Adapters touched so far, loads into slots per second, and the share of time that loads block the engine.

    A load that takes the last free slot evicts, at random, adapters that are still active and must come back at once:
    vLLM touches the adapters of a step in the order of a hash set, and evicts the one touched longest ago. With the
    newcomer and the adapter that left at random places of that order, ``slots/6`` active adapters on average stand
    between them.

    Source: ``_apply_adapters`` in ``vllm/lora/worker_manager.py`` and the LRU lists in ``vllm/lora/models.py``, vLLM
        0.8.5.
    """
    untouched = fixed.adapters - start.touched
    inactive = jnp.maximum(fixed.adapters - start.active, TINY)
    first_per_s = cycle.activations_per_s * jnp.clip(untouched / inactive, 0.0, 1.0)
    touched = fixed.adapters - untouched * jnp.exp(-dt * first_per_s / jnp.maximum(untouched, TINY))
    crowded = fixed.adapters.sum(axis=0) > scenarios.max_loras
    miss = jnp.where(limited, 1.0 + scenarios.max_loras / 6.0, jnp.where(crowded, 1.0 - fixed.resident, 0.0))
    first_loads_per_s = (touched - start.touched) / dt
    loads_per_s = (cycle.activations_per_s * miss).sum(axis=0)
    busy = loads_per_s * costs.loads.host_to_gpu_load_s + (first_loads_per_s * fixed.disk_s).sum(axis=0)
    return touched, loads_per_s, jnp.minimum(busy, _MAX_LOADING_SHARE)


def _small_step_share(running: Array, prefills: Array, mean_input_tokens: Array) -> Array:
    """Share of steps below 128 tokens: requests running are Poisson, prompts that start are exponential in length."""
    room = SMALL_STEP_TOKENS - running
    below = jax.scipy.stats.norm.cdf(room / jnp.sqrt(running + 1.0))
    return below * jnp.exp(-prefills * jnp.exp(-jnp.maximum(room, 0.0) / mean_input_tokens))


def _ttft_s(
    costs: Costs,
    scenarios: Scenarios,
    fixed: Fixed,
    cycle: Cycle,
    limited: Array,
    waiting: Array,
    accepted: Array,
    step_s: Array,
) -> Array:
    """Mean wait of the requests admitted now, half a step until the next begins, and the step of their own prompt."""
    step = costs.step
    prompt_token_s = step.token_s + step.prefill_token_s + step.lora_token_s
    prompt_token_s += step.lora_token_rank_s * scenarios.max_lora_rank
    in_order_s = waiting / (fixed.offered_per_s * accepted)
    waited = cycle.activations_per_s * cycle.wait_s * (1.0 + 0.5 * cycle.backlog)
    served = (cycle.active * cycle.served_per_s).sum(axis=0)
    for_slot_s = waited.sum(axis=0) / jnp.maximum(served, TINY)
    return jnp.where(limited, for_slot_s, in_order_s) + 1.5 * step_s + prompt_token_s * scenarios.mean_input_tokens


def _summarise(scenarios: Scenarios, fixed: Fixed, duration_s: Array, observed: _Observed) -> Results:
    """Average over the horizon and blank what does not start."""
    started = scenarios.status <= Status.OUTSIDE_CALIBRATION

    def mean(values: Array) -> Array:
        return (values * duration_s).sum(axis=0) / scenarios.horizon_s

    def told(values: Array) -> Array:
        return jnp.where(started, values, jnp.nan)

    running, completed = mean(observed.running), mean(observed.completed_per_s)
    tokens_per_request = scenarios.mean_input_tokens + scenarios.mean_output_tokens
    class_completed = (observed.class_completed_per_s * duration_s[:, None, :]).sum(axis=0) / scenarios.horizon_s
    class_offered = fixed.adapters * fixed.rate
    # How slots are shared is a mean-field estimate; of a nearly idle class it may say more than was offered.
    served = jnp.minimum(class_completed / jnp.maximum(class_offered, TINY), 1.0)
    class_service = jnp.where(class_offered > 0, served, jnp.nan)
    return Results(
        throughput_tokens_per_s=told(completed * tokens_per_request),
        offered_tokens_per_s=fixed.offered_per_s * tokens_per_request,
        completed_per_s=told(completed),
        class_service=jnp.where(started[:, None], class_service.T, jnp.nan),
        mean_running=told(running),
        mean_waiting=told(mean(observed.waiting)),
        step_time_s=told(scenarios.horizon_s / (duration_s / observed.step_s).sum(axis=0)),
        itl_s=told(running / mean(observed.running / observed.step_s)),
        ttft_s=told(mean(observed.ttft_s * observed.completed_per_s) / completed),
        active_adapters=told(mean(observed.active_adapters)),
        kv_usage=told(running * scenarios.kv_tokens_per_request / scenarios.kv_cache_tokens),
        loads_per_s=told(mean(observed.loads_per_s)),
        limit=observed.limit[-1],
        status=scenarios.status,
    )
