"""vLLM: its defaults and rules by version, and the flags of its server."""

from lora_capacity.engines.vllm.behaviour import (
    DEVICES,
    BatchBudget,
    SchedulerRules,
    VllmBehaviour,
    smallest_max_lora_rank,
)
from lora_capacity.engines.vllm.config import ServerConfig

__all__ = ["DEVICES", "BatchBudget", "SchedulerRules", "ServerConfig", "VllmBehaviour", "smallest_max_lora_rank"]
