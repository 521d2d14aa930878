"""Many configurations played by the event twin, on every core or device at hand."""

from lora_capacity.playing.play import play, play_workload
from lora_capacity.playing.table import event_table

__all__ = ["event_table", "play", "play_workload"]
