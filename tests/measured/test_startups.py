"""The memory of any model on any GPU against starts of servers that people logged (vLLM 0.4 to 0.29)."""
# ruff: noqa: T201  accuracies are printed beside their bounds

from pathlib import Path

import pytest

from lora_capacity.facts import predict_startup, score_startups
from lora_capacity.fitting import fit_terms
from lora_capacity.measurements import Startup, read_startups
from lora_capacity.memory import EstimatedTerms

# Aims on all starts whose model and GPU are known, odd ones (patched servers, offloaded weights) included.
KV_MEDIAN = 0.05
KV_WITHIN_15_PERCENT = 0.85
INSIDE = (0.85, 0.95)
OUTCOMES = 0.94
ANSWERED = 0.85
# Of a GPU that the terms were not fitted to.
KV_MEDIAN_LEFT_OUT = 0.05


@pytest.fixture(scope="module")
def startups(measurements_dir: Path) -> list[Startup]:
    folder = measurements_dir.parent / "startup"
    return read_startups(folder / "startup_facts.csv", folder / "model_config_map.csv")


def test_starts_are_predicted(startups: list[Startup]) -> None:
    terms = EstimatedTerms.bundled()
    known = [each for each in startups if each.config is not None]
    scores = score_startups(known, [predict_startup(each, terms) for each in known])
    print({name: value for name, value in scores.items() if not name.startswith("by_")})
    assert scores["answered"] >= ANSWERED * scores["rows"]
    assert scores["kv_median_error"] <= KV_MEDIAN
    assert scores["kv_within_15_percent"] >= KV_WITHIN_15_PERCENT
    assert INSIDE[0] <= scores["kv_inside_interval"] <= INSIDE[1]
    assert scores["outcomes_right"] >= OUTCOMES * scores["outcomes"]


@pytest.mark.slow  # a fit of a hundred starts takes some seconds
def test_the_commonest_gpu_is_predicted_from_the_others(startups: list[Startup]) -> None:
    left = [each for each in startups if each.gpu_kind == "H100-80GB"]
    terms = fit_terms([each for each in startups if each.gpu_kind != "H100-80GB"])
    scores = score_startups(left, [predict_startup(each, terms) for each in left])
    print({name: value for name, value in scores.items() if not name.startswith("by_")})
    assert scores["kv_rows"] >= 40
    assert scores["kv_median_error"] <= KV_MEDIAN_LEFT_OUT
