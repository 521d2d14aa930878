"""Puts PEFT's adapters on transformers' own models of given configurations, and counts their tensors.

Knows nothing of this project, and runs on an interpreter that has PEFT:
``python count_adapters.py CASES.json COUNTS.json``. No tensor has memory.
"""
# mypy: ignore-errors

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

LAYER = re.compile(r"\.(?:layers|h)\.\d+\.")


def build(config):
    """Return the model of a ``config.json`` without memory for its weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        known = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(known, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(known, dtype=torch.bfloat16)


def take_experts_apart(model):
    """Give every expert linear layers of its own, as checkpoints have them, and adapters that vLLM loads."""
    for name, module in list(model.named_modules()):
        if name.endswith(".experts") and hasattr(module, "gate_up_proj"):
            experts, both, width = module.gate_up_proj.shape
            with torch.device("meta"):
                parts = {
                    "gate_proj": (width, both // 2),
                    "up_proj": (width, both // 2),
                    "down_proj": (both // 2, width),
                }
                each = [
                    {part: torch.nn.Linear(*sizes, bias=False) for part, sizes in parts.items()} for _ in range(experts)
                ]
                apart = torch.nn.ModuleList(torch.nn.ModuleDict(linear) for linear in each)
            model.set_submodule(name, apart)


def targets(model, names):
    """Return the linear layers of decoder layers that have one of the names, and matrices outside linear layers."""
    layers, matrices = [], []
    for name, parameter in model.named_parameters():
        if not LAYER.search(name) or "visual" in name or "vision" in name or parameter.dim() < 2:
            continue
        owner, _, kind = name.rpartition(".")
        if isinstance(model.get_submodule(owner), torch.nn.Linear):
            if owner.rpartition(".")[2] in names:
                layers.append(owner)
        elif kind in names or (kind == "weight" and owner.rpartition(".")[2] in names):
            matrices.append(name)
    return layers, matrices


def count(config, names, rank, experts_apart):
    """Return the bytes of an adapter's matrices, by the names of what they adapt."""
    # Of a model that it does not recognize, PEFT leaves experts that stand apart as they are.
    model = torch.nn.ModuleDict({"model": build(config)})
    if experts_apart:
        take_experts_apart(model)
    layers, matrices = targets(model, names)
    lora = LoraConfig(r=rank, target_modules=layers, target_parameters=matrices)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    found = Counter()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            owner = re.sub(r"(\.base_layer)*\.lora_[AB].*", "", name)
            key = "experts" if ".experts" in owner else owner.rpartition(".")[2]
            found[key] += parameter.numel() * parameter.element_size()
    return found


def main(cases_path, counts_path):
    torch.set_default_dtype(torch.bfloat16)
    found = {}
    for name, case in json.loads(Path(cases_path).read_text()).items():
        try:
            found[name] = count(**case)
        except Exception as error:  # what cannot be built is told, and the others are counted
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(counts_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
