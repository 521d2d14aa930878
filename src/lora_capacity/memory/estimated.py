"""Amounts of memory that shapes do not tell, estimated for any GPU and version from what servers logged."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, ClassVar, Self

import numpy as np
from jaxtyping import Float

from lora_capacity.errors import InputError
from lora_capacity.files import write_whole
from lora_capacity.hardware import Gpu, catalogue
from lora_capacity.memory.deployment import Amounts, Start
from lora_capacity.memory.fitted import forward_bytes
from lora_capacity.reading import read_json
from lora_capacity.schema import Document, NotNegative, Number

BUNDLED_TERMS = Path(__file__).parent / "bundled" / "terms.json"
"""What ``lora-capacity fit`` wrote of a table of public vLLM start-up logs."""

_OUTER = 0.05
"""Share of servers outside each of the two spreads."""

_LARGEST_GRAPH = 512
"""Most tokens of a captured batch (``max_cudagraph_capture_size`` in ``config/vllm.py`` of 0.27.0)."""

_LINKED_BYTES_PER_S = 3e11
"""Least speed of a link that all GPUs of a server share: NVLink of a V100; bridges of workstations join only pairs."""


@dataclass(frozen=True)
class EstimatedTerms(Document):
    """Terms of the memory that shapes do not tell, and how far their sum goes astray.

    The sum is taken as expected times a log-normal factor, whose lower and upper halves differ in width.

    Attributes:
        context_bytes: CUDA context, libraries and their workspaces, outside PyTorch's allocator.
        collective_bytes: Buffers of NCCL where GPUs share a layer over PCIe.
        linked_collective_bytes: The same, with those of custom all-reduce, over NVLink and the like.
        lora_kernel_bytes: What the LoRA kernels add, whatever the slots.
        logit_bytes: Bytes alive per request and vocabulary entry when tokens are sampled.
        sorted_logit_bytes: The same in versions that sort the logits.
        step_bytes_per_token: Bytes alive per token of a step while its tokens are sampled, besides hidden vectors.
        compile_scratch_bytes: Scratch alive beside the largest activations of the forward pass.
        graph_bytes: The captured CUDA graphs, whatever the layers.
        graph_bytes_per_layer: What each decoder layer adds to them.
        least_factor: The factor of the sum that one of twenty servers stays below.
        most_factor: The factor that one of twenty exceeds.
        weight_spread: Standard deviation of what is loaded, as a share of the weights.
        source: What the terms were fitted to.
    """

    context_bytes: NotNegative
    collective_bytes: NotNegative
    linked_collective_bytes: NotNegative
    lora_kernel_bytes: NotNegative
    logit_bytes: NotNegative
    sorted_logit_bytes: NotNegative
    step_bytes_per_token: NotNegative
    compile_scratch_bytes: NotNegative
    graph_bytes: NotNegative
    graph_bytes_per_layer: NotNegative
    least_factor: Annotated[float, Number(0, 1, exclusive=True)]
    most_factor: Annotated[float, Number(1)]
    weight_spread: NotNegative
    source: str

    where: ClassVar[str] = "terms"
    kv_cache_memory_bytes: ClassVar[float | None] = None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If there is no such file, or it holds something else.
        """
        content = read_json(path, "a file of memory terms")
        if not isinstance(content, Mapping):
            raise InputError(str(path), type(content).__name__, "a JSON object")
        return cls.from_json(content)

    @classmethod
    def bundled(cls) -> Self:
        """Return the terms that come with this library."""
        return cls.from_file(BUNDLED_TERMS)

    def save(self, path: str | Path) -> None:
        """Write the terms, to four digits."""
        content = {name: _shortened(value) for name, value in self.to_json().items()}
        write_whole(path, json.dumps(content, indent=2) + "\n")

    def amounts(self, start: Start, quantile: float) -> Amounts:
        """Return the amounts at a start; what ``quantile`` adds to the expected sum stands under ``other_bytes``.

        Args:
            start: The servers.
            quantile: As `MemoryTerms.amounts` has it.

        Valid for: NVIDIA GPUs best; others were seen too rarely.
        """
        amounts = Amounts(self._activation_bytes(start), self._other_bytes(start), self._graph_bytes(start))
        expected = amounts.taken_bytes(start.behaviour)
        deviations = NormalDist().inv_cdf(quantile)
        edge = np.log(self.least_factor if deviations < 0 else self.most_factor)
        factor = np.exp(edge * abs(deviations / NormalDist().inv_cdf(_OUTER)))
        loaded = self.weight_spread * start.shard.weight_bytes
        # Independent of each other: what is loaded differs by the checkpoint, the rest by the machine.
        added = np.sign(deviations) * np.hypot(expected * (factor - 1), deviations * loaded)
        return amounts._replace(other_bytes=amounts.other_bytes + added)

    def _activation_bytes(self, start: Start) -> Float[np.ndarray, " configs"]:
        """Peak of the profiling step: of its forward pass or of the sampler, whichever is larger.

        The sampler holds hidden vectors and several copies of the logits; the stage of a pipeline that has no output
        head does not sample.
        """
        shard, tokens = start.shard, start.max_num_batched_tokens
        forward = forward_bytes(shard, tokens, self.compile_scratch_bytes)
        if not shard.is_last:
            return forward
        per_logit = self.sorted_logit_bytes if start.behaviour.samples_by_sorting else self.logit_bytes
        # The usual 14 bytes hold two copies in float32 and one in the model's own type.
        per_logit += shard.dtype_bytes - 2
        logits = np.minimum(start.max_num_seqs, tokens) * float(shard.vocab_size)
        sampling = logits * per_logit + tokens * (shard.hidden_size * shard.dtype_bytes + self.step_bytes_per_token)
        # Kernels for MXFP4 have a workspace of their own, which is freed.
        keeps = start.behaviour.keeps_expert_workspace and shard.quantization != "mxfp4"
        if keeps and shard.moe_intermediate_size:
            width = max(2 * shard.moe_intermediate_size, shard.hidden_size) + shard.moe_intermediate_size
            sampling = sampling + tokens * float(shard.experts_per_token * width * shard.dtype_bytes)
        return np.asarray(np.maximum(forward, sampling), np.float64)

    def _other_bytes(self, start: Start) -> Float[np.ndarray, " configs"]:
        shared = 0.0
        if start.shard.tensor_parallel_size > 1:
            shared = self.linked_collective_bytes if _is_linked(start.gpu) else self.collective_bytes
        lora = np.where(start.max_loras > 0, self.lora_kernel_bytes, 0.0)
        return np.asarray(self.context_bytes + shared + lora, np.float64)

    def _graph_bytes(self, start: Start) -> Float[np.ndarray, " configs"]:
        """Graphs of one capture times the captures: with LoRA one without adapters, and more per number of them.

        A capture takes batches of evenly spaced sizes up to twice ``max_num_seqs``, or 512.
        """
        if start.deployment.enforce_eager:
            return np.zeros(start.max_loras.shape)
        captures = np.where(start.max_loras > 0, start.behaviour.lora_graph_captures, 1)
        if start.deployment.specialize_active_lora:
            # Without adapters, with 1, 2, 4, ... up to all of them, and with more (``get_captured_lora_counts``).
            powers = np.log2(np.maximum(start.max_loras, 1)).astype(np.int64) + 1
            captures = np.where(start.max_loras > 0, powers + 2, 1)
        one = self.graph_bytes + self.graph_bytes_per_layer * start.shard.num_layers
        sizes = np.minimum(2 * start.max_num_seqs, _LARGEST_GRAPH) / _LARGEST_GRAPH
        return np.asarray(captures * one * sizes, np.float64)


def _shortened(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")


def _is_linked(gpu: Gpu) -> bool:
    """Whether all GPUs of such a server are linked directly, as far as the catalogue knows the GPU."""
    known = catalogue().get(gpu.name)
    return known is not None and (known.link_bytes_per_s or 0.0) >= _LINKED_BYTES_PER_S
