"""How quantized checkpoints store their linear layers: bits of a weight, scales, and which layers stay as they are."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_capacity.errors import InputError, check_number, nearest_hint
from lora_capacity.schema import Number, briefly, check_numbers

_SCALE_BITS = 16
"""Bits of the scale of a group of weights: one 16-bit number (AWQ, GPTQ, compressed-tensors)."""


@dataclass(frozen=True)
class Quantization:
    """How weights are stored.

    Attributes:
        scheme: Its name, one of `SCHEMES`.
        bits: Bits of a stored weight, scales of groups included.
        bytes_per_output: Bytes of scales for each output channel.
        unquantized: Names or patterns of layers that stay in the model's own type.
        experts_only: Whether only experts are quantized.
        hidden_multiple: Quantized matrices are padded to a multiple of so many elements of the residual stream.
        inner_multiple: The same of the width inside, on each GPU.
        head: Whether the output head is quantized too.
        kv_cache_dtype: What the checkpoint wants the KV cache stored as: ``fp8``, or ``auto``.
    """

    scheme: str
    bits: float
    bytes_per_output: float = 0.0
    unquantized: tuple[str, ...] = ()
    experts_only: bool = False
    hidden_multiple: int = 1
    inner_multiple: int = 1
    head: bool = False
    kv_cache_dtype: str = "auto"

    @property
    def names_layers(self) -> bool:
        """Whether it says of single layers that they are not quantized."""
        return any(any(letter.isdigit() for letter in pattern) for pattern in self.unquantized)

    def covers(self, paths: Sequence[str], is_expert: bool) -> bool:
        """Return whether a layer is quantized.

        Args:
            paths: Names of its parts in the checkpoint, ``model.layers.3.mlp.down_proj``.
            is_expert: Whether it is an expert of a mixture.
        """
        if self.experts_only and not is_expert:
            return False
        return not any(_matches(pattern, path) for pattern in self.unquantized for path in paths)


def _matches(pattern: str, path: str) -> bool:
    """Return whether an entry of a list of excluded modules means a layer: a part of its name, a glob or ``re:``."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    if "*" in pattern:
        return fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"{pattern}*")
    return f".{pattern}." in f".{path}."


def _grouped(bits: float, group_size: float, zero_bits: float = 0.0) -> float:
    """Return bits of a weight with the scale, and the zero point, of its group."""
    return bits + (_SCALE_BITS + zero_bits) / group_size


SCHEMES: Mapping[str, Quantization] = {
    each.scheme: each
    for each in (
        Quantization("awq", _grouped(4, 128, 4)),
        Quantization("gptq", _grouped(4, 128, 4)),
        Quantization("w4a16", _grouped(4, 128)),
        Quantization("int8", 8, bytes_per_output=4),
        Quantization("fp8", 8),
        Quantization("mxfp4", 4 + 8 / 32, experts_only=True, hidden_multiple=256, inner_multiple=128),
        Quantization("nvfp4", 4 + 8 / 16),
        Quantization("bitsandbytes", 4 + 8 / 64 + 32 / (64 * 256)),
    )
}
"""Schemes with their usual groups. Bits of scales: 16 for 128 weights, and 4 of a zero point (AutoAWQ and AutoGPTQ); a
float32 scale an output channel (INT8 of compressed-tensors); 8 for 32 weights (OCP's MX formats) and for 16 (NVFP4); 8
for 64 weights and a float32 for 256 of those (bitsandbytes, quantized twice). MXFP4 is padded as by its Marlin kernels
(``fused_moe/oracle/mxfp4.py`` of 0.32.0)."""

_SAME_AS = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "auto-round": "gptq",
    "auto_round": "gptq",
    "w8a16": "int8",
    "w8a8": "int8",
    "w8a8_int8": "int8",
    "experts_int8": "int8",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "fp8_per_tensor": "fp8",
    "modelopt_fp4": "nvfp4",
    "gpt_oss_mxfp4": "mxfp4",
    "bnb": "bitsandbytes",
}
"""Other names that ``--quantization`` and ``quant_method`` have for them."""

_LISTS = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers", "llm_int8_skip_modules")
"""Keys under which checkpoints list modules that are not quantized."""


def find_scheme(name: str, field: str = "quantization") -> Quantization:
    """Return a scheme by a name of it.

    Raises:
        InputError: If there is none of that name.
    """
    known = (*SCHEMES, *_SAME_AS)
    told = _SAME_AS.get(name.lower(), name.lower())
    if told not in SCHEMES:
        raise InputError(field, name or None, ", ".join(known), nearest_hint(name, known))
    return SCHEMES[told]


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return what stands under a key, empty where there is nothing."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config.json {key}", briefly(found), "a mapping")
    return found


def read_quantization(config: Mapping[str, Any], name: str) -> Quantization | None:
    """Return how a checkpoint's weights are stored; None for 16 bits.

    Args:
        config: Its ``config.json``, with ``hf_quant_config.json`` under the key of that name where there is one.
        name: Name of the model, which tells the scheme where a ``modelopt`` checkpoint's file does not.

    Raises:
        InputError: If the scheme is not known, or its description lacks a number.
    """
    told = _mapping(config, "quantization_config") or _mapping(config, "compression_config")
    extra = _mapping(_mapping(config, "hf_quant_config.json"), "quantization")
    if not told and not extra:
        return None
    field = "config.json quantization_config"
    method = str(told.get("quant_method") or ("modelopt" if extra or "quant_algo" in told else "")).lower()
    excluded = tuple(str(entry) for key in _LISTS for source in (told, extra) for entry in source.get(key) or ())
    if method in ("modelopt", "modelopt_fp4"):
        found = _modelopt({**told, **extra}, name)
    elif method == "compressed-tensors":
        found = _compressed(told, field)
    elif method == "bitsandbytes" and told.get("load_in_8bit"):
        found = replace(SCHEMES["int8"], scheme="bitsandbytes")
    elif method == "fp8" and told.get("weight_block_size"):
        blocks = check_numbers(f"{field}.weight_block_size", told["weight_block_size"], Number(minimum=1), whole=True)
        found = replace(SCHEMES["fp8"], bits=8 + 32 / float(blocks.prod()))
    elif method in ("awq", "gptq", "auto-round", "auto_round"):
        bits = check_number(f"{field}.bits", told.get("bits", 4), minimum=1, maximum=16)
        group = check_number(f"{field}.group_size", told.get("group_size", 128), minimum=-1)
        scheme = find_scheme(method, field).scheme
        # A group of -1 is a whole input: its scale is one an output.
        found = (
            Quantization(scheme, _grouped(bits, group, bits))
            if group > 0
            else Quantization(scheme, bits, bytes_per_output=2 + bits / 8)
        )
        found = replace(found, head=bool(told.get("lm_head")))
    else:
        found = find_scheme(method, f"{field}.quant_method")
    return replace(found, unquantized=excluded)


def _modelopt(told: Mapping[str, Any], name: str) -> Quantization:
    algorithm = str(told.get("quant_algo") or name).upper()
    found = next((scheme for scheme in ("nvfp4", "fp8", "mxfp4") if scheme.upper() in algorithm), None)
    if found is None:
        raise InputError("hf_quant_config.json quant_algo", told.get("quant_algo"), "FP8 or NVFP4")
    cache = str(told.get("kv_cache_quant_algo") or (told.get("kv_cache_scheme") and "fp8") or "auto").lower()
    return replace(
        SCHEMES[found],
        experts_only=False,
        hidden_multiple=1,
        inner_multiple=1,
        kv_cache_dtype="fp8" if cache == "fp8" else "auto",
    )


def _compressed(told: Mapping[str, Any], field: str) -> Quantization:
    groups = _mapping(told, "config_groups")
    weights = next((_mapping(group, "weights") for group in groups.values() if isinstance(group, Mapping)), None)
    if not weights:
        raise InputError(f"{field}.config_groups", None, "the weights' bits and groups")
    bits = check_number(f"{field}.config_groups.weights.num_bits", weights.get("num_bits"), minimum=1)
    group_size = weights.get("group_size")
    is_float = weights.get("type") == "float"
    if bits == 4 and is_float:
        return SCHEMES["nvfp4" if group_size == 16 else "mxfp4"]
    if bits == 8 and is_float:
        return SCHEMES["fp8"]
    if bits == 8 and not group_size:
        return SCHEMES["int8"]
    grouped = Quantization("w4a16", _grouped(bits, check_number(f"{field}.group_size", group_size or 128, minimum=1)))
    return grouped if told.get("kv_cache_scheme") is None else replace(grouped, kv_cache_dtype="fp8")
