"""GPU memory from first principles: what weights, adapter slots and activations take, and the KV cache that is left."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray

from lora_capacity.engines import VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.models import ModelShape, expand_target_modules
from lora_capacity.schema import Document, NotNegative, Number, check_column
from lora_capacity.status import Status

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_VOCAB_PADDING = 64
"""Rows that embedding and output head are padded to. Source: vLLM, ``layers/vocab_parallel_embedding.py``."""

_LORA_VOCAB_PADDING = 256
"""The same of a head that adapters extend. Source: vLLM 0.8.5, ``config.py`` (``lora_vocab_padding_size``)."""

_BLOCK_ID_BYTES = 4
"""A KV block's number in the block table, int32. Source: vLLM, ``v1/worker/block_table.py``."""


@dataclass(frozen=True)
class MemoryModel(Document):
    """The few amounts of memory that shapes do not tell.

    Attributes:
        other_bytes: CUDA context, libraries and their workspaces.
        lora_kernel_bytes: What the LoRA kernels add to that, whatever the slots.
        sampler_bytes_per_logit: Bytes alive per request and vocabulary entry when the sampler peaks.
        compile_scratch_bytes: Scratch alive beside the largest activations when the first forward pass is compiled.
        cuda_graph_bytes_per_layer: Memory of the captured CUDA graphs per decoder layer.
        kv_cache_memory_bytes: Memory of the KV cache where the server is told it (``--kv-cache-memory-bytes``, or
            ``VLLM_CPU_KVCACHE_SPACE`` on a CPU); None: it takes what is left.
    """

    other_bytes: NotNegative
    lora_kernel_bytes: NotNegative
    sampler_bytes_per_logit: NotNegative
    compile_scratch_bytes: NotNegative
    cuda_graph_bytes_per_layer: NotNegative
    kv_cache_memory_bytes: NotNegative | None = None

    where: ClassVar[str] = "memory"

    def to_json(self) -> dict[str, float]:
        """Return the coefficients as a JSON object."""
        return {name: value for name, value in super().to_json().items() if value is not None}


@dataclass(frozen=True)
class MemoryPlan:
    """Where the GPU's memory goes, per configuration (all arrays ``[configs]``).

    Attributes:
        status: :class:`~lora_capacity.status.Status` codes: ``OK``, ``NO_KV_CACHE`` or ``OOM``.
        kv_cache_tokens: Tokens that the KV cache holds, whole blocks; 0 where nothing is left. Where the server does
            not start this is what would have been left.
        kv_cache_bytes: Memory left for the KV cache, negative where memory is short.
        weight_bytes: The base model, its rotary table and the segments around them.
        slot_bytes: All adapter slots, with the segments around them.
        activation_bytes: Most memory that comes and goes while vLLM profiles a step.
        other_bytes: Everything else outside the KV cache.
        cuda_graph_bytes: The captured CUDA graphs.
        headroom_no_kv_cache_bytes: KV cache beyond what one request of ``max_model_len`` needs; negative: refused.
        headroom_oom_bytes: GPU memory free at the tightest moment of the start; negative: out of memory.
    """

    status: IntArray
    kv_cache_tokens: IntArray
    kv_cache_bytes: FloatArray
    weight_bytes: FloatArray
    slot_bytes: FloatArray
    activation_bytes: FloatArray
    other_bytes: FloatArray
    cuda_graph_bytes: FloatArray
    headroom_no_kv_cache_bytes: FloatArray
    headroom_oom_bytes: FloatArray


def plan_memory(
    model: ModelShape,
    gpu: Gpu,
    memory: MemoryModel,
    *,
    behaviour: VllmBehaviour,
    max_loras: ArrayLike,
    max_lora_rank: ArrayLike,
    max_num_seqs: ArrayLike,
    max_num_batched_tokens: ArrayLike,
    gpu_memory_utilization: ArrayLike,
    max_model_len: ArrayLike,
    target_modules: str | tuple[str, ...] = "all-linear",
    block_size: int = 16,
) -> MemoryPlan:
    """Plan the GPU's memory as a starting vLLM server does.

    KV bytes = utilization · memory − (weights + slots) − activations − other (− CUDA graphs, from 0.20), or what the
    server is told. Every slot is reserved in full, at ``max_lora_rank``, whatever the adapters' ranks. The server runs
    out of memory when what comes before the KV cache exceeds the GPU's memory, or else utilization · memory plus CUDA
    graphs not counted in it does.

    Leaves out tensor parallelism, quantized weights or KV caches, LoRA on multimodal parts.

    Args:
        model: Layer shapes.
        gpu: Memory of the GPU.
        memory: Amounts that shapes do not tell.
        behaviour: The vLLM version.
        max_loras: Slots; 0 for a server without LoRA. This and the following broadcast to ``[configs]``.
        max_lora_rank: Rank that slots are reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        gpu_memory_utilization: Share of the memory to plan with.
        max_model_len: Longest sequence, tokens.
        target_modules: Modules that slots are reserved for (``ServerConfig.reserved_modules``).
        block_size: Tokens of a KV block.

    Returns:
        Bytes per purpose, KV tokens, headrooms and status, per configuration.

    Raises:
        InputError: If a setting is out of range or ``target_modules`` names an unknown module.

    Valid for: one GPU, 16-bit weights; measured with vLLM 0.8.5 on an H100 within 0.2 % of the KV tokens.

    Source: vLLM 0.8.5, ``v1/worker/gpu_worker.py`` (``determine_available_memory``), ``v1/core/kv_cache_utils.py``.
    """
    slots, rank, seqs, step_tokens, length, share = np.broadcast_arrays(
        _counts("max_loras", max_loras, minimum=0),
        _counts("max_lora_rank", max_lora_rank),
        _counts("max_num_seqs", max_num_seqs),
        _counts("max_num_batched_tokens", max_num_batched_tokens),
        _counts("max_model_len", max_model_len),
        check_column("gpu_memory_utilization", gpu_memory_utilization, Number(0, 1, exclusive=True)),
    )
    limit = gpu.memory_bytes * share
    resident = resident_memory(model, behaviour, slots, rank, target_modules).reserved_bytes
    bare = resident_memory(model, behaviour, np.zeros(1, np.int64), np.ones(1, np.int64), target_modules).reserved_bytes
    activations = activation_bytes(model, memory, seqs, step_tokens)
    other = other_bytes(memory, slots, seqs, -(-length // block_size))
    graphs = np.full(slots.shape, memory.cuda_graph_bytes_per_layer * model.num_layers)
    graphs_counted = graphs if behaviour.counts_cuda_graphs else np.zeros_like(graphs)
    kv_bytes = limit - resident - activations - other - graphs_counted
    given_bytes = memory.kv_cache_memory_bytes
    if given_bytes is not None:
        kv_bytes = np.full(slots.shape, float(given_bytes))
        limit = kv_bytes + resident + activations + other + graphs_counted
    block_bytes = block_size * model.kv_bytes_per_token
    spare_kv = kv_bytes - -(-length // block_size) * block_bytes
    spare_profiling = gpu.memory_bytes - (resident + activations + other)
    # Graphs are captured only once the KV cache stands, so a server that vLLM refuses never meets them.
    spare_serving = np.where(spare_kv >= 0, gpu.memory_bytes - limit - (graphs - graphs_counted), np.inf)
    spare = np.minimum(spare_profiling, spare_serving)
    return MemoryPlan(
        status=np.select([spare < 0, spare_kv < 0], [Status.OOM, Status.NO_KV_CACHE], Status.OK).astype(np.int64),
        kv_cache_tokens=np.maximum(kv_bytes // block_bytes, 0).astype(np.int64) * block_size,
        kv_cache_bytes=kv_bytes,
        weight_bytes=np.broadcast_to(bare, slots.shape).astype(np.float64),
        slot_bytes=(resident - bare).astype(np.float64),
        activation_bytes=activations,
        other_bytes=other,
        cuda_graph_bytes=graphs,
        headroom_no_kv_cache_bytes=spare_kv,
        headroom_oom_bytes=spare,
    )


def slot_bytes(
    model: ModelShape,
    behaviour: VllmBehaviour,
    max_lora_rank: ArrayLike,
    target_modules: str | tuple[str, ...] = "all-linear",
) -> IntArray:
    """Return the bytes of one adapter slot from layer shapes, before the allocator's rounding.

    A and B matrices of every adapted layer and fused output, at ``max_lora_rank``; where vLLM adapts them, those of
    embedding and output head, and the extra vocabulary's rows (of the embedding, and in a buffer for either side).

    Args:
        model: Layer shapes.
        behaviour: The vLLM version.
        max_lora_rank: Rank that slots are reserved for, any shape.
        target_modules: Modules that slots are reserved for.

    Returns:
        Bytes, of the shape of ``max_lora_rank``.
    """
    ones = np.ones_like(np.asarray(max_lora_rank, np.int64))
    rank = np.asarray(max_lora_rank, np.int64)
    buffers = _slot_buffers(model, behaviour, ones, rank, target_modules)
    return np.asarray(
        sum(buffers) + _extra_vocab_tokens(model, behaviour) * model.hidden_size * model.dtype_bytes, np.int64
    )


def resident_memory(
    model: ModelShape,
    behaviour: VllmBehaviour,
    max_loras: Int[np.ndarray, "..."],
    max_lora_rank: Int[np.ndarray, "..."],
    target_modules: str | tuple[str, ...] = "all-linear",
) -> AllocatedMemory:
    """Return the memory of weights and slots as PyTorch's allocator hands it out.

    Args:
        model: Layer shapes.
        behaviour: The vLLM version.
        max_loras: Slots, ``[configs]``; 0 for a server without LoRA.
        max_lora_rank: Rank that slots are reserved for, ``[configs]``.
        target_modules: Modules that slots are reserved for.

    Returns:
        Allocated bytes (vLLM's log: "Model loading took ... GiB") and reserved bytes, ``[configs]``.
    """
    # Configurations that differ elsewhere (in A, in max_num_seqs, ...) share one replay.
    pairs = np.stack(np.broadcast_arrays(max_loras, max_lora_rank), axis=-1)
    unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
    wanted = [(slots, rank) for slots, rank in unique.tolist()]
    known = _replayed(model, behaviour, target_modules)
    missing = [pair for pair in wanted if pair not in known]
    if missing:
        slots, rank = np.array(missing, np.int64).T
        found = allocate(
            _weight_buffers(model, behaviour, slots) + _slot_buffers(model, behaviour, slots, rank, target_modules)
        )
        amounts = zip(found.allocated_bytes.tolist(), found.reserved_bytes.tolist(), strict=True)
        known.update(zip(missing, amounts, strict=True))
    allocated, reserved = np.array([known[pair] for pair in wanted], np.int64).T[:, inverse.reshape(-1)]
    return AllocatedMemory(allocated, reserved)


@functools.lru_cache(maxsize=16)
def _replayed(
    model: ModelShape, behaviour: VllmBehaviour, target_modules: str | tuple[str, ...]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Memory by slots and rank, as far as it was replayed: searches ask for the same slots again and again."""
    return {}


def _weight_buffers(
    model: ModelShape, behaviour: VllmBehaviour, slots: Int[np.ndarray, " configs"]
) -> list[Int[np.ndarray, "..."]]:
    """Sizes of the base model's tensors in order of creation, each ``[configs]``; zeros take no space."""
    extra = np.where(slots > 0, _extra_vocab_tokens(model, behaviour), 0)
    padding = np.where(extra > 0, _LORA_VOCAB_PADDING, _VOCAB_PADDING)
    embedding = _round_up(model.vocab_size + extra * slots, _VOCAB_PADDING) * model.hidden_size
    head = _round_up(model.vocab_size + extra, padding) * model.hidden_size
    qkv, *others = model.linear_modules
    layer = [qkv.input_size * sum(qkv.output_sizes), sum(qkv.output_sizes) if model.attention_bias else 0]
    layer += [module.input_size * sum(module.output_sizes) for module in others] + [model.hidden_size] * 2
    rotary_table = model.max_position_embeddings * model.head_dim
    elements = [embedding, rotary_table, *layer * model.num_layers, model.hidden_size]
    elements += [] if model.tie_word_embeddings else [head]
    return [np.atleast_1d(np.asarray(count, np.int64)) * model.dtype_bytes for count in elements]


def _slot_buffers(
    model: ModelShape,
    behaviour: VllmBehaviour,
    slots: IntArray,
    rank: IntArray,
    target_modules: str | tuple[str, ...],
) -> list[IntArray]:
    """Sizes of the adapters' tensors in order of creation, each of the shape of ``slots``.

    Source: vLLM 0.8.5, ``lora/layers.py`` (``create_lora_weights`` of each layer); 0.32.0, ``lora/layers/``.
    """
    per_rank = slots * rank * model.dtype_bytes
    wanted = expand_target_modules(target_modules)
    layer: list[IntArray] = []
    for module in model.linear_modules:
        if module.name in wanted:
            layer += [per_rank * module.input_size for _ in module.output_sizes]
            layer += [per_rank * size for size in module.output_sizes]
    layers = layer * model.num_layers
    if model.architecture not in behaviour.embedding_architectures or target_modules != "all-linear":
        return layers
    vocab = model.vocab_size + behaviour.lora_extra_vocab_tokens
    padded = -(-vocab // _LORA_VOCAB_PADDING) * _LORA_VOCAB_PADDING if behaviour.lora_extra_vocab_tokens else vocab
    extra = slots * behaviour.lora_extra_vocab_tokens * model.hidden_size * model.dtype_bytes
    narrow = per_rank * model.hidden_size
    return [extra, per_rank * vocab, narrow, *layers, narrow, per_rank * padded, extra]


def activation_bytes(
    model: ModelShape,
    memory: MemoryModel,
    seqs: Int[np.ndarray, "*configs"],
    step_tokens: Int[np.ndarray, "*configs"],
) -> Float[np.ndarray, "*configs"]:
    """Return the peak of the profiling step: of its forward pass or of the sampler, whichever is larger.

    The forward pass peaks in the feed-forward block: gate, up and their product, and three vectors of the residual
    stream per token. The sampler holds a hidden vector and several copies of the logits per request.

    Args:
        model: Layer shapes.
        memory: Amounts that shapes do not tell.
        seqs: ``max_num_seqs``, ``[configs]``.
        step_tokens: ``max_num_batched_tokens``, ``[configs]``.

    Returns:
        Bytes, ``[configs]``.
    """
    per_token = 3 * (model.intermediate_size + model.hidden_size) * model.dtype_bytes
    forward = step_tokens * float(per_token) + memory.compile_scratch_bytes
    per_request = memory.sampler_bytes_per_logit * model.vocab_size + model.hidden_size * model.dtype_bytes
    return np.asarray(np.maximum(forward, np.minimum(seqs, step_tokens) * per_request), np.float64)


def other_bytes(
    memory: MemoryModel,
    slots: Int[np.ndarray, "*configs"],
    seqs: Int[np.ndarray, "*configs"],
    blocks_per_sequence: Int[np.ndarray, "*configs"],
) -> Float[np.ndarray, "*configs"]:
    """Return what is neither weights, slots, activations nor KV cache: context, libraries and the table of KV blocks.

    Args:
        memory: Amounts that shapes do not tell.
        slots: ``max_loras``, ``[configs]``; 0 for a server without LoRA.
        seqs: ``max_num_seqs``, ``[configs]``.
        blocks_per_sequence: KV blocks of the longest sequence, ``[configs]``.

    Returns:
        Bytes, ``[configs]``.
    """
    lora = np.where(slots > 0, memory.lora_kernel_bytes, 0.0)
    return np.asarray(memory.other_bytes + lora + seqs * blocks_per_sequence * _BLOCK_ID_BYTES, np.float64)


def _extra_vocab_tokens(model: ModelShape, behaviour: VllmBehaviour) -> int:
    return behaviour.lora_extra_vocab_tokens if model.architecture in behaviour.embedding_architectures else 0


def _counts(name: str, value: ArrayLike, minimum: int = 1) -> IntArray:
    return check_column(name, value, Number(minimum), whole=True).astype(np.int64)


def _round_up(
    value: Int[np.ndarray, " configs"], multiple: Int[np.ndarray, " configs"] | int
) -> Int[np.ndarray, " configs"]:
    return -(-value // multiple) * multiple
