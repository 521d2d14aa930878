"""The bundled calibrations against the published serving runs: accuracies beside the bounds asked for."""
# ruff: noqa: T201  accuracies are printed beside their bounds

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import bundled_names, load_calibration
from lora_capacity.measurements import read_runs
from lora_capacity.validation import predict_runs, score_runs

# On the runs that the calibrations were fitted to.
MOST = {
    "throughput_smape": 2.0,
    "itl_smape": 3.5,
    "starved_wrong_percent": 3.0,
    "regret_percent": 1.0,
    "regrets_beyond": 1,
}
MODELS = ("llama-3.1-8b-instruct", "qwen-2.5-7b-instruct")


@pytest.fixture(scope="module")
def scores(measurements_dir: Path) -> dict[str, Any]:
    runs = read_runs(measurements_dir / "serving_runs.csv")
    calibrations = {each.model.name: each for each in map(load_calibration, bundled_names())}
    return score_runs(runs, predict_runs(runs, calibrations))


def within(what: str, value: float, most: float) -> bool:
    print(f"\n{what}: {value:.3g}, at most {most:g}", end=" ")
    return value <= most


def test_every_run_is_compared(scores):
    assert {each["model"]: each["runs"] for each in scores["models"]} == dict(zip(MODELS, (312, 383), strict=True))
    assert len(scores["groups"]) == 16


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("measure", ["throughput_smape", "itl_smape"])
def test_error_of_each_model(scores, model, measure):
    (found,) = (each for each in scores["models"] if each["model"] == model)
    assert within(f"{model}, {measure}", found[measure], MOST[measure])


def test_starved_or_not(scores):
    starved = scores["starved"]
    wrong = 100 * (starved["fp"] + starved["fn"]) / sum(starved.values())
    assert within(f"starved or not: {starved}, wrong percent", wrong, MOST["starved_wrong_percent"])


def test_every_start_is_told(scores):
    print(f"\nstart-up: {scores['startup']}", end=" ")
    assert scores["startup"] == {"agree": 788, "disagree": 0}


def test_optima(scores):
    optima = scores["optima"]
    assert len(optima) == 10
    for each in optima:
        print(f"\n{each}", end=" ")
    assert [each for each in optima if each["chosen"]["starved"] is not False] == []
    beyond = np.count_nonzero([100 * each["regret"] > MOST["regret_percent"] for each in optima])
    assert within(f"workloads with a regret beyond {MOST['regret_percent']} %", beyond, MOST["regrets_beyond"])
