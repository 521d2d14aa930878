"""Many configurations played by the event twin, on every core or device at hand."""

from lora_capacity.run.events import play, play_workload

__all__ = ["play", "play_workload"]
