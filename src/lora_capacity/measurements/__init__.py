"""Measurements: tables of serving runs, profile folders, and request lengths and time series of runs."""

from lora_capacity.measurements.lengths import RunLengths, length_pairs
from lora_capacity.measurements.profile import Profile, read_profile
from lora_capacity.measurements.runs import Runs, read_runs
from lora_capacity.measurements.series import TimeMeans, read_time_means

__all__ = ["Profile", "RunLengths", "Runs", "TimeMeans", "length_pairs", "read_profile", "read_runs", "read_time_means"]
