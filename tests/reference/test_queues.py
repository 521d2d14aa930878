"""The event twin in limits where queueing theory knows the answer, over one set of arrivals and over another.

Intervals are of four standard errors, which a right twin misses once in 16,000 times; seeds are fixed.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.run.compile import IN_ONE_PIECE, in_one_piece
from lora_capacity.run.requests import draw_requests
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.events import RequestTables, simulate_events
from tests.examples import make_costs

pytestmark = pytest.mark.slow

STEP_S = 0.1
CONSTANT_STEPS = make_costs(base_s=STEP_S)
ADAPTERS = 3
REPLICAS = 32
HORIZON_S = 2000.0
MOST_REQUESTS = 12288
INTERVAL = 4.0
"""Standard errors."""


@cache
def compiled() -> Any:
    """One server after the other, in one program: mapped together, each would go on until the last is done."""

    def simulate(case: tuple[Scenarios, RequestTables]) -> Results:
        results = simulate_events(CONSTANT_STEPS, *jax.tree.map(lambda leaf: leaf[jnp.newaxis], case))
        return jax.tree.map(lambda leaf: leaf[0], results)

    return jax.jit(in_one_piece(partial(jax.lax.map, simulate)), compiler_options=dict(IN_ONE_PIECE))


def replicas(output_tokens: list[int], load: float, seed: int, **settings: float) -> Results:
    """Many servers alike, each with Poisson arrivals of its own; prompts of one token, so that a token is a step."""
    per_s = load / (STEP_S * np.mean(output_tokens))
    numbers: Mapping[str, float] = {
        "base_rate_per_s": 0.0,
        "mean_input_tokens": 1.0,
        "mean_output_tokens": float(np.mean(output_tokens)),
        "kv_tokens_per_request": 1.0,
        "horizon_s": HORIZON_S,
        "max_pending": np.inf,
        "max_loras": ADAPTERS,
        "max_lora_rank": 8.0,
        "max_num_seqs": 256.0,
        "max_num_batched_tokens": 2048.0,
        "kv_cache_tokens": 1e5,
        "block_size": 16,
    } | settings
    scenarios = Scenarios(
        class_count=jnp.full((REPLICAS, 1), float(ADAPTERS)),
        class_rate_per_s=jnp.full((REPLICAS, 1), per_s / ADAPTERS),
        class_rank=jnp.full((REPLICAS, 1), 8.0),
        status=jnp.zeros(REPLICAS, jnp.int32),
        **{name: jnp.full(REPLICAS, value) for name, value in numbers.items()},
    )
    tables = draw_requests(scenarios, np.ones(len(output_tokens), dtype=int), np.array(output_tokens), seed=seed).tables
    return compiled()((scenarios, fixed_shape(tables)))


def fixed_shape(tables: RequestTables) -> RequestTables:
    """Pad to one shape, so that it compiles once."""
    missing = MOST_REQUESTS - tables.arrival.shape[1]
    late = np.iinfo(np.int32).max
    return replace(
        tables,
        arrival=jnp.pad(tables.arrival, ((0, 0), (0, missing)), constant_values=late),
        table=jnp.pad(tables.table, ((0, 0), (0, missing), (0, 0))),
        longest_output=31,
    )


def mean_and_error(values: Any) -> tuple[float, float]:
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(values.size))


@pytest.mark.parametrize("load", [0.3, 0.7])
@pytest.mark.parametrize("output_tokens", [[5], [1, 9]], ids=["M/D/1", "M/G/1"])
def test_one_place_is_a_single_server_queue(output_tokens: list[int], load: float) -> None:
    """The mean wait is Pollaczek and Khinchine's, λ · E[D²] / (2 · (1 − ρ)), with a first token one step later."""
    results = replicas(output_tokens, load, seed=5, max_num_seqs=1.0)
    stays_s = STEP_S * np.array(output_tokens)
    expected = load / stays_s.mean() * np.mean(stays_s**2) / (2.0 * (1.0 - load)) + STEP_S
    mean, error = mean_and_error(results.ttft_s)
    assert error < 0.03 * expected
    assert abs(mean - expected) < INTERVAL * error
    busy, busy_error = mean_and_error(results.mean_running)
    assert abs(busy - load) < INTERVAL * busy_error


@pytest.mark.parametrize("load", [0.7, 5.0], ids=["idle", "busy"])
def test_two_seeds_of_one_mean_agree(load: float) -> None:
    """Served in full, tokens are compound Poisson: their variance is λ · T · E[L²], whatever the seed.

    Two runs then differ by a number of variance twice that, and means over replicas agree within their errors.
    """
    lengths = [4, 6, 20]
    first, second = (replicas(lengths, load, seed=seed) for seed in (1, 2))
    tokens = np.array(lengths) + 1.0
    requests = load / (STEP_S * np.mean(lengths)) * HORIZON_S
    spread = np.sqrt(2.0 * requests * np.mean(tokens**2)) / HORIZON_S
    apart = np.asarray(first.throughput_tokens_per_s) - np.asarray(second.throughput_tokens_per_s)
    assert np.all(np.abs(apart) < INTERVAL * spread)
    # A chi-square of one degree of freedom per pair.
    assert abs(np.mean((apart / spread) ** 2) - 1.0) < INTERVAL * np.sqrt(2.0 / REPLICAS)
    for name in ("throughput_tokens_per_s", "ttft_s", "itl_s", "mean_running", "kv_usage", "active_adapters"):
        (one, one_error), (other, other_error) = (mean_and_error(getattr(r, name)) for r in (first, second))
        # Costs are constant, so a latency of the tokens has no spread but that of rounding.
        assert abs(one - other) <= INTERVAL * np.hypot(one_error, other_error) + 1e-5 * one, name
