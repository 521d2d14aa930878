"""Layouts of architectures, as data: an architecture that is like these is one entry more of ``layouts.json``.

A layout says which modules a model has, and of which keys of its ``config.json`` their sizes are made.
"""

import functools
import importlib.resources
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.models.modules import LinearModule, document, text, tuple_of
from lora_capacity.reading import read_json
from lora_capacity.schema import Document, JsonModel, validated

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "o_proj": ("o_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }
)
"""The linear layers of a Llama's decoder layer as vLLM runs them, with the modules that each fuses
(``packed_modules_mapping`` of its models)."""

TARGET_MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"all-linear": tuple(FUSED), "attention": ("qkv_proj", "o_proj")}
)
"""Presets of adapted modules."""

Texts = Annotated[tuple[str, ...], tuple_of(text)]


@dataclass(frozen=True)
class ModuleLayout(Document):
    """A linear layer in a layout. Sizes are sums of products of keys of ``config.json`` (``2*hidden_size``).

    Attributes:
        name: vLLM's name of the layer.
        path: The module of a decoder layer that it belongs to.
        inputs: Width of its input.
        outputs: Width of each fused output.
        parts: As in `LinearModule`.
        split: As in `LinearModule`.
        bias: ``always``, or the key that says whether it has biases; empty: as the layout says.
        experts: The key that counts its copies; empty: it is no expert.
        quantized: Whether quantization covers it.
        adapted: As in `LinearModule`.
        given: Key that must be there and not 0 for the layer to be there.
        unless: Key that must be absent or 0.
    """

    name: str
    path: str
    inputs: str
    outputs: Texts
    parts: Texts = ()
    split: Literal["column", "row", "whole"] = "column"
    bias: str = ""
    experts: str = ""
    quantized: bool = True
    adapted: bool = True
    given: str = ""
    unless: str = ""

    where: ClassVar[str] = "module"


@dataclass(frozen=True)
class CacheLayout(Document):
    """What a layer keeps of a sequence, in a layout; sizes and kinds as in `LayerCache`."""

    kind: Literal["full", "latent", "state"]
    elements: str
    heads: str = ""
    state_elements: str = ""

    where: ClassVar[str] = "cache"


@dataclass(frozen=True)
class Part(Document):
    """A half of a decoder layer: what mixes tokens, or the feed-forward block.

    Attributes:
        modules: Its linear layers, names in the table of modules.
        vectors: Elements of its small parameters.
        cache: What it keeps of a sequence.
        sharded_vectors: Those of its small parameters that tensor parallelism divides.
    """

    modules: Texts
    vectors: str = "0"
    cache: CacheLayout | None = None
    sharded_vectors: str = "0"

    where: ClassVar[str] = "part"


def _mapping(content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError("", type(content).__name__, "a mapping")
    return content


Keys = Annotated[Mapping[str, Any], PlainValidator(_mapping, json_schema_input_type=dict[str, Any])]


@dataclass(frozen=True)
class Layout(Document):
    """An architecture.

    Attributes:
        architecture: vLLM's name of it.
        model_types: Values of ``model_type`` in ``config.json``.
        also: Other names of it, of multimodal models around it for example.
        names: What names of models of it hold, for a file that tells neither; the longest that fits counts.
        mixers: Parts by type of layer, ``full_attention`` and others as ``layer_types`` names them.
        feed_forwards: Parts of ``dense`` and ``sparse`` layers.
        norms: Elements of a layer's norms.
        final_norm: Elements of the last norm.
        qkv_bias: ``always``, or the key that says whether q, k and v have biases.
        out_bias: The same of the attention's output.
        bias: The same of the feed-forward block.
        keys: Keys of ``config.json`` by the names that sizes are made of, where they differ.
        defaults: Values of keys that may be left out: a number, or a size made of others.
        refused: What is not modelled, by the key that says that a model has it.
        window: Whether ``sliding_window`` holds for all layers, where nothing tells which: ``always``, or where
            ``use_sliding_window`` says so.
        scaled_positions: Whether rotary scaling stretches ``max_position_embeddings``.
        source: File of vLLM's ``model_executor/models`` that it was read in.
    """

    architecture: str
    model_types: Texts
    source: str
    also: Texts = ()
    names: Texts = ()
    mixers: Keys = field(default_factory=lambda: {"full_attention": "attention"})
    feed_forwards: Keys = field(default_factory=dict)
    norms: str = "2*hidden_size"
    final_norm: str = "hidden_size"
    qkv_bias: str = "attention_bias"
    out_bias: str = ""
    bias: str = ""
    keys: Keys = field(default_factory=dict)
    defaults: Keys = field(default_factory=dict)
    refused: Keys = field(default_factory=dict)
    window: Literal["always", "told"] = "told"
    scaled_positions: bool = True

    where: ClassVar[str] = "layout"


@dataclass(frozen=True)
class Registry:
    """Known modules, parts and layouts, as in files."""

    modules: Mapping[str, Any]
    parts: Mapping[str, Any]
    layouts: tuple[Mapping[str, Any], ...]

    @property
    def architectures(self) -> dict[str, Mapping[str, Any]]:
        """Layouts by every name of their architectures."""
        return {name: each for each in self.layouts for name in (each["architecture"], *each.get("also", ()))}

    @property
    def model_types(self) -> dict[str, Mapping[str, Any]]:
        """Layouts by ``model_type``."""
        return {name: each for each in self.layouts for name in each["model_types"]}

    def find(self, architecture: str | None, model_types: tuple[str, ...], name: str) -> Layout:
        """Return the layout of a model.

        Args:
            architecture: What ``architectures`` lists first, if anything.
            model_types: Values of ``model_type``, the most telling first.
            name: Name of the model, which tells where the file does not.

        Raises:
            InputError: If none is known.
        """
        for told in model_types:
            if told in self.model_types:
                return Layout.from_json(self.model_types[told])
        if architecture in self.architectures:
            return Layout.from_json(self.architectures[architecture])
        if architecture is None and not model_types:
            hints = {hint: each for each in self.layouts for hint in each.get("names", ()) if hint in name.lower()}
            if hints:
                return Layout.from_json(hints[max(hints, key=len)])
        if model_types:
            raise _unknown("model_type", model_types[0], self.model_types)
        raise _unknown("architectures", architecture, self.architectures)

    def part(self, name: str) -> tuple[Part, tuple[ModuleLayout, ...]]:
        """Return a part by its name, and its modules."""
        part = Part.from_json(self.parts[name])
        return part, tuple(ModuleLayout.from_json(self.modules[each]) for each in part.modules)


def _unknown(key: str, value: str | None, known: Mapping[str, Any]) -> InputError:
    remedy = "describe its modules in a file of layouts"
    hint = nearest_hint(value or "", known)
    return InputError(f"config.json {key}", value, ", ".join(sorted(known)), f"{hint} Or {remedy}" if hint else remedy)


class _LayoutFile(JsonModel):
    """A file of layouts; what they hold is checked as it is used."""

    modules: dict[str, Any] = Field(default_factory=dict)
    parts: dict[str, Any] = Field(default_factory=dict)
    layouts: list[Any] = Field(default_factory=list)


@functools.cache
def registry(path: Path | None = None) -> Registry:
    """Return the bundled layouts, with those of a file put before them.

    Args:
        path: A file of the form of ``layouts.json``.

    Raises:
        InputError: If the file cannot be read, or a layout in it is not well formed.
    """
    text = (importlib.resources.files("lora_capacity.models") / "layouts.json").read_text(encoding="utf-8")
    bundled = json.loads(text)
    if path is None:
        return Registry(bundled["modules"], bundled["parts"], tuple(bundled["layouts"]))
    own = read_json(path, "a file of layouts")
    given = validated(_LayoutFile, own, f"{path}:")
    modules, parts = bundled["modules"] | given.modules, bundled["parts"] | given.parts
    for each in given.layouts:
        layout = document(Layout)(each)
        for part in (*layout.mixers.values(), *layout.feed_forwards.values()):
            if part not in parts:
                raise InputError(f"{path}: {layout.architecture}", part, f"a part: {', '.join(parts)}")
            for module in document(Part)(parts[part]).modules:
                if module not in modules:
                    raise InputError(f"{path}: {part}", module, f"a module: {', '.join(modules)}")
                document(ModuleLayout)(modules[module])
    return Registry(modules, parts, (*given.layouts, *bundled["layouts"]))


@functools.cache
def _layer_names() -> Mapping[str, str]:
    """VLLM's names of linear layers by their own names and those of their parts, over all bundled layouts."""
    found = {module: fused for fused, parts in FUSED.items() for module in (*parts, fused)}
    for each in registry().modules.values():
        for name in (*each.get("parts", ()), each["name"]):
            found.setdefault(name, each["name"])
    return {name: layer for name, layer in found.items() if name}


def expand_target_modules(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the fused linear layers that adapters of these target modules make vLLM reserve space in.

    Args:
        target_modules: ``all-linear`` or ``attention`` (of a model whose layers are called as Llama's), or names as in
            an adapter's ``target_modules`` (``q_proj``, ``down_proj``, ...). A fused layer is reserved in full when any
            of its parts is adapted.

    Raises:
        InputError: If a name is not known, or there is none.
    """
    if isinstance(target_modules, str) and target_modules in TARGET_MODULES:
        return TARGET_MODULES[target_modules]
    layers = _layer_names()
    known = (*TARGET_MODULES, *layers)
    names = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    for name in names:
        if name not in layers:
            raise InputError("target_modules", name, ", ".join(known), nearest_hint(str(name), known))
    if not names:
        raise InputError("target_modules", target_modules, "at least one module name")
    wanted = {layers[name] for name in names}
    return tuple(name for name in dict.fromkeys((*FUSED, *layers.values())) if name in wanted)


def targeted_modules(modules: Iterable[LinearModule], target_modules: str | tuple[str, ...]) -> frozenset[LinearModule]:
    """Return the layers of a model that slots are reserved for: in full when any of their parts is a target.

    Args:
        modules: Its linear layers.
        target_modules: As `expand_target_modules` takes them, or names that only this model has.

    Raises:
        InputError: If neither the model nor any bundled layout has a layer of that name, or there is no name.

    Source: ``is_in_target_modules`` in vLLM 0.32.0, ``lora/utils.py``.
    """
    adapted = frozenset(module for module in modules if module.adapted)
    if target_modules == "all-linear":
        return adapted
    if target_modules == "attention":
        return frozenset(module for module in adapted if module.kind == "attention")
    names = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    own = {name for module in adapted for name in (module.name, *module.parts)}
    if not names <= own:
        expand_target_modules(tuple(sorted(names - own)))
    return frozenset(module for module in adapted if names.intersection((module.name, *module.parts)))
