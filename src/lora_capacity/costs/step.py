"""How long an engine step takes, and how long the engine stands still while an adapter is brought in."""

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.costs.kernels import SHRINK_SPLITS_SMALL, LoraKernels, is_small, launched_blocks, shrink_splits


@struct.dataclass(kw_only=True)
class StepCosts:
    """Coefficients of the step time; scalars, none negative.

    Attributes:
        base_s: A step whatever its content: reading the weights, launching kernels, the engine loop.
        lora_s: What serving adapters adds to every step: launching the LoRA kernels, mapping tokens to slots.
        token_s: Each token in the step, decode or prefill: matrix products, sampling, bookkeeping.
        prefill_token_s: Each prefill token, on top: it is computed, where a decode token mostly waits for weights.
        lora_token_s: Each token in a server with adapters, on top: the LoRA kernels read and write its activations.
        kv_token_s: Each token in the KV cache that attention reads.
        expand_block_s: Each thread block that the expand kernels launch, nearly all of them empty.
        shrink_block_s: The same of the shrink kernels.
        adapter_s: Each different adapter in the step.
        adapter_rank_s: Each different adapter, times the server's ``max_lora_rank``, in a step of fewer than 128
            tokens; an eighth in a larger one: each split of the shrink kernel adds results as wide as the rank to those
            of the others, and in larger steps there are 8 splits in place of 64.
        lora_listing_s: Each different adapter, times each adapter loaded on the host: for every one in a step,
            vLLM lists all that are loaded, in Python.
        active_block_factor: How much more a block costs whose slot has an adapter in the step: it looks up how many
            tokens are its own before it leaves.
        skipped_request_s: Each queued request that the scheduler skips because its adapter has no slot.
        queued_request_s: Each queued request, whether the scheduler looks at it or not. Steps take longer while
            thousands wait, and the scheduler's own log does not tell why: other processes hold their connections, on
            the same processors.
        decode_token_s: Each decode token, on top: on a CPU the processor that computes also samples, and shares memory
            with what hands the tokens out, while prefill tokens go through the matrices together.
        lora_token_rank_s: Each token in a server with adapters, times the server's ``max_lora_rank``: vLLM's kernels
            for CPUs copy the adapter's matrices for every token, in the place of the GPU's grid of blocks.
    """

    base_s: ArrayLike
    lora_s: ArrayLike
    token_s: ArrayLike
    prefill_token_s: ArrayLike
    lora_token_s: ArrayLike
    kv_token_s: ArrayLike
    expand_block_s: ArrayLike
    shrink_block_s: ArrayLike
    adapter_s: ArrayLike
    adapter_rank_s: ArrayLike
    skipped_request_s: ArrayLike
    queued_request_s: ArrayLike = 0.0
    lora_listing_s: ArrayLike = 0.0
    active_block_factor: ArrayLike = 0.0
    decode_token_s: ArrayLike = 0.0
    lora_token_rank_s: ArrayLike = 0.0


@struct.dataclass(kw_only=True)
class LoadCosts:
    """Coefficients of the adapter loads; scalars. The engine does nothing else meanwhile.

    Attributes:
        host_to_gpu_load_s: One adapter from host memory into a GPU slot.
        disk_s: One adapter from disk into host memory, whatever its rank.
        disk_rank_s: The same, per unit of the adapter's own rank.
    """

    host_to_gpu_load_s: ArrayLike
    disk_s: ArrayLike
    disk_rank_s: ArrayLike


@struct.dataclass(kw_only=True)
class Costs:
    """Everything that takes time, for one model on one GPU."""

    step: StepCosts
    loads: LoadCosts
    kernels: LoraKernels


def step_time_s(
    costs: Costs,
    *,
    tokens: ArrayLike,
    prefill_tokens: ArrayLike,
    kv_tokens: ArrayLike,
    adapters: ArrayLike,
    skipped: ArrayLike,
    queued: ArrayLike,
    loaded: ArrayLike,
    max_loras: ArrayLike,
    max_lora_rank: ArrayLike,
    small_share: ArrayLike | None = None,
) -> Array:
    """Time of one engine step, adapter loads apart.

    ``base + lora + (token + lora_token + lora_token_rank · max_lora_rank) · tokens + prefill_token · prefill_tokens +
    decode_token · (tokens - prefill_tokens) + kv_token · kv_tokens + expand_block · expand_blocks + shrink_block ·
    shrink_blocks + adapters · (adapter + adapter_rank · max_lora_rank · splits / 64 + lora_listing · loaded) +
    skipped_request · skipped + queued_request · queued``, with ``max_loras + 1 + active_block_factor · adapters``
    grids of blocks.

    A GPU has no ``decode_token`` and no ``lora_token_rank``; a CPU no blocks, and of the others no ``prefill_token``,
    ``adapter_rank``, ``lora_listing`` and ``queued_request``.

    Source: of the blocks `lora_capacity.costs.kernels`; of listing, ``LRUCacheWorkerLoRAManager.add_adapter`` in
    ``vllm/lora/worker_manager.py``, vLLM 0.8.5.

    It leaves out that launches overlap with compute, and that steps above the largest captured CUDA graph are
    launched one kernel at a time.

    Args:
        costs: The coefficients.
        tokens: Tokens computed in the step: one per decoding sequence, plus prefill chunks.
        prefill_tokens: Those of them that are prefill.
        kv_tokens: Tokens held in the KV cache by the sequences of the step.
        adapters: Different adapters in the step.
        skipped: Queued requests that the scheduler looks at and skips, since their adapter has no slot.
        queued: All queued requests.
        loaded: Adapters loaded on the host.
        max_loras: Adapter slots of the server.
        max_lora_rank: Rank that the slots are reserved for.
        small_share: Share of steps below 128 tokens where the arguments are means over steps; None for one actual step.

    Returns:
        Seconds, in the common shape of the arguments.
    """
    step = costs.step
    grids = jnp.asarray(max_loras) + 1.0 + step.active_block_factor * adapters
    expand_blocks, shrink_blocks = launched_blocks(costs.kernels, tokens, grids, max_lora_rank, small_share)
    splits = shrink_splits(is_small(tokens) if small_share is None else small_share)
    adapter_s = step.adapter_s + step.adapter_rank_s * max_lora_rank * splits / SHRINK_SPLITS_SMALL
    adapter_s += step.lora_listing_s * loaded
    return jnp.asarray(
        step.base_s
        + step.lora_s
        + (step.token_s + step.lora_token_s + step.lora_token_rank_s * max_lora_rank) * tokens
        + step.prefill_token_s * prefill_tokens
        + step.decode_token_s * jnp.subtract(tokens, prefill_tokens)
        + step.kv_token_s * kv_tokens
        + step.expand_block_s * expand_blocks
        + step.shrink_block_s * shrink_blocks
        + adapter_s * adapters
        + step.skipped_request_s * skipped
        + step.queued_request_s * queued
    )
