"""Results that no server can have do not leave the library."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.errors import ImpossibleResultError
from lora_capacity.run import simulate
from lora_capacity.run.invariants import check_results
from lora_capacity.scenarios import Results, Scenarios
from tests.examples import STAYS, make_calibration, make_scenarios

SCENARIOS = make_scenarios([8.0, 4.0], [0.2, 0.1], max_loras=[4, 6, 12], horizon_s=600.0, max_pending=50.0)


@pytest.fixture(scope="module")
def results() -> Results:
    return simulate(make_calibration(), SCENARIOS, STAYS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("throughput_tokens_per_s", np.nan, "throughput_tokens_per_s is nan, which has to be finite"),
        ("mean_waiting", np.inf, "mean_waiting is inf, which has to be finite"),
        ("ttft_s", -0.5, "ttft_s is -0.5, which has to be at least 0"),
        ("throughput_tokens_per_s", 1e6, "throughput_tokens_per_s is 1e.06, which has to be at most"),
        ("mean_waiting", 60.0, "mean_running . mean_waiting is .*at most 50"),
        ("active_adapters", 6.1, "active_adapters is 6.1, which has to be at most 6"),
        ("kv_usage", 1.1, "kv_usage is 1.1, which has to be at most 1"),
        ("ttft_s", 601.0, "ttft_s is 601, which has to be at most 600"),
        ("attainment", 1.01, "attainment is 1.01, which has to be at most 1"),
    ],
)
def test_what_no_server_can_do_is_told_with_its_configuration(
    results: Results, name: str, value: float, message: str
) -> None:
    check_results(SCENARIOS, results)
    column = np.array(getattr(results, name))
    column[1] = value
    wrong: Any = dataclasses.replace(results, **{name: column})
    with pytest.raises(ImpossibleResultError, match=rf"{message}.*\(max_cpu_loras 12, max_loras 6, .*please report it"):
        check_results(SCENARIOS, wrong)


def test_servers_that_do_not_start_have_no_numbers(results: Results) -> None:
    host: Any = jax.tree.map(np.asarray, SCENARIOS)
    refused: Scenarios = dataclasses.replace(host, status=np.full(3, 3, np.int32))
    blank: Any = {"throughput_tokens_per_s": np.full(3, np.nan), "status": refused.status}
    check_results(refused, dataclasses.replace(results, **blank))
