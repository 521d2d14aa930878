"""Servers whose host memory holds fewer adapters than they serve: loads counted by hand, and both models of them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from lora_capacity.costs import LoadCosts
from lora_capacity.errors import InputError
from lora_capacity.run import simulate
from lora_capacity.run.batches import Batches
from lora_capacity.scenarios import Results, build_scenarios, table
from lora_capacity.workload import AdapterMix, Arrivals, LengthDistribution, Requests, Workload
from tests.examples import COSTS, make_calibration

LOADS = LoadCosts(host_to_gpu_load_s=5e-3, disk_s=0.1, disk_rank_s=0.0)
CALIBRATION = make_calibration(costs=dataclasses.replace(COSTS, loads=LOADS))
LENGTHS = LengthDistribution.from_histogram([40], [1])


def one_after_the_other(*adapters: int) -> Workload:
    """A request every ten seconds, each done before the next comes."""
    number = len(adapters)
    trace = Requests(10.0 * np.arange(number), np.array(adapters), np.full(number, 40), np.full(number, 40))
    return Workload(
        AdapterMix([0.1], [8]), LENGTHS, LENGTHS, arrivals=Arrivals("trace"), horizon_s=10.0 * number, trace=trace
    )


@pytest.mark.parametrize("engine", ["event", "reference"])
@pytest.mark.parametrize(
    ("adapters", "settings", "disk_loads"),
    [
        ((0, 1, 2, 0, 1, 2), {}, 3),
        ((0, 1, 2, 0, 1, 2), {"max_cpu_loras": 2}, 6),  # the one asked for next is always the one that left
        ((0, 1, 2, 1, 2, 0), {"max_cpu_loras": 2}, 4),
        ((0, 1, 2, 0, 1, 2), {"loaded_at_start": True}, 0),
        ((2, 1, 0, 1, 0, 2), {"max_cpu_loras": 2, "loaded_at_start": True}, 2),  # the last two of three are there
    ],
)
def test_disk_loads_counted_by_hand(
    adapters: tuple[int, ...], settings: dict[str, Any], disk_loads: int, engine: str
) -> None:
    workload = one_after_the_other(*adapters)
    scenarios = build_scenarios(workload, CALIBRATION, 3, 1, **settings)
    results = simulate(CALIBRATION, scenarios, workload, engine=engine)
    assert int(results.events.disk_loads[0]) == disk_loads


WORKLOAD = Workload.from_mapping(
    {
        "adapters": {"mix": {"rates_per_s": [0.06, 0.02], "ranks": [8]}},
        "requests": {
            "input_tokens": {"mean": 100, "std": 80, "min": 4, "max": 300},
            "output_tokens": {"mean": 50, "std": 40, "min": 1, "max": 200},
        },
        "horizon_s": 200,
    }
)


def predicted(engine: str, max_cpu_loras: list[int]) -> Results:
    scenarios = build_scenarios(WORKLOAD, CALIBRATION, 60, 12, max_cpu_loras=max_cpu_loras)
    return simulate(CALIBRATION, scenarios, WORKLOAD, engine=engine)


@pytest.mark.slow
def test_steady_twin_sees_what_small_host_memory_costs_as_the_reference_does() -> None:
    """Chance moves 480 requests by some percent; a load from disk takes as long as nine steps."""
    steady, reference = (predicted(engine, [12, 30, 60]) for engine in ("steady", "reference"))
    np.testing.assert_allclose(steady.itl_s, reference.itl_s, rtol=0.05)
    np.testing.assert_allclose(steady.throughput_tokens_per_s, reference.throughput_tokens_per_s, rtol=0.05)
    # What the room costs, against room for all.
    longer, told = (np.asarray(each.itl_s)[:2] / each.itl_s[2] - 1.0 for each in (reference, steady))
    assert longer[0] > longer[1] > 0.05
    np.testing.assert_allclose(told, longer, rtol=0.2)
    later_s, seen_s = (float(each.ttft_s[1] - each.ttft_s[2]) for each in (reference, steady))
    assert seen_s == pytest.approx(later_s, rel=0.3)


def test_room_for_all_adapters_is_what_it_was() -> None:
    plain = build_scenarios(WORKLOAD, CALIBRATION, 60, 12)
    for room in (60, 90):
        scenarios = build_scenarios(WORKLOAD, CALIBRATION, 60, 12, max_cpu_loras=room)
        assert scenarios.max_cpu_loras is None
        assert float(simulate(CALIBRATION, scenarios, WORKLOAD).itl_s[0]) == float(
            simulate(CALIBRATION, plain, WORKLOAD).itl_s[0]
        )


def test_loaded_at_start_saves_the_first_loads() -> None:
    """60 loads of 0.1 s in 200 s are 3 % of the time; longer steps bring larger batches, which add a little."""
    late, early = (
        simulate(CALIBRATION, build_scenarios(WORKLOAD, CALIBRATION, 60, 60, loaded_at_start=early), WORKLOAD)
        for early in (False, True)
    )
    saved = 1.0 - float(early.itl_s[0]) / float(late.itl_s[0])
    assert saved == pytest.approx(60 * 0.1 / 200, rel=0.25)


def test_event_twin_on_an_accelerator_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Batches.plan
    monkeypatch.setattr(Batches, "plan", lambda *given: dataclasses.replace(plan(*given), processors=False))
    short = dataclasses.replace(WORKLOAD, horizon_s=1.0)
    for settings, words in (
        (
            {"max_cpu_loras": 20},
            "max_cpu_loras: 20 is not allowed; allowed: >= 60, the adapters served, with the event",
        ),
        ({"loaded_at_start": True}, "loaded_at_start: True is not allowed"),
    ):
        scenarios = build_scenarios(short, CALIBRATION, 60, 12, **settings)
        with pytest.raises(InputError, match=words):
            simulate(CALIBRATION, scenarios, short, engine="event")


def test_table_tells_adapters_apart_from_those_in_host_memory() -> None:
    scenarios = build_scenarios(WORKLOAD, CALIBRATION, 60, 12, max_cpu_loras=[20, 60])
    columns = table(scenarios, simulate(CALIBRATION, scenarios, WORKLOAD))
    assert columns["adapters"].tolist() == [60, 60]
    assert columns["max_cpu_loras"].tolist() == [20, 60]
    plain = build_scenarios(WORKLOAD, CALIBRATION, 60, 12)
    columns = table(plain, simulate(CALIBRATION, plain, WORKLOAD))
    assert columns["max_cpu_loras"].tolist() == [60]
    assert "adapters" not in columns
