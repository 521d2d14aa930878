"""The steady twin: where a server settles, and how it gets there, without simulating single steps.

The horizon is cut into a few intervals that lengthen with time. In each, the server is taken to be in balance: the
batch follows from Little's law, the step time from the batch, the number of different adapters from how long each
stays busy (`lora_capacity.twins.steady.equations`). From one interval to the next the queue, the active adapters and
the adapters loaded so far are carried by implicit Euler steps, which are stable however long the interval.

While slots are free on average, chance still makes adapters wait for one, and requests for a place in the batch
(`lora_capacity.twins.steady.chance`). When all are in use for long, a slot goes to the adapter whose oldest request has
waited longest, with its whole backlog (`lora_capacity.twins.steady.slots`). While the batch is full, requests are
admitted in the order of arrival.

What it leaves out: that chance may push a server from one balance into another, a worse one; preemptions; the start-up
of the batch itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from lora_capacity.costs import Costs
from lora_capacity.scenarios.results import ClientView, Results
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.clients import seen_by_clients
from lora_capacity.twins.steady.balance import FirstToken, Observed
from lora_capacity.twins.steady.equations import follow
from lora_capacity.twins.steady.first_token import within
from lora_capacity.twins.steady.problem import TINY, Interval, Problem, ServerState
from lora_capacity.twins.steady.residence import ResidenceTime
from lora_capacity.twins.steady.slots import overfilled_share
from lora_capacity.workload import LengthDistribution, Workload

_INTERVALS = 16
"""Intervals of the horizon: means over it of a queue that grows along a line are then at most 9 % too high."""

_STRETCH = 2.2
"""Power by which intervals lengthen: a server changes most at its start. The first is 0.2 % of the horizon, the last
13 %."""

_LEAST_COMPLETED = 1e-3
"""Share of the requests that are completed at least: keeps what is told of them a number."""

_ITERATIONS = 8
"""Of the fixed point in each interval: damping halves the distance from a balance that stands still, to 0.4 % in all,
and the next interval goes on from there."""


def simulate_steady(
    costs: Costs, scenarios: Scenarios, stays: Workload | LengthDistribution | ResidenceTime
) -> Results:
    """Predict every configuration by the steady twin; pure, differentiable in its floating-point inputs, to be jitted.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``.
        stays: The workload of the configurations, whose output lengths say how long requests stay in the batch; not
            to be traced. (Within this library, also their distribution as `ResidenceTime` has it, which may be.)

    Returns:
        Predictions, ``[configs]``; NaN where the server does not start.

    Valid for: servers that start; rates and lengths that do not change over the horizon.
    """
    # A traced function that closes over configurations hands them on as they are laid out: by NumPy.
    scenarios, residence = jax.tree.map(jnp.asarray, (scenarios, ResidenceTime.of(stays)))
    problem = Problem.of(costs, scenarios, residence)
    fractions = (jnp.arange(_INTERVALS + 1) / _INTERVALS) ** _STRETCH
    edges_s = fractions[:, None] * scenarios.horizon_s
    durations_s = jnp.diff(edges_s, axis=0)

    def settle(start: ServerState, times_s: tuple[Array, Array]) -> tuple[ServerState, Observed]:
        return _balance(problem, Interval(start, *times_s, overfilled_share(problem, start, times_s[1])))

    _, observed = jax.lax.scan(settle, ServerState.empty(problem), (durations_s, edges_s[1:]))
    results = _average(problem, durations_s, observed)
    client = seen_by_clients(costs.front_end, scenarios, results)
    attainment = _attainment(
        scenarios, results, durations_s, observed.first_token, client.ttft_s - results.answered_ttft_s
    )
    seen: Results = dataclasses.replace(results, client=client, attainment=attainment)
    return seen


def _balance(problem: Problem, interval: Interval) -> tuple[ServerState, Observed]:
    """Find the balance of one interval by damped fixed-point iteration on step time, queue and accepted share."""

    def iterate(guess: ServerState, _: None) -> tuple[ServerState, tuple[ServerState, Observed]]:
        state, observed = follow(problem, interval, guess)
        return state, (state, observed)

    guess = interval.start._replace(waiting=jnp.maximum(interval.start.waiting, TINY))
    _, (states, observed) = jax.lax.scan(iterate, guess, length=_ITERATIONS)
    # Where the iteration ends in a cycle of two, its middle is the best answer.
    middle: tuple[ServerState, Observed] = jax.tree.map(_middle_of_last_two, (states, observed))
    return middle


def _middle_of_last_two(values: Shaped[Array, "iterations ..."]) -> Shaped[Array, "..."]:
    return values[-1] if jnp.issubdtype(values.dtype, jnp.integer) else 0.5 * (values[-1] + values[-2])


def _average(problem: Problem, durations_s: Float[Array, "intervals configs"], observed: Observed) -> Results:
    """Average over the horizon and blank what does not start."""
    scenarios = problem.scenarios
    started = scenarios.status <= Status.OUTSIDE_CALIBRATION

    def mean(values: Float[Array, "intervals configs"]) -> Float[Array, " configs"]:
        return (values * durations_s).sum(axis=0) / scenarios.horizon_s

    def told(values: Float[Array, " configs"]) -> Float[Array, " configs"]:
        return jnp.where(started, values, jnp.nan)

    running, served = mean(observed.running), mean(observed.completed_per_s)
    completed_share = _completed_share(problem, observed, served)
    completed = served * completed_share
    tokens_per_request = scenarios.mean_input_tokens + scenarios.mean_output_tokens
    # Gaps between tokens, each seen by every running request.
    itl_s = running / mean(observed.running / observed.step_s)

    def of_requests(values_s: Float[Array, "intervals configs"]) -> Float[Array, " configs"]:
        # Who has waited for the whole horizon is not seen to wait for longer.
        return jnp.minimum(mean(values_s * observed.completed_per_s) / served, scenarios.horizon_s)

    ttft_s = of_requests(observed.first_token.mean_s)
    return Results(
        throughput_tokens_per_s=told(completed * tokens_per_request),
        offered_tokens_per_s=problem.offered_per_s * tokens_per_request,
        completed_per_s=told(completed),
        class_service=jnp.where(
            started[:, None], (completed_share * _class_service(problem, durations_s, observed)).T, jnp.nan
        ),
        mean_running=told(running),
        mean_waiting=told(mean(observed.waiting)),
        # Steps of the horizon, so that a long interval of short steps counts by its many steps.
        step_time_s=told(scenarios.horizon_s / (durations_s / observed.step_s).sum(axis=0)),
        itl_s=told(itl_s),
        tpot_s=told(itl_s),
        ttft_s=told(ttft_s),
        answered_ttft_s=told(ttft_s),
        attainment=told(jnp.minimum(served / problem.offered_per_s, 1.0)),
        active_adapters=told(mean(observed.active_adapters)),
        kv_usage=told(running * scenarios.kv_tokens_per_request / scenarios.kv_cache_tokens),
        loads_per_s=told(mean(observed.loads_per_s)),
        client=ClientView(ttft_s=told(ttft_s), tpot_s=told(itl_s), itl_s=told(itl_s)),
        limit=observed.bottleneck[-1],
        status=scenarios.status,
        slot_wait_s=told(of_requests(observed.first_token.slot_wait_s)),
    )


def _completed_share(
    problem: Problem, observed: Observed, served: Float[Array, " configs"]
) -> Float[Array, " configs"]:
    """Share of the requests admitted within the horizon that are completed within it: the others still run.

    An open batch keeps all that run, if the horizon is long: ``λ ∫ P(stay > t) dt``, for exponential stays. From a
    batch that was always full as many left as renewals took place, ``horizon/stay + (cv² − 1) / 2`` in each place.

    Source: Cox, Renewal Theory (1962), chapter 4.
    """
    horizon_s, running = problem.scenarios.horizon_s, observed.running[-1]
    stay_s = running / jnp.maximum(observed.completed_per_s[-1], TINY)
    kept = 1.0 - observed.batch_full_share[-1] * 0.5 * (1.0 + problem.residence_cv2)
    unfinished = kept * running * -jnp.expm1(-horizon_s / stay_s) / (horizon_s * served)
    return jnp.clip(1.0 - unfinished, _LEAST_COMPLETED, 1.0)


def _attainment(
    scenarios: Scenarios,
    results: Results,
    durations_s: Float[Array, "intervals configs"],
    first: FirstToken,
    later_s: Float[Array, " configs"],
) -> Float[Array, " configs"]:
    """Share of arriving requests that keep their bounds: of each interval's, those whose first token comes in time.

    What it leaves out: that answers differ in length, of which a bound of the whole time takes the mean.

    Args:
        scenarios: The configurations.
        results: What the engine does; its attainment is the share served.
        durations_s: The intervals.
        first: The time to first token in each, ``[intervals, configs]``.
        later_s: What clients wait longer for the first token than the engine takes.
    """
    if scenarios.bounds is None:
        return results.attainment
    bounds = scenarios.bounds.earlier(later_s)
    whole_s = bounds.e2el_s - results.tpot_s * (scenarios.mean_output_tokens - 1.0)
    most_ttft_s = jnp.maximum(jnp.minimum(bounds.ttft_s, whole_s), 0.0)
    in_time = within(first, jnp.broadcast_to(most_ttft_s, durations_s.shape))
    share = (in_time * durations_s).sum(axis=0) / scenarios.horizon_s
    return jnp.minimum(share, results.attainment) * (results.tpot_s <= bounds.tpot_s)


def _class_service(
    problem: Problem, durations_s: Float[Array, "intervals configs"], observed: Observed
) -> Float[Array, "classes configs"]:
    """Share of each class's requests completed; NaN for a class without requests."""
    completed = (observed.class_completed_per_s * durations_s[:, None, :]).sum(axis=0) / problem.scenarios.horizon_s
    offered = problem.adapters * problem.rate_per_s
    # How slots are shared is a mean-field estimate; of a nearly idle class it may say more than was offered.
    served = jnp.minimum(completed / jnp.maximum(offered, TINY), 1.0)
    return jnp.where(offered > 0, served, jnp.nan)
