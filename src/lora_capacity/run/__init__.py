"""Many configurations at once, on every core or device at hand."""

from lora_capacity.run.cluster import on_ray
from lora_capacity.run.events import LengthSample
from lora_capacity.run.runner import ENGINES, TWINS, engine_named, simulate

__all__ = ["ENGINES", "TWINS", "LengthSample", "engine_named", "on_ray", "simulate"]
