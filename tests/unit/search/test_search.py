import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import norm

from lora_capacity.costs import FrontEndCosts
from lora_capacity.errors import InfeasibleError, InputError
from lora_capacity.hardware import Gpu
from lora_capacity.run import simulate
from lora_capacity.run.steady import grid
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search import (
    Needed,
    Objective,
    assess,
    choose,
    judge,
    load_headroom,
    recommend,
    starving_probability,
)
from lora_capacity.search.margin import capacity_error, load_factors
from lora_capacity.search.objective import GOALS
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import AdapterList, AdapterMix, Goodput, Windows, Workload
from tests.examples import LENGTHS, LLAMA_8B, STAYS, make_calibration, make_scenarios

GPU_80 = make_calibration()
SHORT = dataclasses.replace(LLAMA_8B, max_position_embeddings=4096)
GPU_32 = make_calibration(gpu=Gpu("small", 32 * BYTES_PER_GIB), model=SHORT)
INTERPOLATED = 0.01  # the load at which a configuration starves is interpolated between loads about 8 % apart
MERGED = 1e-3


LIMITS = {"max_num_batched_tokens": [2048], "max_num_seqs": [256]}
THROUGHPUT, UNSTARVED, BOUNDED = Objective("throughput"), Needed(), Needed.within(Goodput())


def make_workload(adapters, **changes):
    return Workload(adapters, LENGTHS, LENGTHS, **({"max_pending": 5000} | changes))


BUSY = make_workload(AdapterMix([2.0, 1.0], [16]))
IDLE = make_workload(AdapterMix([0.3, 0.1], [8, 16]), base_rate_per_s=2.0)
LISTED = make_workload(AdapterList([f"a{i}" for i in range(40)], np.geomspace(2.0, 0.1, 40), [8, 8, 16, 32] * 10))


def make_columns(**columns):
    """Configurations that serve all they are offered, unless told otherwise."""
    columns = {name: np.asarray(values) for name, values in columns.items()}
    size = columns["max_cpu_loras"].size
    offered = columns["max_cpu_loras"] * 100.0
    others = {
        "max_loras": np.full(size, 8),
        "throughput_tokens_per_s": offered,
        "offered_tokens_per_s": offered,
        "starving_probability": np.zeros(size),
        "status": np.full(size, "ok", dtype=object),
        "attainment": np.ones(size),
        "served": np.ones(size),
    }
    found = others | columns
    return found | {"goodput_per_s": found["attainment"] * found["max_cpu_loras"]}


def advise(workload, calibration, **given):
    """Recommend without playing, with given batch limits unless others are given."""
    return recommend(workload, calibration, **({"engine": "steady"} | LIMITS | given))


@pytest.mark.slow
def test_a_calibration_is_derived_for_the_modules_among_the_settings():
    few = {"adapters": 4, "max_loras": 4, "max_num_batched_tokens": 2048, "max_num_seqs": 64, "engine": "steady"}
    content = {
        "adapters": {"mix": {"rates_per_s": [0.1], "ranks": [8]}},
        "requests": {f"{each}_tokens": {"mean": 50, "std": 9, "min": 9, "max": 99} for each in ("input", "output")},
    }
    itl_s = [
        recommend(content, model="Qwen3-8B", gpu="L40S", settings={"target_modules": each}, **few).best.itl_s
        for each in ("all-linear", "attention")
    ]
    assert itl_s[1] < itl_s[0]


def brute_force(workload, calibration, objective, most_adapters, most_slots):
    """The choice among all configurations, none left out."""
    every = grid(range(1, most_adapters + 1), range(1, most_slots + 1))
    needed = UNSTARVED if objective == THROUGHPUT else Needed.within(workload.goodput)
    limits = {name: value for name, (value,) in LIMITS.items()}
    columns = assess(calibration, build_scenarios(workload, calibration, **every, **limits), STAYS, needed=needed)
    return {name: column[choose(columns, objective, needed)] for name, column in columns.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"goal": "fewest-slot"}, "did you mean 'fewest-slots'"),
        ({"within": 1.0}, "within: 1.0"),
    ],
)
def test_an_objective_out_of_range_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Objective(**given)


def test_the_critical_load_lies_between_the_loads_tried():
    factors = [1.0, 1.1, 1.21]
    service = [[1.0, 0.95, 0.85], [1.0, 0.9, 0.8], [0.45, 0.4, 0.3], [1.0, 1.0, 0.99], [np.nan] * 3]
    found = load_headroom(np.array(service) / 0.9, factors)
    np.testing.assert_allclose(found, [1.1 * 1.1**0.5, 1.1, 0.5, 1.21, np.nan])


def test_what_is_reached_is_the_least_of_what_is_needed():
    columns = {
        "service": np.array([0.9, 0.45]),
        "served": np.array([0.99, 0.495]),
        "attainment": np.array([0.95, 0.76]),
    }
    np.testing.assert_allclose(Needed().reached(columns), [1.0, 0.5])
    np.testing.assert_allclose(Needed(0.99, 0.95).reached(columns), [1.0, 0.5])
    np.testing.assert_allclose(Needed(0.45, 0.95).reached(columns), [1.0, 0.8])


def test_the_chance_of_starving_is_that_of_a_lognormal_capacity():
    capacity = np.exp(np.random.default_rng(1).normal(0.0, 0.05, 200_000))
    for critical in (0.95, 1.0, 1.08):
        chance = starving_probability([critical], 0.05).item()
        assert chance == pytest.approx((capacity * critical <= 1.0).mean(), abs=0.005)  # 4 standard errors
    assert starving_probability([0.9, 1.1], 0.0).tolist() == [1.0, 0.0]


def test_the_second_load_tried_is_where_the_accepted_risk_ends():
    factors = load_factors(np.array([0.05]), 0.02, 4)[0]
    assert factors[0] == 1.0
    assert starving_probability(factors[1:2], 0.05).item() == pytest.approx(0.02)
    assert (np.diff(load_factors(np.array([0.0]), 0.5, 5)[0, 1:]) > 0).all()


def test_a_server_starves_at_its_critical_load():
    scenarios = make_scenarios([20.0, 20.0], [0.63, 0.126], max_loras=[6, 12, 40], kv_cache_tokens=4e4, horizon_s=3e3)
    # A large accepted risk makes for small steps between the loads tried.
    found = assess(GPU_80, scenarios, STAYS, risk=0.4, loads=13)
    at_critical = scenarios.replace(
        class_rate_per_s=scenarios.class_rate_per_s * found["critical_load"][:, np.newaxis].astype(np.float32)
    )
    beyond = assess(GPU_80, at_critical, STAYS)
    last = load_factors(capacity_error(GPU_80, scenarios), 0.4, 13)[:, -1]
    inside = (found["critical_load"] > 1.0) & (found["critical_load"] < last)
    assert inside.any()
    np.testing.assert_allclose(beyond["service"][inside], 0.9, atol=INTERPOLATED)
    np.testing.assert_allclose(beyond["critical_load"][inside], 1.0, atol=INTERPOLATED)


def test_verdicts():
    columns = make_columns(
        max_cpu_loras=[1, 2, 3, 4, 5],
        throughput_tokens_per_s=[100.0, 200.0, 270.0, np.nan, np.nan],
        starving_probability=[0.01, 0.2, 0.9, np.nan, np.nan],
        status=np.array(["ok", "outside_calibration", "ok", "oom", "no_kv_cache"], dtype=object),
    )
    expected = ["acceptable", "risky", "starved", "oom", "no_kv_cache"]
    assert judge(columns, UNSTARVED).tolist() == expected
    assert judge(columns, Needed(0.8), risk=0.5)[:3].tolist() == ["acceptable", "acceptable", "risky"]
    bounded = columns | {"served": [1.0, 1.0, 0.98, 1.0, 1.0], "attainment": np.array([0.94, 0.96, 0.9, 1.0, 1.0])}
    bounded |= {"served": np.array(bounded["served"])}
    assert judge(bounded, BOUNDED).tolist() == ["misses_bounds", "risky", "falls_behind", "oom", "no_kv_cache"]


def test_adapters_beyond_the_first_that_fail_are_not_chosen():
    columns = make_columns(max_cpu_loras=[40, 10, 20, 30], starving_probability=[0.0, 0.0, 0.0, 0.06])
    assert choose(columns, THROUGHPUT, UNSTARVED) == 2
    assert choose(columns | {"max_num_seqs": np.array([64, 64, 64, 32])}, THROUGHPUT, UNSTARVED) == 0
    assert choose(columns, THROUGHPUT, UNSTARVED, risk=0.07) == 0
    slow = make_columns(max_cpu_loras=[40, 10, 20, 30], attainment=[1.0, 1.0, 1.0, 0.9])
    assert choose(slow, Objective(), BOUNDED) == 2
    assert choose(slow, Objective(), Needed(0.99, 0.8)) == 0
    assert choose(slow, Objective(), Needed(0.99, 1.1)) is None


def test_of_equal_throughputs_the_safer_goes_before_the_fewer_slots():
    columns = make_columns(
        max_cpu_loras=[20, 20, 20, 21],
        max_loras=[4, 8, 16, 32],
        throughput_tokens_per_s=[1995.0, 1996.0, 2000.0, 1990.0],
        starving_probability=[0.04, 0.009, 0.0, 0.0],
    )
    assert choose(columns, THROUGHPUT, UNSTARVED) == 1
    assert choose(columns | {"starving_probability": np.full(4, 0.04)}, THROUGHPUT, UNSTARVED) == 0


def test_goals_differ():
    columns = make_columns(
        max_cpu_loras=[300, 299, 295, 290],
        max_loras=[16, 8, 4, 2],
        throughput_tokens_per_s=[1900.0, 2000.0, 1985.0, 1979.0],
        offered_tokens_per_s=[2000.0] * 4,
    )
    assert choose(columns, THROUGHPUT, UNSTARVED) == 1
    assert choose(columns, Objective("goodput"), BOUNDED) == 1  # about equal to the first, with fewer slots
    assert choose(columns, Objective("fewest-slots"), BOUNDED) == 1
    assert choose(columns, Objective("fewest-slots", within=0.02), BOUNDED) == 2
    assert choose(columns, Objective("most-adapters"), BOUNDED) == 0


@pytest.mark.slow
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize(
    ("workload", "calibration"), [(BUSY, GPU_80), (IDLE, GPU_32), (LISTED, GPU_80)], ids=["busy", "idle", "listed"]
)
def test_refinement_finds_what_looking_everywhere_finds(workload, calibration, goal):
    found = advise(workload, calibration, objective=Objective(goal))
    most = workload.adapters.max_count or found.best.max_cpu_loras + 20
    everywhere = brute_force(workload, calibration, Objective(goal), most, found.best.max_loras + 20)
    assert abs(found.best.max_cpu_loras - everywhere["max_cpu_loras"]) <= 1
    assert abs(found.best.max_loras - everywhere["max_loras"]) <= 1
    assert found.best.throughput_tokens_per_s == pytest.approx(
        everywhere["throughput_tokens_per_s"], rel=0.01
    )  # an adapter


def test_the_grids_that_are_given_are_the_only_ones_considered():
    found = advise(BUSY, GPU_80, adapters=[12, 5, 7], max_loras=[2, 5, 400])
    assert found.best.max_cpu_loras in (5, 7, 12)
    assert found.best.max_loras in (2, 5)
    shown = {(each.max_cpu_loras, each.max_loras) for each in found.runners_up}
    assert shown <= {(a, s) for a in (5, 7, 12) for s in (2, 5)}
    fixed = advise(BUSY, GPU_80, adapters=[9], objective=Objective("fewest-slots", within=0.0001))
    assert fixed.best.max_cpu_loras == 9


def test_a_single_adapter_gets_a_single_slot():
    found = advise(make_workload(AdapterList(["only"], [1.0], [8])), GPU_80)
    assert (found.best.max_cpu_loras, found.best.max_loras, found.best.max_lora_rank) == (1, 1, 8)
    assert [each.change for each in found.neighbours] == []
    assert any("all 1 adapters" in warning for warning in found.warnings)


def test_the_best_batch_limits_are_found_and_impossible_ones_left_out():
    found = advise(BUSY, GPU_80, max_num_batched_tokens=[128, 1024], max_num_seqs=[16, 512])
    few = advise(BUSY, GPU_80, max_num_batched_tokens=[1024], max_num_seqs=[16])
    assert (found.best.max_num_batched_tokens, found.best.max_num_seqs) == (1024, 512)
    assert found.best.goodput_per_s > few.best.goodput_per_s
    with pytest.raises(InputError, match="max_num_batched_tokens: 128"):
        advise(BUSY, GPU_80, max_num_batched_tokens=[128], max_num_seqs=[512])


def test_batch_limits_that_are_not_given_are_searched():
    workload = dataclasses.replace(IDLE, goodput=Goodput(tpot_s=0.05))
    found = advise(workload, GPU_80, max_num_batched_tokens=None, max_num_seqs=None)
    every = {"max_num_batched_tokens": [512, 2048, 8192], "max_num_seqs": [64, 128, 256, 512, 1024]}
    everywhere = advise(workload, GPU_80, **every)
    assert found.best.goodput_per_s >= everywhere.best.goodput_per_s * 0.99
    fixed = advise(workload, GPU_80, max_num_batched_tokens=None, max_num_seqs=None, settings={"max_num_seqs": 32})
    assert fixed.best.max_num_seqs == 32


def test_a_load_that_one_adapter_overwhelms_is_infeasible():
    with pytest.raises(InfeasibleError, match=r"closest: max_cpu_loras 1, max_loras 1, serves \d[\d.]* % of"):
        advise(make_workload(AdapterMix([500.0], [16])), GPU_80)


def test_a_model_that_does_not_fit_is_infeasible():
    calibration = make_calibration(gpu=Gpu("small", 12 * BYTES_PER_GIB))
    with pytest.raises(InfeasibleError, match=r"no configuration starts: max_loras 1 .* lacks \d+\.\d\d GiB \(oom\)"):
        advise(BUSY, calibration)
    with pytest.raises(InfeasibleError, match=r"\(no_kv_cache\); it starts with .*gpu_memory_utilization 0\.\d+"):
        advise(BUSY, GPU_80, settings={"gpu_memory_utilization": 0.25})


@pytest.mark.parametrize("engine", ["steady", "event"])
def test_bounds_that_no_server_meets_are_infeasible_and_the_answer_says_what_to_relax(engine):
    workload = dataclasses.replace(BUSY, goodput=Goodput(tpot_s=0.001), horizon_s=60.0)
    with pytest.raises(
        InfeasibleError, match=r"within bounds: .* tpot:1 ms \(95 % asked\).*bottleneck: .* step time .*--goodput"
    ):
        advise(workload, GPU_80, engine=engine)


def test_a_latency_bound_is_kept():
    free, bound = (advise(dataclasses.replace(BUSY, goodput=Goodput(tpot_s=limit)), GPU_80) for limit in (np.inf, 0.02))
    assert free.best.tpot_s > 0.02 >= bound.best.tpot_s
    assert bound.best.goodput_per_s < free.best.goodput_per_s
    assert bound.best.attainment >= 0.95


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"risk": 0.0}, "risk: 0.0"),
        ({"risk": 0.6}, "risk: 0.6"),
        ({"starvation_threshold": 1.0}, "starvation_threshold: 1.0"),
        ({"adapters": []}, "adapters: 'none'"),
        ({"adapters": [0, 5]}, "adapters: 0"),
        ({"max_loras": [0, 5]}, "max_loras: 0"),
        ({"max_loras": [2.5]}, "max_loras: 2.5"),
        ({"adapters": [4], "max_loras": [8]}, "max_loras: 8 is not allowed; allowed: 1 to 4"),
        ({"max_num_seqs": []}, "max_num_seqs: 'none'"),
        ({"max_num_seqs": [64], "settings": {"max_num_seqs": 32}}, "max_num_seqs: 32"),
        ({"settings": {"max_loras": 8}}, "max_loras: 8 is not allowed; allowed: given once"),
        ({"settings": {"max_lora_rank": 8}}, "max_lora_rank: 8"),
        ({"settings": {"max_lora_rnak": 8}}, "did you mean 'max_lora_rank'"),
    ],
)
def test_what_is_not_allowed_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        advise(BUSY, GPU_80, **given)


def test_neighbours_are_the_configurations_next_to_it():
    found = advise(IDLE, GPU_80)
    best = found.best
    places = {each.change: (each.candidate.max_cpu_loras, each.candidate.max_loras) for each in found.neighbours}
    assert places == {
        "one more adapter": (best.max_cpu_loras + 1, best.max_loras),
        "one more slot": (best.max_cpu_loras, best.max_loras + 1),
        "one slot fewer": (best.max_cpu_loras, best.max_loras - 1),
    }
    (more,) = (each for each in found.neighbours if each.change == "one more adapter")
    assert more.verdict == "risky"
    assert best.starving_probability <= found.risk < more.candidate.starving_probability
    for each in found.neighbours:
        point = ([each.candidate.max_cpu_loras], [each.candidate.max_loras])
        limits = {name: value for name, (value,) in LIMITS.items()}
        alone = assess(GPU_80, build_scenarios(IDLE, GPU_80, *point, **limits), STAYS)
        gain = alone["throughput_tokens_per_s"].item() - best.throughput_tokens_per_s
        assert each.gain_tokens_per_s == pytest.approx(gain, abs=1.0)


def test_runners_up_have_other_slots_and_do_not_beat_the_best():
    found = advise(IDLE, GPU_80)
    slots = [each.max_loras for each in (found.best, *found.runners_up)]
    assert len(set(slots)) == len(slots) == 6
    assert all(
        each.goodput_per_s <= found.best.goodput_per_s * 1.005 and each.starving_probability <= 0.05
        for each in found.runners_up
    )


def test_the_answer_is_json_and_says_what_to_run():
    answering = dataclasses.replace(GPU_32.costs, front_end=FrontEndCosts(response_s=0.003))
    server = dataclasses.replace(GPU_32, costs=answering)
    found = advise(BUSY, server, settings={"gpu_memory_utilization": 0.85, "max_model_len": 2048, "block_size": None})
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    for name, value in content["recommended"].items():
        assert value == content["server"][name] == content["predicted"][name]
    assert content["recommended"]["max_cpu_loras"] == content["max_cpu_loras"] == found.best.max_cpu_loras
    assert (content["goodput"], content["attainment"]) == ({"ttft": 2000.0}, 0.95)
    assert content["headroom"] == content["margin"]["critical_load"] > 1
    assert content["played"] is None
    assert content["client"]["ttft_s"] - content["predicted"]["ttft_s"] == pytest.approx(0.003, rel=1e-3)
    assert content["client"]["itl_s"] == content["predicted"]["itl_s"]
    assert content["server"]["gpu_memory_utilization"] == 0.85
    assert f"--max-loras {found.best.max_loras} --max-cpu-loras {found.best.max_cpu_loras}" in content["serve_command"]
    assert "--max-model-len 2048" in content["serve_command"]
    assert sum(content["looked_at"].values()) > 100
    assert content["margin"]["kv_cache_tokens"] == content["predicted"]["kv_cache_tokens"]
    spare = content["margin"]["spare_kv_cache_tokens"] - (content["predicted"]["kv_cache_tokens"] - 2048)
    assert 0 <= spare < 16  # what is left of the last block
    assert any("this load" in sentence for sentence in content["explanation"])
    assert any("not checked by the event twin" in sentence for sentence in content["explanation"])


def test_extrapolation_is_said():
    found = advise(BUSY, make_calibration(fitted_ranges={"adapters": (100.0, 200.0), "max_loras": (1.0, 64.0)}))
    assert any(warning.startswith(f"adapters {found.best.max_cpu_loras} is outside") for warning in found.warnings)
    assert not any(warning.startswith("max_loras") for warning in found.warnings)
    assert found.best.status == "outside_calibration"


def test_the_highest_throughput_is_said_to_be_that_of_an_overloaded_server():
    found = advise(BUSY, GPU_80, objective=THROUGHPUT)
    assert found.best.ttft_s > 10.0
    assert found.best.attainment < 0.5
    (warning,) = found.warnings
    assert "server is overloaded" in warning
    assert "\n" not in warning
    assert advise(BUSY, GPU_80).warnings == ()
    assert any("starves at" in sentence for sentence in found.explanation)


def test_many_different_adapters_are_merged_without_changing_the_answer():
    rates = np.geomspace(0.8, 0.05, 90)
    workload = make_workload(AdapterList([f"a{i}" for i in range(90)], rates, [16] * 90))
    found = advise(workload, GPU_80)
    limits = {name: value for name, (value,) in LIMITS.items()}
    point = ([found.best.max_cpu_loras], [found.best.max_loras])
    exact = assess(GPU_80, build_scenarios(workload, GPU_80, *point, **limits), STAYS)
    assert found.best.throughput_tokens_per_s == pytest.approx(exact["throughput_tokens_per_s"].item(), rel=MERGED)


def test_progress_counts_the_combinations():
    calls = []
    advise(BUSY, GPU_80, max_loras=[4], max_num_seqs=[64, 128], progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {2}
    assert calls[-1] == (2, 2)


def test_a_steeper_risk_is_a_safer_choice():
    found = {risk: advise(BUSY, GPU_80, risk=risk).best for risk in (0.001, 0.05, 0.5)}
    margins = [best.critical_load for best in found.values()]
    assert margins == sorted(margins, reverse=True)
    assert margins[0] >= np.exp(norm.ppf(0.999) * 0.05) * (1.0 - INTERPOLATED)


def test_few_contended_slots_add_to_the_error_of_the_capacity() -> None:
    calibration = make_calibration(capacity_error=0.03)
    scenarios = make_scenarios([[16], [16], [16], [400]], 1.0, max_loras=[4, 8, 16, 200])
    few, more, one_each, many = capacity_error(calibration, scenarios)
    assert few > more > one_each == 0.03
    assert many == pytest.approx(0.03, rel=0.01)


@pytest.mark.slow
def test_the_event_twin_settles_what_the_steady_twin_finds():
    workload = make_workload(AdapterMix([0.4, 0.2], [16]), horizon_s=300.0, max_pending=2000)
    found = advise(workload, GPU_80, engine="event", seed=3, seeds=2)
    played, best = found.played, found.best
    assert (found.engine, played.seeds) == ("event", (3, 4))
    assert (played.mean.max_cpu_loras, played.mean.max_loras) == (best.max_cpu_loras, best.max_loras)
    assert played.mean.starving_probability <= 0.05
    assert played.mean.attainment >= 0.95
    assert played.error >= GPU_80.capacity_error
    # Simulated on its own, with the mean of the same seeds.
    limits = {name: value for name, (value,) in LIMITS.items()}
    scenarios = build_scenarios(workload, GPU_80, [best.max_cpu_loras] * 2, best.max_loras, **limits)
    alone = simulate(GPU_80, scenarios, workload, engine="event", seed=[3, 4])
    assert played.mean.throughput_tokens_per_s == pytest.approx(alone.throughput_tokens_per_s.mean(), rel=1e-5)
    assert played.mean.attainment == pytest.approx(alone.attainment.mean(), rel=1e-5)
    off = played.differences(best)
    assert off["itl_s"] == pytest.approx(best.itl_s / played.mean.itl_s - 1.0)
    assert any("Event twin, seeds 3 to 4" in sentence for sentence in found.explanation)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["played"]["seeds"] == [3, 4]
    assert document["played"]["attainment"] == played.mean.attainment
    assert document["played"]["differences"] == pytest.approx(off)
    assert document["headroom"] == played.mean.critical_load >= 1.0


def test_what_the_steady_twin_overrates_is_refused():
    """One slot for many adapters: all wait for one, whatever an average says."""
    workload = make_workload(AdapterMix([0.02], [16]), horizon_s=600.0)
    found = advise(workload, GPU_80, max_loras=[1, 2], engine="event")
    limits = {name: value for name, (value,) in LIMITS.items()}
    scenarios = build_scenarios(workload, GPU_80, [found.best.max_cpu_loras] * 4, found.best.max_loras, **limits)
    fresh = simulate(GPU_80, scenarios, workload, engine="event", seed=[11, 12, 13, 14])
    assert (fresh.attainment >= 0.94).all()


def test_the_event_twin_keeps_to_the_numbers_asked_for():
    workload = make_workload(AdapterMix([0.4, 0.2], [16]), horizon_s=120.0, max_pending=2000)
    found = advise(workload, GPU_80, adapters=[6, 9, 12], max_loras=[4, 6], engine="event", seeds=1)
    assert found.best.max_cpu_loras in (6, 9, 12)
    assert found.best.max_loras in (4, 6)
    assert found.played.error == GPU_80.capacity_error


def test_where_nothing_keeps_up_the_event_twin_says_so_too():
    workload = make_workload(AdapterMix([40.0], [16]), horizon_s=60.0, max_pending=500)
    with pytest.raises(InfeasibleError, match="no configuration keeps up within bounds"):
        advise(workload, GPU_80, adapters=[20, 40], max_loras=[2, 4], engine="event")


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match=r"engine.*did you mean 'event'"):
        advise(BUSY, GPU_80, engine="events")


def test_the_peak_is_planned_for_and_what_goes_unused_is_told():
    windows, mean = Windows.from_profile([0.5, 2.0, 0.5, 1.0], 14_400.0)
    assert mean == 1.0
    changing = dataclasses.replace(BUSY, horizon_s=14_400.0, over_time=windows)
    found, at_peak = advise(changing, GPU_80), advise(changing.at_peak(), GPU_80)
    assert found.best == at_peak.best
    assert at_peak.over_time is None
    told = found.over_time
    assert (told.peak_start_s, told.peak_end_s) == (3600, 7200)
    offered = BUSY.adapters.deal(found.best.max_cpu_loras)[0].sum()
    assert told.peak_per_s == pytest.approx(2 * offered)
    assert told.mean_per_s == pytest.approx(offered)
    # It could take the headroom times the peak all the time, and the mean comes, half the peak.
    assert told.unused == pytest.approx(1 - 0.5 / found.told.critical_load)
    assert "Planned for the peak, 3,600 to 7,200 s" in found.explanation[0]
    assert json.loads(json.dumps(found.to_dict()))["over_time"]["peak_start_s"] == 3600


def test_what_people_hand_over_is_taken_for_what_it_stands_for():
    content = {
        "adapters": {"mix": {"rates_per_s": [0.3, 0.1], "ranks": [8, 16]}},
        "requests": {
            name: {"mean": 200, "std": 200, "min": 4, "max": 1024} for name in ("input_tokens", "output_tokens")
        },
        "base_model": {"rate_per_s": 2.0},
        "max_pending": 5000,
    }
    found = advise(content, GPU_80, objective="fewest-slots", goodput={"ttft": 1000}, attainment=0.9)
    bounds = Goodput(ttft_s=1.0, attainment=0.9)
    expected = advise(dataclasses.replace(IDLE, goodput=bounds), GPU_80, objective=Objective("fewest-slots"))
    assert found.to_dict() == expected.to_dict()
    fixed = advise(content, GPU_80, adapters=8, max_loras=4)
    assert (fixed.max_cpu_loras, fixed.max_loras) == (8, 4)


def test_numbers_of_a_recommendation_are_its_own_attributes():
    found = advise(IDLE, GPU_80)
    document = found.to_dict()
    for name, value in document["recommended"].items():
        assert getattr(found, name) == value
    for name in ("throughput_tokens_per_s", "goodput_per_s", "attainment", "ttft_s", "tpot_s", "itl_s"):
        assert getattr(found, name) == document["predicted"][name]
    assert found.headroom == document["headroom"]
    assert (
        found.bottleneck == {"kv_cache": "KV cache", "sequences": "batch limit", "none": "–"}[found.told.limit_beyond]
    )
