"""The event twin: nothing is lost, nothing exceeds its bound, and servers do not see each other."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.costs import LoraKernels
from lora_capacity.engines import SchedulerRules, VllmBehaviour
from lora_capacity.run.requests import draw_requests
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events import RequestTables, simulate_events
from tests.examples import compiled_once, make_costs

pytestmark = pytest.mark.slow

CONFIGS, CLASSES = 4, 2
MOST_ADAPTERS = 15
HORIZON_S = 30.0
COSTS = make_costs(
    LoraKernels(layers=32.0, expand_tiles=224.0, shrink_slices=7.0),
    base_s=0.01,
    lora_s=0.003,
    token_s=3e-5,
    prefill_token_s=5e-5,
    lora_token_s=1e-5,
    kv_token_s=1e-7,
    adapter_s=2e-4,
    adapter_rank_s=3e-6,
    skipped_request_s=4e-7,
    host_to_gpu_load_s=0.01,
    disk_s=0.04,
    disk_rank_s=0.003,
)

OLD, NEW = (VllmBehaviour.for_version(version).scheduler for version in ("0.8.5", "0.33"))

Case = tuple[Scenarios, RequestTables]


@cache
def compiled(rules: SchedulerRules) -> Any:
    return compiled_once(partial(simulate_events, rules=rules))


@cache
def sampled() -> Any:
    def simulate(warmup_s: float, *case: Any) -> Results:
        return simulate_events(COSTS, *case, warmup_s=warmup_s, samples=10)

    return compiled_once(simulate)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Four servers of all loads, from idle to hopeless."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.integers(1, 8, size=(CONFIGS, CLASSES)).astype(float)
    load = draw(st.sampled_from([0.05, 1.0, 10.0]))
    numbers = {
        "class_count": counts,
        "class_rate_per_s": load * rng.exponential(size=(CONFIGS, CLASSES)),
        "class_rank": np.full((CONFIGS, CLASSES), 8.0),
        "base_rate_per_s": load * rng.choice([0.0, 1.0], size=CONFIGS),
        "mean_input_tokens": np.full(CONFIGS, 50.0),
        "mean_output_tokens": np.full(CONFIGS, 30.0),
        "kv_tokens_per_request": np.full(CONFIGS, 70.0),
        "horizon_s": np.full(CONFIGS, HORIZON_S),
        "max_pending": rng.choice([20.0, 200.0, np.inf], size=CONFIGS),
        "max_loras": rng.integers(1, counts.sum(axis=1) + 1).astype(float),
        "max_lora_rank": np.full(CONFIGS, 8.0),
        "max_num_seqs": rng.choice([4.0, 256.0], size=CONFIGS),
        "max_num_batched_tokens": rng.choice([256.0, 2048.0], size=CONFIGS),
        "kv_cache_tokens": rng.choice([400.0, 20000.0], size=CONFIGS),
        "block_size": np.full(CONFIGS, 16),
    }
    scenarios = Scenarios(
        **{name: jnp.asarray(value) for name, value in numbers.items()}, status=jnp.zeros(CONFIGS, jnp.int32)
    )
    sample = rng.integers(1, 100, size=200), rng.integers(1, 64, size=200)
    tables = draw_requests(scenarios, *sample, seed=int(rng.integers(1000)), most=1500).tables
    return scenarios, fixed_shape(tables)


def fixed_shape(tables: RequestTables) -> RequestTables:
    """Pad to one shape, so that it compiles once."""
    missing = 2048 - tables.arrival.shape[1]
    late = np.iinfo(np.int32).max
    return replace(
        tables,
        arrival=jnp.pad(tables.arrival, ((0, 0), (0, missing)), constant_values=late),
        table=jnp.pad(tables.table, ((0, 0), (0, missing), (0, 0))),
        following=jnp.pad(tables.following, ((0, 0), (0, missing))),
        longest_output=63,
    )


def only(case: Case, row: int) -> Case:
    """The same case with all servers but one replaced by copies of it."""
    chosen = jnp.full(CONFIGS, row)
    scenarios, tables = case
    return jax.tree.map(lambda leaf: leaf[chosen], scenarios), jax.tree.map(lambda leaf: leaf[chosen], tables)


def played(case: Case, rules: SchedulerRules = OLD) -> Results:
    results: Results = compiled(rules)(COSTS, *case)
    return results


@settings(max_examples=25)
@given(cases(), st.sampled_from([OLD, NEW]))
def test_bounds_hold(case: Case, rules: SchedulerRules) -> None:
    scenarios, tables = case
    results = played(case, rules)
    assert np.all(results.status == Status.OK)
    arrived, completed = np.asarray(results.events.adapter_arrived), np.asarray(results.events.adapter_completed)
    assert np.all((completed >= 0) & (completed <= arrived))
    sent = (np.asarray(tables.arrival) < np.iinfo(np.int32).max).sum(axis=1)
    assert np.all(arrived.sum(axis=1) <= sent)
    assert np.all(results.active_adapters <= scenarios.max_loras * (1 + 1e-5))
    assert np.all(results.mean_running <= scenarios.max_num_seqs * (1 + 1e-5))
    assert np.all(results.mean_running + results.mean_waiting <= scenarios.max_pending * (1 + 1e-5))
    assert np.all(results.kv_usage <= 1 + 1e-5)
    shares = np.stack([results.events.compute_share, results.events.load_share, results.events.idle_share])
    assert np.all(shares >= -1e-5)
    quantiles = np.asarray(results.events.ttft_quantiles_s)
    assert np.all((np.diff(quantiles, axis=1) >= 0) | np.isnan(quantiles[:, 1:]))


@settings(max_examples=25)
@given(cases(), st.sampled_from([OLD, NEW]))
def test_completions_add_up(case: Case, rules: SchedulerRules) -> None:
    """Without base model, those of the adapters are those of the server, and what the last steps complete too late."""
    scenarios, _ = case
    results = played(case, rules)
    of_adapters = np.asarray(results.events.adapter_completed).sum(axis=1)
    all_requests = np.round(np.asarray(results.completed_per_s) * HORIZON_S)
    without_base = np.asarray(scenarios.base_rate_per_s) == 0
    difference = (of_adapters - all_requests)[without_base]
    last = np.asarray(scenarios.max_num_seqs)[without_base] * (2 if rules.async_scheduling else 1)
    assert np.all((difference >= 0) & (difference <= last))


@settings(max_examples=10)
@given(cases(), st.integers(0, CONFIGS - 1), st.sampled_from([OLD, NEW]))
def test_a_server_does_not_see_the_others(case: Case, row: int, rules: SchedulerRules) -> None:
    together, alone = played(case, rules), played(only(case, row), rules)
    for field, a, b in zip(
        together.__dataclass_fields__, jax.tree.leaves(together), jax.tree.leaves(alone), strict=False
    ):
        np.testing.assert_array_equal(np.asarray(a)[row], np.asarray(b)[0], err_msg=field)


def test_equal_seeds_draw_equal_requests_and_a_configuration_depends_on_its_own_seed_alone() -> None:
    leaves: list[Any] = [
        *(jnp.full((2, 1), value) for value in (3.0, 2.0, 8.0)),
        *(
            jnp.full(2, value)
            for value in (0.5, 50.0, 30.0, 70.0, HORIZON_S, np.inf, 2.0, 8.0, 256.0, 2048.0, 20000.0, 16)
        ),
        jnp.zeros(2, jnp.int32),
    ]
    scenarios = Scenarios(*leaves)
    lengths = np.arange(1, 50), np.arange(1, 50)
    first, again, other = (draw_requests(scenarios, *lengths, seed=seed).tables for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.table, again.table)
    assert not np.array_equal(first.arrival, other.arrival)
    assert not np.array_equal(first.arrival[0], first.arrival[1])
    expected = (3 * 2.0 + 0.5) * HORIZON_S
    assert np.all(
        np.abs((np.asarray(first.arrival) < np.iinfo(np.int32).max).sum(axis=1) - expected) < 5 * np.sqrt(expected)
    )


def test_a_server_with_time_and_room_answers_like_an_infinite_one() -> None:
    """No queue: running = arrivals · mean stay, where the stay is the answer's length times the step time."""
    leaves: list[Any] = [
        *(jnp.full((1, 1), value) for value in (2.0, 1.0, 8.0)),
        *(jnp.full(1, value) for value in (0.0, 1.0, 50.0, 26.0, 1000.0, np.inf, 2.0, 8.0, 256.0, 2048.0, 1e5, 16)),
        jnp.zeros(1, jnp.int32),
    ]
    scenarios = Scenarios(*leaves)
    flat = make_costs(base_s=0.01)
    tables = draw_requests(scenarios, np.array([1]), np.array([50]), seed=3).tables
    found = compiled_once(simulate_events)(flat, scenarios, tables)
    arrived = float(tables.arrived[0].sum()) / 1000.0
    # Served from the step after they arrive; the last 0.5 s are not finished.
    assert float(found.mean_running[0]) == pytest.approx(arrived * 50 * 0.01, rel=0.01)
    assert float(found.itl_s[0]) == pytest.approx(0.01, rel=1e-4)
    assert 0.01 <= float(found.ttft_s[0]) <= 0.02
    np.testing.assert_allclose(found.events.tpot_quantiles_s[0], 0.01, rtol=0.04)
    np.testing.assert_allclose(found.events.e2e_quantiles_s[0], 49.5 * 0.01 + float(found.ttft_s[0]) - 0.005, rtol=0.04)
    assert np.all(found.events.adapter_worst_wait_s[0] <= 0.01 + 1e-6)


@settings(max_examples=10)
@given(cases())
def test_a_series_adds_up_and_a_warm_up_is_left_out(case: Case) -> None:
    whole, late = (sampled()(warmup_s, *case) for warmup_s in (0.0, HORIZON_S / 2))
    end_s = np.asarray(whole.events.series.end_s)
    spans_s = np.diff(end_s, axis=1, prepend=0.0)
    for mean, series in (
        (whole.completed_per_s, whole.events.series.completed_per_s),
        (whole.mean_running, whole.events.series.running),
        (whole.kv_usage, whole.events.series.kv_usage),
    ):
        inside = (np.nan_to_num(np.asarray(series)) * spans_s).sum(axis=1)
        # The last step may end beyond the horizon, and what is idle has nothing.
        np.testing.assert_allclose(inside, np.asarray(mean) * HORIZON_S, rtol=1e-4, atol=0.4 * np.max(inside) / 10)
    second = end_s > HORIZON_S / 2
    completed = (np.nan_to_num(np.asarray(whole.events.series.completed_per_s)) * spans_s * second).sum(axis=1)
    np.testing.assert_allclose(np.asarray(late.completed_per_s) * HORIZON_S / 2, completed, atol=40)
    np.testing.assert_array_equal(whole.events.adapter_completed, late.events.adapter_completed)
