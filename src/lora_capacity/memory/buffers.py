"""Tensors of weights and adapter slots that one GPU holds, in order of creation."""

import functools

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray

from lora_capacity.engines import VllmBehaviour
from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.models import ModelShape, ModelShard, padded_rows, split_model, targeted_modules

IntArray = NDArray[np.int64]

_LORA_VOCAB_PADDING = 256
"""Rows that a head is padded to which adapters extend. Source: vLLM 0.8.5, ``config.py``
(``lora_vocab_padding_size``)."""


def slot_bytes(
    model: ModelShape | ModelShard,
    behaviour: VllmBehaviour,
    max_lora_rank: ArrayLike,
    target_modules: str | tuple[str, ...] = "all-linear",
    *,
    fully_sharded_loras: bool = False,
) -> IntArray:
    """Return the bytes of one adapter slot from layer shapes, before the allocator's rounding.

    A and B matrices of every adapted layer and fused output, at ``max_lora_rank``, those of every expert included where
    the version adapts experts; where vLLM adapts them, those of embedding and output head, whole on every GPU, and the
    extra vocabulary's rows (of the embedding, and in a buffer for either side).

    Args:
        model: Layer shapes, of the whole on one GPU or of what one of several holds.
        behaviour: The vLLM version.
        max_lora_rank: Rank that slots are reserved for, any shape.
        target_modules: Modules that slots are reserved for.
        fully_sharded_loras: Whether the matrices are divided over the GPUs that are otherwise whole on each.

    Returns:
        Bytes, of the shape of ``max_lora_rank``.
    """
    shard = as_shard(model)
    ones = np.ones_like(np.asarray(max_lora_rank, np.int64))
    rank = np.asarray(max_lora_rank, np.int64)
    buffers = _slot_buffers(shard, behaviour, ones, rank, target_modules, fully_sharded_loras)
    extra_rows = _extra_vocab_tokens(shard, behaviour) if shard.is_first else 0
    return np.asarray(sum(buffers) + extra_rows * shard.hidden_size * shard.dtype_bytes, np.int64)


def resident_memory(
    model: ModelShape | ModelShard,
    behaviour: VllmBehaviour,
    max_loras: Int[np.ndarray, "..."],
    max_lora_rank: Int[np.ndarray, "..."],
    target_modules: str | tuple[str, ...] = "all-linear",
    *,
    fully_sharded_loras: bool = False,
) -> AllocatedMemory:
    """Return the memory of weights and slots as PyTorch's allocator hands it out.

    Args:
        model: Layer shapes, of the whole on one GPU or of what one of several holds.
        behaviour: The vLLM version.
        max_loras: Slots, ``[configs]``; 0 for a server without LoRA.
        max_lora_rank: Rank that slots are reserved for, ``[configs]``.
        target_modules: Modules that slots are reserved for.
        fully_sharded_loras: Whether the matrices are divided over the GPUs that are otherwise whole on each.

    Returns:
        Allocated bytes (vLLM's log: "Model loading took ... GiB") and reserved bytes, ``[configs]``.
    """
    shard = as_shard(model)
    pairs = np.stack(np.broadcast_arrays(max_loras, max_lora_rank), axis=-1).reshape(-1, 2).tolist()
    # Configurations that differ elsewhere (in A, in max_num_seqs, ...) share one replay.
    known = _replayed(shard, behaviour, target_modules, fully_sharded_loras)
    missing = [pair for pair in dict.fromkeys(map(tuple, pairs)) if pair not in known]
    if missing:
        slots, rank = np.array(missing, np.int64).T
        adapters = _slot_buffers(shard, behaviour, slots, rank, target_modules, fully_sharded_loras)
        found = allocate(_weight_buffers(shard, behaviour, slots) + adapters)
        amounts = zip(found.allocated_bytes.tolist(), found.reserved_bytes.tolist(), strict=True)
        known.update(zip(missing, amounts, strict=True))
    allocated, reserved = np.array([known[slots, rank] for slots, rank in pairs], np.int64).T
    return AllocatedMemory(allocated, reserved)


def as_shard(model: ModelShape | ModelShard) -> ModelShard:
    """Return what a GPU holds: all of a whole model."""
    return model if isinstance(model, ModelShard) else split_model(model)[0]


@functools.lru_cache(maxsize=16)
def _replayed(
    shard: ModelShard,
    behaviour: VllmBehaviour,
    target_modules: str | tuple[str, ...],
    fully_sharded_loras: bool,
) -> dict[tuple[int, int], tuple[int, int]]:
    """Memory by slots and rank, as far as it was replayed: searches ask for the same slots again and again."""
    return {}


def _weight_buffers(
    shard: ModelShard, behaviour: VllmBehaviour, slots: Int[np.ndarray, " configs"]
) -> list[Int[np.ndarray, "..."]]:
    """Sizes in bytes of the base model's tensors, each ``[configs]``; zeros take no space."""
    model = shard.model
    row_bytes = model.hidden_size * model.dtype_bytes
    extra = np.where(slots > 0, _extra_vocab_tokens(shard, behaviour), 0)
    gpus, rows = shard.tensor_parallel_size, model.vocab_size + extra
    embedding = padded_rows(model.vocab_size + extra * slots, gpus) * row_bytes
    rotary_table = model.max_position_embeddings * model.head_dim * model.dtype_bytes
    final_norm = (model.final_norm or model.hidden_size) * model.dtype_bytes
    padded = np.where(extra > 0, padded_rows(rows, gpus, _LORA_VOCAB_PADDING), padded_rows(rows, gpus))
    has_embedding = shard.is_first or (shard.is_last and model.tie_word_embeddings)
    buffers = [embedding] if has_embedding else []
    buffers += [shard.other_bytes] if shard.is_first else []
    buffers += [rotary_table, *shard.layer_buffers()]
    buffers += [final_norm, padded * model.head_row_bytes] if shard.is_last else []
    return [np.atleast_1d(np.asarray(size, np.int64)) for size in buffers]


def _slot_buffers(
    shard: ModelShard,
    behaviour: VllmBehaviour,
    slots: IntArray,
    rank: IntArray,
    target_modules: str | tuple[str, ...],
    fully_sharded_loras: bool,
) -> list[IntArray]:
    """Sizes in bytes of the adapters' tensors, each of the shape of ``slots``.

    Source: vLLM 0.8.5, ``lora/layers.py`` (``create_lora_weights`` of each layer); 0.32.0, ``lora/layers/``.
    """
    per_rank = slots * rank * shard.dtype_bytes
    blocks = set(shard.layers)
    wanted = targeted_modules((module for block in blocks for module in block.modules), target_modules)
    kinds = {
        block: [
            per_rank * elements
            for module in block.modules
            if module in wanted and (behaviour.adapts_experts or not module.experts)
            for matrices in module.adapter_elements(shard.tensor_parallel_size, fully_sharded_loras=fully_sharded_loras)
            for elements in matrices
        ]
        for block in blocks
    }
    layers = [size for layer in shard.layers for size in kinds[layer]]
    has_head = shard.model.architecture in behaviour.embedding_architectures
    has_embedding = has_head or shard.model.architecture in behaviour.headless_embedding_architectures
    if not has_embedding or target_modules != "all-linear":
        return layers
    vocab = shard.vocab_size + behaviour.lora_extra_vocab_tokens
    padded = padded_rows(vocab, 1, _LORA_VOCAB_PADDING) if behaviour.lora_extra_vocab_tokens else vocab
    extra = slots * behaviour.lora_extra_vocab_tokens * shard.hidden_size * shard.dtype_bytes
    narrow = per_rank * shard.hidden_size
    before = [extra, per_rank * vocab, narrow] if shard.is_first else []
    after = [narrow, per_rank * padded, extra] if shard.is_last and has_head else []
    return [*before, *layers, *after]


def _extra_vocab_tokens(shard: ModelShard, behaviour: VllmBehaviour) -> int:
    adapts = shard.model.architecture in behaviour.embedding_architectures
    return behaviour.lora_extra_vocab_tokens if adapts else 0
