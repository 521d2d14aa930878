"""Models of the server: what a configuration does under a workload."""

from lora_capacity.twin.events import EventResults
from lora_capacity.twin.inputs import Scenarios, build_scenarios, lay_out
from lora_capacity.twin.results import Limit, Results
from lora_capacity.twin.stays import StayLaw
from lora_capacity.twin.steady import simulate_steady

__all__ = ["EventResults", "Limit", "Results", "Scenarios", "StayLaw", "build_scenarios", "lay_out", "simulate_steady"]
