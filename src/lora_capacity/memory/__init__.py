"""The one place that knows bytes: KV capacity and the outcome of a server's start."""

from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.memory.plan import MemoryModel, MemoryPlan, plan_memory, resident_memory, slot_bytes

__all__ = [
    "AllocatedMemory",
    "MemoryModel",
    "MemoryPlan",
    "allocate",
    "plan_memory",
    "resident_memory",
    "slot_bytes",
]
