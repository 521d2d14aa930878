"""The steady twin: an analytical model of the server, from averages."""

from lora_capacity.twins.steady.residence import StayLaw
from lora_capacity.twins.steady.solve import simulate_steady

__all__ = ["StayLaw", "simulate_steady"]
