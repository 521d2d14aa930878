"""Many configurations at once, on every core or device at hand."""

from lora_capacity.run.events import LengthSample
from lora_capacity.run.runner import ENGINES, simulate

__all__ = ["ENGINES", "LengthSample", "simulate"]
