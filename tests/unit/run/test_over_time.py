"""Traffic over time by both twins: window after window, with the queue carried over."""

from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import load_calibration
from lora_capacity.run import simulate
from lora_capacity.run.over_time import windows_in_series
from lora_capacity.scenarios import build_scenarios
from lora_capacity.workload import Workload

CALIBRATION = load_calibration("llama-3.1-8b-instruct-h100-64gb")
REQUESTS = {
    "input_tokens": {"mean": 223, "std": 248, "min": 4, "max": 1024},
    "output_tokens": {"mean": 197, "std": 207, "min": 4, "max": 1024},
}


def workload(**keys: Any) -> Workload:
    mix = {"mix": {"rates_per_s": [0.4], "ranks": [8]}}
    return Workload.from_mapping({"adapters": mix, "requests": REQUESTS, "horizon_s": 2400} | keys)


def steady(asked: Workload, adapters: list[int]) -> Any:
    return simulate(CALIBRATION, build_scenarios(asked, CALIBRATION, adapters=adapters, max_loras=8), asked)


def test_rates_that_stay_the_same_give_the_answer_of_a_window() -> None:
    constant, changing = workload(horizon_s=600), workload(arrivals={"profile": [1, 1, 1, 1]})
    expected, found = steady(constant, [8, 12]), steady(changing, [8, 12])
    for name in ("ttft_s", "itl_s", "attainment", "mean_running", "kv_usage", "offered_tokens_per_s", "class_service"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, err_msg=name)
    assert found.windows.requests_per_s.shape == (2, 4)
    np.testing.assert_allclose(found.windows.requests_per_s[0], 3.2, rtol=1e-6)


def test_without_traffic_over_time_no_windows_are_told() -> None:
    assert steady(workload(), [8]).windows is None


def test_a_queue_is_carried_until_it_is_worked_off() -> None:
    """The event twin, which plays every step, is what the fluid is held against."""
    asked = workload(arrivals={"profile": [1, 2.5, 1, 0.2]})
    servers = build_scenarios(asked, CALIBRATION, adapters=[32], max_loras=[32])
    told, played = (simulate(CALIBRATION, servers, asked, engine=engine).windows for engine in ("steady", "event"))
    # 15 %: the steady twin's error of the capacity in overload, which the queue adds up.
    for name in ("served_per_s", "mean_running"):
        np.testing.assert_allclose(getattr(told, name), getattr(played, name), rtol=0.15, err_msg=name)
    np.testing.assert_allclose(told.mean_waiting[0, 1:3], played.mean_waiting[0, 1:3], rtol=0.15)
    assert np.all(told.mean_waiting[0, [0, 3]] < 1) and np.all(played.mean_waiting[0, [0, 3]] < 1)  # noqa: PT018
    assert told.worst.tolist() == [1]
    assert np.isnan(played.attainment).all()


def test_what_nobody_asks_for_costs_nothing_and_waits_for_nothing() -> None:
    found = steady(workload(arrivals={"profile": [0, 0, 1, 0]}), [8]).windows
    assert found.mean_running[0, [0, 1, 3]] == pytest.approx([0, 0, 0], abs=1e-3)
    assert found.worst.tolist() == [2]


def test_adapters_may_change_each_by_itself(tmp_path: Any) -> None:
    rows = [
        f"{name},{600 * i},{rate}" for name, rates in {"a": (1, 3), "b": (3, 1)}.items() for i, rate in enumerate(rates)
    ]
    (tmp_path / "rates.csv").write_text("\n".join(["adapter,t_s,rate_per_s", *rows]))
    asked = Workload.from_mapping({"adapters": {"rates": "rates.csv", "ranks": [8]}, "requests": REQUESTS}, tmp_path)
    servers = build_scenarios(asked, CALIBRATION, adapters=[1, 2], max_loras=[1, 2])
    found = simulate(CALIBRATION, servers, asked)
    # Both have the same mean rate and rank, and are one class: of one adapter it tells the first's rates.
    np.testing.assert_allclose(found.windows.requests_per_s, [[1, 3], [4, 4]], rtol=1e-6)
    np.testing.assert_allclose(found.windows.mean_running[1], found.windows.mean_running[1, 0], rtol=1e-5)


def test_windows_of_different_lengths_are_not_told_by_the_event_twin(tmp_path: Any) -> None:
    (tmp_path / "rates.csv").write_text("adapter,t_s,rate_per_s\na,0,1\na,60,2\n")
    asked = Workload.from_mapping(
        {"adapters": {"rates": "rates.csv", "ranks": [8]}, "requests": REQUESTS, "horizon_s": 90}, tmp_path
    )
    assert windows_in_series(asked) == 0
    assert windows_in_series(workload(arrivals={"profile": [1, 2, 3]})) == 3
    servers = build_scenarios(asked, CALIBRATION, adapters=[1], max_loras=[1])
    assert simulate(CALIBRATION, servers, asked).windows.end_s.tolist() == [[60, 90]]
