"""Inference engines: what a version does by default, how it schedules, and the flags of its server."""

from lora_capacity.engines.base import DEVICES, BatchBudget, EngineBehaviour, SchedulerRules, smallest_max_lora_rank
from lora_capacity.engines.vllm import FORMS, FlagValue, ServerConfig, VllmBehaviour, emitted, environment, flag_words
from lora_capacity.engines.vllm.serve_line import read_serve_config, read_serve_line
from lora_capacity.engines.vllm.versions import NEWEST

__all__ = [
    "DEVICES",
    "FORMS",
    "NEWEST",
    "BatchBudget",
    "EngineBehaviour",
    "FlagValue",
    "SchedulerRules",
    "ServerConfig",
    "VllmBehaviour",
    "emitted",
    "environment",
    "flag_words",
    "read_serve_config",
    "read_serve_line",
    "smallest_max_lora_rank",
]
