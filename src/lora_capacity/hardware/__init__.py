"""Hardware: GPUs as data."""

from lora_capacity.hardware.catalogue import Processor, catalogue, find_gpu
from lora_capacity.hardware.gpu import Gpu

__all__ = ["Gpu", "Processor", "catalogue", "find_gpu"]
