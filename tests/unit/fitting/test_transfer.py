"""Calibrations corrected by a few runs, from made-up servers whose coefficients are known."""

import dataclasses

import numpy as np
import pytest

from lora_capacity.calibration import bundled_names, derive_calibration, load_calibration
from lora_capacity.costs import Costs
from lora_capacity.errors import InputError
from lora_capacity.fitting.measured import measured_runs
from lora_capacity.fitting.transfer import (
    NewModel,
    distribution,
    draw_costs,
    interval_coverage,
    transferred,
    update_calibration,
)
from lora_capacity.measurements import Runs, read_runs
from lora_capacity.models import find_shape
from tests.cli.test_bad_input import RUN
from tests.unit.fitting.test_fit import write

MODEL = dataclasses.replace(find_shape("Qwen3-8B"), name="mine")
PRIOR = derive_calibration(MODEL, "L40S", vllm_version="0.20.0")


@pytest.fixture(scope="module")
def truth():
    """A server that is slower than believed, within what its distribution says."""
    values = PRIOR.coefficients
    slower = {"base_s": 1.15, "token_s": 1.4, "expand_block_s": 1.3, "adapter_s": 1.2}
    values = {name: value * slower.get(name, 1.0) for name, value in values.items()}
    return dataclasses.replace(PRIOR, costs=Costs.of_values(values, PRIOR.costs.kernels))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, truth) -> Runs:
    """Runs as that server would have made them."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        RUN
        | {"model": "mine", "max_loras": str(slots), "max_cpu_loras": str(adapters), "rates": str(rate), "status": "ok"}
        | {"max_num_seqs": "256", "max_num_batched_tokens": "2048", "gpu": "L40S", "duration_s": "3600"}
        for adapters, slots, rate in (
            (8, 8, 0.2),
            (8, 8, 3.0),
            (32, 32, 0.2),
            (32, 16, 1.0),
            (64, 64, 0.5),
            (96, 32, 0.1),
        )
    ]
    write(folder / "runs.csv", rows)
    asked = read_runs(folder / "runs.csv")
    found = measured_runs(asked, truth).simulate(truth.costs)
    client = found.client
    share = np.asarray(found.throughput_tokens_per_s) / (asked.mean_input_tokens + asked.mean_output_tokens)
    return dataclasses.replace(
        asked,
        throughput_tokens_per_s=np.asarray(found.throughput_tokens_per_s, np.float64),
        output_tokens_per_s=np.asarray(share * asked.mean_output_tokens, np.float64),
        completed=np.asarray(share * asked.duration_s, np.float64),
        itl_s=np.asarray(client.itl_s, np.float64),
        ttft_s=np.asarray(client.ttft_s, np.float64),
        mean_running=np.full(len(asked), np.nan),
    )


def error(calibration, runs: Runs) -> float:
    """Mean absolute error of the logarithm of the inter-token latency."""
    found = measured_runs(runs, calibration).simulate(calibration.costs)
    return float(np.mean(np.abs(np.log(np.asarray(found.client.itl_s) / runs.itl_s))))


@pytest.mark.slow
def test_a_few_runs_correct_what_was_believed(runs: Runs, truth) -> None:
    corrected = update_calibration(PRIOR, runs.take(np.array([1, 3, 4])))
    assert error(truth, runs) < 0.01
    assert error(corrected, runs) < 0.3 * error(PRIOR, runs)
    assert corrected.capacity_error < PRIOR.capacity_error
    before, after = (each.accuracy["coefficient_errors"] for each in (PRIOR, corrected))
    assert all(after[name] <= before[name] + 1e-3 for name in after)
    assert after["disk_s"] == pytest.approx(before["disk_s"], rel=0.02)  # of which runs tell nothing
    assert corrected.provenance["corrected_by_runs"] == 3


def test_draws_have_the_spreads_and_correlations_told() -> None:
    known = distribution(PRIOR)
    generator = np.random.default_rng(0)
    drawn = np.log([[getattr(draw_costs(PRIOR, generator).step, n) for n in ("base_s", "token_s")] for _ in range(400)])
    told = [PRIOR.accuracy["coefficient_errors"][name] for name in ("base_s", "token_s")]
    assert np.std(drawn, axis=0) == pytest.approx(told, rel=0.12)
    rows = [known.names.index(name) for name in ("base_s", "token_s")]
    correlation = known.covariance[rows[0], rows[1]] / np.prod(told)
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(correlation, abs=0.12)


def test_correlations_that_no_variables_have_are_made_ones() -> None:
    errors = {"base_s": 0.1, "token_s": 0.1, "lora_s": 0.1}
    told = {"coefficient_errors": errors, "coefficient_correlations": [[], [0.99], [0.99, -0.99]]}
    covariance = distribution(dataclasses.replace(PRIOR, accuracy=told)).covariance
    assert np.linalg.eigvalsh(covariance).min() > 0
    assert np.diag(covariance) == pytest.approx(0.01)
    sound = {"coefficient_errors": errors, "coefficient_correlations": [[], [0.5], [0.2, -0.1]]}
    assert distribution(dataclasses.replace(PRIOR, accuracy=sound)).covariance[2, 1] == pytest.approx(-0.001)


def test_intervals_of_the_right_server_hold_and_of_a_wrong_one_do_not(runs: Runs, truth) -> None:
    assert interval_coverage(runs, {"mine": truth}).mean() == 1.0
    sure = {"coefficient_errors": dict.fromkeys(PRIOR.accuracy["coefficient_errors"], 1e-4)}
    assert interval_coverage(runs, {"mine": dataclasses.replace(PRIOR, accuracy=sure)}).mean() < 1.0


def test_no_model_is_predicted_by_its_own_measurements(runs: Runs) -> None:
    known = {each.model.name: each for each in map(load_calibration, bundled_names())}
    new = NewModel(MODEL, "L40S", "0.20.0")
    derived = transferred(runs, known, new)["mine"]
    assert set(derived.provenance["corrected_by"]) == set(bundled_names())
    own = dataclasses.replace(known["qwen-2.5-7b-instruct"], name="own")
    named = dataclasses.replace(runs, model=np.full(len(runs), own.model.name, object))
    again = transferred(named, known | {own.model.name: own})[own.model.name]
    assert again.provenance["corrected_by"] == ["llama-3.1-8b-instruct-h100-64gb"]
    with pytest.raises(InputError, match=r"model: 'mine' .* --model-config"):
        transferred(runs, known)


def test_a_prior_without_errors_is_refused(runs: Runs) -> None:
    with pytest.raises(InputError, match="--prior"):
        update_calibration(dataclasses.replace(PRIOR, accuracy={}), runs)
