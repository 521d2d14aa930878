"""Calibrations: the coefficients of one model on one GPU, where they come from and how good they are."""

from lora_capacity.calibration.model import Calibration, bundled_names, load_calibration

__all__ = ["Calibration", "bundled_names", "load_calibration"]
