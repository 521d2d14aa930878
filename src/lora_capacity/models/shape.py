"""Shapes of the base model's layers."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from lora_capacity.errors import InputError
from lora_capacity.models.hf_config import read_config, shape_fields
from lora_capacity.models.layouts import FUSED, TARGET_MODULES, registry
from lora_capacity.models.modules import Block, LayerCache, LinearModule, Natural, document, natural, tuple_of
from lora_capacity.schema import Count, Document, NotNegative

_FIRST_OPTIONAL = 14
"""Index of the first field that only some models have, ``blocks``."""


@dataclass(frozen=True)
class ModelShape(Document):
    """Layer shapes of a decoder.

    What stands before ``dtype_bytes`` describes a dense decoder of Llama's modules whole; models that are made
    otherwise say so in ``blocks``.

    Attributes:
        name: Name of the model.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the feed-forward block.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head, or of the part that is rotated.
        vocab_size: Rows of the token embedding.
        tie_word_embeddings: Whether the output head shares the embedding's weights.
        attention_bias: Whether the q, k, v projections have biases.
        max_position_embeddings: Longest sequence the model takes, tokens.
        architecture: vLLM's name of the architecture, on which it depends whether it adapts embeddings too.
        dtype_bytes: Bytes of a weight that is not quantized, of an adapter's, and of a cached key or value element.
        hf_id: Its id at Hugging Face, empty where it is not known.
        blocks: Kinds of decoder layers; empty: all are Llama's.
        order: The kind of each layer, an index into ``blocks``; empty with them.
        final_norm: Elements of the norm after the last layer; 0: ``hidden_size``.
        experts_per_token: Experts of a mixture that a token goes to; 0 without experts.
        other_parameters: Parameters beside the decoder: a vision encoder's.
        quantization: Scheme of quantized weights; empty: there are none.
        head_bits: Bits of the output head's stored weights; 0: those of the model's own type.
        kv_cache_dtype: What the checkpoint wants the KV cache stored as: ``fp8``, or ``auto`` for its own type.
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
    blocks: Annotated[tuple[Block, ...], tuple_of(document(Block))] = ()
    order: Annotated[tuple[int, ...], tuple_of(natural)] = ()
    final_norm: Natural = 0
    experts_per_token: Natural = 0
    other_parameters: Natural = 0
    quantization: str = ""
    head_bits: NotNegative = 0.0
    kv_cache_dtype: str = "auto"

    where: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads {self.num_attention_heads}"
            raise InputError("model.num_key_value_heads", self.num_key_value_heads, allowed)
        if not self.blocks and self.architecture not in registry().architectures:
            raise InputError("model.architecture", self.architecture, ", ".join(registry().architectures))
        if self.blocks and (len(self.order) != self.num_layers or max(self.order) >= len(self.blocks)):
            raise InputError("model.order", "a list", f"an index of blocks for each of {self.num_layers} layers")
        # Told once: a Llama's layers follow from the sizes.
        if self.blocks == (self._llama_block(),):
            object.__setattr__(self, "blocks", ())
            object.__setattr__(self, "order", ())
        if self.final_norm == self.hidden_size:
            object.__setattr__(self, "final_norm", 0)

    @property
    def served_as(self) -> str:
        """What a server is told to load: the id at Hugging Face, or the name where that is not known."""
        return self.hf_id or self.name

    @cached_property
    def layers(self) -> tuple[Block, ...]:
        """Every decoder layer, first to last."""
        if not self.blocks:
            return (self._llama_block(),) * self.num_layers
        return tuple(self.blocks[kind] for kind in self.order)

    @property
    def is_dense_decoder(self) -> bool:
        """Whether all layers are alike, attend to every token and have no experts: what step times are known for."""
        block = self.layers[0]
        alike = all(layer == block for layer in self.layers)
        full = block.cache is not None and block.cache.kind == "full"
        return alike and full and not self.quantization and not any(module.experts for module in block.modules)

    @property
    def num_experts(self) -> int:
        """Experts of a mixture's layer; 0 without."""
        return max(module.experts for block in set(self.layers) for module in block.modules)

    @property
    def linear_modules(self) -> tuple[LinearModule, ...]:
        """The linear layers of a decoder layer, the commonest kind of it."""
        return Counter(self.layers).most_common(1)[0][0].modules

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: linear layers, biases, norms, embedding, head, and encoders beside the decoder."""
        layers = sum(
            count
            * (
                sum(m.weight_bytes(1, self.dtype_bytes) + m.bias_bytes(1, self.dtype_bytes) for m in block.modules)
                + block.vectors * self.dtype_bytes
            )
            for block, count in Counter(self.layers).items()
        )
        elements = self.vocab_size * self.hidden_size + (self.final_norm or self.hidden_size) + self.other_parameters
        return layers + elements * self.dtype_bytes + self.vocab_size * self.head_row_bytes

    @property
    def head_row_bytes(self) -> int:
        """Bytes of an output head's row; 0 where it is the embedding."""
        return 0 if self.tie_word_embeddings else round(self.hidden_size * (self.head_bits or 8 * self.dtype_bytes) / 8)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token within every window takes in the KV cache, over all layers, in the model's own type."""
        kept = (layer.cache for layer in self.layers)
        return self.dtype_bytes * sum(cache.elements for cache in kept if cache and cache.kind != "state")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object; what only some models have is left out where it does not hold."""
        optional = {entry.name: entry.default for entry in dataclasses.fields(self)[_FIRST_OPTIONAL:]}
        content = super().to_json().items()
        return {name: value for name, value in content if name not in optional or value != optional[name]}

    def _llama_block(self) -> Block:
        """Return a decoder layer of Llama's modules."""
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        sizes = {
            "qkv_proj": (self.hidden_size, (q_size, kv_size, kv_size)),
            "o_proj": (q_size, (self.hidden_size,)),
            "gate_up_proj": (self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            "down_proj": (self.intermediate_size, (self.hidden_size,)),
        }
        modules = tuple(
            LinearModule(
                name,
                *sizes[name],
                kind="attention" if name in TARGET_MODULES["attention"] else "mlp",
                parts=parts if len(parts) > 1 else (),
                split="row" if name in ("o_proj", "down_proj") else "column",
                kv_heads=self.num_key_value_heads if name == "qkv_proj" else 0,
                bias=self.attention_bias and name == "qkv_proj",
            )
            for name, parts in FUSED.items()
        )
        cache = LayerCache("full", 2 * kv_size, self.num_key_value_heads)
        return Block(modules, 2 * self.hidden_size, cache)

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        name: str,
        quantization: str | None = None,
        layouts: Path | None = None,
    ) -> Self:
        """Read the shape off a Hugging Face ``config.json``.

        Args:
            config: The file's content.
            name: Name to give the model.
            quantization: How vLLM is told to load the weights (``--quantization``); None: as the file says.
            layouts: A file of layouts of architectures besides the bundled ones, of the form of ``layouts.json``.

        Raises:
            InputError: If the architecture or the quantization is not known, or a size is missing or out of range.
        """
        return cls(name=name, **shape_fields(config, name, quantization, layouts))

    @classmethod
    def from_file(cls, path: Path, quantization: str | None = None, layouts: Path | None = None) -> Self:
        """Read the shape from a ``config.json`` or from the folder that holds it; the folder names the model.

        Args:
            path: The file or folder.
            quantization: As in :meth:`from_hf_config`.
            layouts: As in :meth:`from_hf_config`.

        Raises:
            InputError: If the file cannot be read as JSON, or as :meth:`from_hf_config` says.
        """
        config, name = read_config(path)
        return cls.from_hf_config(config, name, quantization, layouts)
