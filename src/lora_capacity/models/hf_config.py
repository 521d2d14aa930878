"""Shapes read off a Hugging Face ``config.json``."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from lora_capacity.errors import InputError, check_number
from lora_capacity.models.layouts import Layout, ModuleLayout, Part, Registry, registry
from lora_capacity.models.modules import Block, LayerCache, LinearModule
from lora_capacity.models.quantization import Quantization, find_scheme, read_quantization
from lora_capacity.reading import read_json
from lora_capacity.schema import Model, Number, validated

_MOST = {"num_hidden_layers": 10_000, "num_experts": 100_000}
"""Largest sizes by key, far above any model's: what is laid out layer by layer has to end."""

_LARGEST = 10**9
"""Largest of the other sizes."""

_COUNTED = Number(minimum=0, maximum=_MOST["num_hidden_layers"])

_QUANTIZATION_FILE = "hf_quant_config.json"

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
"""Keys under which multimodal models describe their language model."""

_ALSO_CALLED = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("n_query_groups", "multi_query_group_num", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("ffn_hidden_size", "n_inner"),
    "head_dim": ("kv_channels", "attention_head_dim"),
    "vocab_size": ("padded_vocab_size",),
    "max_position_embeddings": ("block_size", "seq_length", "n_positions", "max_sequence_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "n_expert"),
    "num_experts_per_tok": ("n_expert_per_token", "top_k_experts", "experts_per_token"),
    "moe_intermediate_size": ("expert_intermediate_size",),
    "attention_bias": ("attn_bias",),
    "sliding_window": ("sliding_window_size",),
}
"""Other names that keys have in files of some families."""

_HYBRID_LETTERS = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "sparse"}
"""Letters of ``hybrid_override_pattern`` (Nemotron-H), a layer each."""

_KV_HEADS = ("num_key_value_heads", "num_global_key_value_heads")
"""Keys that count key and value heads, which are not divided below one a GPU."""

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"

_UNSCALED_ROPE = ("default", "llama3", "longrope", "su", "mrope", "proportional")
"""Kinds of rotary scaling whose limit ``max_position_embeddings`` counts already."""


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a ``config.json``, or of that in a folder, and the name of its folder.

    What ``hf_quant_config.json`` beside it holds stands under that key.

    Raises:
        InputError: If a file cannot be read as a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file, "a readable config.json of a model")
    if not isinstance(config, dict):
        raise InputError(str(file), type(config).__name__, "a JSON object")
    beside = file.with_name(_QUANTIZATION_FILE)
    if beside.exists():
        config[_QUANTIZATION_FILE] = read_json(beside, "a readable description of the quantization")
    return config, file.resolve().parent.name


def shape_fields(
    config: Mapping[str, Any], name: str, quantization: str | None = None, layouts: Path | None = None
) -> dict[str, Any]:
    """Return the fields of `ModelShape`, but for the name, from the content of a ``config.json``.

    Args:
        config: The file's content.
        name: Name of the model, which tells the family where the file does not.
        quantization: How vLLM is told to load the weights (``--quantization``); None: as the file says.
        layouts: A file of layouts besides the bundled ones.

    Raises:
        InputError: If the architecture or the quantization is not known, or a size is missing or out of range.
    """
    text = _text_config(config)
    for each in (config, text):
        _check_kinds(each)
    known = registry(layouts)
    architecture = next(iter(config.get("architectures") or ()), None)
    types = tuple(str(each["model_type"]) for each in (text, config) if each.get("model_type"))
    layout = known.find(architecture, types, str(text.get("model") or text.get("_name_or_path") or name))
    sizes = _Sizes(text, layout)
    stored = _stored(text, name, quantization)
    layers = _layers(sizes, known, stored)
    blocks = tuple(dict.fromkeys(layers))
    experts = "sparse" in layout.feed_forwards and sizes["num_experts"]
    inner = "intermediate_size" if sizes.has("intermediate_size") else "moe_intermediate_size"
    rotary = "qk_rope_head_dim" if any(b.cache and b.cache.kind == "latent" for b in blocks) else "head_dim"
    return {
        "num_layers": len(layers),
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes[inner],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_key_value_heads"],
        "head_dim": sizes[rotary],
        "vocab_size": sizes["vocab_size"],
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", layout.defaults.get("tie_word_embeddings", False))),
        "attention_bias": sizes.says(layout.qkv_bias),
        "max_position_embeddings": _context_tokens(sizes),
        "architecture": architecture or layout.architecture,
        "hf_id": _hf_id(config),
        "blocks": blocks,
        "order": tuple(blocks.index(layer) for layer in layers),
        "final_norm": sizes.size(layout.final_norm),
        "experts_per_token": sizes["num_experts_per_tok"] if experts and sizes.has("num_experts_per_tok") else 0,
        "other_parameters": _vision_parameters(config),
        "quantization": stored.scheme if stored else "",
        "head_bits": stored.bits if stored and stored.head else 0.0,
        "kv_cache_dtype": stored.kv_cache_dtype if stored else "auto",
    }


class _Kinds(Model):
    """Keys whose values are not sizes, each of which may be left out or null."""

    architectures: list[str] | None = None
    model_type: str | None = None
    layer_types: list[str] | None = None
    hybrid_override_pattern: str | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    mlp_only_layers: list[Annotated[int, _COUNTED]] | None = None
    max_window_layers: Annotated[int, _COUNTED] | None = None
    decoder_sparse_step: Annotated[int, _COUNTED] | None = None
    moe_layer_freq: Annotated[int, _COUNTED] | list[Annotated[int, _COUNTED]] | None = None
    first_k_dense_replace: Annotated[int, _COUNTED] | None = None


def _check_kinds(config: Mapping[str, Any]) -> None:
    """Refuse values of keys that are of another kind than the key's."""
    given = {name: config[name] for name in _Kinds.model_fields if config.get(name) is not None}
    validated(_Kinds, given, "config.json")


class _Sizes:
    """Keys of a ``config.json`` by the names that layouts use, and sizes made of them."""

    def __init__(self, config: Mapping[str, Any], layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.head_dim = self._head_dim()

    def raw(self, key: str) -> Any:
        """Return what the file holds of a key, under any name of it; None where it holds nothing."""
        own = self.layout.keys.get(key, key)
        names = (own, *_ALSO_CALLED.get(own, ()), *_ALSO_CALLED.get(key, ()))
        return next((self.config[each] for each in names if self.config.get(each) is not None), None)

    def has(self, key: str) -> bool:
        """Return whether a size is known."""
        return self.raw(key) is not None or key in self.layout.defaults

    def flag(self, key: str) -> bool:
        """Return whether a key is given and not 0 or false."""
        value = self.raw(key)
        return bool(self.layout.defaults.get(key) if value is None else value)

    def says(self, word: str) -> bool:
        """Return whether a layout's ``always``, or the key that it names, says so."""
        return word == "always" or bool(word and self.flag(word))

    def __getitem__(self, key: str) -> int:
        if key == "head_dim":
            return self.head_dim
        if key == "state_window":
            return self["linear_conv_kernel_dim" if self.has("linear_conv_kernel_dim") else "conv_kernel"] - 1
        if key == "num_key_value_heads" and self.raw("multi_query") and not self.raw("new_decoder_architecture"):
            return 1
        value = self.raw(key)
        if value is None:
            default = self.layout.defaults.get(key)
            if default is None:
                raise InputError(f"config.json {key}", None, "a whole number >= 1")
            return self.size(default) if isinstance(default, str) else int(default)
        minimum, maximum = 0 if key in self.layout.defaults else 1, _MOST.get(key, _LARGEST)
        return int(check_number(f"config.json {key}", value, minimum=minimum, maximum=maximum, integer=True))

    def size(self, expression: str) -> int:
        """Return a sum of products of keys and whole numbers."""
        total = 0
        for term in expression.split("+"):
            product = 1
            for factor in term.split("*"):
                product *= int(factor) if factor.isdigit() else self[factor]
            total += product
        return total

    def _head_dim(self) -> int:
        if self.has("head_dim"):
            value = self.raw("head_dim")
            if value is None:
                value = self.layout.defaults["head_dim"]
            return int(check_number("config.json head_dim", value, minimum=1, integer=True))
        heads, hidden = self["num_attention_heads"], self["hidden_size"]
        if hidden % heads:
            raise InputError(
                "config.json num_attention_heads", heads, f"a divisor of hidden_size {hidden}", "or give head_dim"
            )
        return hidden // heads


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the language model, with what only the whole file tells."""
    nested: Mapping[str, Any] = next((config[key] for key in _TEXT_PARTS if isinstance(config.get(key), Mapping)), {})
    return {**config, **nested}


def _stored(config: Mapping[str, Any], name: str, wanted: str | None) -> Quantization | None:
    found = read_quantization(config, name)
    if wanted is None:
        return found
    scheme = find_scheme(wanted)
    if found is None:
        return scheme
    if scheme.scheme != found.scheme and wanted != str(config.get("quantization_config", {}).get("quant_method")):
        raise InputError("quantization", wanted, f"{found.scheme}, as the checkpoint's weights are stored, or nothing")
    return found


def _layer_types(sizes: _Sizes) -> list[str]:
    """Return the type of every layer, as ``layer_types`` names them."""
    for key, what in sizes.layout.refused.items():
        if sizes.config.get(key):
            raise InputError(f"config.json {key}", sizes.config[key], "0", f"{what} are not modelled")
    mixers, count = sizes.layout.mixers, None
    pattern = sizes.config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        types = [_HYBRID_LETTERS.get(letter, letter) for letter in pattern]
    elif "mamba" in mixers:
        raise InputError("config.json hybrid_override_pattern", None, "a letter a layer, as M-M*")
    else:
        count = sizes["num_hidden_layers"]
        types = _attention_types(sizes, count)
    for each in types:
        if each not in mixers and not (each == _SLIDING and _FULL in mixers):
            raise InputError("config.json layer_types", each, ", ".join(mixers))
    if count is not None and len(types) != count:
        raise InputError("config.json layer_types", f"{len(types)} layers", f"num_hidden_layers {count} of them")
    return types


def _attention_types(sizes: _Sizes, layers: int) -> list[str]:
    told = sizes.config.get("layer_types")
    if isinstance(told, list):
        return [str(each) for each in told]
    mixers = sizes.layout.mixers
    if _LINEAR in mixers:
        every = sizes["full_attention_interval"]
        return [_FULL if (index + 1) % every == 0 else _LINEAR for index in range(layers)]
    if _SLIDING in mixers and sizes.raw("sliding_window") is not None:
        pattern = sizes.raw("sliding_window_pattern")
        if isinstance(pattern, str):
            return [_FULL if pattern[index % len(pattern)] == "G" else _SLIDING for index in range(layers)]
        if sizes.has("sliding_window_pattern"):
            every = sizes["sliding_window_pattern"]
            return [_FULL if (index + 1) % every == 0 else _SLIDING for index in range(layers)]
    used = sizes.config.get("use_sliding_window", sizes.layout.window == "always")
    if used and sizes.raw("sliding_window") is not None:
        first = int(sizes.config.get("max_window_layers") or 0) if "use_sliding_window" in sizes.config else 0
        return [_FULL if index < first else _SLIDING for index in range(layers)]
    return [_FULL] * layers


def _is_sparse(sizes: _Sizes, index: int) -> bool:
    """Return whether a layer's feed-forward block is a mixture of experts."""
    if "sparse" not in sizes.layout.feed_forwards or not sizes["num_experts"]:
        return False
    step = int(sizes.config.get("decoder_sparse_step") or sizes.config.get("moe_layer_freq") or 1)
    dense = int(sizes.config.get("first_k_dense_replace") or 0)
    return index not in (sizes.config.get("mlp_only_layers") or ()) and index >= dense and (index + 1) % step == 0


def _layers(sizes: _Sizes, known: Registry, stored: Quantization | None) -> list[Block]:
    """Return every decoder layer; those alike in type and in what is quantized are one object."""
    made: dict[tuple[str, bool, int], Block] = {}
    layers = []
    for index, kind in enumerate(_layer_types(sizes)):
        # Lists of what is not quantized may name single layers.
        key = kind, _is_sparse(sizes, index), index if stored and stored.names_layers else 0
        if key not in made:
            made[key] = _layer(sizes, known, stored, index, kind, sparse=key[1])
        layers.append(made[key])
    return layers


def _layer(
    sizes: _Sizes, known: Registry, stored: Quantization | None, index: int, kind: str, *, sparse: bool
) -> Block:
    layout = sizes.layout
    mixer, mixing = known.part(layout.mixers.get(kind) or layout.mixers[_FULL])
    default = "experts" if sparse else "gated_mlp"
    feed_forward, feeding = known.part(layout.feed_forwards.get("sparse" if sparse else "dense", default))
    modules = []
    for each in (*mixing, *feeding):
        if (not each.given or sizes.flag(each.given)) and not (each.unless and sizes.flag(each.unless)):
            is_stored = stored is not None and each.quantized and stored.covers(_paths(index, each), bool(each.experts))
            modules.append(_module(sizes, each, stored if is_stored else None, mixes=each in mixing))
    vectors = sizes.size(mixer.vectors) + sizes.size(feed_forward.vectors) + sizes.size(layout.norms)
    sharded = sizes.size(mixer.sharded_vectors) + sizes.size(feed_forward.sharded_vectors)
    return Block(tuple(modules), vectors, _cache(sizes, mixer, kind), sharded)


def _paths(index: int, module: ModuleLayout) -> list[str]:
    """Return the names of a layer in a checkpoint."""
    return [f"model.layers.{index}.{module.path}.{each}" for each in module.parts or (module.name,)]


def _module(sizes: _Sizes, layout: ModuleLayout, stored: Quantization | None, *, mixes: bool) -> LinearModule:
    heads = next((key for key in _KV_HEADS if any(key in each for each in layout.outputs[1:])), None)
    architecture, bias = sizes.layout, layout.bias
    if not bias and mixes:
        bias = architecture.qkv_bias if heads else architecture.out_bias if layout.split == "row" else ""
    elif not bias and not layout.experts and layout.split != "whole":
        bias = architecture.bias
    return LinearModule(
        name=layout.name,
        input_size=sizes.size(layout.inputs),
        output_sizes=tuple(map(sizes.size, layout.outputs)),
        kind="experts" if layout.experts else "attention" if mixes else "mlp",
        parts=layout.parts,
        split=layout.split,
        kv_heads=sizes[heads] if heads else 0,
        bias=sizes.says(bias),
        experts=sizes[layout.experts] if layout.experts else 0,
        adapted=layout.adapted,
        **(_stored_fields(stored, layout.split == "row") if stored else {}),
    )


def _stored_fields(stored: Quantization, ends_in_hidden: bool) -> dict[str, Any]:
    """Return the fields of a layer whose weights are quantized."""
    multiples = (stored.hidden_multiple, stored.inner_multiple)
    inputs, outputs = reversed(multiples) if ends_in_hidden else multiples
    return {
        "bits": stored.bits,
        "bytes_per_output": stored.bytes_per_output,
        "input_multiple": inputs,
        "output_multiple": outputs,
    }


def _cache(sizes: _Sizes, mixer: Part, kind: str) -> LayerCache | None:
    if mixer.cache is None:
        return None
    told = mixer.cache
    dtype = str(sizes.config.get("mamba_ssm_dtype") or sizes.config.get("mamba_ssm_cache_dtype") or "auto")
    slides = kind == _SLIDING
    return LayerCache(
        kind="sliding" if slides else told.kind,
        elements=sizes.size(told.elements),
        heads=sizes[told.heads] if told.heads else 0,
        window=sizes["sliding_window"] if slides else 0,
        state_elements=sizes.size(told.state_elements) if told.state_elements else 0,
        state_element_bytes=4 if dtype == "float32" else 2,
    )


def _vision_parameters(config: Mapping[str, Any]) -> int:
    """Return the parameters of a vision encoder as far as its main sizes tell: attention and feed-forward matrices."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return 0

    def size(*names: str) -> float:
        """Return the first of some sizes that is given; 0 if none is."""
        told = next(((each, vision[each]) for each in names if vision.get(each)), None)
        return 0.0 if told is None else check_number(f"config.json vision_config.{told[0]}", told[1], minimum=0)

    layers, hidden = size("num_hidden_layers", "depth", "num_layers"), size("embed_dim", "hidden_size")
    if not layers or not hidden:
        return 0
    inner = size("intermediate_size") or hidden * (size("mlp_ratio") or 4)
    return int(layers * (4 * hidden**2 + 2 * hidden * inner))


def _hf_id(config: Mapping[str, Any]) -> str:
    """Return ``_name_or_path`` where that is an organisation and a model, not somebody's folder."""
    told = config.get("_name_or_path")
    return told if isinstance(told, str) and re.fullmatch(r"[\w-]+/[\w.-]+", told) else ""


def _context_tokens(sizes: _Sizes) -> int:
    """Longest sequence as vLLM derives it: rotary scaling stretches it, but for kinds whose limit counts it already.

    Source: ``_get_and_verify_max_len`` in vLLM's ``config.py``.
    """
    limit = sizes["max_position_embeddings"]
    scaling = sizes.config.get("rope_scaling") or sizes.config.get("rope_parameters") or {}
    own = scaling.get(_FULL)  # one for each type of layer
    scaling = own if isinstance(own, Mapping) else scaling
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in _UNSCALED_ROPE or not sizes.layout.scaled_positions:
        return limit
    factor = check_number("config.json rope_scaling.factor", scaling.get("factor", 1.0), minimum=1)
    original = scaling.get("original_max_position_embeddings", limit)
    return int(check_number("config.json rope_scaling.original_max_position_embeddings", original, minimum=1) * factor)
