"""From measurements of servers to a calibration, and from their starts and speeds to what holds for any server."""

from lora_capacity.fitting.efficiencies import contradictions, fit_efficiencies, leave_out_gpus
from lora_capacity.fitting.fit import FitReport, fit_calibration
from lora_capacity.fitting.terms import FIRST_GUESS, fit_terms, leave_out
from lora_capacity.fitting.transfer import update_calibration

__all__ = [
    "FIRST_GUESS",
    "FitReport",
    "contradictions",
    "fit_calibration",
    "fit_efficiencies",
    "fit_terms",
    "leave_out",
    "leave_out_gpus",
    "update_calibration",
]
