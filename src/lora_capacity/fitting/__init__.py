"""From measurements of servers to a calibration, and from their starts to the memory that shapes do not tell."""

from lora_capacity.fitting.fit import FitReport, fit_calibration
from lora_capacity.fitting.terms import FIRST_GUESS, fit_terms, leave_out

__all__ = ["FIRST_GUESS", "FitReport", "fit_calibration", "fit_terms", "leave_out"]
