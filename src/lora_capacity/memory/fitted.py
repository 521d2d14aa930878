"""Amounts of memory that shapes do not tell, as coefficients fitted to one model on one GPU."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from lora_capacity.memory.deployment import Amounts, Start
from lora_capacity.models import ModelShape, ModelShard
from lora_capacity.schema import Document, NotNegative

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

    def amounts(self, start: Start, quantile: float) -> Amounts:
        """Return the amounts at a start, as fitted: they are taken as certain.

        Args:
            start: The servers.
            quantile: Unused.
        """
        blocks = -(-start.max_model_len // start.block_size)
        graphs = 0.0 if start.deployment.enforce_eager else self.cuda_graph_bytes_per_layer * start.shard.num_layers
        return Amounts(
            activation_bytes(start.shard, self, start.max_num_seqs, start.max_num_batched_tokens),
            other_bytes(self, start.max_loras, start.max_num_seqs, blocks),
            np.full(start.max_loras.shape, graphs),
        )


def forward_bytes(
    model: ModelShape | ModelShard, step_tokens: Int[np.ndarray, "*configs"], compile_scratch_bytes: float
) -> Float[np.ndarray, "*configs"]:
    """Return the peak of the forward pass of the profiling step.

    It lies in the feed-forward block: gate, up and their product, and three vectors of the residual stream per token.

    Args:
        model: Layer shapes, of the whole or of what one GPU holds.
        step_tokens: ``max_num_batched_tokens``, ``[configs]``.
        compile_scratch_bytes: Scratch alive beside the largest activations when the pass is compiled.

    Returns:
        Bytes, ``[configs]``.
    """
    per_token = 3 * (model.intermediate_size + model.hidden_size) * model.dtype_bytes
    return np.asarray(step_tokens * float(per_token) + compile_scratch_bytes, np.float64)


def activation_bytes(
    model: ModelShape | ModelShard,
    memory: MemoryModel,
    seqs: Int[np.ndarray, "*configs"],
    step_tokens: Int[np.ndarray, "*configs"],
) -> Float[np.ndarray, "*configs"]:
    """Return the peak of the profiling step: of its forward pass or of the sampler, whichever is larger.

    The sampler holds a hidden vector and several copies of the logits per request.

    Args:
        model: Layer shapes, of the whole or of what one GPU holds.
        memory: Amounts that shapes do not tell.
        seqs: ``max_num_seqs``, ``[configs]``.
        step_tokens: ``max_num_batched_tokens``, ``[configs]``.

    Returns:
        Bytes, ``[configs]``.
    """
    forward = forward_bytes(model, step_tokens, memory.compile_scratch_bytes)
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
