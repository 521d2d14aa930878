"""Closed form of a server whose batch is full: the sustained load that models are taught the corrections of.

With a full batch the step time follows from the costs, and the sustained load from the step time. It leaves out that
adapters wait for slots, that they are loaded, and that the queue of an hour is not that of a steady state.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, step_time_s
from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.twins.steady.problem import KV_CACHE_FILL

_ITERATIONS = 5
"""Of the fixed point between step time and busy adapters: each halves the logarithm of what is left, to about 3 %."""

_LEAST_BUSY = 1e-3
"""Floor of adapters, squared, under the geometric mean of two iterates, whose derivative has no end at 0."""

_UNBOUNDED_PENDING = 1e9
"""In-flight requests that stand for no bound: infinity has no derivative."""

_COLUMNS = (
    *("base_rate_per_s", "mean_input_tokens", "mean_output_tokens", "output_spread", "kv_tokens_per_request"),
    *("max_num_seqs", "max_num_batched_tokens"),
)


@struct.dataclass
class SurrogateInputs:
    """What the closed form and the neural surrogate are functions of; leaves ``[…]`` that broadcast.

    Attributes:
        rates_per_s: Requests per second of the adapters of a round, ``[round, …]``.
        base_rate_per_s: Requests per second without an adapter.
        mean_input_tokens: Mean prompt length.
        mean_output_tokens: Mean output length.
        output_spread: Standard deviation of the output length over its mean.
        kv_tokens_per_request: Tokens that a running request holds.
        kv_cache_tokens: Tokens that the KV cache would hold beside no slots.
        slot_tokens_per_rank: KV tokens that a slot takes the place of, per unit of ``max_lora_rank``.
        max_lora_rank: Rank that slots are reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_pending: Most in-flight requests.
        adapters: Adapters, A.
        max_loras: Slots, S.
    """

    rates_per_s: Array
    base_rate_per_s: Array
    mean_input_tokens: Array
    mean_output_tokens: Array
    output_spread: Array
    kv_tokens_per_request: Array
    kv_cache_tokens: Array
    slot_tokens_per_rank: Array
    max_lora_rank: Array
    max_num_seqs: Array
    max_num_batched_tokens: Array
    max_pending: Array
    adapters: Array
    max_loras: Array

    @classmethod
    def of(cls, calibration: Calibration, workloads: WorkloadBatch, adapters: Any, max_loras: Any) -> Self:
        """Return the inputs of workloads with numbers of adapters and slots, ``[workloads]`` each."""
        count = np.ones(len(workloads), np.int64)
        rank = workloads.max_lora_rank(np.full(len(workloads), workloads.ranks.shape[1]), calibration)
        with_one, _ = workloads.plan(calibration, count, rank)
        per_rank = calibration.slot_bytes(rank) / rank / calibration.model.kv_bytes_per_token
        columns = {name: getattr(workloads, name) for name in _COLUMNS} | {
            "rates_per_s": workloads.rates_per_s.T,
            "max_pending": np.minimum(workloads.max_pending, _UNBOUNDED_PENDING),
            "kv_cache_tokens": with_one + per_rank * rank,
            "slot_tokens_per_rank": per_rank,
            "max_lora_rank": rank,
            "adapters": adapters,
            "max_loras": max_loras,
        }
        leaves: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in columns.items()}
        return cls(**leaves)


class FullBatch(NamedTuple):
    """A server whose batch is full; arrays in the common shape of the inputs.

    Attributes:
        load_per_s: Requests per second, the base model's included, that a full batch completes.
        step_s: Time of a step of the full batch.
        running: Requests in the full batch.
        busy_adapters: Different adapters that have a request running, if none has to wait for a slot.
        kv_share: Requests that the KV cache holds, over those that the other bounds allow.
    """

    load_per_s: Float[Array | np.ndarray, "*shape"]
    step_s: Float[Array | np.ndarray, "*shape"]
    running: Float[Array | np.ndarray, "*shape"]
    busy_adapters: Float[Array | np.ndarray, "*shape"]
    kv_share: Float[Array | np.ndarray, "*shape"]


def full_batch(costs: Costs, inputs: SurrogateInputs, kv_cache_tokens: Array) -> FullBatch:
    """Solve for the load that a full batch completes; pure and differentiable.

    ``load = running / (output · step)``, with the running requests from the tightest of KV cache, token budget and
    sequences, and the step from as many different adapters as that load keeps busy, at most the slots.

    Args:
        costs: What steps cost.
        inputs: Workload and server; the adapters served do not matter.
        kv_cache_tokens: Tokens that the KV cache holds beside the slots, ``[…]``.
    """
    slots = inputs.max_loras
    prompt = inputs.mean_input_tokens / inputs.mean_output_tokens
    by_kv = KV_CACHE_FILL * kv_cache_tokens / inputs.kv_tokens_per_request
    by_budget = jnp.minimum(inputs.max_num_batched_tokens / (1.0 + prompt), inputs.max_num_seqs)
    by_others = jnp.minimum(by_budget, inputs.max_pending)
    running = jnp.minimum(by_kv, by_others)
    mean_rate = inputs.rates_per_s.mean(axis=0)

    def iterate(guess: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        busy, loaded = guess
        step_s = step_time_s(
            costs,
            tokens=running * (1.0 + prompt),
            prefill_tokens=running * prompt,
            kv_tokens=running * inputs.kv_tokens_per_request,
            adapters=jnp.minimum(jnp.minimum(busy, slots), running),
            skipped=0.0,
            queued=0.0,
            loaded=loaded,
            max_loras=slots,
            max_lora_rank=inputs.max_lora_rank,
            small_share=jnp.zeros_like(running),
        )
        residence_s = inputs.mean_output_tokens * step_s
        load = running / residence_s
        adapters = jnp.maximum(load - inputs.base_rate_per_s, 0.0) / mean_rate
        wanted = adapters * -jnp.expm1(-inputs.rates_per_s * residence_s).mean(axis=0)
        return (_halfway(busy, wanted), _halfway(loaded, adapters)), (load, step_s, wanted)

    shape = jnp.broadcast_shapes(running.shape, slots.shape)
    running = jnp.broadcast_to(running, shape)
    first = jnp.broadcast_to(slots, shape) + 0.0 * running
    _, every = jax.lax.scan(iterate, (first, first), length=_ITERATIONS)
    load, step_s, busy = (values[-1] for values in every)
    return FullBatch(load, step_s, running, busy, by_kv / by_others)


def full_batches(
    calibration: Calibration,
    workloads: WorkloadBatch,
    max_loras: Int[np.ndarray, "workloads n"],
    kv_cache_tokens: NDArray[np.float64] | None = None,
) -> FullBatch:
    """Return the closed form of each server with each of some numbers of slots, leaves ``[workloads, n]``.

    Args:
        calibration: Whose costs hold.
        workloads: The workloads and servers.
        max_loras: Numbers of slots, ``[workloads, n]``.
        kv_cache_tokens: What the KV cache holds, ``[workloads, n]``; by default what the memory plan says.
    """
    count, slots = max_loras.shape
    inputs = SurrogateInputs.of(calibration, workloads, np.zeros(count), np.zeros(count))
    if kv_cache_tokens is None:
        repeated = workloads.take(np.repeat(np.arange(count), slots))
        planned, _ = repeated.plan(calibration, max_loras.ravel(), np.repeat(np.asarray(inputs.max_lora_rank), slots))
        kv_cache_tokens = planned.reshape(max_loras.shape)
    # Rows are made a power of two, so that few shapes are compiled.
    rows = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)
    padded: Any = jax.tree.map(lambda values: values[..., rows, np.newaxis], inputs)
    padded = padded.replace(max_loras=max_loras[rows].astype(np.float32))
    found: FullBatch = jax.tree.map(
        lambda values: np.asarray(values)[:count],
        _full_batch(calibration.costs, padded, kv_cache_tokens[rows].astype(np.float32)),
    )
    return found


_full_batch = jax.jit(full_batch)


def _halfway(old: Array, new: Array) -> Array:
    """Geometric mean: damps the iteration, which else goes to and fro."""
    return jnp.sqrt(jnp.maximum(old * new, _LEAST_BUSY))
