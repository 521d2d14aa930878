"""Shapes read off a Hugging Face ``config.json``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_capacity.errors import InputError, check_number
from lora_capacity.models.layouts import LAYOUTS, Layout
from lora_capacity.schema import read_json


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a ``config.json``, or of that in a folder, and the name of its folder.

    Raises:
        InputError: If the file cannot be read as a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file, "a readable config.json of a model")
    if not isinstance(config, dict):
        raise InputError(str(file), type(config).__name__, "a JSON object")
    return config, file.resolve().parent.name


def shape_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelShape`, but for the name, from the content of a ``config.json``.

    Raises:
        InputError: If the architecture is not a supported dense decoder, weights are quantized, a size is missing, or
            attention slides over a window.
    """
    layout = _layout(config)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise InputError(
            "config.json num_attention_heads", heads, f"a divisor of hidden_size {hidden}", "or give head_dim"
        )
    one_kv_head_each = layout.kv_heads_optional and config.get("num_key_value_heads") is None
    return {
        "num_layers": _size(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": _size(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if one_kv_head_each else _size(config, "num_key_value_heads"),
        "head_dim": hidden // heads if config.get("head_dim") is None else _size(config, "head_dim"),
        "vocab_size": _size(config, "vocab_size"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_bias": layout.attention_bias or bool(config.get("attention_bias", False)),
        "max_position_embeddings": _context_tokens(config),
        "architecture": layout.architecture,
        "hf_id": _hf_id(config),
    }


def _hf_id(config: Mapping[str, Any]) -> str:
    """Return ``_name_or_path`` where that is an organisation and a model, not somebody's folder."""
    told = config.get("_name_or_path")
    return told if isinstance(told, str) and re.fullmatch(r"[\w-]+/[\w.-]+", told) else ""


def _layout(config: Mapping[str, Any]) -> Layout:
    """Return the layout of a model, whose weights are 16 bits wide and whose attention sees all tokens."""
    by_type = {layout.model_type: layout.architecture for layout in LAYOUTS.values()}
    model_type = config.get("model_type")
    listed = config.get("architectures") or [by_type.get(str(model_type), model_type)]
    layout = LAYOUTS.get(str(listed[0]))
    if layout is None:
        remedy = "mixtures of experts, multimodal and recurrent models are not supported"
        raise InputError("config.json architectures", listed[0], ", ".join(LAYOUTS), remedy)
    if config.get("quantization_config"):
        raise InputError(
            "config.json quantization_config", "quantized weights", "16-bit weights", "use the unquantized model"
        )
    if config.get("sliding_window") is not None and config.get("use_sliding_window", layout.window_is_used):
        raise InputError(
            "config.json sliding_window", config["sliding_window"], "null", "sliding-window attention is not supported"
        )
    return layout


def _size(config: Mapping[str, Any], key: str) -> int:
    if config.get(key) is None:
        raise InputError(f"config.json {key}", "missing", "a whole number >= 1")
    return int(check_number(f"config.json {key}", config[key], minimum=1, integer=True))


def _context_tokens(config: Mapping[str, Any]) -> int:
    """Longest sequence as vLLM derives it: rotary scaling stretches it, but for kinds whose limit counts it already.

    Source: ``_get_and_verify_max_len`` in vLLM's ``config.py``.
    """
    limit = _size(config, "max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "llama3", "longrope", "su"):
        return limit
    factor = check_number("config.json rope_scaling.factor", scaling.get("factor", 1.0), minimum=1)
    original = scaling.get("original_max_position_embeddings", limit)
    return int(check_number("config.json rope_scaling.original_max_position_embeddings", original, minimum=1) * factor)
