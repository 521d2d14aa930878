"""Hardware: GPUs as data."""

from lora_capacity.hardware.catalogue import CATALOGUE, Processor
from lora_capacity.hardware.gpu import Gpu

__all__ = ["CATALOGUE", "Gpu", "Processor"]
