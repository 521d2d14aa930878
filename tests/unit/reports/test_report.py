"""What a report says agrees with what the twin says of the same configurations."""

import dataclasses

import numpy as np
import pytest

from lora_capacity import Recommendation, Workload, build_scenarios, load_calibration, simulate
from lora_capacity.reports import Report, build_report, survey
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload.adapters import AdapterMix
from tests.unit.reports.conftest import SETTINGS


def test_recommendation_is_on_the_grid_and_keeps_up(report: Report) -> None:
    grid, best = report.grid, report.found.best
    column, row = grid.best
    assert (grid.adapters[column], grid.slots[row]) == (best.max_cpu_loras, best.max_loras)
    assert grid.verdict[row, column] == "acceptable"
    assert grid.values["throughput_tokens_per_s"][row, column] == pytest.approx(best.throughput_tokens_per_s, rel=1e-3)


def test_grid_shows_every_region(report: Report) -> None:
    assert {"acceptable", "risky", "falls_behind", "impossible"} <= set(report.grid.verdict.ravel())
    assert {"no_kv_cache", "oom"} & set(report.grid.verdict.ravel())
    assert {"slots", "impossible"} <= set(report.grid.bottleneck.ravel())


def test_more_slots_than_adapters_are_impossible_and_nothing_else_is(report: Report) -> None:
    grid = report.grid
    up, across = np.meshgrid(grid.slots, grid.adapters, indexing="ij")
    assert ((grid.verdict == "impossible") == (up > across)).all()


def test_intervals_hold_the_prediction(report: Report) -> None:
    curve = report.curve
    for name, low in curve.low.items():
        values, high = curve.values[name], curve.high[name]
        assert (low <= values).all(), name
        assert (high >= values).all(), name
        assert (high > low).any(), name
    assert curve.adapters[0] >= report.found.best.max_loras
    assert report.found.best.max_cpu_loras in curve.adapters


def test_an_overloaded_server_that_is_slower_completes_less_by_as_much(report: Report) -> None:
    # Far beyond capacity throughput is the server's speed: 90 % of a lognormal of the calibration's error and more.
    curve, error = report.curve, report.calibration.capacity_error
    width = np.log(curve.high["throughput_tokens_per_s"][-1] / curve.low["throughput_tokens_per_s"][-1])
    assert width > 0.9 * 2 * 1.645 * error


def test_load_curve_goes_through_the_recommendation_and_on_to_where_it_fails(report: Report) -> None:
    curve, best = report.load, report.found.best
    asked = int(np.argmin(np.abs(curve.load - 1.0)))
    for name in ("attainment", "itl_s", "goodput_per_s", "throughput_tokens_per_s"):
        assert curve.values[name][asked] == pytest.approx(getattr(best, name), rel=1e-3), name
    assert curve.verdict[asked] == "acceptable"
    beyond = curve.load > 1.1 * best.critical_load
    assert beyond.any()
    assert set(curve.verdict[beyond]) <= {"falls_behind", "misses_bounds"}
    assert curve.played is None


def test_wait_for_a_slot_is_part_of_the_time_to_first_token_and_grows_with_the_load(report: Report) -> None:
    values, best = report.load.values, report.found.best
    assert best.max_loras < best.max_cpu_loras
    assert (values["slot_wait_s"] <= values["ttft_s"]).all()
    assert (np.diff(values["slot_wait_s"][(report.load.load > 0.8) & (report.load.load < 1.05)]) > 0).all()
    enough = build_scenarios(report.workload, report.calibration, [best.max_loras], best.max_loras, **SETTINGS)
    assert simulate(report.calibration, enough, report.workload).slot_wait_s == pytest.approx(0.0, abs=1e-9)


def test_quantiles_agree_with_the_share_within_the_bound(report: Report) -> None:
    values, bound_s = report.load.values, report.workload.goodput.ttft_s
    p50, p95, p99 = (values[f"ttft_{name}_s"] for name in ("p50", "p95", "p99"))
    assert not ((p50 > p95) | (p95 > p99)).any()  # where a quantile is beyond the horizon there is none
    for share, quantile_s in ((0.5, p50), (0.95, p95), (0.99, p99)):
        clear = np.abs(values["attainment"] - share) > 0.005
        assert ((values["attainment"] > share) == (quantile_s <= bound_s))[clear].all(), share


def test_each_figure_of_the_recommendation_is_told_once(report: Report) -> None:
    column, row = report.grid.best
    at = report.curve.adapters == report.found.best.max_cpu_loras
    for name in ("starving_probability", "critical_load"):
        told = getattr(report.found.best, name)
        assert report.grid.values[name][row, column] == told
        assert report.curve.values[name][at].tolist() == [told]


def test_memory_is_shared_out_as_planned(report: Report) -> None:
    memory, found = report.memory, report.found
    assert memory.limit_bytes == pytest.approx(found.server.gpu_memory_utilization * memory.total_bytes, rel=1e-6)
    counted = {name: size for name, size in memory.parts.items() if "not counted" not in name}
    assert sum(counted.values()) == pytest.approx(memory.limit_bytes)
    assert "CUDA graphs (not counted)" in memory.parts  # vLLM 0.8.5 captures them beyond its limit
    assert counted["KV cache"] // report.calibration.model.kv_bytes_per_token == pytest.approx(
        found.memory.kv_cache_tokens, rel=1e-3
    )


def test_every_adapter_is_named_with_its_class_served(report: Report) -> None:
    service = {(each.rate_per_s, each.ranks): each.service for each in report.classes}
    assert sorted(int(each.name) for each in report.adapters) == list(range(report.found.best.max_cpu_loras))
    for each in report.adapters:
        assert (each.rate_per_s, each.rank) == ((0.2, 32), (0.1, 64))[int(each.name) % 2]
        (told,) = (share for (rate, ranks), share in service.items() if ranks[0][0] == each.rank)
        assert each.service == told
    assert [each.service for each in report.adapters] == sorted(each.service for each in report.adapters)


def test_ranks_of_merged_classes_are_counted(workload: Workload, found: Recommendation) -> None:
    rates = [0.2 * 1.01**i for i in range(8)]  # of two ranks each: more than are kept apart
    many = dataclasses.replace(workload, adapters=AdapterMix(rates_per_s=np.array(rates), ranks=np.array([8, 32, 8])))
    built = build_report(many, load_calibration("llama-3.1-8b-instruct-h100-64gb"), found, settings=SETTINGS)
    assert len(built.classes) <= 12
    counts = {rank: sum(dict(each.ranks).get(rank, 0) for each in built.classes) for rank in (8, 32)}
    _, ranks = many.adapters.deal(found.best.max_cpu_loras)
    assert counts == {8: int((ranks == 8).sum()), 32: int((ranks == 32).sum())}
    assert all(sum(count for _, count in each.ranks) == each.adapters for each in built.classes)


def test_classes_are_those_of_the_workload(report: Report) -> None:
    assert sum(each.adapters for each in report.classes) == report.found.best.max_cpu_loras
    assert [each.rate_per_s for each in report.classes] == pytest.approx([0.2, 0.1])
    assert all(0 <= each.service_beyond <= each.service <= 1 for each in report.classes)


def test_more_load_longer_outputs_and_dearer_slots_cost_margin(report: Report) -> None:
    margin = {each.words: each.margin for each in report.changes}
    assert margin["one more request per second"] < -0.01
    assert margin["outputs 10 % longer"] < -0.01
    assert margin["one more adapter"] < 0
    assert not margin["the next rank, 128"] >= 0  # or the server does not start


def test_changed_load_agrees_with_a_workload_of_that_load(report: Report, workload: Workload) -> None:
    best = report.found.best
    scenarios = build_scenarios(workload, report.calibration, [best.max_cpu_loras] * 2, best.max_loras, **SETTINGS)
    offered_per_s = np.asarray((scenarios.class_count * scenarios.class_rate_per_s).sum(axis=1))
    load = 1.0 + np.array([0.0, 1.0]) / offered_per_s
    more = dataclasses.replace(scenarios, class_rate_per_s=scenarios.class_rate_per_s * load[:, None])
    results = simulate(report.calibration, more, ResidenceTime.of_lengths(workload.output_tokens))
    change = next(each for each in report.changes if each.words == "one more request per second")
    assert change.itl_s == pytest.approx(float(results.itl_s[1] - results.itl_s[0]), abs=1e-4)


def test_adapters_that_there_are_not_are_not_drawn() -> None:
    few = Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": [0.5], "ranks": [8]}},
            "requests": {
                "input_tokens": {"mean": 100, "std": 0, "min": 100, "max": 100},
                "output_tokens": {"mean": 50, "std": 0, "min": 50, "max": 50},
            },
        }
    )
    from lora_capacity import recommend

    calibration = load_calibration("llama-3.1-8b-instruct-h100-64gb")
    found = recommend(few, calibration, adapters=[1], max_loras=[1], engine="steady")
    built = build_report(few, calibration, found)
    assert built.grid.best == (0, 0)
    assert "one slot fewer" not in {each.words for each in built.changes}
    assert built.html()


def test_survey_is_a_coarser_grid(report: Report, found: Recommendation) -> None:
    coarse = survey(report.workload, report.calibration, found, settings=SETTINGS, columns=10, rows=5)
    assert coarse.verdict.shape < report.grid.verdict.shape
    column, row = coarse.best
    assert (coarse.adapters[column], coarse.slots[row]) == (found.best.max_cpu_loras, found.best.max_loras)


def test_progress_reaches_its_end(report: Report) -> None:
    seen = []
    build_report(
        report.workload, report.calibration, report.found, settings=SETTINGS, progress=lambda *part: seen.append(part)
    )
    assert seen[-1][0] == seen[-1][1]
