"""How many thread blocks vLLM's LoRA kernels launch in a step.

vLLM multiplies by an adapter's two small matrices with two Triton kernels per linear layer: *shrink* (hidden size to
rank) and *expand* (rank to output size). Both are launched over a grid that covers **every slot**, each as if all
tokens of the step were its own; a block whose slot has no tokens there leaves at once, but launching it takes time,
and a little more if its adapter has tokens elsewhere in the step. That is why slots cost time even when empty, and why
the cost of a slot grows with the tokens in the step.

With ``--specialize-active-lora`` (vLLM 0.16 on) the grids cover as many adapters as the step has, rounded up to a power
of two, as CUDA graphs are captured for those numbers only; a step without adapters launches none.

Source: the launch grids in ``vllm/lora/ops/triton_ops/lora_shrink.py`` and ``lora_expand.py`` of vLLM 0.8.5. The
block sizes are those of that version; later versions tune them per GPU, which a calibration's ``kernel_block_s``
absorbs.
"""

import dataclasses
from dataclasses import field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from lora_capacity.engines import EngineBehaviour
from lora_capacity.memory import Deployment
from lora_capacity.models import ModelShape, targeted_modules

SMALL_STEP_TOKENS = 128
"""Below this many tokens in a step the shrink kernel splits its inner dimension more finely."""

_EXPAND_BLOCK_TOKENS, _EXPAND_BLOCK_OUTPUTS = 64, 128
"""Tokens and outputs that a block of the expand kernel works on (``lora_expand.py``, ``BLOCK_M`` and ``BLOCK_N``)."""

_SHRINK_BLOCK_TOKENS, _SHRINK_BLOCK_RANKS = 32, 16
"""Tokens and ranks that a block of the shrink kernel works on (``lora_shrink.py``, ``BLOCK_M`` and ``BLOCK_N``)."""

SHRINK_SPLITS_SMALL, SHRINK_SPLITS_LARGE = 64, 8
"""Parts of the shrink kernel's inner dimension in small and in large steps (``lora_shrink.py``, ``SPLIT_K``)."""


_CAPTURED_COUNTS = tuple(2**power for power in range(13))
"""Numbers of adapters that CUDA graphs are captured for, beside the slots and one, far beyond what has room."""

_LEAST_ACTIVE = 1e-3
"""Mean number of adapters in a step below which there are as good as none."""


@struct.dataclass
class LoraKernels:
    """The parts of the launch grid that the model's shape fixes; scalars.

    Attributes:
        layers: Transformer layers.
        expand_tiles: Blocks across the outputs of all adapted modules of a layer.
        shrink_slices: Adapted matrices in a layer; packed modules count once per slice (q, k and v are three).
        specialized: Whether grids cover the adapters in the step (``--specialize-active-lora``), not the slots; static.
    """

    layers: ArrayLike
    expand_tiles: ArrayLike
    shrink_slices: ArrayLike
    specialized: bool = field(metadata={"pytree_node": False}, default=False)

    @classmethod
    def of_server(
        cls,
        model: ModelShape,
        deployment: Deployment,
        behaviour: EngineBehaviour,
        target_modules: str | tuple[str, ...] = "all-linear",
    ) -> "LoraKernels":
        """Count the grid of a GPU of a server: kernels run for all modules that it reserves slots for.

        Args:
            model: Layer shapes.
            deployment: How the model is laid out on GPUs.
            behaviour: The vLLM version.
            target_modules: Modules that the adapters adapt.
        """
        reserved = behaviour.reserved_modules(target_modules)
        kernels = cls.of_model(model, deployment.tensor_parallel_size, behaviour.packed_expand_outputs, reserved)
        specialized = deployment.specialize_active_lora and behaviour.specializes_active_lora
        return dataclasses.replace(kernels, specialized=specialized)

    @classmethod
    def of_model(
        cls,
        model: ModelShape,
        tensor_parallel_size: int = 1,
        packed_expand_outputs: int = _EXPAND_BLOCK_OUTPUTS,
        reserved_modules: str | tuple[str, ...] = "all-linear",
    ) -> "LoraKernels":
        """Count the grid of a model that covers all slots, by default that of vLLM 0.8.5 on one GPU.

        Args:
            model: Layer shapes.
            tensor_parallel_size: GPUs that share every layer; the grid is that of one.
            packed_expand_outputs: Outputs that a block of the expand kernel works on where several are fused.
            reserved_modules: Modules that slots are reserved for.
        """
        wanted = targeted_modules(model.linear_modules, reserved_modules)
        modules = [module for module in model.linear_modules if module in wanted]
        tiles = 0
        for outputs in (module.local_outputs(tensor_parallel_size) for module in modules):
            width = packed_expand_outputs if len(outputs) > 1 else _EXPAND_BLOCK_OUTPUTS
            tiles += len(outputs) * -(-max(outputs) // width)
        return cls(
            layers=float(model.num_layers),
            expand_tiles=float(tiles),
            shrink_slices=float(sum(len(m.output_sizes) for m in modules)),
        )


def launched_blocks(
    kernels: LoraKernels,
    tokens: ArrayLike,
    grids: ArrayLike,
    max_lora_rank: ArrayLike,
    small_share: ArrayLike | None = None,
    rows: "MeanRows | None" = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Thread blocks launched by the LoRA kernels in one step.

    Expand: ``layers · grids · expand_tiles · ⌈tokens/64⌉``. Shrink: ``layers · grids · slices · ⌈rank/16⌉ · splits ·
    ⌈tokens/32⌉``, with 64 splits below 128 tokens and 8 from there on.

    Args:
        kernels: The model's part of the grid.
        tokens: Tokens in the step, any shape.
        grids: Grids that each kernel is launched over, one a slot and one for tokens without an adapter, same shape;
            not a whole number where some count for more.
        max_lora_rank: Rank that the slots are reserved for, same shape.
        small_share: Share of steps with fewer than 128 tokens when ``tokens`` is a mean over steps; the ceilings are
            then replaced by their means. None for the tokens of one actual step.
        rows: What is known of steps whose tokens vary less than evenly; ``small_share`` is then not asked for.

    Returns:
        Number of expand and of shrink blocks, each of the same shape.
    """
    tokens = jnp.asarray(tokens)
    if rows is not None:
        expand_rows, shrink_rows = rows.expand, rows.split_shrink
    elif small_share is None:
        expand_rows = jnp.ceil(tokens / _EXPAND_BLOCK_TOKENS)
        shrink_rows = shrink_splits(is_small(tokens)) * jnp.ceil(tokens / _SHRINK_BLOCK_TOKENS)
    else:
        expand_rows = tokens / _EXPAND_BLOCK_TOKENS + 0.5
        shrink_rows = shrink_splits(small_share) * (tokens / _SHRINK_BLOCK_TOKENS + 0.5)
    rank_tiles = jnp.ceil(jnp.asarray(max_lora_rank) / _SHRINK_BLOCK_RANKS)
    per_kernel = kernels.layers * jnp.asarray(grids)
    expand = per_kernel * kernels.expand_tiles * expand_rows
    shrink = per_kernel * kernels.shrink_slices * rank_tiles * shrink_rows
    return jnp.asarray(expand), jnp.asarray(shrink)


def slot_grids(
    kernels: LoraKernels, *, max_loras: ArrayLike, adapters: ArrayLike, mean: bool = False
) -> Float[Array, "*shape"]:
    """Grids that a LoRA kernel is launched over: one a slot, and one for tokens without an adapter.

    Specialized they are the least power of two, or the number for all slots, that is not below the adapters in a step:
    ``Σ (min(next, slots + 1) − min(count, slots + 1)) · P(adapters > count)`` over the counts 0, 1, 2, 4, … , each with
    the next. Tokens of the base model beside adapters, which count as one adapter more, are left out.

    Source: ``get_captured_lora_counts`` in ``lora/utils.py``, ``LoRAKernelMeta.prepare_tensors`` in
    ``lora/ops/triton_ops/lora_kernel_metadata.py``, vLLM 0.16 to 0.33.

    Args:
        kernels: The model's part of the grid.
        max_loras: Adapter slots of the server; 0: it serves without LoRA and launches none.
        adapters: Different adapters in the step, same shape.
        mean: Whether ``adapters`` is a mean over steps, in which their number has a Poisson number's variance.
    """
    slots, active = jnp.asarray(max_loras), jnp.asarray(adapters)
    whole = jnp.where(slots > 0, slots + 1.0, 0.0)
    if not kernels.specialized:
        return whole
    grids = jnp.minimum(1.0, whole) * (-jnp.expm1(-active) if mean else jnp.where(active > 0, 1.0, 0.0))
    spread = jnp.sqrt(jnp.maximum(active, _LEAST_ACTIVE))
    for count in _CAPTURED_COUNTS:
        above = (
            jax.scipy.stats.norm.cdf((active - count - 0.5) / spread) if mean else jnp.where(active > count, 1.0, 0.0)
        )
        grids += (jnp.minimum(2 * count, whole) - jnp.minimum(count, whole)) * above
    return grids


class MeanRows(NamedTuple):
    """What the rows of blocks in the kernels' grids are on average over steps of different tokens.

    Attributes:
        expand: Mean of ``⌈tokens/64⌉``.
        split_shrink: Mean of ``splits · ⌈tokens/32⌉``: small steps have more splits, and few rows.
        small_share: Share of steps below 128 tokens.
    """

    expand: Float[Array, "*shape"]
    split_shrink: Float[Array, "*shape"]
    small_share: Float[Array, "*shape"]


def mean_rows(
    sequences: Float[Array, "*shape"],
    variance: Float[Array, "*shape"],
    prompts: Float[Array, "*shape"],
    prompt_tokens: Float[Array, "*shape"],
) -> MeanRows:
    """Return the kernels' rows of steps whose sequences and prompts are random.

    Sequences are taken as normal, prompts as Poisson numbers of exponential lengths: those of small steps are the ones
    that fit beside the sequences.

    Args:
        sequences: Decoding sequences, their mean.
        variance: Their variance.
        prompts: Prompts in a step, their mean; may be 0.
        prompt_tokens: Their mean length.
    """
    room = jnp.maximum(SMALL_STEP_TOKENS - sequences, 0.0)
    longer = jnp.exp(-room / prompt_tokens)
    fitting = prompts * (1.0 - longer)
    below = jax.scipy.stats.norm.cdf((SMALL_STEP_TOKENS - 0.5 - sequences) / jnp.sqrt(variance))
    small_share = below * jnp.exp(-prompts * longer)
    fitting_tokens = prompts * ((1.0 - longer) * prompt_tokens - longer * room)
    tokens = sequences + prompts * prompt_tokens
    small_tokens = jnp.minimum(sequences + fitting_tokens, SMALL_STEP_TOKENS - 1.0)
    expand = tokens / _EXPAND_BLOCK_TOKENS + _rounded_up(sequences, variance, prompts, _EXPAND_BLOCK_TOKENS)
    shrink = tokens / _SHRINK_BLOCK_TOKENS + _rounded_up(sequences, variance, prompts, _SHRINK_BLOCK_TOKENS)
    small = small_tokens / _SHRINK_BLOCK_TOKENS + _rounded_up(sequences, variance, fitting, _SHRINK_BLOCK_TOKENS)
    small = jnp.minimum(small, SMALL_STEP_TOKENS / _SHRINK_BLOCK_TOKENS)
    more_splits = SHRINK_SPLITS_SMALL - SHRINK_SPLITS_LARGE
    return MeanRows(expand, SHRINK_SPLITS_LARGE * shrink + more_splits * small_share * small, small_share)


def _rounded_up(
    sequences: Float[Array, "*shape"], variance: Float[Array, "*shape"], prompts: Float[Array, "*shape"], block: int
) -> Float[Array, "*shape"]:
    """What ``⌈tokens/block⌉`` adds to ``tokens/block`` on average: a half beside prompts, whose lengths vary more.

    Without them the Fourier series of a ceiling, ``½ + Σ sin(2πkx) / (πk)``, whose terms a spread of ``x`` damps: the
    first by ``ρ = e^{−2π²·variance}``, as for normal numbers, the others by ``ρᵏ``, so that the sum has a closed form.

    Source: the sum by Gradshteyn and Ryzhik, Table of Integrals, Series, and Products, 1.448.
    """
    # Tokens are whole numbers: the step of the ceiling lies between two of them.
    angle = 2.0 * jnp.pi * (sequences - 0.5) / block
    damping = jnp.exp(-2.0 * (jnp.pi / block) ** 2 * variance)
    wave = jnp.arctan2(damping * jnp.sin(angle), 1.0 - damping * jnp.cos(angle))
    return 0.5 + jnp.exp(-prompts) * (wave / jnp.pi - 0.5 / block)


def shrink_splits(small_share: ArrayLike) -> Float[Array, "*shape"]:
    """Parts into which the shrink kernel splits its inner dimension; their mean where a share of steps is small."""
    return SHRINK_SPLITS_LARGE + (SHRINK_SPLITS_SMALL - SHRINK_SPLITS_LARGE) * jnp.asarray(small_share)


def is_small(tokens: ArrayLike) -> Float[Array, "*shape"]:
    """1 where a step has fewer than 128 tokens, else 0."""
    return jnp.where(jnp.asarray(tokens) < SMALL_STEP_TOKENS, 1.0, 0.0)
