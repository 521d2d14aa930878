"""Configurations as columns, and what a twin says of each."""

from lora_capacity.scenarios.results import Bottleneck, ClientView, EventDetails, Results, Series, WindowDetails, table
from lora_capacity.scenarios.scenarios import Scenarios, build_scenarios, extrapolations, lay_out, pack_scenarios
from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.status import STARVED_SHORTFALL

__all__ = [
    "STARVED_SHORTFALL",
    "Bottleneck",
    "ClientView",
    "EventDetails",
    "Results",
    "Scenarios",
    "Series",
    "WindowDetails",
    "WorkloadBatch",
    "build_scenarios",
    "extrapolations",
    "lay_out",
    "pack_scenarios",
    "table",
]
