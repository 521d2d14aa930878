"""The published serving runs, each model predicted by what was measured of the other, and by few of its own runs."""
# ruff: noqa: T201  accuracies are printed beside their bounds

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import Calibration, bundled_names, load_calibration
from lora_capacity.fitting import update_calibration
from lora_capacity.fitting.transfer import interval_coverage, transferred
from lora_capacity.measurements import Runs, read_runs
from lora_capacity.validation import predict_runs, score_runs
from tests.measured.test_validation import within

pytestmark = pytest.mark.slow

MOST = {"throughput_smape": 2.4, "itl_smape": 5.0}
STARVED_WRONG_PERCENT = 2.0
REGRET, REGRETS_BEYOND = 0.03, 3  # two are wanted; measured optima lie at a cliff, beyond which servers starve


@pytest.fixture(scope="module")
def runs(measurements_dir: Path) -> Runs:
    return read_runs(measurements_dir / "serving_runs.csv")


@pytest.fixture(scope="module")
def derived(runs: Runs) -> dict[str, Calibration]:
    return transferred(runs, {each.model.name: each for each in map(load_calibration, bundled_names())})


@pytest.fixture(scope="module")
def scores(runs: Runs, derived: dict[str, Calibration]) -> dict[str, Any]:
    return score_runs(runs, predict_runs(runs, derived))


def test_errors_of_a_model_never_measured(scores: dict[str, Any]) -> None:
    for each in scores["models"]:
        for name, most in MOST.items():
            assert within(f"{each['model']}, {name}", each[name], most)


def test_outcomes_of_a_model_never_measured(scores: dict[str, Any]) -> None:
    starved = scores["starved"]
    wrong = 100 * (starved["fp"] + starved["fn"]) / sum(starved.values())
    assert within("starved or not, wrong %", wrong, STARVED_WRONG_PERCENT)
    assert scores["startup"]["disagree"] == 0
    assert not any(each["chosen"]["starved"] for each in scores["optima"])
    beyond = sum(each["regret"] > REGRET for each in scores["optima"])
    assert within("optima with a larger regret", beyond, REGRETS_BEYOND)


def test_intervals_hold_nine_of_ten(runs: Runs, derived: dict[str, Calibration]) -> None:
    share = np.nanmean(interval_coverage(runs, derived))
    print(f"\nruns within their interval: {share:.3f}, 0.85 to 0.95")
    assert 0.85 <= share <= 0.95


def test_five_runs_bring_it_near_a_profiled_one(runs: Runs, derived: dict[str, Calibration]) -> None:
    generator = np.random.default_rng(0)
    for model, calibration in derived.items():
        own = runs.completed_of(model)
        five = own.take(generator.choice(len(own), 5, replace=False))
        corrected = update_calibration(calibration, five)
        error = score_runs(own, predict_runs(own, {model: corrected}))["models"][0]["throughput_smape"]
        profiled = load_calibration(f"{model}-h100-64gb").accuracy["held_back_by_scenario"]["throughput_smape"]
        assert within(f"{model}, throughput SMAPE after five runs", error, 2 * profiled)
