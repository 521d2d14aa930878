"""The event twin: every engine step of many servers at once."""

from lora_capacity.twins.events.requests import RequestTables
from lora_capacity.twins.events.simulation import simulate_events

__all__ = ["RequestTables", "simulate_events"]
