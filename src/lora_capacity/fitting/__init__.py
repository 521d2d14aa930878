"""From measurements of a server to a calibration."""

from lora_capacity.fitting.fit import FitReport, fit_calibration

__all__ = ["FitReport", "fit_calibration"]
