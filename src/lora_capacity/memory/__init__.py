"""The one place that knows bytes: KV capacity and the outcome of a server's start."""

from lora_capacity.memory.allocator import AllocatedMemory, allocate
from lora_capacity.memory.answer import QUANTILES, MemoryAnswer, MemoryQuestion, answer_memory
from lora_capacity.memory.buffers import resident_memory, slot_bytes
from lora_capacity.memory.deployment import Amounts, Deployment, MemoryTerms, Start
from lora_capacity.memory.estimated import EstimatedTerms
from lora_capacity.memory.fitted import MemoryModel
from lora_capacity.memory.plan import PARTS, MemoryPlan, plan_memory
from lora_capacity.memory.room import Remedy, most_slots, remedies

__all__ = [
    "PARTS",
    "QUANTILES",
    "AllocatedMemory",
    "Amounts",
    "Deployment",
    "EstimatedTerms",
    "MemoryAnswer",
    "MemoryModel",
    "MemoryPlan",
    "MemoryQuestion",
    "MemoryTerms",
    "Remedy",
    "Start",
    "allocate",
    "answer_memory",
    "most_slots",
    "plan_memory",
    "remedies",
    "resident_memory",
    "slot_bytes",
]
