"""The event twin: every engine step of many servers at once."""

from lora_capacity.twins.events.requests import RequestTables, draw_requests, lay_out_requests
from lora_capacity.twins.events.simulation import simulate_events

__all__ = ["RequestTables", "draw_requests", "lay_out_requests", "simulate_events"]
