"""How long an engine step takes, and how long the engine stands still while an adapter is loaded."""

from collections.abc import Mapping
from dataclasses import field
from typing import NamedTuple, Self

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from lora_capacity.costs.coefficients import Coefficient, MakePrior, Prior, PriorBasis, coefficient, coefficients_of
from lora_capacity.costs.experts import ExpertRouting
from lora_capacity.costs.front_end import FrontEndCosts
from lora_capacity.costs.kernels import (
    SHRINK_SPLITS_SMALL,
    LoraKernels,
    MeanRows,
    is_small,
    launched_blocks,
    shrink_splits,
    slot_grids,
)
from lora_capacity.models import ModelShape

_PREFILL_SHARE_ON_TOP = 0.4
"""Share of a prompt token's matrix products that is not hidden behind reading the weights: fitted to the H100 runs."""

_ADAPTER_SHARE = 0.01
"""Of the base step on a CPU, for each different adapter: its kernels do not depend on how many there are."""

_LEAST_LORA_SHARE = 0.1
"""Of a step or token without adapters: adapters are taken to add at least this, whatever noise says."""


def _activations(basis: PriorBasis) -> Prior:
    """LoRA kernels read a layer's inputs, and read and write its outputs, at the speed of the memory."""
    model = basis.model
    moved = sum(module.input_size + 2 * sum(module.output_sizes) for module in model.linear_modules)
    return Prior(model.num_layers * model.dtype_bytes * moved / basis.bandwidth_bytes_per_s, 0.3)


def _kv_cache(spread: float) -> MakePrior:
    """Attention reads a token's keys and values at the speed of the memory."""
    return lambda basis: Prior(basis.model.kv_bytes_per_token / basis.bandwidth_bytes_per_s, spread)


def _prompt(basis: PriorBasis) -> Prior:
    """Two operations a parameter; wide where prompts were timed and tell themselves."""
    prompt_s = 2.0 * basis.model.weight_bytes / basis.model.dtype_bytes / basis.flop_per_s
    return Prior(_PREFILL_SHARE_ON_TOP * prompt_s, 1.0 if basis.tells_prefill else 0.3)


def _half_token(basis: PriorBasis) -> Prior:
    """The profile's batches decode: what each token takes is split evenly between all tokens and decode tokens."""
    return Prior(0.5 * basis.token_s, 1.5)


def _lora_on_top(basis: PriorBasis) -> float:
    return max(basis.lora_token_s, _LEAST_LORA_SHARE * basis.token_s)


@struct.dataclass(kw_only=True)
class StepCosts:
    """Coefficients of the step time; scalars, none negative. Each field says what it is the cost of.

    Usual values on a GPU are those of a large data-centre GPU; priors of a CPU follow from its own step times.
    """

    base_s: ArrayLike = coefficient(
        "A step whatever its content: reading the weights, launching kernels, the engine loop.",
        gpu=Prior(12e-3, 0.5),
        cpu=lambda basis: Prior(basis.base_s, 0.7),
    )
    lora_s: ArrayLike = coefficient(
        "What serving adapters adds to every step: launching the LoRA kernels, mapping tokens to slots.",
        gpu=Prior(1.5e-3, 0.7),
        cpu=lambda basis: Prior(max(basis.lora_s, _LEAST_LORA_SHARE * basis.base_s), 0.7),
    )
    token_s: ArrayLike = coefficient(
        "Each token in the step, decode or prefill: matrix products, sampling, bookkeeping.",
        gpu=Prior(30e-6, 0.5),
        cpu=_half_token,
    )
    prefill_token_s: ArrayLike = coefficient(
        "Each prefill token, on top: it is computed, where a decode token mostly waits for weights.",
        gpu=_prompt,
    )
    lora_token_s: ArrayLike = coefficient(
        "Each token in a server with adapters, on top: the LoRA kernels read and write its activations.",
        gpu=_activations,
        cpu=lambda basis: Prior(0.5 * _lora_on_top(basis), 1.5),
    )
    kv_token_s: ArrayLike = coefficient(
        "Each token in the KV cache that attention reads.",
        gpu=_kv_cache(spread=0.3),
        cpu=_kv_cache(spread=0.7),
    )
    expand_block_s: ArrayLike = coefficient(
        "Each thread block that the expand kernels launch, nearly all of them empty.",
        source="lora/ops/triton_ops/lora_expand.py, vLLM 0.8.5",
        gpu=Prior(1.5e-9, 0.5),
    )
    shrink_block_s: ArrayLike = coefficient(
        "The same of the shrink kernels.",
        source="lora/ops/triton_ops/lora_shrink.py, vLLM 0.8.5",
        gpu=Prior(0.3e-9, 0.7),
    )
    adapter_s: ArrayLike = coefficient(
        "Each different adapter in the step.",
        gpu=Prior(0.15e-3, 0.7),
        cpu=lambda basis: Prior(_ADAPTER_SHARE * basis.base_s, 1.5),
    )
    adapter_rank_s: ArrayLike = coefficient(
        "Each different adapter, times the server's max_lora_rank, in a step of fewer than 128 tokens; an eighth in a "
        "larger one: each split of the shrink kernel adds results as wide as the rank to those of the others, and in "
        "larger steps there are 8 splits in place of 64.",
        source="lora/ops/triton_ops/lora_shrink.py, vLLM 0.8.5",
        gpu=Prior(6e-6, 0.5),
    )
    skipped_request_s: ArrayLike = coefficient(
        "Each queued request that the scheduler skips because its adapter has no slot.",
        source="v1/core/sched/scheduler.py; its prior is from the scheduler's own log of the published runs: what it "
        "takes longer with a queue when slots are fewer than adapters",
        gpu=Prior(0.2e-6, 0.3),
        cpu=Prior(0.2e-6, 0.3),
    )
    queued_request_s: ArrayLike = coefficient(
        "Each queued request, whether the scheduler looks at it or not. Steps take longer while thousands wait, and "
        "the scheduler's own log does not tell why: other processes hold their connections, on the same processors.",
        gpu=Prior(0.3e-6, 0.7),
        optional=True,
    )
    lora_listing_s: ArrayLike = coefficient(
        "Each different adapter, times each adapter loaded on the host: for every one in a step, vLLM lists all that "
        "are loaded, in Python.",
        source="LRUCacheWorkerLoRAManager.add_adapter in lora/worker_manager.py, vLLM 0.8.5",
        gpu=Prior(0.2e-6, 0.5),
        optional=True,
    )
    active_block_factor: ArrayLike = coefficient(
        "How much more a block costs whose slot has an adapter in the step: it looks up how many tokens are its own "
        "before it leaves.",
        gpu=Prior(0.5, 0.5),
        optional=True,
    )
    decode_token_s: ArrayLike = coefficient(
        "Each decode token, on top: on a CPU the processor that computes also samples, and shares memory with what "
        "hands the tokens out, while prefill tokens go through the matrices together.",
        cpu=_half_token,
        optional=True,
    )
    lora_token_rank_s: ArrayLike = coefficient(
        "Each token in a server with adapters, times the server's max_lora_rank: vLLM's kernels for CPUs copy the "
        "adapter's matrices for every token, in the place of the GPU's grid of blocks.",
        cpu=lambda basis: Prior(0.5 * _lora_on_top(basis) / basis.max_lora_rank, 1.5),
        optional=True,
    )
    expert_s: ArrayLike = coefficient(
        "Each different expert of a mixture that the step's tokens go to, in all layers together: reading its weights.",
        optional=True,
    )


@struct.dataclass(kw_only=True)
class LoadCosts:
    """Coefficients of the adapter loads; scalars, none negative. The engine does nothing else meanwhile."""

    host_to_gpu_load_s: ArrayLike = coefficient(
        "One adapter from host memory into a GPU slot.",
        gpu=lambda basis: Prior(basis.host_to_gpu_load_s, 0.4),
        cpu=lambda basis: Prior(basis.host_to_gpu_load_s, 0.4),
    )
    disk_s: ArrayLike = coefficient("One adapter from disk into host memory, whatever its rank.")
    disk_rank_s: ArrayLike = coefficient("The same, per unit of the adapter's own rank.")


COEFFICIENTS: tuple[Coefficient, ...] = (
    *coefficients_of(StepCosts, "step"),
    *coefficients_of(LoadCosts, "loads"),
    *coefficients_of(FrontEndCosts, "front_end"),
)
"""All coefficients, in the order in which they are fitted and written."""


@struct.dataclass(kw_only=True)
class Costs:
    """Everything that takes time, for one model on one GPU."""

    step: StepCosts
    loads: LoadCosts
    kernels: LoraKernels
    front_end: FrontEndCosts = field(default_factory=FrontEndCosts)
    experts: ExpertRouting | None = None

    @classmethod
    def of_model(cls, model: ModelShape, values: Mapping[str, ArrayLike]) -> Self:
        """Put coefficients into place, by name; those that are not given are 0."""
        return cls.of_values(values, LoraKernels.of_model(model), ExpertRouting.of_model(model))

    @classmethod
    def of_values(
        cls, values: Mapping[str, ArrayLike], kernels: LoraKernels, experts: ExpertRouting | None = None
    ) -> Self:
        """Put coefficients into place, by name; those that are not given are 0."""
        groups: dict[str, dict[str, ArrayLike]] = {each.group: {} for each in COEFFICIENTS}
        for each in COEFFICIENTS:
            groups[each.group][each.name] = values.get(each.name, 0.0)
        return cls(
            step=StepCosts(**groups["step"]),
            loads=LoadCosts(**groups["loads"]),
            front_end=FrontEndCosts(**groups["front_end"]),
            kernels=kernels,
            experts=experts,
        )


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
    rows: MeanRows | None = None,
    prompt_tokens: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    """Time of one engine step, adapter loads apart.

    ``base + lora + (token + lora_token + lora_token_rank · max_lora_rank) · tokens + prefill_token · prefill_tokens +
    decode_token · (tokens - prefill_tokens) + kv_token · kv_tokens + expand_block · expand_blocks + shrink_block ·
    shrink_blocks + adapters · (adapter + adapter_rank · max_lora_rank · splits / 64 + lora_listing · loaded) +
    skipped_request · skipped + queued_request · queued``, with ``max_loras + 1 + active_block_factor · adapters``
    grids of blocks; where they are specialized `slot_grids` stand in the place of ``max_loras + 1``.

    A server without LoRA, which has no slots, has none of the terms of ``lora`` and of blocks.

    A GPU has no ``decode_token`` and no ``lora_token_rank``; a CPU no blocks, and of the others no ``prefill_token``,
    ``adapter_rank``, ``lora_listing`` and ``queued_request``. A mixture adds ``expert`` times the different experts
    that the tokens go to (`ExpertRouting`).

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
        max_loras: Adapter slots of the server; 0: it serves without LoRA.
        max_lora_rank: Rank that the slots are reserved for.
        small_share: Share of steps below 128 tokens where the arguments are means over steps; None for one actual step.
        rows: What is known of the kernels' rows where the arguments are means over steps, in place of ``small_share``.
        prompt_tokens: Mean prompt where the arguments are means over steps; None for one actual step. Only experts ask
            for it: they depend on how many of its tokens come at once.

    Returns:
        Seconds, in the common shape of the arguments.
    """
    step = costs.step
    terms = step_terms(
        costs,
        tokens,
        loaded=loaded,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        small_share=small_share,
        rows=rows,
    )
    mean = small_share is not None or rows is not None
    grids = launched_grids(costs, max_loras=max_loras, adapters=adapters, mean=mean)
    return jnp.asarray(
        terms.fixed_s
        + _experts_s(costs, tokens, prefill_tokens, prompt_tokens)
        + terms.grid_s * grids
        + terms.adapter_s * adapters
        + jnp.subtract(step.prefill_token_s, step.decode_token_s) * prefill_tokens
        + step.kv_token_s * kv_tokens
        + step.skipped_request_s * skipped
        + step.queued_request_s * queued
    )


class StepTerms(NamedTuple):
    """What the tokens of a step decide of its time, seconds, each in the shape of the tokens.

    Attributes:
        fixed_s: The step without adapters in it, its grids of blocks and experts apart.
        grid_s: Each grid of blocks that the LoRA kernels launch.
        adapter_s: Each different adapter.
    """

    fixed_s: Float[Array, "*shape"]
    grid_s: Float[Array, "*shape"]
    adapter_s: Float[Array, "*shape"]


def step_terms(
    costs: Costs,
    tokens: ArrayLike,
    *,
    loaded: ArrayLike,
    max_loras: ArrayLike,
    max_lora_rank: ArrayLike,
    small_share: ArrayLike | None = None,
    rows: MeanRows | None = None,
) -> StepTerms:
    """Return the terms of `step_time_s` that depend on the step's tokens, as if all of them were decode tokens.

    Arguments as there.
    """
    step = costs.step
    expand_blocks, shrink_blocks = launched_blocks(costs.kernels, tokens, 1.0, max_lora_rank, small_share, rows)
    if rows is not None:
        small_share = rows.small_share
    splits = shrink_splits(is_small(tokens) if small_share is None else small_share)
    adapter_s = step.adapter_s + step.adapter_rank_s * max_lora_rank * splits / SHRINK_SPLITS_SMALL
    bare_token_s = step.token_s + step.decode_token_s
    token_s = bare_token_s + step.lora_token_s + step.lora_token_rank_s * max_lora_rank
    has_lora = jnp.asarray(max_loras) > 0
    fixed_s = jnp.where(has_lora, step.base_s + step.lora_s, step.base_s)
    return StepTerms(
        fixed_s=jnp.asarray(fixed_s + jnp.where(has_lora, token_s, bare_token_s) * jnp.asarray(tokens)),
        grid_s=jnp.asarray(step.expand_block_s * expand_blocks + step.shrink_block_s * shrink_blocks),
        adapter_s=jnp.asarray(adapter_s + step.lora_listing_s * loaded),
    )


def launched_grids(
    costs: Costs, *, max_loras: ArrayLike, adapters: ArrayLike, mean: bool = False
) -> Float[Array, "*shape"]:
    """Return the grids of blocks that each LoRA kernel launches (`lora_capacity.costs.kernels.slot_grids`).

    Those of adapters in the step count for more by ``active_block_factor``. A server without LoRA launches none.

    Args:
        costs: The coefficients.
        max_loras: Adapter slots of the server; 0: it serves without LoRA.
        adapters: Different adapters in the step.
        mean: Whether that is a mean over steps.
    """
    grids = slot_grids(costs.kernels, max_loras=max_loras, adapters=adapters, mean=mean)
    return jnp.where(grids > 0, grids + costs.step.active_block_factor * adapters, 0.0)


def experts_time_s(costs: Costs, tokens: ArrayLike) -> Float[Array, "*shape"]:
    """Return what reading a mixture's experts takes in a step of so many tokens, seconds; 0 for other models."""
    return jnp.asarray(_experts_s(costs, tokens))


def bare_step_time_s(costs: Costs, *, sequences: ArrayLike, kv_tokens: ArrayLike) -> Float[Array, "*shape"]:
    """Time of a decode step in a server without adapters, seconds.

    Args:
        costs: The coefficients.
        sequences: Decoding sequences, one token each.
        kv_tokens: Tokens that they hold in the KV cache, same shape.
    """
    step = costs.step
    decode_s = step.base_s + (step.token_s + step.decode_token_s) * jnp.asarray(sequences)
    return jnp.asarray(decode_s + _experts_s(costs, sequences) + step.kv_token_s * kv_tokens)


def _experts_s(
    costs: Costs, tokens: ArrayLike, prefill_tokens: ArrayLike = 0.0, prompt_tokens: ArrayLike | None = None
) -> ArrayLike:
    if costs.experts is None:  # such a model has no such term in its compiled program
        return 0.0
    if prompt_tokens is None:
        return costs.step.expert_s * costs.experts.different_experts(tokens)
    # Prompts come whole, in a few steps: spread over all steps they would seem to go to more experts.
    decode = jnp.subtract(tokens, prefill_tokens)
    share = jnp.minimum(prefill_tokens / jnp.asarray(prompt_tokens), 1.0)
    without = costs.experts.different_experts(decode)
    beside = costs.experts.different_experts(decode + jnp.maximum(prompt_tokens, prefill_tokens))
    return costs.step.expert_s * (without + share * (beside - without))
