"""The time to first token: whether a request waits, how long, and the steps of its prompt; as a distribution."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lora_capacity.twins.steady.balance import FirstToken, Queue, Step
from lora_capacity.twins.steady.chance import Overflow, gamma_deviate
from lora_capacity.twins.steady.problem import TINY, Problem, ServerState, further_chunks
from lora_capacity.twins.steady.slots import AdapterCycle

_MOST_PROMPT_LOAD = 0.95
"""Most of the time that prompts take: beyond, the batch is full and they wait in the queue."""

_EVEN_CV2 = 1.0 / 3.0
"""Squared coefficient of variation of waits that are spread evenly from 0 to the longest."""

_LEAST_CV2 = 0.01
"""That of times as good as equal."""


def first_token(
    problem: Problem, guess: ServerState, cycle: AdapterCycle, queue: Queue, step: Step, by_chance: Overflow
) -> FirstToken:
    """Return the time to first token of the requests admitted now.

    In order of arrival all wait equally long, the queue over what is sent per second (Little's law). For a slot the
    first request of a backlog waits in full, those behind it half as long on average. Those who wait by chance, for a
    slot or for a place in the batch, wait exponentially long.
    """
    served_per_s = jnp.maximum((cycle.active * cycle.served_per_s).sum(axis=0), TINY)

    def of_all(per_activation: Float[Array, "classes configs"]) -> Float[Array, " configs"]:
        return (cycle.activations_per_s * per_activation).sum(axis=0) / served_per_s

    in_order_s = queue.mean_waiting / (problem.offered_per_s * guess.accepted)
    settled_s = jnp.where(cycle.slots_taken, of_all(cycle.wait_s * (cycle.burst + 0.5 * cycle.backlog)), in_order_s)
    held_s = cycle.chance_wait_s * of_all(piled_up(cycle))
    full_s = jnp.minimum(by_chance.by_chance, problem.most_waiting(guess)) / problem.offered_per_s

    held = jnp.clip(cycle.held_share * of_all(cycle.burst + cycle.backlog), 0.0, 1.0)
    settled = jnp.where(cycle.slots_taken, held, 1.0 - jnp.exp(-in_order_s / step.time_s))
    held = jnp.where(cycle.slots_taken, 0.0, held)
    waiting = jnp.clip(1.0 - (1.0 - settled) * (1.0 - held) * (1.0 - by_chance.full_share), TINY, 1.0)
    wait_s = (settled_s + held_s + full_s) / waiting
    settled_cv2 = jnp.where(cycle.slots_taken, _EVEN_CV2, _LEAST_CV2)
    squares = (1.0 + settled_cv2) * settled_s**2 / jnp.maximum(settled, TINY)
    squares += 2.0 * held_s**2 / jnp.maximum(held, TINY) + 2.0 * full_s**2 / jnp.maximum(by_chance.full_share, TINY)
    squares += 2.0 * settled_s * (held_s + full_s)
    wait_cv2 = squares / (waiting * jnp.maximum(wait_s, TINY) ** 2) - 1.0
    prompt_s, variance_s2 = _prompt_s(problem, queue.completed_per_s, step)
    slot_wait_s = jnp.where(cycle.slots_taken, settled_s, 0.0) + held_s
    return FirstToken(prompt_s, variance_s2, waiting, wait_s, jnp.maximum(wait_cv2, _LEAST_CV2), slot_wait_s)


def within(first: FirstToken, bound_s: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Share of the requests whose first token comes within a bound.

    Those that wait, and those that do not, each have gamma-distributed times of their mean and variance.
    """
    at_once = _gamma_cdf(bound_s, first.prompt_s, first.prompt_variance_s2)
    variance_s2 = first.prompt_variance_s2 + first.wait_cv2 * first.wait_s**2
    waited = _gamma_cdf(bound_s, first.prompt_s + first.wait_s, variance_s2)
    return at_once + first.waiting_share * (waited - at_once)


def _gamma_cdf(
    value: Float[Array, "*shape"], mean: Float[Array, "*shape"], variance: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Distribution function of the gamma law of a mean and a variance."""
    shape = mean**2 / jnp.maximum(variance, _LEAST_CV2 * mean**2)
    return jax.scipy.stats.norm.cdf(gamma_deviate(jnp.maximum(value, 0.0) / mean, shape))


def piled_up(cycle: AdapterCycle) -> Float[Array, "classes configs"]:
    """Mean wait of an adapter's requests for a slot, added up, over that of the first of them.

    Requests come evenly while the first waits. Where that is an exponential time they wait as long as it on average,
    where it is constant half as long.
    """
    return cycle.burst + 0.5 * (1.0 + cycle.wait_cv2) * cycle.backlog


def _prompt_s(
    problem: Problem, completed_per_s: Float[Array, " configs"], step: Step
) -> tuple[Float[Array, " configs"], Float[Array, " configs"]]:
    """Mean and variance of the time from admission to the first token: the rest of a step, and those of the prompt.

    A request comes rather into a long step, one with prompts, and is computed with all that come meanwhile: the gate of
    a queue whose service is the prompts' own time. One that exceeds the token budget takes as many steps more as it
    has further chunks, by exponential lengths.

    Source: M/G/1 with gated service by Takagi, Analysis of Polling Systems (1986), without switch-over times.
    """
    scenarios = problem.scenarios
    room = jnp.maximum(scenarios.max_num_batched_tokens - problem.most_running / scenarios.mean_output_tokens, 1.0)
    chunks = further_chunks(scenarios.mean_input_tokens, room)
    prompt_s = scenarios.mean_input_tokens * step.prompt_token_s + chunks * step.decode_s
    load = jnp.minimum(completed_per_s * prompt_s, _MOST_PROMPT_LOAD)
    among_others_s = 0.5 * (1.0 + problem.input_cv**2) * load * prompt_s * (1.0 + 2.0 * load) / (1.0 - load**2)
    if problem.cut_steps is not None:
        prompt_s = prompt_s + problem.cut_steps * step.time_s  # others are computed meanwhile: nobody waits for it
    # The rest of a step is uniform; what is computed with a prompt varies as prompts do.
    variance_s2 = step.time_s**2 / 12.0 + (problem.input_cv * (among_others_s + prompt_s)) ** 2
    return 1.5 * step.time_s + among_others_s + prompt_s, variance_s2
