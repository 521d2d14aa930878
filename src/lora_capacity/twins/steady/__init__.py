"""The steady twin: an analytical model of the server, from averages."""

from lora_capacity.twins.steady.residence import ResidenceTime
from lora_capacity.twins.steady.solve import simulate_steady

__all__ = ["ResidenceTime", "simulate_steady"]
