"""What LoRA costs, against the costs of its parts and against the reference scheduler."""

import dataclasses

import numpy as np
import pytest

from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search.lora_cost import FIGURES, ServerCost, lora_cost
from lora_capacity.workload import AdapterList, AdapterMix, LengthDistribution, Workload
from tests.examples import COSTS, make_calibration

LENGTHS = LengthDistribution.from_histogram([100, 200], [1, 1])
WORKLOAD = Workload(AdapterMix([0.6, 0.2], [8, 16]), LENGTHS, LENGTHS, base_rate_per_s=0.4, horizon_s=100.0)
LORA_S, ADAPTER_S = 2e-3, 1e-3


def costs_of(**changes: float) -> dict[str, ServerCost]:
    """Of 12 adapters, 4.8 requests a second, on 6 slots."""
    step = dataclasses.replace(COSTS.step, lora_s=LORA_S, adapter_s=ADAPTER_S, adapter_rank_s=0.0, **changes)
    calibration = make_calibration(costs=dataclasses.replace(COSTS, step=step))
    workload = dataclasses.replace(WORKLOAD, horizon_s=3600.0)  # of which what still runs at the end is little
    return {each.server: each for each in lora_cost(workload, calibration, 12, 6)}


def test_differences_are_what_the_parts_cost() -> None:
    """Without blocks a step with LoRA takes 2 ms longer, and 1 ms for the one adapter, which is always in it."""
    found = costs_of(expand_block_s=0.0, shrink_block_s=0.0)
    assert list(found) == ["base_model", "one_adapter", "idle_slots", "adapters", "next_adapter", "next_slot"]
    one, idle = found["one_adapter"], found["idle_slots"]
    assert one.difference["itl_s"] == pytest.approx(LORA_S + ADAPTER_S, rel=0.1)  # a longer step has a larger batch
    assert idle.difference["itl_s"] == pytest.approx(0.0, abs=1e-6)
    assert found["adapters"].difference["itl_s"] > ADAPTER_S
    # 4.8 requests and 0.4 of the base model a second, of 150 tokens in and out.
    # At the end of 100 s those of the last two are still running.
    for name in ("base_model", "one_adapter", "idle_slots"):
        assert found[name].figures["throughput_tokens_per_s"] == pytest.approx(5.2 * 300, rel=0.025)
    assert found["next_adapter"].difference["throughput_tokens_per_s"] == pytest.approx(0.6 * 300, rel=0.1)
    for each in found.values():
        other = found.get(each.compared_with or "")
        for name in FIGURES if other else ():
            assert each.difference[name] == each.figures[name] - other.figures[name]  # type: ignore[union-attr]


def test_slots_take_the_kv_cache_that_their_bytes_hold() -> None:
    found, calibration = costs_of(), make_calibration()
    slot_tokens = float(calibration.slot_bytes(16)) / calibration.model.kv_bytes_per_token
    lost = {name: -found[name].difference["kv_cache_tokens"] for name in ("idle_slots", "next_slot")}
    # The allocator rounds what it reserves up.
    assert 5 * slot_tokens <= lost["idle_slots"] <= 1.25 * 5 * slot_tokens
    assert slot_tokens * 0.5 < lost["next_slot"] < 2 * slot_tokens
    assert found["adapters"].difference["kv_cache_tokens"] == 0
    servers = ("base_model", "one_adapter", "idle_slots", "adapters")
    saturates = [found[name].figures["saturates_at_tokens_per_s"] for name in servers]
    assert saturates == sorted(saturates, reverse=True)
    assert saturates[2] > 5.2 * 300


@pytest.mark.slow
def test_the_reference_finds_the_same_differences() -> None:
    """30 ms steps: few of them, and 500 requests of which the chance is the same for all servers but the last."""
    step = dataclasses.replace(COSTS.step, base_s=0.03, lora_s=6e-3, expand_block_s=1e-8)
    calibration = make_calibration(costs=dataclasses.replace(COSTS, step=step))
    found = {each.server: each for each in lora_cost(WORKLOAD, calibration, 12, 6)}
    one = dataclasses.replace(WORKLOAD, adapters=AdapterList(["all"], np.array([4.8]), np.array([16])))
    alone = dataclasses.replace(WORKLOAD, base_rate_per_s=5.2)
    asked = {"base_model": (alone, 0, 0), "one_adapter": (one, 1, 1), "idle_slots": (one, 1, 6)}
    itl_s = {}
    for name, (workload, adapters, max_loras) in asked.items():
        scenarios = build_scenarios(workload, calibration, adapters, max_loras, max_lora_rank=16)
        itl_s[name] = float(simulate(calibration, scenarios, workload, engine="reference").itl_s[0])
        assert found[name].figures["itl_s"] == pytest.approx(itl_s[name], rel=0.06)
    for name, other in (("one_adapter", "base_model"), ("idle_slots", "one_adapter")):
        assert found[name].difference["itl_s"] == pytest.approx(itl_s[name] - itl_s[other], rel=0.15)


def test_traffic_over_time_is_told_as_in_its_busiest_window() -> None:
    calibration = make_calibration()
    changing = {
        "adapters": {"mix": {"rates_per_s": [0.6, 0.2], "ranks": [8, 16]}},
        "requests": {f"{kind}_tokens": {"mean": 100, "std": 80, "min": 1, "max": 400} for kind in ("input", "output")},
        "arrivals": {"profile": [0.5, 1.5]},
        "horizon_s": 7200,
    }
    constant = changing | {"adapters": {"mix": {"rates_per_s": [0.9, 0.3], "ranks": [8, 16]}}, "horizon_s": 3600}
    del constant["arrivals"]
    over_time, peak = (lora_cost(Workload.from_mapping(each), calibration, 6, 6) for each in (changing, constant))
    for told, expected in zip(over_time, peak, strict=True):
        assert told.figures == pytest.approx(dict(expected.figures), rel=1e-4)
