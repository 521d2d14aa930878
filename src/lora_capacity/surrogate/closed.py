"""A closed form of the server at its limit: what models are taught the corrections of.

With a full batch the step time follows from the costs, and the sustained load from the step time. It leaves out that
adapters wait for slots, that they are loaded, and that the queue of an hour is not that of a steady state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.costs import Costs, step_time_s
from lora_capacity.twins.steady.solve import KV_CACHE_FILL

_ITERATIONS = 5


class Limit(NamedTuple):
    """A server at its limit; arrays in the common shape of the arguments.

    Attributes:
        load_per_s: Requests per second, the base model's included, that a full batch completes.
        step_s: Time of a step of the full batch.
        running: Requests in the full batch.
        busy_adapters: Different adapters that have a request running, if none has to wait for a slot.
        kv_share: Requests that the KV cache holds, over those that the other bounds allow.
    """

    load_per_s: Array
    step_s: Array
    running: Array
    busy_adapters: Array
    kv_share: Array


def at_limit(
    costs: Costs,
    *,
    rates_per_s: Array,
    base_rate_per_s: Array,
    mean_input_tokens: Array,
    mean_output_tokens: Array,
    kv_tokens_per_request: Array,
    kv_cache_tokens: Array,
    max_num_seqs: Array,
    max_num_batched_tokens: Array,
    max_pending: Array,
    max_loras: Array,
    max_lora_rank: Array,
) -> Limit:
    """Solve for the load that a full batch completes; pure and differentiable.

    ``load = running / (output · step)``, with the running requests from the tightest of KV cache, token budget and
    sequences, and the step from as many different adapters as that load keeps busy, at most the slots.

    Args:
        costs: What steps cost.
        rates_per_s: Rates of the adapters of a turn, ``[turn, …]``; the others broadcast to ``[…]``.
        base_rate_per_s: Requests per second without an adapter.
        mean_input_tokens: Mean prompt length.
        mean_output_tokens: Mean answer length.
        kv_tokens_per_request: Tokens that a running request holds.
        kv_cache_tokens: Tokens that the KV cache holds.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_pending: Most unanswered requests.
        max_loras: Slots.
        max_lora_rank: Rank that they are reserved for.
    """
    prompt = mean_input_tokens / mean_output_tokens
    by_kv = KV_CACHE_FILL * kv_cache_tokens / kv_tokens_per_request
    by_others = jnp.minimum(jnp.minimum(max_num_batched_tokens / (1.0 + prompt), max_num_seqs), max_pending)
    running = jnp.minimum(by_kv, by_others)
    mean_rate = rates_per_s.mean(axis=0)

    def iterate(guess: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        busy, loaded = guess
        step_s = step_time_s(
            costs,
            tokens=running * (1.0 + prompt),
            prefill_tokens=running * prompt,
            kv_tokens=running * kv_tokens_per_request,
            adapters=jnp.minimum(jnp.minimum(busy, max_loras), running),
            skipped=0.0,
            queued=0.0,
            loaded=loaded,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            small_share=jnp.zeros_like(running),
        )
        stay_s = mean_output_tokens * step_s
        load = running / stay_s
        adapters = jnp.maximum(load - base_rate_per_s, 0.0) / mean_rate
        wanted = adapters * -jnp.expm1(-rates_per_s * stay_s).mean(axis=0)
        return (_between(busy, wanted), _between(loaded, adapters)), (load, step_s, wanted)

    shape = jnp.broadcast_shapes(running.shape, max_loras.shape)
    running = jnp.broadcast_to(running, shape)
    slots = jnp.broadcast_to(max_loras, shape) + 0.0 * running
    _, every = jax.lax.scan(iterate, (slots, slots), length=_ITERATIONS)
    load, step_s, busy = (values[-1] for values in every)
    return Limit(load, step_s, running, busy, by_kv / by_others)


def _between(old: Array, new: Array) -> Array:
    return jnp.sqrt(jnp.maximum(old * new, 1e-3))
