"""The one place that knows bytes: KV capacity and the outcome of a server's start."""

from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.memory.buffers import resident_memory, slot_bytes
from lora_capacity.memory.deployment import Amounts, Deployment, MemoryTerms, Start
from lora_capacity.memory.estimated import EstimatedTerms
from lora_capacity.memory.fitted import MemoryModel
from lora_capacity.memory.plan import MemoryPlan, plan_memory

__all__ = [
    "AllocatedMemory",
    "Amounts",
    "Deployment",
    "EstimatedTerms",
    "MemoryModel",
    "MemoryPlan",
    "MemoryTerms",
    "Start",
    "allocate",
    "plan_memory",
    "resident_memory",
    "slot_bytes",
]
