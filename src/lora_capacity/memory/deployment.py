"""How a model is laid out on GPUs, and what a start asks of the terms that shapes do not tell."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from lora_capacity.engines import VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.models import ModelShard
from lora_capacity.schema import Count, Document

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
"""Bytes of a cached element by ``--kv-cache-dtype`` (``config/cache.py`` of 0.32.0)."""


@dataclass(frozen=True)
class Deployment(Document):
    """Flags of a server that decide what each GPU holds, by vLLM's names.

    Attributes:
        tensor_parallel_size: GPUs that share every layer.
        pipeline_parallel_size: Stages of GPUs that share the layers out.
        kv_cache_dtype: Type of the KV cache, ``auto``: as the checkpoint has it.
        enforce_eager: Whether no CUDA graphs are captured.
        fully_sharded_loras: Whether the adapters' matrices are divided over the GPUs too that are otherwise whole.
        specialize_active_lora: Whether CUDA graphs are captured for every power of two of active adapters.
    """

    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"] = "auto"
    enforce_eager: bool = False
    fully_sharded_loras: bool = False
    specialize_active_lora: bool = False

    where: ClassVar[str] = ""

    def kv_element_bytes(self, shard: ModelShard) -> int:
        """Return the bytes of a cached element."""
        told = shard.model.kv_cache_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        return _ELEMENT_BYTES.get(told, shard.dtype_bytes)


@dataclass(frozen=True)
class Start:
    """The start of a server, or of several that differ in some settings, on one GPU of a pipeline stage.

    Attributes:
        shard: What the GPU holds of the model.
        gpu: The GPU.
        behaviour: The vLLM version.
        deployment: How the model is laid out.
        max_loras: Slots, ``[configs]``; 0 for a server without LoRA.
        max_lora_rank: Rank that slots are reserved for, ``[configs]``.
        max_num_seqs: Most requests in a step, ``[configs]``.
        max_num_batched_tokens: Most tokens in a step, ``[configs]``.
        max_model_len: Longest sequence, tokens, ``[configs]``.
        block_size: Tokens of a KV block.
    """

    shard: ModelShard
    gpu: Gpu
    behaviour: VllmBehaviour
    deployment: Deployment
    max_loras: Int[np.ndarray, " configs"]
    max_lora_rank: Int[np.ndarray, " configs"]
    max_num_seqs: Int[np.ndarray, " configs"]
    max_num_batched_tokens: Int[np.ndarray, " configs"]
    max_model_len: Int[np.ndarray, " configs"]
    block_size: int


class Amounts(NamedTuple):
    """Memory of one GPU that shapes do not tell, bytes, each ``[configs]``.

    Attributes:
        activation_bytes: Most memory that comes and goes while vLLM profiles a step.
        other_bytes: What stays besides weights, slots and KV cache.
        cuda_graph_bytes: The captured CUDA graphs.
    """

    activation_bytes: NDArray[np.float64]
    other_bytes: NDArray[np.float64]
    cuda_graph_bytes: NDArray[np.float64]

    def taken_bytes(self, behaviour: VllmBehaviour) -> NDArray[np.float64]:
        """Return what of them is taken off the KV cache, ``[configs]``: graphs where the version counts them."""
        graphs = self.cuda_graph_bytes if behaviour.counts_cuda_graphs else 0.0
        return self.activation_bytes + self.other_bytes + graphs


@runtime_checkable
class MemoryTerms(Protocol):
    """What tells the memory that shapes do not."""

    @property
    def kv_cache_memory_bytes(self) -> float | None:
        """Memory of the KV cache where the server is told it; None: it takes what is left."""

    def amounts(self, start: Start, quantile: float) -> Amounts:
        """Return the amounts at a start.

        Args:
            start: The servers.
            quantile: How much of the uncertainty their sum covers: 0.5 what is expected, 0.95 more than all but one
                of twenty servers take.
        """
