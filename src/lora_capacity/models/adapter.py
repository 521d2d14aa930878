"""Adapters as PEFT saves them: what decides whether vLLM loads one, and into which slot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_capacity.errors import InputError, check_number, nearest_hint
from lora_capacity.models.shape import ModelShape
from lora_capacity.reading import read_json
from lora_capacity.schema import briefly

_REFUSED = {
    "modules_to_save": "full copies of modules",
    "use_dora": "DoRA",
    "lora_bias": "biases of the adapter",
    "layer_replication": "layers that stand several times",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
}
"""What vLLM refuses to load, by key (``PEFTHelper`` in ``lora/peft_helper.py`` of 0.32.0)."""

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""What adapters call the embedding and the output head."""


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter.

    Attributes:
        rank: Largest rank of its layers.
        target_modules: Layers that it adapts; empty where it names them by a pattern or all.
    """

    rank: int
    target_modules: tuple[str, ...]


def read_adapter(path: Path, largest_rank: int, model: ModelShape) -> AdapterConfig:
    """Read an ``adapter_config.json``, or that in a folder.

    Args:
        path: The file or folder.
        largest_rank: The largest ``max_lora_rank`` that the vLLM version takes.
        model: The model that it adapts.

    Raises:
        InputError: If the file cannot be read, or vLLM refuses to load the adapter.
    """
    file = path / "adapter_config.json" if path.is_dir() else path
    content: Any = read_json(file, "a readable adapter_config.json of PEFT")
    if not isinstance(content, dict):
        raise InputError(str(file), type(content).__name__, "a JSON object")
    for key, what in _REFUSED.items():
        if content.get(key):
            raise InputError(f"{file}: {key}", content[key], "nothing", f"vLLM does not load {what}")
    if content.get("bias", "none") != "none":
        raise InputError(f"{file}: bias", content["bias"], "none", "vLLM does not load biases of the base model")
    patterns = content.get("rank_pattern") or {}
    ranks = [content.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max(int(check_number(f"{file}: r", each, minimum=1, integer=True)) for each in ranks)
    if rank > largest_rank:
        raise InputError(f"{file}: r", rank, f"at most {largest_rank}, the largest max_lora_rank of this vLLM version")
    targets = content.get("target_modules") or ()
    if isinstance(targets, str):
        targets = ()
    if not isinstance(targets, list | tuple):
        raise InputError(f"{file}: target_modules", briefly(targets), "a list of names, or a pattern")
    names = tuple(str(each).rpartition(".")[2] for each in targets)
    modules = {module for layer in model.layers for module in layer.modules if module.adapted}
    known = set(_EMBEDDINGS).union(*(module.adapter_names for module in modules))
    for name in names:
        if name not in known:
            allowed = f"layers of {model.name}: {', '.join(sorted(known))}"
            raise InputError(f"{file}: target_modules", name, allowed, nearest_hint(name, known))
    return AdapterConfig(rank, names)
