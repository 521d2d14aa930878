"""Configurations as columns, and what a twin says of each."""

from lora_capacity.scenarios.results import Limit, Results
from lora_capacity.scenarios.scenarios import Scenarios, build_scenarios, lay_out

__all__ = ["Limit", "Results", "Scenarios", "build_scenarios", "lay_out"]
