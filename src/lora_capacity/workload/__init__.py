"""Workloads: adapters by rate and rank, lengths, arrivals, and the requests sampled or recorded from them."""

from lora_capacity.workload.adapters import AdapterClasses, AdapterList, AdapterMix, Adapters
from lora_capacity.workload.arrivals import Arrivals
from lora_capacity.workload.columns import is_recording
from lora_capacity.workload.goodput import Goodput
from lora_capacity.workload.lengths import LengthDistribution
from lora_capacity.workload.load import WORKLOAD_TYPES, WorkloadLike, load_workload
from lora_capacity.workload.over_time import Windows
from lora_capacity.workload.requests import BASE_MODEL, Requests, Trace
from lora_capacity.workload.run_lengths import RunLengths
from lora_capacity.workload.workload import Workload

__all__ = [
    "BASE_MODEL",
    "WORKLOAD_TYPES",
    "AdapterClasses",
    "AdapterList",
    "AdapterMix",
    "Adapters",
    "Arrivals",
    "Goodput",
    "LengthDistribution",
    "Requests",
    "RunLengths",
    "Trace",
    "Windows",
    "Workload",
    "WorkloadLike",
    "is_recording",
    "load_workload",
]
