"""Inference engines: what a version does by default, how it schedules, and the flags of its server."""

from lora_capacity.engines.base import DEVICES, BatchBudget, EngineBehaviour, SchedulerRules, smallest_max_lora_rank
from lora_capacity.engines.vllm import ENVIRONMENT, FORMS, ServerConfig, VllmBehaviour, emitted

__all__ = [
    "DEVICES",
    "ENVIRONMENT",
    "FORMS",
    "BatchBudget",
    "EngineBehaviour",
    "SchedulerRules",
    "ServerConfig",
    "VllmBehaviour",
    "emitted",
    "smallest_max_lora_rank",
]
