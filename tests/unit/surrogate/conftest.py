"""Few labels, made once for all tests of models."""

import pytest

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.surrogate import Dataset, Space, label


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return load_calibration("llama-3.1-8b-instruct-h100-64gb")


@pytest.fixture(scope="session")
def labels(calibration: Calibration) -> Dataset:
    return label(calibration, Space(), 48, seed=3)
