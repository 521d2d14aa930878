"""Predictions of what is about to be sent, and whether a measurement bears them out."""

import dataclasses
import math

import numpy as np
import pytest

from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InputError
from lora_capacity.validation import Agreement, Outcome, offered_tokens_per_s, predict_outcomes
from lora_capacity.workload import Workload
from lora_capacity.workload.requests import Requests
from tests.examples import make_calibration

PREDICTED = Outcome("ok", 1000.0, 950.0, 0.02, 0.3)
WORKLOAD = Workload.from_mapping(
    {
        "adapters": {"mix": {"rates_per_s": [0.2, 0.1], "ranks": [8]}},
        "base_model": {"rate_per_s": 0.5},
        "requests": {
            "input_tokens": {"mean": 100, "std": 50, "min": 4, "max": 300},
            "output_tokens": {"mean": 80, "std": 40, "min": 4, "max": 200},
        },
        "horizon_s": 200,
    }
)


def measured(**changes: float | str) -> Outcome:
    return dataclasses.replace(PREDICTED, **changes)


@pytest.mark.parametrize(
    ("seen", "agrees"),
    [
        (measured(), True),
        (measured(throughput_tokens_per_s=950 / 1.099), True),
        (measured(throughput_tokens_per_s=950 / 1.101), False),
        (measured(throughput_tokens_per_s=950 / 0.899), False),
        (measured(itl_s=0.02 / 1.199), True),
        (measured(itl_s=0.02 / 0.799), False),
        (measured(ttft_s=30.0), True),
        (measured(itl_s=math.nan), True),
        (measured(throughput_tokens_per_s=math.nan), False),
        (measured(throughput_tokens_per_s=0.0), False),
        (Outcome("oom"), False),
    ],
)
def test_what_agrees(seen: Outcome, agrees: bool) -> None:
    assert Agreement(PREDICTED, seen).agrees == agrees


def test_servers_that_do_not_start_agree_whatever_the_reason() -> None:
    assert Agreement(Outcome("oom"), Outcome("no_kv_cache")).agrees
    assert not Agreement(Outcome("oom"), PREDICTED).agrees
    assert Agreement(dataclasses.replace(PREDICTED, status="outside_calibration"), PREDICTED).agrees


def test_errors_are_relative_to_what_was_measured() -> None:
    seen = measured(throughput_tokens_per_s=1000.0, itl_s=0.016, ttft_s=0.6)
    assert Agreement(PREDICTED, seen).errors == pytest.approx({"throughput": -0.05, "itl": 0.25, "ttft": -0.5})
    assert math.isnan(Agreement(PREDICTED, Outcome("oom")).errors["itl"])


def test_tolerances_are_positive() -> None:
    with pytest.raises(InputError, match="itl_tolerance: 0 is not allowed"):
        Agreement(PREDICTED, PREDICTED, 0.1, 0)


def test_starved_by_the_definition_of_the_library() -> None:
    assert measured(throughput_tokens_per_s=900.0).starved
    assert not PREDICTED.starved
    assert not Outcome("oom").starved


def test_offered_load_counts_what_arrives_in_time() -> None:
    requests = Requests(np.array([0.0, 5.0, 11.0]), np.zeros(3), np.array([10, 20, 30]), np.array([1, 2, 3]))
    assert offered_tokens_per_s(requests, 10.0) == pytest.approx(3.3)


@pytest.mark.parametrize("engine", ["event", "steady"])
def test_prediction_is_of_the_requests_drawn(engine: str) -> None:
    calibration = make_calibration(vllm_version="0.32.0")
    servers = [
        ServerConfig.with_defaults(
            calibration.behaviour,
            calibration.gpu,
            calibration.model,
            max_cpu_loras=count,
            max_loras=4,
            max_lora_rank=8,
            max_num_seqs=64,
        )
        for count in (8, 4)
    ]
    outcomes = predict_outcomes(WORKLOAD, calibration, servers, engine, seed=5)
    for server, outcome in zip(servers, outcomes, strict=True):
        drawn = WORKLOAD.sample_requests(server.max_cpu_loras, 5)
        assert outcome.offered_tokens_per_s == pytest.approx(offered_tokens_per_s(drawn, 200.0))
        # An easy load: all but what is still running at the end.
        assert outcome.throughput_tokens_per_s == pytest.approx(outcome.offered_tokens_per_s, rel=0.03)
        assert outcome.itl_s > 0.01
    assert outcomes[0].throughput_tokens_per_s > outcomes[1].throughput_tokens_per_s


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'event'"):
        predict_outcomes(WORKLOAD, make_calibration(), [], "events")
