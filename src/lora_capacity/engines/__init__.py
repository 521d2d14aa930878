"""Inference engines: what a version does by default, how it schedules, and the flags of its server."""

from lora_capacity.engines.base import DEVICES, BatchBudget, EngineBehaviour, SchedulerRules, smallest_max_lora_rank
from lora_capacity.engines.vllm import ENVIRONMENT, FORMS, FlagValue, ServerConfig, VllmBehaviour, emitted, flag_words

__all__ = [
    "DEVICES",
    "ENVIRONMENT",
    "FORMS",
    "BatchBudget",
    "EngineBehaviour",
    "FlagValue",
    "SchedulerRules",
    "ServerConfig",
    "VllmBehaviour",
    "emitted",
    "flag_words",
    "smallest_max_lora_rank",
]
