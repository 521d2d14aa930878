"""The event twin against a sample of the measured runs; prints what it finds beside each bound."""
# ruff: noqa: T201  accuracies are printed beside their bounds

from pathlib import Path

import numpy as np
import pytest

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.playing import play
from lora_capacity.status import Status
from lora_capacity.twin.events import EventResults
from lora_capacity.validation import lay_out_runs, length_pairs, read_runs
from lora_capacity.validation.runs import Runs

SAMPLE = 40

# Held by one seed and one sample of the runs. The chaos of an overloaded server moves a run by about 1 %.
THROUGHPUT_SMAPE, ITL_SMAPE, TTFT_SMAPE = 2.0, 4.0, 12.0


def played(runs: Runs, rows: np.ndarray, calibration: Calibration) -> EventResults:
    lengths = calibration.runs
    assert lengths is not None
    scenarios, _ = lay_out_runs(runs, rows, calibration, lengths)
    means = np.stack([scenarios.mean_input_tokens, scenarios.mean_output_tokens], axis=1).tolist()
    inputs, outputs = zip(*(length_pairs(*each, lengths) for each in means), strict=True)
    return play(calibration, scenarios, np.stack(inputs), np.stack(outputs), seed=1)


def smape(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    return 100 * np.abs(predicted - measured) / (predicted + measured)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"])
def test_close_to_a_sample_of_the_measured_runs(model: str, measurements_dir: Path) -> None:
    runs = read_runs(measurements_dir / "serving_runs.csv")
    rows = np.flatnonzero((runs.model == model) & (runs.status == Status.OK))
    # Evenly over scenarios and loads, which is how the table is sorted.
    rows = rows[np.linspace(0, rows.size - 1, SAMPLE // 2).astype(int)]
    results = played(runs, rows, load_calibration(f"{model}-h100-64gb"))
    settled = results.settled
    columns = (
        ("throughput", settled.throughput_tokens_per_s, runs.throughput_tokens_per_s, THROUGHPUT_SMAPE),
        ("ITL", settled.itl_s, runs.itl_s, ITL_SMAPE),
        ("TTFT", settled.ttft_s, runs.ttft_s, TTFT_SMAPE),
    )
    errors = {}
    for name, predicted, measured, bound in columns:
        found = smape(np.asarray(predicted), measured[rows])
        errors[name] = (found.mean(), bound)
        print(f"\n{model} {name}: SMAPE {found.mean():.2f} % (bound {bound} %)")
        for row, value, right in zip(rows, np.asarray(predicted), measured[rows], strict=True):
            print(
                f"  {runs.scenario[row]} S={runs.max_loras[row]} A={runs.max_cpu_loras[row]}: {value:.4g} {right:.4g}"
            )
    print("preemptions", np.asarray(results.preemptions), "turns", np.asarray(results.turns))
    assert not np.any(np.asarray(settled.status) == Status.STEP_LIMIT)
    for name, (error, bound) in errors.items():
        assert error <= bound, name
