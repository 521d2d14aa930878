"""Reads how people start vLLM: a ``vllm serve`` line, or a file for its ``--config``."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_capacity.errors import InputError
from lora_capacity.reading import parse_yaml, read_text

_NUMBERS = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "block_size": int,
    "max_loras": int,
    "max_cpu_loras": int,
    "max_lora_rank": int,
    "gpu_memory_utilization": float,
}
_TEXTS = ("model", "quantization", "kv_cache_dtype")
_SWITCHES = (
    *("enable_lora", "enforce_eager", "fully_sharded_loras", "specialize_active_lora"),
    "enable_prefix_caching",
)
_LISTS = ("lora_target_modules",)

_SHORT = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "q": "quantization", "model_tag": "model"}
"""Short names of flags (``engine/arg_utils.py`` of 0.32.0)."""

_NOT_MODELLED = {
    "enable_expert_parallel": "experts are divided over GPUs as other layers are",
    "speculative_config": "a draft model takes memory too",
    "speculative_model": "a draft model takes memory too",
    "cpu_offload_gb": "weights in host memory",
    "num_gpu_blocks_override": "the KV cache is then not what is left",
    "kv_cache_memory_bytes": "the KV cache is then not what is left",
    "hf_overrides": "write the sizes into a config.json",
    "decode_context_parallel_size": "KV caches divided by tokens",
}
"""Flags that change what a GPU holds in ways that are not modelled, and what they do."""

_UNITS = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
"""Units of numbers as vLLM reads them (``human_readable_int`` in ``engine/arg_utils.py`` of 0.32.0)."""


def read_serve_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of a command line that starts vLLM, by their names, and the names of those not looked at.

    Args:
        line: ``vllm serve MODEL ...`` or ``python -m vllm.entrypoints.openai.api_server --model MODEL ...``, with
            variables or a container's command before it.

    Raises:
        InputError: If it cannot be split into words, has no model, or a flag has no number where it takes one.
    """
    try:
        words = shlex.split(line.replace("\\\n", " "))
    except ValueError as error:
        raise InputError("--serve-line", line, f"a shell's command ({error})") from None
    starts = [place for place, word in enumerate(words) if word == "serve" or word.endswith("api_server")]
    words = words[starts[0] + 1 :] if starts else words
    given: dict[str, Any] = {}
    name = "model" if starts else None
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\d[\d.]*", word):
            flag, equals, value = word.lstrip("-").partition("=")
            name = _flag_name(flag)
            given[name] = value if equals else True
        elif name is not None:
            known = given.get(name, True)
            given[name] = word if known is True else [*(known if isinstance(known, list) else [known]), word]
    return _read(given, "--serve-line")


def read_serve_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of a file for ``vllm serve --config``; as `read_serve_line`.

    Raises:
        InputError: If it is not YAML with a mapping, or a flag has no number where it takes one.
    """
    content = parse_yaml(read_text(path, "a file for `vllm serve --config`"), str(path))
    if not isinstance(content, Mapping):
        raise InputError(str(path), type(content).__name__, "flags by name")
    return _read({_flag_name(str(name)): value for name, value in content.items()}, str(path))


def _flag_name(flag: str) -> str:
    name = flag.replace("-", "_")
    return _SHORT.get(name, name)


def _read(given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    others = []
    for name, value in given.items():
        field, switch = f"{where} --{name.replace('_', '-')}", name.removeprefix("no_")
        if name in _NOT_MODELLED and value not in (False, None, 0, "0"):
            raise InputError(field, value, "a server without it", f"not modelled: {_NOT_MODELLED[name]}")
        if name in _NUMBERS:
            found[name] = _number(field, value, _NUMBERS[name])
        elif name in _TEXTS:
            if not isinstance(value, str):
                raise InputError(field, value, "one name")
            found[name] = value
        elif switch in _SWITCHES:
            on = value if isinstance(value, bool) else str(value).lower() not in ("false", "0", "no")
            found[switch] = on != (switch != name)
        elif name in _LISTS:
            found[name] = tuple(value) if isinstance(value, list) else tuple(str(value).replace(",", " ").split())
        else:
            others.append(f"--{name.replace('_', '-')}")
    if "model" not in found:
        raise InputError(where, "no model", "a model: `vllm serve MODEL`, or --model")
    return found, others


def _number(field: str, value: Any, kind: type) -> int | float:
    text = str(value)
    factor = _UNITS.get(text[-1:], 1) if kind is int else 1
    try:
        number = float(text.removesuffix(text[-1]) if factor > 1 else text) * factor
        if kind is float or number == int(number):
            return kind(number)  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        pass
    raise InputError(field, value, "a whole number" if kind is int else "a number")
