"""The event twin for processors, compiled by Numba: `simulate_server` runs one server, `Server` is its state."""

from lora_capacity.twins.compiled.engine import simulate_server
from lora_capacity.twins.compiled.jit import keep_compiled
from lora_capacity.twins.compiled.state import ADAPTER, REQUEST, STEP, Server, records

__all__ = ["ADAPTER", "REQUEST", "STEP", "Server", "keep_compiled", "records", "simulate_server"]
