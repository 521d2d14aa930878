"""The event twin: laying out requests, what it refuses, what it leaves blank."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.engines import SchedulerRules
from lora_capacity.errors import InputError
from lora_capacity.run.requests import draw_requests, pack_first, pack_requests
from lora_capacity.scenarios import Bottleneck, Results, Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events import simulate_events, simulation
from lora_capacity.twins.events.requests import TICKS
from lora_capacity.workload import BASE_MODEL, Requests
from tests.examples import compiled_once, make_costs

COSTS = make_costs(base_s=0.01, host_to_gpu_load_s=0.005, disk_s=0.02, disk_rank_s=0.001)
REQUESTS = Requests(
    np.array([0.0, 0.1, 0.2, 0.3]), np.array([1, 0, BASE_MODEL, 1]), np.array([10, 20, 30, 40]), np.array([4, 3, 2, 1])
)


def scenarios(configs: int = 1, **changes: Any) -> Scenarios:
    """Two classes of adapters, one adapter each, of rank 8 and 16."""
    numbers = {
        "base_rate_per_s": 0.0,
        "mean_input_tokens": 25.0,
        "mean_output_tokens": 2.5,
        "kv_tokens_per_request": 30.0,
        "horizon_s": 10.0,
        "max_pending": np.inf,
        "max_loras": 2.0,
        "max_lora_rank": 16.0,
        "max_num_seqs": 8.0,
        "max_num_batched_tokens": 256.0,
        "kv_cache_tokens": 1600.0,
        "block_size": 16,
    } | changes
    status = numbers.pop("status", Status.OK)
    return Scenarios(
        class_count=jnp.ones((configs, 2)),
        class_rate_per_s=jnp.ones((configs, 2)),
        class_rank=jnp.broadcast_to(jnp.array([8.0, 16.0]), (configs, 2)),
        status=jnp.full(configs, status, jnp.int32),
        **{name: jnp.full(configs, value) for name, value in numbers.items()},
    )


def simulated(given: Scenarios, requests: Requests = REQUESTS, **options: SchedulerRules) -> Results:
    tables = pack_requests(given, [requests], [[0, 1]], seed=None)
    results: Results = compiled_once(functools.partial(simulate_events, **options))(COSTS, given, tables)
    return results


def test_requests_of_an_adapter_are_chained_and_the_given_ones_left_alone() -> None:
    tables = pack_requests(scenarios(), [REQUESTS], [[0, 1]], seed=None)
    base = tables.rank.shape[1]
    np.testing.assert_array_equal(tables.table[0, :4, 0], [1, 0, base, 1])
    np.testing.assert_array_equal(tables.following[0, :4], [3, TICKS, TICKS, TICKS])
    np.testing.assert_array_equal(tables.head[0, [0, 1, base]], [1, 0, 2])
    np.testing.assert_allclose(tables.arrival[0, :4] * 10.0 / TICKS, REQUESTS.arrival_s, atol=1e-8)
    np.testing.assert_array_equal(tables.rank[0, :2], [8, 16])
    np.testing.assert_array_equal(REQUESTS.adapter, [1, 0, BASE_MODEL, 1])


def test_order_of_touching_permutes_adapters_with_their_ranks() -> None:
    given = scenarios()
    for seed in range(8):
        tables = pack_requests(given, [REQUESTS], [[0, 1]], seed=seed)
        rank = np.asarray(tables.rank[0])[np.asarray(tables.table[0, [0, 1, 3], 0])]
        np.testing.assert_array_equal(rank, [16, 8, 16])


def test_four_requests_served_by_hand() -> None:
    """Each is alone: a load from disk for the first of an adapter, then a step for each of its tokens."""
    results = simulated(scenarios())
    assert int(results.events.steps[0]) == 4 + 3 + 2 + 1
    assert float(results.completed_per_s[0]) == pytest.approx(0.4)
    assert float(results.throughput_tokens_per_s[0]) == pytest.approx(11.0)
    loads_s = (0.005 + 0.02 + 0.016) + (0.005 + 0.02 + 0.008)
    assert float(results.events.load_share[0]) * 10 == pytest.approx(loads_s, rel=1e-5)
    assert float(results.ttft_s[0]) == pytest.approx((loads_s + 4 * 0.01) / 4, rel=1e-5)
    assert float(results.itl_s[0]) == pytest.approx(0.01, rel=1e-5)
    assert float(results.mean_running[0]) * 10 == pytest.approx(loads_s + 10 * 0.01, rel=1e-5)
    assert float(results.events.idle_share[0]) * 10 == pytest.approx(10 - loads_s - 0.1, rel=1e-5)
    np.testing.assert_array_equal(results.events.adapter_completed[0, :2], [1, 2])
    np.testing.assert_allclose(results.class_service[0], 1.0)
    assert int(results.events.disk_loads[0]) == 2
    assert int(results.limit[0]) == Bottleneck.NONE


def test_what_does_not_start_is_blank() -> None:
    results = simulated(scenarios(status=Status.OOM))
    assert int(results.status[0]) == Status.OOM
    assert np.isnan(results.throughput_tokens_per_s[0])
    assert np.isnan(results.mean_running[0])
    assert int(results.events.iterations[0]) == 0


def test_a_request_larger_than_the_kv_cache_is_refused() -> None:
    with pytest.raises(InputError, match="KV cache, 16 tokens"):
        pack_requests(scenarios(kv_cache_tokens=32.0), [REQUESTS], [[0, 1]], seed=None)
    pack_requests(scenarios(kv_cache_tokens=32.0, status=Status.NO_KV_CACHE), [REQUESTS], [[0, 1]], seed=None)


@pytest.mark.parametrize("rules", [SchedulerRules(), SchedulerRules(skipped_first=True)])
def test_too_many_preempted_requests_are_told(rules: SchedulerRules, monkeypatch: pytest.MonkeyPatch) -> None:
    many = Requests(np.zeros(8), np.zeros(8), np.full(8, 15), np.full(8, 60))
    given = scenarios(kv_cache_tokens=16.0 * 10)
    assert int(simulated(given, many, rules=rules).status[0]) == Status.OK
    monkeypatch.setattr(simulation, "PREEMPTED_PLACES", 2)
    jax.clear_caches()
    results = simulated(given, many, rules=rules)
    assert int(results.status[0]) == Status.STEP_LIMIT
    assert np.isnan(results.throughput_tokens_per_s[0])


def test_most_cuts_the_requests_off_without_thinning_them() -> None:
    lengths = np.array([10]), np.array([5])
    every = draw_requests(scenarios(horizon_s=1000.0), *lengths, seed=4).tables
    some = draw_requests(scenarios(horizon_s=1000.0), *lengths, seed=4, most=400).tables
    assert int(every.arrived[0].sum()) == pytest.approx(2000, rel=0.1)
    assert int(some.arrived[0].sum()) == 400
    assert int(some.arrival[0, 399]) / TICKS * 1000 == pytest.approx(200, rel=0.2)


def test_what_most_leaves_out_is_counted_in_full() -> None:
    lengths, given = (np.array([10]), np.array([5])), scenarios(horizon_s=1000.0)
    rates = np.array([1.0, 0.25])
    given = dataclasses.replace(given, class_rate_per_s=jnp.array([rates]))
    assert draw_requests(given, *lengths, seed=4).left_out == [None]
    arrived, observed = [], []
    for seed in range(100):
        drawn = draw_requests(given, *lengths, seed=seed, most=400, warmup_s=600.0)
        [left_out] = drawn.left_out
        own = drawn.tables.class_of[0] >= 0
        shown = np.bincount(drawn.tables.class_of[0][own], drawn.tables.arrived[0][own], 2)
        arrived.append(left_out.by_adapter + shown)
        observed.append(left_out.observed)
    # Means of 100 Poisson numbers, within four standard deviations.
    np.testing.assert_allclose(np.mean(arrived, axis=0), 1000 * rates, atol=4 * np.sqrt(1000 / 100))
    assert np.mean(observed) == pytest.approx(400 * rates.sum(), abs=4 * np.sqrt(500 / 100))
    packed = pack_first(given, [REQUESTS], [[0, 1]], [1], seed=0, indices=[0], warmup_s=float(REQUESTS.arrival_s[-1]))
    [rest] = packed.left_out
    assert rest.by_adapter.sum() == np.count_nonzero(REQUESTS.adapter[1:] != BASE_MODEL)
    assert rest.observed == np.count_nonzero(REQUESTS.arrival_s[1:] >= REQUESTS.arrival_s[-1])
