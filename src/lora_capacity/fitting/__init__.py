"""From measurements of a server to a calibration."""

from lora_capacity.fitting.fit import FitReport, fit_calibration
from lora_capacity.fitting.profile import Profile, read_profile

__all__ = ["FitReport", "Profile", "fit_calibration", "read_profile"]
