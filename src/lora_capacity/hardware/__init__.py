"""Hardware: GPUs as data."""

from lora_capacity.hardware.gpu import Gpu

__all__ = ["Gpu"]
