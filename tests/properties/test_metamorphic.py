"""What must not change when a workload is told differently, and what may change in one direction only: both twins."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.costs import Costs
from lora_capacity.run import LengthSample, simulate
from lora_capacity.scenarios import Results, Scenarios
from tests.examples import make_calibration, make_scenarios

pytestmark = pytest.mark.slow

WORKLOADS, BATCHES = 50, 6
"""Workloads of a batch, and batches: 300 of each kind."""

CALIBRATION = make_calibration()
LENGTHS = LengthSample([30, 120, 700], [10, 60, 300])
MOST_RATE_PER_S = 50.0
IDLE_ADAPTERS = 20
MONOTONE = 0.01
"""How much may be lost where nothing should be: iterations left over, and other requests of the same kind."""

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int) -> dict[str, Any]:
    """Return servers that someone may run, idle to hopeless, of three classes of adapters, for ten minutes."""
    rng = np.random.default_rng(seed)
    count = rng.integers(1, 60, (WORKLOADS, 3))
    weight = rng.dirichlet(np.ones(4), WORKLOADS)
    rate_per_s = np.exp(rng.uniform(np.log(0.1), np.log(MOST_RATE_PER_S), WORKLOADS))
    every = count.sum(axis=1)
    return {
        "count": count,
        "rate_per_s": weight[:, :3] * rate_per_s[:, None] / count,
        "class_rank": rng.choice([8.0, 16.0], (WORKLOADS, 3)),
        "base_rate_per_s": weight[:, 3] * rate_per_s * rng.integers(0, 2, WORKLOADS),
        "mean_input_tokens": np.mean(LENGTHS.input_tokens),
        "mean_output_tokens": np.mean(LENGTHS.output_tokens),
        "kv_tokens_per_request": np.mean(np.add(LENGTHS.input_tokens, LENGTHS.output_tokens)),
        "kv_cache_tokens": np.exp(rng.uniform(np.log(2e4), np.log(5e5), WORKLOADS)),
        "horizon_s": 600.0,
        "max_pending": rng.choice([100.0, 2000.0], WORKLOADS),
        "max_loras": np.maximum(np.rint(every * rng.uniform(0.1, 1.0, WORKLOADS)), 2.0),
        "max_num_seqs": rng.choice([32.0, 256.0], WORKLOADS),
        "max_num_batched_tokens": 2048.0,
    }


def told(columns: dict[str, Any], engine: str, costs: Costs = CALIBRATION.costs, **options: Any) -> Results:
    columns = dict(columns)
    scenarios: Scenarios = make_scenarios(columns.pop("count"), columns.pop("rate_per_s"), **columns)
    calibration = dataclasses.replace(CALIBRATION, costs=costs)
    return simulate(calibration, jax.tree.map(np.asarray, scenarios), LENGTHS, engine=engine, **options)


def throughput(results: Results) -> np.ndarray:
    return np.asarray(results.throughput_tokens_per_s)


def relative(results: Results, to: Results) -> np.ndarray:
    return np.abs(throughput(results) / throughput(to) - 1.0)


engines = pytest.mark.parametrize("engine", ["steady", "event"])
batches = settings(max_examples=BATCHES, deadline=None)


@engines
@given(seeds)
@batches
def test_the_order_of_adapters_changes_nothing(engine: str, seed: int) -> None:
    """The event twin draws other requests then, which now and then fall into a worse balance of a hopeless server."""
    columns = drawn(seed)
    turned = columns | {name: columns[name][:, ::-1] for name in ("count", "rate_per_s", "class_rank")}
    change = relative(told(turned, engine), told(columns, engine))
    assert change.max() < (1e-3 if engine == "steady" else 0.1)
    assert change.mean() < (1e-4 if engine == "steady" else 0.005)


@engines
@given(seeds)
@batches
def test_adapters_that_nobody_asks_for_change_little(engine: str, seed: int) -> None:
    columns = drawn(seed)
    more = columns | {
        name: np.concatenate([columns[name], np.full((WORKLOADS, 1), value)], axis=1)
        for name, value in (("count", IDLE_ADAPTERS), ("rate_per_s", 1e-9), ("class_rank", 8.0))
    }
    change = relative(told(more, engine), told(columns, engine))
    assert change.max() < 0.1
    assert change.mean() < 0.005


@engines
@given(seeds)
@batches
def test_a_clock_of_half_the_speed_changes_nothing_but_units(engine: str, seed: int) -> None:
    columns = drawn(seed)
    times: Any = {
        name: jax.tree.map(lambda time: 2.0 * time, getattr(CALIBRATION.costs, name)) for name in ("step", "loads")
    }
    slow = columns | {name: columns[name] / 2.0 for name in ("rate_per_s", "base_rate_per_s")} | {"horizon_s": 1200.0}
    one, other = told(columns, engine), told(slow, engine, dataclasses.replace(CALIBRATION.costs, **times))
    rounding = 1e-3 if engine == "steady" else 0.0  # of single precision, which the iteration amplifies
    for name in ("throughput_tokens_per_s", "loads_per_s"):
        np.testing.assert_allclose(2.0 * getattr(other, name), getattr(one, name), rtol=rounding, atol=rounding)
    for name in ("ttft_s", "itl_s"):
        np.testing.assert_allclose(0.5 * getattr(other, name), getattr(one, name), rtol=rounding)
    for name in ("mean_running", "mean_waiting", "attainment", "class_service"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=rounding, atol=rounding)


@engines
@given(seeds)
@batches
def test_twice_the_load_serves_no_larger_share(engine: str, seed: int) -> None:
    columns = drawn(seed)
    doubled = columns | {name: columns[name] * 2 for name in ("rate_per_s", "base_rate_per_s")}
    one, other = (np.asarray(told(each, engine).attainment) for each in (columns, doubled))
    assert (other <= one + MONOTONE).all()


@engines
@given(seeds)
@batches
def test_more_kv_cache_never_completes_less(engine: str, seed: int) -> None:
    columns = drawn(seed)
    more = columns | {"kv_cache_tokens": columns["kv_cache_tokens"] * 1.5}
    one, other = (throughput(told(each, engine)) for each in (columns, more))
    assert (other >= one * (1.0 - MONOTONE)).all()


@given(seeds)
@batches
def test_two_seeds_arrive_and_serve_alike(seed: int) -> None:
    columns = drawn(seed)
    one, other = (told(columns, "event", seed=each) for each in (1, 2))
    arrived = [np.asarray(each.events.adapter_arrived).sum(axis=1) for each in (one, other)]
    assert (np.abs(arrived[0] - arrived[1]) <= 5.0 * np.sqrt(arrived[0] + arrived[1])).all()
    keeps_up = np.minimum(one.attainment, other.attainment) > 0.99
    completed = [np.asarray(each.completed_per_s) * columns["horizon_s"] for each in (one, other)]
    apart = np.abs(completed[0] - completed[1]) / np.sqrt(completed[0] + completed[1])
    assert keeps_up.sum() > WORKLOADS / 10
    assert (apart[keeps_up] <= 5.0).all()
