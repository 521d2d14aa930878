"""The server side: the base model's shape, the GPU, what a vLLM version does, and the server's flags."""

from lora_capacity.server.behaviour import DEVICES, BatchBudget, SchedulerRules, VllmBehaviour, smallest_max_lora_rank
from lora_capacity.server.config import ServerConfig
from lora_capacity.server.model import TARGET_MODULES, Gpu, LinearModule, ModelShape, expand_target_modules

__all__ = [
    "DEVICES",
    "TARGET_MODULES",
    "BatchBudget",
    "Gpu",
    "LinearModule",
    "ModelShape",
    "SchedulerRules",
    "ServerConfig",
    "VllmBehaviour",
    "expand_target_modules",
    "smallest_max_lora_rank",
]
