"""Shapes of the base model's layers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from lora_capacity.errors import InputError, check_number, checked_fields, nearest_hint

TARGET_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "all-linear": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        "attention": ("qkv_proj", "o_proj"),
    }
)
"""Presets of adapted modules. vLLM fuses q, k, v into ``qkv_proj`` and gate, up into ``gate_up_proj``."""

_FUSED_INTO = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up_proj"),
    "o_proj": "o_proj",
    "down_proj": "down_proj",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Supported architectures by the ``model_type`` of ``config.json``."""


def expand_target_modules(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the fused linear layers that adapters of these target modules make vLLM reserve space in.

    Args:
        target_modules: ``all-linear``, ``attention``, or names as in an adapter's ``target_modules`` (``q_proj``,
            ``down_proj``, ...). A fused layer is reserved in full when any of its parts is adapted.

    Raises:
        InputError: If a name is not known, or there is none.
    """
    if isinstance(target_modules, str) and target_modules in TARGET_MODULES:
        return TARGET_MODULES[target_modules]
    known = (*TARGET_MODULES, *_FUSED_INTO)
    names = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    for name in names:
        if name not in _FUSED_INTO:
            raise InputError("target_modules", name, ", ".join(known), nearest_hint(str(name), known))
    if not names:
        raise InputError("target_modules", target_modules, "at least one module name")
    wanted = {_FUSED_INTO[name] for name in names}
    return tuple(name for name in TARGET_MODULES["all-linear"] if name in wanted)


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
class ModelShape:
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
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int
    architecture: str
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.type is int:
                number = check_number(f"model.{entry.name}", getattr(self, entry.name), minimum=1, integer=True)
                object.__setattr__(self, entry.name, number)
        if self.architecture not in _ARCHITECTURES.values():
            raise InputError("model.architecture", self.architecture, ", ".join(_ARCHITECTURES.values()))
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads {self.num_attention_heads}"
            raise InputError("model.num_key_value_heads", self.num_key_value_heads, allowed)

    @property
    def linear_modules(self) -> tuple[LinearModule, ...]:
        """The four linear layers of one decoder layer."""
        q_size = self.num_attention_heads * self.head_dim
        kv_size = self.num_key_value_heads * self.head_dim
        return (
            LinearModule("qkv_proj", self.hidden_size, (q_size, kv_size, kv_size)),
            LinearModule("o_proj", q_size, (self.hidden_size,)),
            LinearModule("gate_up_proj", self.hidden_size, (self.intermediate_size, self.intermediate_size)),
            LinearModule("down_proj", self.intermediate_size, (self.hidden_size,)),
        )

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
        architecture = _architecture(config)
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        if config.get("head_dim") is None and hidden % heads:
            raise InputError(
                "config.json num_attention_heads", heads, f"a divisor of hidden_size {hidden}", "or give head_dim"
            )
        kv_heads_optional = architecture == "LlamaForCausalLM" and config.get("num_key_value_heads") is None
        return cls(
            name=name,
            num_layers=_size(config, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads_optional else _size(config, "num_key_value_heads"),
            head_dim=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim"),
            vocab_size=_size(config, "vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=architecture == "Qwen2ForCausalLM" or bool(config.get("attention_bias", False)),
            max_position_embeddings=_context_tokens(config),
            architecture=architecture,
        )

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read the shape from a ``config.json`` or from the folder that holds it; the folder names the model.

        Raises:
            InputError: If the file cannot be read as JSON, or as :meth:`from_hf_config` says.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(str(file), error.strerror or str(error), "a readable config.json of a model") from None
        except ValueError as error:
            raise InputError(str(file), str(error), "JSON") from None
        if not isinstance(config, dict):
            raise InputError(str(file), type(config).__name__, "a JSON object")
        return cls.from_hf_config(config, file.resolve().parent.name)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild what :meth:`to_json` wrote.

        Raises:
            InputError: If a key is unknown or missing, or a value is not allowed.
        """
        return cls(**checked_fields(cls, "model", content))


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    listed = config.get("architectures") or [_ARCHITECTURES.get(str(model_type), model_type)]
    architecture = str(listed[0])
    if architecture not in _ARCHITECTURES.values():
        remedy = "mixtures of experts, multimodal and recurrent models are not supported"
        raise InputError("config.json architectures", listed[0], ", ".join(_ARCHITECTURES.values()), remedy)
    if config.get("quantization_config"):
        raise InputError(
            "config.json quantization_config", "quantized weights", "16-bit weights", "use the unquantized model"
        )
    if config.get("sliding_window") is not None and config.get("use_sliding_window", "Qwen" not in architecture):
        raise InputError(
            "config.json sliding_window", config["sliding_window"], "null", "sliding-window attention is not supported"
        )
    return architecture


def _size(config: Mapping[str, Any], key: str) -> int:
    if config.get(key) is None:
        raise InputError(f"config.json {key}", "missing", "a whole number >= 1")
    return int(check_number(f"config.json {key}", config[key], minimum=1, integer=True))


def _context_tokens(config: Mapping[str, Any]) -> int:
    """Longest sequence as vLLM derives it: rotary scaling stretches it, but for kinds whose limit counts it already."""
    limit = _size(config, "max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "llama3", "longrope", "su"):
        return limit
    factor = check_number("config.json rope_scaling.factor", scaling.get("factor", 1.0), minimum=1)
    original = scaling.get("original_max_position_embeddings", limit)
    return int(check_number("config.json rope_scaling.original_max_position_embeddings", original, minimum=1) * factor)
