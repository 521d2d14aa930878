"""Material to measure with where real weights are absent: a small random model, and adapters for any model.

How long a step takes depends on shapes, not on what the weights say, so that random ones measure as well. Files are
written here directly: a safetensors file is a length, a JSON header and the raw numbers, and numpy has no bfloat16, the
type wanted, which the ``safetensors`` package would take from numpy only as something else.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_capacity.errors import InputError, check_keys, check_number
from lora_capacity.models import TARGET_MODULES, ModelShape, expand_target_modules

SMALL_LLAMA: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)
"""Content of ``config.json`` of a Llama that a CPU serves in milliseconds a step: 4 layers, 256 wide, 1,000 words."""

_PARTS = {
    "qkv_proj": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o_proj": ("self_attn", ("o_proj",)),
    "gate_up_proj": ("mlp", ("gate_proj", "up_proj")),
    "down_proj": ("mlp", ("down_proj",)),
}
"""Where each fused layer stands in a decoder layer, and the layers that checkpoints hold in its place."""

_STD = 0.02
"""Of random weights, the usual ``initializer_range``: no layer overflows, however many follow each other."""

_SPECIAL_WORDS = ("<s>", "</s>", "<unk>")
_BYTES_PER_ELEMENT = 2  # of a bfloat16

Tensor = tuple[str, tuple[int, ...], float]
"""A tensor to write: name, shape, and the standard deviation of its random elements (0: all ones)."""


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a small Llama of random bfloat16 weights with its configuration and tokenizer.

    vLLM and transformers load it without a network. Its tokenizer has ``vocab_size`` words: three special ones, then
    ``w3``, ``w4``, ..., with blanks between.

    Args:
        folder: Where to write; created if need be, files of an earlier call are replaced.
        seed: Seed of the weights.
        **changes: Entries of ``config.json`` that differ from :data:`SMALL_LLAMA`.

    Returns:
        The folder.

    Raises:
        InputError: If a key is unknown, the sizes make no model, or the folder cannot be written.
    """
    check_keys("config.json", changes, SMALL_LLAMA)
    config = {**SMALL_LLAMA, **changes}
    shape = ModelShape.from_hf_config(config, folder.name)
    if shape.architecture != "LlamaForCausalLM" or shape.attention_bias:
        raise InputError("config.json", "another architecture or biases", "a Llama without biases")
    check_number("config.json vocab_size", shape.vocab_size, minimum=len(_SPECIAL_WORDS) + 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", config)
        _write_tokenizer(folder, shape)
        _write_safetensors(folder / "model.safetensors", list(_model_tensors(shape)), seed)
    except OSError as error:
        raise _unwritable(folder, error, shape.weight_bytes) from None
    return folder


def write_adapter(
    folder: Path,
    model: Path | ModelShape,
    *,
    rank: int,
    target_modules: str | tuple[str, ...] = "all-linear",
    seed: int = 0,
) -> Path:
    """Write a LoRA adapter of random bfloat16 weights in PEFT's format.

    One folder per rank is enough for many adapters: a server takes the same folder under several names, and holds and
    loads each of them by itself.

    Args:
        folder: Where to write; created if need be, files of an earlier call are replaced.
        model: The base model: its folder, its ``config.json``, or its shapes.
        rank: Rank of every adapted layer.
        target_modules: ``all-linear``, ``attention``, or names of layers as checkpoints have them (``q_proj``, ...).
        seed: Seed of the weights.

    Returns:
        The folder.

    Raises:
        InputError: If the rank or a module is not allowed, the model cannot be read or is no dense decoder of Llama's
            modules, or the folder cannot be written.
    """
    check_number("rank", rank, minimum=1, integer=True)
    shape = model if isinstance(model, ModelShape) else ModelShape.from_file(model)
    check_profiled(shape)
    modules = _unfused(target_modules)
    tensors = list(_adapter_tensors(shape, rank, modules))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": shape.name,
                "r": rank,
                "lora_alpha": 2 * rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "modules_to_save": None,
                "target_modules": list(modules),
            },
        )
        _write_safetensors(folder / "adapter_model.safetensors", tensors, seed)
    except OSError as error:
        raise _unwritable(folder, error, sum(map(_tensor_bytes, tensors))) from None
    return folder


def check_profiled(shape: ModelShape) -> None:
    """Refuse a model that no adapters can be written for, and whose step times nothing is known of.

    Raises:
        InputError: If it is not a dense decoder of Llama's modules.
    """
    parts = {module.name: module.parts or (module.name,) for module in shape.linear_modules}
    if not shape.is_dense_decoder or parts != {name: layers for name, (_, layers) in _PARTS.items()}:
        allowed = "a dense decoder with 16-bit weights whose layers are called as Llama's"
        raise InputError(f"model {shape.name}, architecture", shape.architecture, allowed)


def _unfused(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the layers of a checkpoint that are meant; a fused name stands for all its parts."""
    fused = expand_target_modules(target_modules)
    named = TARGET_MODULES.get(target_modules) if isinstance(target_modules, str) else target_modules
    wanted = {target_modules} if named is None else set(named)
    return tuple(part for name in fused for part in _PARTS[name][1] if part in wanted or name in wanted)


def _model_tensors(shape: ModelShape) -> Iterator[Tensor]:
    hidden = shape.hidden_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden), _STD
    for layer in range(shape.num_layers):
        for prefix, _, sizes in _linear_layers(shape, layer):
            yield f"model.{prefix}.weight", sizes, _STD
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,), 0.0
    yield "model.norm.weight", (hidden,), 0.0
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden), _STD


def _adapter_tensors(shape: ModelShape, rank: int, modules: tuple[str, ...]) -> Iterator[Tensor]:
    for layer in range(shape.num_layers):
        for prefix, module, (output_size, input_size) in _linear_layers(shape, layer):
            if module in modules:
                # Both factors random: a trained adapter has no zero one, and its outputs then differ from the model's.
                yield f"base_model.model.model.{prefix}.lora_A.weight", (rank, input_size), _STD
                yield f"base_model.model.model.{prefix}.lora_B.weight", (output_size, rank), _STD


def _linear_layers(shape: ModelShape, layer: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield path, name and shape ``(outputs, inputs)`` of the linear layers of a decoder layer in a checkpoint."""
    for module in shape.linear_modules:
        parent, parts = _PARTS[module.name]
        for part, output_size in zip(parts, module.output_sizes, strict=True):
            yield f"layers.{layer}.{parent}.{part}", part, (output_size, module.input_size)


def _tensor_bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor[1])) * _BYTES_PER_ELEMENT


def _write_safetensors(path: Path, tensors: Iterable[Tensor], seed: int) -> None:
    """Write random tensors one at a time, so that memory holds the largest of them only.

    Source: format of https://github.com/huggingface/safetensors (header length as little-endian uint64, JSON header,
    data without gaps).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _tensor_bytes(tensor)
        header[tensor[0]] = {"dtype": "BF16", "shape": list(tensor[1]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which must start aligned
    random = np.random.default_rng(seed)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, size, std in tensors:
                values = np.ones(size, "<f4")
                if std:
                    values *= std * random.standard_normal(size, dtype=np.float32)
                # The upper half of a float32 is a bfloat16, rounded towards zero.
                file.write((values.view("<u4") >> 16).astype("<u2").tobytes())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_tokenizer(folder: Path, shape: ModelShape) -> None:
    words = [*_SPECIAL_WORDS, *(f"w{index}" for index in range(len(_SPECIAL_WORDS), shape.vocab_size))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": word, **flags} for index, word in enumerate(_SPECIAL_WORDS)],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: index for index, word in enumerate(words)},
                "unk_token": _SPECIAL_WORDS[2],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL_WORDS[0],
            "eos_token": _SPECIAL_WORDS[1],
            "unk_token": _SPECIAL_WORDS[2],
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _unwritable(folder: Path, error: OSError, needed_bytes: int) -> InputError:
    return InputError(str(folder), error.strerror or str(error), f"a folder with room for {needed_bytes:,} bytes")
