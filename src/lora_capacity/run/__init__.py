"""Many configurations played by the event twin, on every core or device at hand."""

from lora_capacity.run.events import play, play_workload
from lora_capacity.run.table import event_table

__all__ = ["event_table", "play", "play_workload"]
