"""The event twin against a sample of the measured runs; prints what it finds beside each bound.

The whole set, over several seeds and with coefficients that the runs had no part in, is what
``docs/generate_event_accuracy.py`` reports.
"""
# ruff: noqa: T201  accuracies are printed beside their bounds

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lora_capacity.calibration import load_calibration
from lora_capacity.measurements import Runs, is_starved, read_runs, read_time_means, smape
from lora_capacity.status import Status
from lora_capacity.validation import Predictions, predict_runs

EVERY_MODEL = pytest.mark.parametrize("model", ["llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"])
SAMPLE = 20
SEED = 1

# Held by one seed and one sample of the runs. The chaos of an overloaded server moves a run by about 1 %.
MOST = {"throughput_tokens_per_s": 2.0, "itl_s": 4.0, "ttft_s": 12.0}
# Mean absolute difference of the mean over time, percent, of a dozen runs. Over all of them it is 4 % where starved (at
# most 8 % is aimed at) and 10 % elsewhere (at most 5 %): unstarved servers are predicted to run 9 % more requests than
# the engine reported, as many as follow from the inter-token latency that clients saw and the fit asks for.
MOST_HELD = {"starved": 12.0, "not starved": 18.0}


@cache
def sample(folder: Path, model: str) -> tuple[Runs, Predictions]:
    """Runs evenly over scenarios and loads, which is how the table is sorted, and what the twin says of them."""
    runs = read_runs(folder / "serving_runs.csv")
    rows = np.flatnonzero((runs.model == model) & (runs.status == Status.OK))
    runs = runs.take(rows[np.linspace(0, rows.size - 1, SAMPLE).astype(int)])
    return runs, predict_runs(runs, {model: load_calibration(f"{model}-h100-64gb")}, "event", seed=SEED)


@pytest.mark.slow
@EVERY_MODEL
def test_close_to_a_sample_of_the_measured_runs(model: str, measurements_dir: Path) -> None:
    runs, predicted = sample(measurements_dir, model)
    assert set(predicted.status) <= {Status.OK.label, Status.OUTSIDE_CALIBRATION.label}
    errors = {}
    for name, bound in MOST.items():
        told, right = getattr(predicted, name), getattr(runs, name)
        errors[name] = smape(told, right)
        print(f"\n{model} {name}: SMAPE {errors[name]:.2f} % (at most {bound} %)")
        for row in range(len(runs)):
            place = f"S={runs.max_loras[row]} A={runs.max_cpu_loras[row]}"
            print(f"  {runs.scenario[row]} {place}: {told[row]:.4g} {right[row]:.4g}")
    assert {name: error for name, error in errors.items() if error > MOST[name]} == {}


@pytest.mark.slow
@EVERY_MODEL
def test_running_requests_and_kv_cache_over_time(model: str, measurements_dir: Path) -> None:
    runs, predicted = sample(measurements_dir, model)
    held = read_time_means(measurements_dir / "serving_timeseries.parquet", runs)
    starved = is_starved(runs.throughput_tokens_per_s, predicted.offered_tokens_per_s)
    wrong = {}
    for word, rows in (("starved", starved), ("not starved", ~starved)):
        for what, told, right in (
            ("running requests", predicted.mean_running, held.running),
            ("KV cache in use", predicted.kv_usage, held.kv_usage),
        ):
            error = 100 * np.abs(told[rows] / right[rows] - 1).mean()
            print(f"\n{model}, {word}, {what}: {error:.1f} % on average (at most {MOST_HELD[word]} %)")
            if error > MOST_HELD[word]:
                wrong[word, what] = error
    assert wrong == {}
