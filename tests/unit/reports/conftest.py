"""One report, built once: a small server's that starves with many adapters and does not start with many slots."""

import pytest

from lora_capacity import Recommendation, Workload, load_calibration, recommend
from lora_capacity.reports import Report, build_report

WORKLOAD = {
    "adapters": {"mix": {"rates_per_s": [0.2, 0.1], "ranks": [32, 64]}},
    "requests": {
        "input_tokens": {"mean": 223, "std": 248, "min": 4, "max": 1024},
        "output_tokens": {"mean": 197, "std": 207, "min": 4, "max": 1024},
    },
    "max_pending": 26000,
}
SETTINGS = {"max_model_len": 8192}


@pytest.fixture(scope="package")
def workload() -> Workload:
    return Workload.from_mapping(WORKLOAD)


@pytest.fixture(scope="package")
def found(workload: Workload) -> Recommendation:
    return recommend(workload, load_calibration("llama-3.1-8b-instruct-h100-64gb"), settings=SETTINGS, engine="steady")


@pytest.fixture(scope="package")
def report(workload: Workload, found: Recommendation) -> Report:
    calibration = load_calibration("llama-3.1-8b-instruct-h100-64gb")
    return build_report(workload, calibration, found, settings=SETTINGS)
