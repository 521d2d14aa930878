"""Calibrations: the coefficients of one model on one GPU, where they come from and how good they are."""

from lora_capacity.calibration.derive import Target, derive_calibration
from lora_capacity.calibration.efficiencies import Efficiencies
from lora_capacity.calibration.load import CalibrationLike, Served, load_calibration
from lora_capacity.calibration.model import Calibration, bundled_names

__all__ = [
    "Calibration",
    "CalibrationLike",
    "Efficiencies",
    "Served",
    "Target",
    "bundled_names",
    "derive_calibration",
    "load_calibration",
]
