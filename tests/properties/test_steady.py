import dataclasses
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_capacity.scenarios import Bottleneck, Results, Scenarios
from tests.examples import make_scenarios, simulate

BATCH = 8
"""Configurations simulated at once: always as many, so that all examples share one compilation."""

ABOVE_OFFERED = 0.02
"""How far above the offered load the balance may lie: queue and batch are each found by iteration."""

MOST_TOKENS_PER_S = 1000
"""Offered to a server far from saturation, which would reach 25,000 if tokens were all that takes time."""

SINGLE = 1e-6
"""Relative rounding of single precision in a sum and a product."""

SERVED = 1e-5
"""Relative rounding of single precision in means over the horizon: without a queue what arrives is completed."""

MONOTONE = 0.02
"""How much throughput may fall where it should rise: iterations left over, and regimes that meet with a step."""


IDLE_ADAPTERS, IDLE_CHANGE, HOPELESS = 20, 0.05, 0.1
"""Adapters at a billionth of a request per second, and by how much they may change the throughput."""


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(np.log(low), np.log(high)).map(lambda exponent: float(np.exp(exponent)))


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any server and workload that would be accepted, two classes of adapters, traffic to the base model or none."""
    counts = [draw(st.integers(1, 1000)), draw(st.integers(0, 1000))]
    input_tokens, output_tokens = draw(log_uniform(4, 4000)), draw(log_uniform(2, 1000))
    held = input_tokens + output_tokens / 2
    return {
        "count": counts,
        "rate_per_s": [draw(log_uniform(1e-4, 50)), draw(log_uniform(1e-4, 50))],
        "base_rate_per_s": draw(st.one_of(st.just(0.0), log_uniform(1e-4, 50))),
        "mean_input_tokens": input_tokens,
        "mean_output_tokens": output_tokens,
        "kv_tokens_per_request": held,
        "kv_cache_tokens": held * draw(log_uniform(2, 2000)),
        "horizon_s": draw(log_uniform(10, 1e5)),
        "max_pending": draw(st.one_of(st.just(np.inf), st.integers(1, 30_000).map(float))),
        "max_loras": float(draw(st.integers(1, sum(counts)))),
        "max_lora_rank": draw(st.sampled_from([8.0, 16.0, 64.0])),
        "max_num_seqs": float(draw(st.integers(1, 2000))),
        "max_num_batched_tokens": float(draw(st.integers(2000, 16_000))),
    }


batches = st.lists(configurations(), min_size=BATCH, max_size=BATCH)


def scenarios_of(batch: list[dict[str, Any]], **factors: float) -> Scenarios:
    columns = {name: np.array([each[name] for each in batch]) for name in batch[0]}
    for name, factor in factors.items():
        columns[name] = columns[name] * factor
    return make_scenarios(columns.pop("count"), columns.pop("rate_per_s"), **columns)


def throughput(results: Results) -> np.ndarray:
    return np.asarray(results.throughput_tokens_per_s)


@given(batches)
@settings(max_examples=100)
def test_every_prediction_is_a_number_and_within_what_is_offered_and_allowed(batch: list[dict[str, Any]]) -> None:
    scenarios = scenarios_of(batch)
    found = simulate(scenarios)
    assert found.events is None
    for name, value in vars(dataclasses.replace(found, events=0.0, client=0.0, windows=0.0, scenarios=0.0)).items():
        known = (
            np.asarray(value) if name != "class_service" else np.asarray(value)[np.asarray(scenarios.class_count) > 0]
        )
        assert np.isfinite(known).all(), name
        assert (known >= 0).all(), name
    assert (np.asarray(found.service) > 0).all()
    assert (np.asarray(found.service) <= 1 + ABOVE_OFFERED).all()
    bounds = {
        "mean_running": scenarios.max_num_seqs,
        "active_adapters": scenarios.max_loras,
        "kv_usage": 1.0,
        "mean_waiting": scenarios.max_pending,
    }
    for name, bound in bounds.items():
        assert (np.asarray(getattr(found, name)) <= np.asarray(bound) * 1.005).all(), name


@given(batches)
@settings(max_examples=50)
def test_what_the_classes_complete_adds_up_to_the_whole(batch: list[dict[str, Any]]) -> None:
    scenarios = scenarios_of([each | {"base_rate_per_s": 0.0} for each in batch])
    found = simulate(scenarios)
    offered = np.asarray(scenarios.class_count) * np.asarray(scenarios.class_rate_per_s)
    completed = np.where(offered > 0, np.nan_to_num(np.asarray(found.class_service)) * offered, 0.0).sum(axis=1)
    np.testing.assert_allclose(completed, found.completed_per_s, rtol=0.01)


@given(batches, st.floats(0.1, 10.0))
@settings(max_examples=50)
def test_offered_is_what_the_classes_ask_for_and_grows_as_their_rates_do(
    batch: list[dict[str, Any]], factor: float
) -> None:
    tokens = np.array([each["mean_input_tokens"] + each["mean_output_tokens"] for each in batch])
    rates = np.array([np.dot(each["count"], each["rate_per_s"]) + each["base_rate_per_s"] for each in batch])
    for scale in (1.0, factor):
        found = simulate(scenarios_of(batch, rate_per_s=scale, base_rate_per_s=scale))
        np.testing.assert_allclose(found.offered_tokens_per_s, scale * rates * tokens, rtol=SINGLE)


@st.composite
def ample_servers(draw: st.DrawFn) -> dict[str, Any]:
    """A slot for each adapter, room for every request, a long horizon, and few tokens.

    A token takes 0.07 ms and its adapter 0.26 ms: with twice `MOST_TOKENS_PER_S`, each token of another adapter, they
    fill 0.7 of the time, which leaves a balance.
    """
    counts = [draw(st.integers(1, 100)), draw(st.integers(0, 100))]
    input_tokens, output_tokens = draw(log_uniform(4, 1000)), draw(log_uniform(2, 1000))
    weights = [draw(st.floats(0.1, 1.0)) for _ in range(3)]
    offered_per_s = draw(log_uniform(1, MOST_TOKENS_PER_S)) / (input_tokens + output_tokens)
    share = offered_per_s / (np.dot(counts, weights[:2]) + weights[2])
    return {
        "count": counts,
        "rate_per_s": [weight * share for weight in weights[:2]],
        "base_rate_per_s": weights[2] * share,
        "mean_input_tokens": input_tokens,
        "mean_output_tokens": output_tokens,
        "kv_tokens_per_request": input_tokens + output_tokens / 2,
        "horizon_s": 1e5,
        "max_loras": float(sum(counts)),
    }


@given(st.lists(ample_servers(), min_size=BATCH, max_size=BATCH), st.floats(1.0, 2.0))
@settings(max_examples=50)
def test_far_from_saturation_all_that_is_offered_is_served(batch: list[dict[str, Any]], factor: float) -> None:
    """At both rates, of adapters and base model alike, but for what still runs at the end."""
    for scale in (1.0, factor):
        found = simulate(scenarios_of(batch, rate_per_s=scale, base_rate_per_s=scale))
        np.testing.assert_array_equal(found.limit, Bottleneck.NONE)
        tokens = np.array([each["mean_input_tokens"] + each["mean_output_tokens"] for each in batch])
        running_at_end = np.asarray(found.mean_running) * tokens / 1e5
        np.testing.assert_allclose(throughput(found) + running_at_end, found.offered_tokens_per_s, rtol=SERVED)


@given(batches, st.floats(1.0, 4.0))
@settings(max_examples=50)
def test_more_kv_cache_never_lowers_the_throughput(batch: list[dict[str, Any]], factor: float) -> None:
    """While every adapter has a slot; with fewer slots a larger batch may keep them longer."""
    batch = [each | {"max_loras": float(sum(each["count"]))} for each in batch]
    before, after = (throughput(simulate(scenarios_of(batch, kv_cache_tokens=each))) for each in (1.0, factor))
    assert (after >= before * (1 - MONOTONE)).all()


@given(batches)
@settings(max_examples=25)
def test_a_configuration_is_the_same_at_any_place_of_a_batch(batch: list[dict[str, Any]]) -> None:
    there, back = throughput(simulate(scenarios_of(batch))), throughput(simulate(scenarios_of(batch[::-1])))
    np.testing.assert_allclose(there, back[::-1], rtol=1e-5)


def plausible_servers() -> st.SearchStrategy[dict[str, Any]]:
    """Servers that someone may run, of more than one slot, for ten minutes to two hours.

    A class of its own holds adapters that hardly ask for anything.
    """
    return st.fixed_dictionaries(
        {
            "count": st.tuples(st.integers(1, 400), st.integers(0, 400)).map(lambda counts: [*counts, 0]),
            "rate_per_s": st.tuples(log_uniform(1e-3, 3), log_uniform(1e-3, 3)).map(lambda rates: [*rates, 1e-9]),
            "base_rate_per_s": st.one_of(st.just(0.0), log_uniform(1e-3, 5)),
            "mean_input_tokens": log_uniform(20, 2000),
            "mean_output_tokens": log_uniform(5, 600),
            "kv_tokens_per_request": st.just(1000.0),
            "kv_cache_tokens": log_uniform(3e4, 2e6),
            "horizon_s": log_uniform(600, 7200),
            "max_pending": st.one_of(st.just(np.inf), st.integers(10, 3000).map(float)),
            "max_loras": st.integers(2, 400).map(float),
            "max_num_seqs": st.integers(16, 600).map(float),
            "max_num_batched_tokens": st.integers(2000, 9000).map(float),
        }
    )


@given(st.lists(plausible_servers(), min_size=BATCH, max_size=BATCH))
@settings(max_examples=40)
def test_idle_adapters_change_little_and_twice_the_load_keeps_no_more_bounds(batch: list[dict[str, Any]]) -> None:
    before = simulate(scenarios_of(batch))
    idle = simulate(scenarios_of([each | {"count": [*each["count"][:2], IDLE_ADAPTERS]} for each in batch]))
    # Hopeless servers have two balances, and which one is found may turn on less.
    told = throughput(before) > HOPELESS * np.asarray(before.offered_tokens_per_s)
    np.testing.assert_allclose(throughput(idle)[told], throughput(before)[told], rtol=IDLE_CHANGE)
    doubled = [
        each | {"rate_per_s": [2 * rate for rate in each["rate_per_s"]], "base_rate_per_s": 2 * each["base_rate_per_s"]}
        for each in batch
    ]
    kept, kept_of_twice = (np.asarray(found.attainment) for found in (before, simulate(scenarios_of(doubled))))
    assert (kept_of_twice <= kept + MONOTONE).all()
