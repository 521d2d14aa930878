"""Measurements: tables of serving runs, profile folders, and request lengths and time series of runs."""

from lora_capacity.measurements.lengths import length_pairs
from lora_capacity.measurements.profile import CapacityRows, Profile, read_profile
from lora_capacity.measurements.runs import Runs, read_runs
from lora_capacity.measurements.scores import is_starved, mape, smape
from lora_capacity.measurements.series import TimeMeans, read_time_means
from lora_capacity.measurements.speeds import SPEED_COLUMNS, Speed, read_speeds
from lora_capacity.measurements.startups import STARTUP_COLUMNS, Startup, read_startups
from lora_capacity.workload import RunLengths

__all__ = [
    "SPEED_COLUMNS",
    "STARTUP_COLUMNS",
    "CapacityRows",
    "Profile",
    "RunLengths",
    "Runs",
    "Speed",
    "Startup",
    "TimeMeans",
    "is_starved",
    "length_pairs",
    "mape",
    "read_profile",
    "read_runs",
    "read_speeds",
    "read_startups",
    "read_time_means",
    "smape",
]
