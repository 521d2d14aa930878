"""Shapes of the base model's layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lora_capacity.errors import InputError
from lora_capacity.models.hf_config import read_config, shape_fields
from lora_capacity.models.layouts import FUSED, LAYOUTS
from lora_capacity.schema import Count, Document


@dataclass(frozen=True)
class LinearModule:
    """A linear layer as vLLM runs it: one input, one or more fused outputs, each with an adapter of its own.

    Attributes:
        name: vLLM's name of the layer.
        input_size: Width of its input.
        output_sizes: Width of each fused output.
    """

    name: str
    input_size: int
    output_sizes: tuple[int, ...]


@dataclass(frozen=True)
class ModelShape(Document):
    """Layer shapes of a dense decoder (Llama, Mistral, Qwen 2 or Qwen 3).

    Attributes:
        name: Name of the model.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward block.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the token embedding.
        tie_word_embeddings: Whether the output head shares the embedding's weights.
        attention_bias: Whether the q, k, v projections have biases.
        max_position_embeddings: Longest sequence the model takes, tokens.
        architecture: Hugging Face's name of the architecture, on which it depends whether vLLM adapts embeddings too.
        dtype_bytes: Bytes of a weight and of a cached key or value element.
        hf_id: Its id at Hugging Face, empty where it is not known.
    """

    name: str
    num_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    vocab_size: Count
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: Count
    architecture: str
    dtype_bytes: Count = 2
    hf_id: str = ""

    where: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in LAYOUTS:
            raise InputError("model.architecture", self.architecture, ", ".join(LAYOUTS))
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads {self.num_attention_heads}"
            raise InputError("model.num_key_value_heads", self.num_key_value_heads, allowed)

    @property
    def served_as(self) -> str:
        """What a server is told to load: the id at Hugging Face, or the name where that is not known."""
        return self.hf_id or self.name

    @property
    def linear_modules(self) -> tuple[LinearModule, ...]:
        """The four linear layers of one decoder layer."""
        q_size = self.num_attention_heads * self.head_dim
        kv_size = self.num_key_value_heads * self.head_dim
        sizes = {
            "qkv_proj": (self.hidden_size, (q_size, kv_size, kv_size)),
            "o_proj": (q_size, (self.hidden_size,)),
            "gate_up_proj": (self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            "down_proj": (self.intermediate_size, (self.hidden_size,)),
        }
        return tuple(LinearModule(name, *sizes[name]) for name in FUSED)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: linear layers, biases of q, k, v, two norms a layer and the last, embedding, head."""
        matrices = sum(module.input_size * sum(module.output_sizes) for module in self.linear_modules)
        bias = sum(self.linear_modules[0].output_sizes) if self.attention_bias else 0
        layer = matrices + bias + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return (self.num_layers * layer + embeddings + self.hidden_size) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * self.dtype_bytes

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str) -> Self:
        """Read the shape off a Hugging Face ``config.json``.

        Args:
            config: The file's content.
            name: Name to give the model.

        Raises:
            InputError: If the architecture is not a supported dense decoder, weights are quantized, a size is
                missing, or attention slides over a window.
        """
        return cls(name=name, **shape_fields(config))

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read the shape from a ``config.json`` or from the folder that holds it; the folder names the model.

        Raises:
            InputError: If the file cannot be read as JSON, or as :meth:`from_hf_config` says.
        """
        return cls.from_hf_config(*read_config(path))
