"""What prefixes save on average, in limits in which it can be told by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_capacity.twins.steady.cached import Saved, nothing_saved, saved_by_prefixes

SHARED = 96.0


def saved(
    rate_per_s: float,
    *,
    running: float = 10.0,
    kv_cache_tokens: float = 1e5,
    adapters: int = 4,
    active: float | None = None,
) -> Saved:
    """One class of adapters, no base model; a request stays for a second."""
    scenarios: Any = SimpleNamespace(
        mean_input_tokens=np.array([160.0]),
        mean_output_tokens=np.array([100.0]),
        kv_tokens_per_request=np.array([218.0]),
        kv_cache_tokens=np.array([kv_cache_tokens]),
        block_size=np.array([16]),
        class_count=np.array([[float(adapters)]]),
        class_rate_per_s=np.array([[rate_per_s]]),
        class_shared_tokens=np.array([[SHARED]]),
        base_shared_tokens=np.array([SHARED]),
        base_rate_per_s=np.array([0.0]),
        requests_per_s=np.array([adapters * rate_per_s]),
        horizon_s=np.array([1e9]),
    )
    results: Any = SimpleNamespace(
        completed_per_s=np.array([adapters * rate_per_s]),
        mean_running=np.array([running]),
        itl_s=np.array([0.01]),
        class_service=np.array([[1.0]]),
        active_adapters=np.array([-adapters * np.expm1(-rate_per_s) if active is None else active]),
    )
    return saved_by_prefixes(scenarios, results, nothing_saved(scenarios))


def test_busy_adapters_find_their_prefix_and_hold_it_once() -> None:
    found = saved(100.0, running=400.0)
    assert found.prompt_tokens[0] == pytest.approx(SHARED, rel=1e-6)
    # Of a hundred requests of each adapter at a time all but one hold what another holds.
    assert found.kv_tokens[0] == pytest.approx(SHARED * 99 / 100, rel=1e-6)


def test_rare_requests_find_nothing_once_all_free_blocks_have_been_taken() -> None:
    # All of them together take 268 tokens each: free ones, here 5,000, last for 19 requests of 1,000 adapters.
    found = saved(1e-4, running=0.1, kv_cache_tokens=5000.0, adapters=1000)
    lasts_s = 1.0 + (5000.0 - 21.8) / (0.1 * 268.0)
    assert found.prompt_tokens[0] == pytest.approx(SHARED * (1 - np.exp(-1e-4 * lasts_s)), rel=1e-3)
    assert found.prompt_tokens[0] < 0.03 * SHARED
    assert found.kv_tokens[0] < 0.01 * SHARED


def test_requests_that_come_together_find_more() -> None:
    """100 adapters with half a request at a time, independent of each other or five active ones with ten each."""
    apart, together = (saved(0.5, running=50, adapters=100, active=each) for each in (None, 5.0))
    assert together.kv_tokens[0] == pytest.approx(SHARED * 45 / 50, rel=1e-3)
    assert apart.kv_tokens[0] == pytest.approx(SHARED * (50 - 100 * -np.expm1(-0.5)) / 50, rel=1e-3)
    assert together.prompt_tokens[0] > 0.99 * SHARED


def test_a_larger_cache_keeps_prefixes_longer() -> None:
    small, large = (saved(0.01, kv_cache_tokens=tokens).prompt_tokens[0] for tokens in (2.3e3, 1e6))
    assert small < 0.5 * large
    assert large == pytest.approx(SHARED, rel=1e-3)
