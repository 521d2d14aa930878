"""The front end's coefficients, from what clients of made-up servers see."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, FrontEndCosts
from lora_capacity.fitting.front_end import fit_front_end
from lora_capacity.fitting.measured import MeasuredRuns, read_measured
from lora_capacity.measurements import Profile, read_profile
from tests.unit.fitting.test_fit import MEMORY, MODEL, TRUTH, write, write_profile

FRONT_END = FrontEndCosts(
    response_s=6e-3,
    adapter_response_s=0.25,
    streamed_token_s=0.2e-3,
    adapter_set_s=12e-6,
    adapter_name_s=0.2e-6,
    metrics_interval_s=2.0,
)
COSTS = Costs.of_model(MODEL, TRUTH)
TRAFFIC = [(4, 0.1), (4, 2.0), (4, 3.0), (4, 4.0), (4, 7.0), (4, 9.0), (32, 0.05), (64, 0.06), (96, 0.001), (128, 0.04)]
TRAFFIC += [(128, 0.002), (256, 0.01)]
"""Adapters and the rate of each: busy batches, many combinations, and many first requests."""
ROW = {
    "model": MODEL.name,
    "max_lora_rank": 16,
    "ranks": 16,
    "status": "ok",
    "max_num_seqs": 512,
    "mean_input_tokens": 220,
    "mean_output_tokens": 200,
    "completed": 9000,
    "duration_s": 3600,
    "input_throughput": 550,
    "output_throughput": 500,
    "mean_itl_ms": 30,
    "mean_ttft_ms": 120,
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profile")
    write_profile(folder)
    return read_profile(folder)


@pytest.fixture(scope="module")
def measured(profile: Profile) -> MeasuredRuns:
    """Runs whose latencies clients measured behind `FRONT_END`."""
    rows: list[dict[str, Any]] = [
        ROW | {"max_cpu_loras": adapters, "max_loras": adapters, "rates": rate} for adapters, rate in TRAFFIC
    ]
    write(profile.folder / "runs.csv", rows)
    draft = Calibration(
        name="draft",
        model=profile.model,
        gpu=profile.gpu,
        vllm_version=str(profile.server["vllm_version"]),
        costs=COSTS,
        memory=MEMORY,
        fitted_ranges={},
        capacity_error=0.0,
        device=profile.device,
    )
    found = read_measured(profile.folder / "runs.csv", draft)
    client = found.simulate(replace(COSTS, front_end=FRONT_END)).client
    return replace(found, runs=replace(found.runs, ttft_s=np.asarray(client.ttft_s), itl_s=np.asarray(client.itl_s)))


def test_true_coefficients_are_recovered(profile: Profile, measured: MeasuredRuns) -> None:
    every = np.full(len(measured.runs), True)
    fitted, errors = fit_front_end(profile, measured, measured.simulate(COSTS), every)
    for name, truth in vars(FRONT_END).items():
        assert float(getattr(fitted, name)) == pytest.approx(truth, rel=0.25), name  # priors pull
    assert set(errors) == set(vars(FRONT_END)) - {"metrics_interval_s"}


def test_runs_that_are_not_chosen_tell_nothing(profile: Profile, measured: MeasuredRuns) -> None:
    prior, _ = fit_front_end(profile, None, None, np.zeros(0, bool))
    assert prior.metrics_interval_s == 0.0
    fitted, _ = fit_front_end(profile, measured, measured.simulate(COSTS), np.full(len(measured.runs), False))
    for name in set(vars(prior)) - {"metrics_interval_s"}:
        assert getattr(fitted, name) == pytest.approx(getattr(prior, name)), name


def test_runs_that_nobody_watched_tell_of_no_readings(profile: Profile, measured: MeasuredRuns) -> None:
    unread = replace(measured.runs, metrics_interval_s=np.zeros(len(measured.runs)))
    every = np.full(len(unread), True)
    fitted, _ = fit_front_end(profile, replace(measured, runs=unread), measured.simulate(COSTS), every)
    assert fitted.metrics_interval_s == 0.0
    assert set(jax.tree.leaves(fitted)) != {0.0}
