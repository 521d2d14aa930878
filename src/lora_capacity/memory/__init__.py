"""The one place that knows bytes: KV capacity and the outcome of a server's start."""

from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.memory.fit import CapacityRows, MemoryReport, fit_memory, plan_rows, score_memory
from lora_capacity.memory.plan import MemoryModel, MemoryPlan, plan_memory, resident_memory, slot_bytes

__all__ = [
    "AllocatedMemory",
    "CapacityRows",
    "MemoryModel",
    "MemoryPlan",
    "MemoryReport",
    "allocate",
    "fit_memory",
    "plan_memory",
    "plan_rows",
    "resident_memory",
    "score_memory",
    "slot_bytes",
]
