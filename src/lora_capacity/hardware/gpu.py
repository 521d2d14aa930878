"""GPUs: what of their data sheets decides how many adapters a server can hold."""

from dataclasses import dataclass
from typing import ClassVar

from lora_capacity.schema import Count, Document


@dataclass(frozen=True)
class Gpu(Document):
    """One GPU.

    Attributes:
        name: Name of the GPU.
        memory_bytes: Memory that the driver reports as its total, bytes.
    """

    name: str
    memory_bytes: Count

    where: ClassVar[str] = "gpu"
