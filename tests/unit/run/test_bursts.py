"""Bursts of recorded requests: what they add to the steady twin's averages."""

from typing import Any

import numpy as np
import pytest

from lora_capacity.calibration import load_calibration
from lora_capacity.run import simulate
from lora_capacity.run.bursts import with_bursts
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.workload import AdapterMix, Arrivals, LengthDistribution, Requests, Workload

CALIBRATION = load_calibration("llama-3.1-8b-instruct-h100-64gb")
PROMPTS = LengthDistribution.from_histogram([1500], [1])
ANSWERS = LengthDistribution.from_histogram([20], [1])
WINDOW_S = 10.0


def recorded(counts: Any, adapters: int = 8, base: int = 0) -> Workload:
    """A record with so many requests in each ten seconds, evenly in each, in turn; the first so many to the base."""
    counts = np.asarray(counts)
    parts = [WINDOW_S * (i + (np.arange(count) + 0.5) / count) for i, count in enumerate(counts) if count]
    arrival_s = np.concatenate(parts)
    whose = np.arange(arrival_s.size) % adapters
    whose[:base] = -1
    requests = Requests(arrival_s, whose, np.full(arrival_s.size, 1500), np.full(arrival_s.size, 20))
    horizon_s = WINDOW_S * counts.size
    mix = AdapterMix([arrival_s.size / horizon_s / adapters], [8])
    return Workload(mix, PROMPTS, ANSWERS, arrivals=Arrivals("trace"), horizon_s=horizon_s, trace=requests)


def servers(asked: Workload, count: int = 1) -> Scenarios:
    return build_scenarios(asked, CALIBRATION, adapters=[8] * count, max_loras=8)


def test_the_event_twin_agrees_on_a_burst() -> None:
    counts = np.full(60, 15)
    counts[20:24] = 300, 250, 150, 60  # some 100 fit into ten seconds
    asked = recorded(counts)
    steady, event = (simulate(CALIBRATION, servers(asked), asked, engine=engine) for engine in ("steady", "event"))
    assert simulate(CALIBRATION, servers(asked), ANSWERS).ttft_s < 1  # of averages alone
    assert event.ttft_s > 5
    # 20 %: a fluid over ten seconds, and the capacity of a prompt-bound server beyond what was fitted.
    for name in ("ttft_s", "mean_waiting"):
        assert getattr(steady, name) == pytest.approx(getattr(event, name), rel=0.2), name
    assert steady.attainment == pytest.approx(event.attainment, abs=0.1)


def test_requests_that_come_evenly_wait_for_nothing_more() -> None:
    asked = recorded(np.full(30, 20))
    found, averages = (simulate(CALIBRATION, servers(asked), traffic) for traffic in (asked, ANSWERS))
    for name in ("ttft_s", "attainment", "mean_waiting", "completed_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(averages, name), rel=1e-6)


def served(capacity_per_s: float, averages: Any) -> Any:
    """A twin of a server with a known capacity."""

    def solve(asked: Scenarios) -> Any:
        offered = np.asarray(asked.requests_per_s)
        done = np.minimum(offered, capacity_per_s)
        tokens = offered * 1520.0
        fields = {"offered_tokens_per_s": tokens, "throughput_tokens_per_s": tokens * done / offered}
        return averages.replace(**fields, mean_running=np.zeros_like(offered))

    return solve


def test_the_queue_is_that_of_a_fluid() -> None:
    asked = recorded([0, 40, 10, 0, 10])
    averages: Any = simulate(CALIBRATION, servers(asked), ANSWERS)
    assert asked.trace is not None
    found: Any = with_bursts(servers(asked), asked.trace, asked.horizon_s, averages, served(2.0, averages))
    # 20 fit into a window: 20 are left of the second, 10 of the third, none later. At 2 a second the 40 wait 0 to 10 s,
    # the 10 after them 10 to 5 s.
    assert found.ttft_s - averages.ttft_s == pytest.approx((40 * 5 + 10 * 7.5) / 60, rel=1e-4)
    assert found.mean_waiting - averages.mean_waiting == pytest.approx((10 + 15 + 5) / 5, rel=1e-4)
    # Within 2 s less the usual time are a fifth of the 40 and none of the 10 after them.
    slack_s = 2.0 - averages.client.ttft_s
    late = 40 * (1 - slack_s / 10) + 10
    assert found.attainment == pytest.approx(averages.attainment * (1 - late / 60), rel=1e-4)


def test_a_load_presses_the_record_together() -> None:
    asked = recorded([0, 40, 10, 0, 10])
    averages: Any = simulate(CALIBRATION, servers(asked), ANSWERS)
    assert asked.trace is not None
    doubled = servers(asked).scaled(np.array([2.0]))
    found: Any = with_bursts(doubled, asked.trace, asked.horizon_s, averages, served(4.0, averages))
    # Twice as fast in both: as many in a queue, for half as long.
    assert found.ttft_s - averages.ttft_s == pytest.approx((40 * 5 + 10 * 7.5) / 60 / 2, rel=1e-4)


def test_what_is_left_at_the_end_is_not_completed() -> None:
    asked = recorded([10, 0, 0, 50])
    averages: Any = simulate(CALIBRATION, servers(asked), ANSWERS)
    assert asked.trace is not None
    found: Any = with_bursts(servers(asked), asked.trace, asked.horizon_s, averages, served(2.0, averages))
    assert found.completed_per_s == pytest.approx(averages.completed_per_s * (1 - 30 / 60), rel=1e-4)


def test_servers_that_do_not_start_say_nothing() -> None:
    asked = recorded([1, 50, 1], base=3)
    scenarios = build_scenarios(asked, CALIBRATION, adapters=[8], max_loras=8, gpu_memory_utilization=0.2)
    assert np.isnan(simulate(CALIBRATION, scenarios, asked).ttft_s).all()
