"""Many configurations at once, on every core or device at hand."""

from lora_capacity.run.events import LengthSample
from lora_capacity.run.runner import ENGINES, TWINS, simulate

__all__ = ["ENGINES", "TWINS", "LengthSample", "simulate"]
