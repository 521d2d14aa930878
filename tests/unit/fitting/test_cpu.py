"""A calibration from the recorded profile of a real server: vLLM 0.32.0 for CPUs on two cores, a Llama of 4 layers.

Recorded by ``lora-capacity profile --random-model``, campaign ``quick-cpu``; the paths of that machine are replaced.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import Calibration
from lora_capacity.costs import step_time_s
from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InputError
from lora_capacity.fitting import FitReport, fit_calibration
from lora_capacity.measurements import read_profile, read_runs, smape
from lora_capacity.search import recommend
from lora_capacity.status import Status
from lora_capacity.validation import predict_runs
from lora_capacity.workload import Workload

pytestmark = pytest.mark.slow

PROFILE = Path(__file__).parents[2] / "data" / "profile-cpu"
# Repeats of a step time lie within 4 % for the most part, and the form of the equation adds its own.
MEAN_STEP_ERROR, STEP_ERROR = 0.03, 0.2
# Two runs of 20 s that were not fitted, one of them overloaded.
THROUGHPUT_SMAPE, ITL_SMAPE = 5.0, 10.0


@pytest.fixture(scope="module")
def report() -> FitReport:
    return fit_calibration(PROFILE)


def test_step_times_of_a_cpu_are_matched(report: FitReport) -> None:
    profile, costs = read_profile(PROFILE), report.calibration.costs
    batch = profile.adapters
    predicted = step_time_s(
        costs,
        tokens=batch["running"],
        prefill_tokens=0.0,
        kv_tokens=batch["running"] * (9.0 + batch["output_tokens"] / 2),
        adapters=batch["unique"],
        skipped=0.0,
        queued=0.0,
        loaded=0.0,
        max_loras=batch["max_loras"],
        max_lora_rank=batch["max_lora_rank"],
    )
    error = np.abs(np.asarray(predicted) / batch["step_s"] - 1.0)
    assert error.mean() < MEAN_STEP_ERROR
    assert error.max() < STEP_ERROR


def test_coefficients_are_those_of_a_cpu(report: FitReport, tmp_path: Path) -> None:
    step = report.calibration.costs.step
    assert (step.expand_block_s, step.shrink_block_s, step.adapter_rank_s, step.prefill_token_s) == (0, 0, 0, 0)
    # Kernels that copy an adapter's matrices for every token cost by the rank, not by how many adapters there are.
    assert 8 * float(step.lora_token_rank_s) > float(step.lora_token_s)
    assert 7 * float(step.adapter_s) < 64 * 8 * float(step.lora_token_rank_s) / 8
    report.calibration.save(tmp_path / "cpu.json")
    again = Calibration.from_file(tmp_path / "cpu.json")
    assert again == report.calibration
    assert (again.device, again.behaviour.scheduler.async_scheduling) == ("cpu", False)


def test_rules_of_a_cpu_server_are_those_of_its_device() -> None:
    profile = read_profile(PROFILE)
    for behaviour in (profile.behaviour, profile.kv_capacity.behaviour):
        assert not behaviour.scheduler.async_scheduling


def test_kv_cache_of_a_cpu_is_what_it_is_told(report: FitReport) -> None:
    calibration = report.calibration
    assert calibration.accuracy["kv_capacity"]["max_error"] == 0.0
    for slots, rank in ((1, 8), (64, 64)):
        server = ServerConfig("0.32.0", slots, 64, rank, 64, 512, 0.92, 1024, 128)
        plan = calibration.plan_memory(server)
        assert (plan.kv_cache_tokens.tolist(), plan.status.tolist()) == ([131072], [Status.OK])
        assert plan.kv_cache_bytes.tolist() == [131072 * calibration.model.kv_bytes_per_token]


def test_runs_that_were_not_fitted_are_predicted(report: FitReport) -> None:
    runs = read_runs(PROFILE / "serving_runs.csv")
    for engine in ("steady", "event"):
        found = predict_runs(runs, {report.calibration.model.name: report.calibration}, engine)
        assert smape(found.throughput_tokens_per_s, runs.throughput_tokens_per_s) < THROUGHPUT_SMAPE
        assert smape(found.itl_s, runs.itl_s) < ITL_SMAPE


def test_runs_of_the_profile_can_be_fitted_to(report: FitReport) -> None:
    again = fit_calibration(PROFILE, runs=PROFILE / "serving_runs.csv")
    assert set(again.calibration.accuracy["held_back_by_scenario"]["scenarios"]) == {"rank8-load0.5", "rank8-load1.5"}
    assert again.held_back.shape == (2,)


def test_pair_for_a_cpu_is_recommended(report: FitReport) -> None:
    workload = Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": [2.0], "ranks": [8]}},
            "requests": {
                "input_tokens": {"mean": 48, "std": 24, "min": 4, "max": 128},
                "output_tokens": {"mean": 40, "std": 20, "min": 4, "max": 128},
            },
            "horizon_s": 60,
        }
    )
    found = recommend(
        workload,
        report.calibration,
        max_loras=range(1, 9),
        max_num_seqs=[64],
        max_num_batched_tokens=[512],
        settings={"max_model_len": 1024},
    )
    assert 4 <= found.server.max_cpu_loras <= 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(device="tpu"), ("device", "tpu", "gpu, cpu")),
        (lambda content: content["server"].pop("max_num_seqs"), ("server.max_num_seqs", "missing")),
    ],
)
def test_unusable_description(tmp_path: Path, change: Callable[[Any], object], words: tuple[str, ...]) -> None:
    folder = shutil.copytree(PROFILE, tmp_path / "profile")
    content = json.loads((folder / "profile.json").read_text())
    change(content)
    (folder / "profile.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        read_profile(folder)
    assert all(word in str(error.value) for word in words), str(error.value)
