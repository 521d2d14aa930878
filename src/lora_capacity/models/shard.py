"""What one GPU of a server holds of a model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_number
from lora_capacity.models.modules import Block, LinearModule
from lora_capacity.models.shape import ModelShape

VOCAB_PADDING = 64
"""Rows that embedding and output head are padded to. Source: vLLM, ``layers/vocab_parallel_embedding.py``."""


Rows = TypeVar("Rows", int, NDArray[np.int64])


def padded_rows(rows: Rows, tensor_parallel_size: int, padding: int = VOCAB_PADDING) -> Rows:
    """Return the rows of an embedding or an output head on one GPU.

    Args:
        rows: Rows before padding.
        tensor_parallel_size: GPUs that they are divided over.
        padding: Rows that they are padded to a multiple of.
    """
    return -(-(-(-rows // padding) * padding) // tensor_parallel_size)


class KvLayers(NamedTuple):
    """Layers that keep the same of a sequence, on one GPU.

    Attributes:
        kind: As in `LayerCache`.
        layers: How many there are.
        token_elements: Elements that each keeps of a token; of a ``state`` 0.
        window: Tokens that each keeps, where it has a window.
        state_bytes: Bytes of a ``state``.
    """

    kind: str
    layers: int
    token_elements: int
    window: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class ModelShard:
    """A part of a model: some of its layers, each divided over the GPUs of its stage.

    Attributes:
        model: The whole.
        tensor_parallel_size: GPUs that share every layer.
        first_layer: Its first layer.
        end_layer: The layer after its last.
    """

    model: ModelShape
    tensor_parallel_size: int
    first_layer: int
    end_layer: int

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output head and the last norm."""
        return self.end_layer == self.model.num_layers

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.end_layer - self.first_layer

    @property
    def layers(self) -> tuple[Block, ...]:
        """Its decoder layers, first to last."""
        return self.model.layers[self.first_layer : self.end_layer]

    def layer_buffers(self) -> Iterator[int]:
        """Yield the bytes of the tensors of all layers in order of creation."""
        dtype_bytes, tensor_parallel = self.model.dtype_bytes, self.tensor_parallel_size
        buffers = {block: self._buffers_of(block, tensor_parallel, dtype_bytes) for block in set(self.layers)}
        for layer in self.layers:
            yield from buffers[layer]

    def _buffers_of(self, block: Block, tensor_parallel: int, dtype_bytes: int) -> list[int]:
        buffers = []
        for module in block.modules:
            buffers.append(module.weight_bytes(tensor_parallel, dtype_bytes))
            if module.bias:
                buffers.append(module.bias_bytes(tensor_parallel, dtype_bytes))
        hidden = self.model.hidden_size
        norms, rest = divmod(block.local_vectors(tensor_parallel), hidden)
        return buffers + [hidden * dtype_bytes] * norms + ([rest * dtype_bytes] if rest else [])

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights, embedding and head as they are padded."""
        model, rows = self.model, padded_rows(self.model.vocab_size, self.tensor_parallel_size)
        total = sum(self.layer_buffers())
        shares_head = model.tie_word_embeddings and self.is_last
        if self.is_first or shares_head:
            total += rows * model.hidden_size * model.dtype_bytes
        if self.is_first:
            total += self.other_bytes
        if self.is_last:
            total += (model.final_norm or model.hidden_size) * model.dtype_bytes + rows * model.head_row_bytes
        return total

    @property
    def other_bytes(self) -> int:
        """Bytes of what stands beside the decoder, divided over the GPUs."""
        return self.model.other_parameters * self.model.dtype_bytes // self.tensor_parallel_size

    @property
    def dtype_bytes(self) -> int:
        """Bytes of an element of activations and adapters."""
        return self.model.dtype_bytes

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, whole on every GPU."""
        return self.model.hidden_size

    @property
    def vocab_size(self) -> int:
        """Width of the logits, which every GPU gathers."""
        return self.model.vocab_size

    @property
    def quantization(self) -> str:
        """Scheme of quantized weights; empty: there are none."""
        return self.model.quantization

    @property
    def num_experts(self) -> int:
        """Experts of a mixture's layer; 0 without."""
        return self.model.num_experts

    @property
    def experts_per_token(self) -> int:
        """Experts that a token goes to; 0 without."""
        return self.model.experts_per_token

    @property
    def moe_intermediate_size(self) -> int:
        """Width inside an expert on this GPU; 0 without."""
        inner = [m.local_input(self.tensor_parallel_size) for m in self._modules if m.experts and m.split == "row"]
        return max(inner, default=0)

    @property
    def intermediate_size(self) -> int:
        """Widest inner width, on this GPU, of the feed-forward block that a token passes."""

        def width(block: Block) -> int:
            inner = [module for module in block.modules if module.kind != "attention" and module.split == "row"]
            return sum(
                module.local_input(self.tensor_parallel_size) * (self.experts_per_token or 1 if module.experts else 1)
                for module in inner
            )

        return max(map(width, set(self.layers)))

    @property
    def attention_width(self) -> int:
        """Widest output of a layer that mixes tokens, on this GPU."""
        columns = [m for m in self._modules if m.kind == "attention" and m.split == "column"]
        return max((sum(m.local_outputs(self.tensor_parallel_size)) for m in columns), default=0)

    @property
    def largest_module_elements(self) -> int:
        """Elements of the largest linear layer's matrix on this GPU, all experts together."""
        gpus = self.tensor_parallel_size
        return max(m.local_input(gpus) * sum(m.local_outputs(gpus)) * max(m.experts, 1) for m in self._modules)

    @cached_property
    def kv_layers(self) -> tuple[KvLayers, ...]:
        """What its layers keep of a sequence, by kind, in order of their first layer."""
        gpus, dtype_bytes = self.tensor_parallel_size, self.model.dtype_bytes
        kinds = Counter(layer.cache for layer in self.layers if layer.cache is not None)
        return tuple(
            KvLayers(cache.kind, count, 0, 0, cache.state_bytes(gpus, dtype_bytes))
            if cache.kind == "state"
            else KvLayers(cache.kind, count, cache.local_elements(gpus), cache.window)
            for cache, count in kinds.items()
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that a token within every window takes in the KV cache on this GPU."""
        return sum(each.layers * each.token_elements for each in self.kv_layers)

    @cached_property
    def _modules(self) -> tuple[LinearModule, ...]:
        return tuple(module for block in dict.fromkeys(self.layers) for module in block.modules)


def split_model(
    model: ModelShape, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> tuple[ModelShard, ...]:
    """Return what one GPU of each pipeline stage holds.

    Layers are shared out evenly; what is left over goes to the stages before the last, from there backwards.

    Args:
        model: The whole.
        tensor_parallel_size: GPUs that share every layer.
        pipeline_parallel_size: Stages that share the layers out.

    Raises:
        InputError: If tensor parallelism does not divide the heads, or there are fewer layers than stages. What divides
            another width badly is told when that width is asked for.

    Source: ``get_pp_indices`` in vLLM 0.32.0, ``distributed/utils.py``.
    """
    gpus = int(check_number("tensor_parallel_size", tensor_parallel_size, minimum=1, integer=True))
    stages = int(check_number("pipeline_parallel_size", pipeline_parallel_size, minimum=1, integer=True))
    if model.num_attention_heads % gpus:
        allowed = f"a divisor of the {model.num_attention_heads} attention heads of {model.name}"
        raise InputError("tensor_parallel_size", gpus, allowed)
    if stages > model.num_layers:
        raise InputError("pipeline_parallel_size", stages, f"at most the {model.num_layers} layers of {model.name}")
    sizes = [model.num_layers // stages] * stages
    for back in range(2, model.num_layers % stages + 2):
        sizes[-back] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return tuple(ModelShard(model, gpus, end - size, end) for end, size in zip(ends, sizes, strict=True))
