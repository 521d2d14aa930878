from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.scenarios import Bottleneck, Results
from tests.examples import make_scenarios, simulate


def results(throughput_tokens_per_s: list[float], offered_tokens_per_s: list[float]) -> Results:
    any_results = simulate(make_scenarios([[10, 20, 30]], [0.2, 0.1, 0.04]))
    return replace(
        any_results,
        throughput_tokens_per_s=jnp.asarray(throughput_tokens_per_s),
        offered_tokens_per_s=jnp.asarray(offered_tokens_per_s),
    )


def test_service_is_the_share_of_the_offered_load_that_is_served() -> None:
    found = results([90.0, 100.0, np.nan], [100.0, 100.0, 100.0]).service
    np.testing.assert_allclose(found, [0.9, 1.0, np.nan], rtol=1e-6)


def test_starved_is_a_tenth_below_the_offered_load_or_what_is_asked_for() -> None:
    found = results([85.0, 95.0, 100.0, np.nan], [100.0] * 4)
    assert found.starved().tolist() == [True, False, False, False]
    assert found.starved(0.02).tolist() == [True, True, False, False]
    assert found.starved(0.5).tolist() == [False, False, False, False]


@pytest.mark.parametrize(("limit", "label"), [(Bottleneck.NONE, "none"), (Bottleneck.KV_CACHE, "kv_cache")])
def test_a_limit_has_the_name_that_stands_in_files(limit: Bottleneck, label: str) -> None:
    assert limit.label == label
