"""Inference engines: what a version does by default, how it schedules, and the flags of its server."""

from lora_capacity.engines.vllm import (
    DEVICES,
    BatchBudget,
    SchedulerRules,
    ServerConfig,
    VllmBehaviour,
    smallest_max_lora_rank,
)

__all__ = ["DEVICES", "BatchBudget", "SchedulerRules", "ServerConfig", "VllmBehaviour", "smallest_max_lora_rank"]
