"""Builds vLLM's own models of given configurations, with adapter slots, and counts their tensors.

Knows nothing of this project, and runs on an interpreter that has vLLM:
``python count_tensors.py CASES.json COUNTS.json [GPUS]``, as many processes as GPUs, each with its share of the layers.
"""
# mypy: ignore-errors

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.setdefault("VLLM_DIST_IDENT", f"count_tensors_{os.getpid()}")

import torch
from torch.multiprocessing import spawn
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers.fused_moe import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.model_loader.utils import initialize_model


def patched_experts(cls):
    """Let experts have slots without a kernel that could compute with them, which CPUs lack."""

    def init(self, base_layer):
        torch.nn.Module.__init__(self)
        self.base_layer = base_layer
        self.moe_config = base_layer.moe_config
        self._shared_experts = base_layer._shared_experts
        self.tp_size = base_layer.moe_config.moe_parallel_config.tp_size
        self.tp_rank, self.device = 0, torch.device("cpu")
        self._w13_slices = 2 if base_layer.moe_config.is_act_and_mul else 1
        if isinstance(self, FusedMoE3DWithLoRA):
            self._w13_slices = 1
        self.enable_moe_shared_loras = False
        self.n_slices = self.local_num_experts * (self._w13_slices + 1)

    cls.__init__ = init
    cls.set_mapping = lambda self, punica_wrapper: None


def adapter_bytes(module, seen):
    """Return the bytes that a wrapped layer holds for adapters; views of one storage count once."""
    total = 0
    for value in vars(module).values():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.bfloat16:
                storage = each.untyped_storage()
                total += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen.add(storage.data_ptr())
    return total


def count(config, slots, rank, gpus=1, fully_sharded=False):
    """Return the bytes of the parameters, and of the tensors of adapter slots."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        model_config = ModelConfig(
            model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, seed=0
        )
        lora = LoRAConfig(
            max_loras=slots,
            max_lora_rank=rank,
            max_cpu_loras=slots,
            lora_dtype=torch.bfloat16,
            fully_sharded_loras=fully_sharded,
        )
        vllm_config = VllmConfig(
            model_config=model_config,
            cache_config=CacheConfig(block_size=16),
            device_config=DeviceConfig(device="cpu"),
            lora_config=lora,
            parallel_config=ParallelConfig(tensor_parallel_size=gpus),
        )
    with set_current_vllm_config(vllm_config), torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(vllm_config=vllm_config)
        parameters = {each.untyped_storage().data_ptr(): each for each in model.parameters() if each.numel()}
        weights = sum(each.numel() * each.element_size() for each in parameters.values())
        manager = LoRAModelManager(model, 4, 64, config_vocab(model_config), lora, torch.device("cpu"), vllm_config)
    seen = set(parameters)
    layers = {name: adapter_bytes(module, seen) for name, module in manager.modules.items()}
    return {"weights": weights, "slots": sum(layers.values()), "layers": layers}


def config_vocab(model_config):
    return model_config.get_vocab_size()


def count_all(process, cases, counts_path, gpus):
    """Count every case in one of the processes that share the layers; the first writes what it found."""
    for cls in (FusedMoEWithLoRA, FusedMoE3DWithLoRA):
        patched_experts(cls)
    store = Path(counts_path).with_name("store")
    init_distributed_environment(gpus, process, f"file://{store}", process, backend="gloo")
    shared = VllmConfig(
        device_config=DeviceConfig(device="cpu"), parallel_config=ParallelConfig(tensor_parallel_size=gpus)
    )
    with set_current_vllm_config(shared):
        initialize_model_parallel(gpus, 1)
    found = {}
    for name, case in cases.items():
        try:
            found[name] = count(**case, gpus=gpus)
        except Exception as error:  # what a version cannot build is told, and the others are counted
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    if process == 0:
        Path(counts_path).write_text(json.dumps(found))


def main(cases_path, counts_path, gpus="1"):
    cases = json.loads(Path(cases_path).read_text())
    if int(gpus) == 1:
        count_all(0, cases, counts_path, 1)
    else:
        spawn(count_all, (cases, counts_path, int(gpus)), int(gpus))


if __name__ == "__main__":
    main(*sys.argv[1:])
