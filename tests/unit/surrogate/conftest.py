"""Few labels, made once for all tests of models."""

import pytest

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.surrogate import Labels, Space, make_labels


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    return load_calibration("llama-3.1-8b-instruct-h100-64gb")


@pytest.fixture(scope="session")
def labels(calibration: Calibration) -> Labels:
    return make_labels(calibration, Space(), 48, seed=3)
