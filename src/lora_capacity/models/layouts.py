"""Layouts of supported architectures, as data: an architecture that is like these is one entry more."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_capacity.errors import InputError, nearest_hint

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "o_proj": ("o_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }
)
"""The linear layers of a decoder layer as vLLM runs them, with the modules that each fuses (``packed_modules_mapping``
of its models)."""

TARGET_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"all-linear": tuple(FUSED), "attention": ("qkv_proj", "o_proj")}
)
"""Presets of adapted modules."""

_FUSED_INTO = {module: fused for fused, parts in FUSED.items() for module in (*parts, fused)}


@dataclass(frozen=True)
class Layout:
    """A dense decoder architecture, and in what its ``config.json`` and its layers differ from the others.

    Attributes:
        architecture: Hugging Face's name, as ``architectures`` lists it.
        model_type: Its ``model_type``.
        attention_bias: Whether the q, k, v projections always have biases; otherwise the file says so.
        kv_heads_optional: Whether ``num_key_value_heads`` may be left out, and is then that of the query heads.
        window_is_used: Whether ``sliding_window`` holds where ``use_sliding_window`` does not say.
    """

    architecture: str
    model_type: str
    attention_bias: bool = False
    kv_heads_optional: bool = False
    window_is_used: bool = True


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.architecture: layout
        for layout in (
            Layout("LlamaForCausalLM", "llama", kv_heads_optional=True),
            Layout("MistralForCausalLM", "mistral"),
            Layout("Qwen2ForCausalLM", "qwen2", attention_bias=True, window_is_used=False),
            Layout("Qwen3ForCausalLM", "qwen3", window_is_used=False),
        )
    }
)
"""Supported architectures by name. Source: the configurations of these models in Hugging Face's transformers."""


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
    return tuple(name for name in FUSED if name in wanted)
