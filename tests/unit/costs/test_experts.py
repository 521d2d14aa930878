"""How many experts a step reads: known limits, draws, and what a step costs with them."""

import numpy as np
import pytest

from lora_capacity.costs import Costs, ExpertRouting, bare_step_time_s
from lora_capacity.models import find_shape

MIXTURE = find_shape("Qwen3-30B-A3B")
ROUTING = ExpertRouting(128.0, 8.0)


def test_one_token_reads_its_own_experts_and_many_read_all() -> None:
    assert float(ROUTING.different_experts(1.0)) == pytest.approx(8.0)
    assert float(ROUTING.different_experts(10_000.0)) == pytest.approx(128.0)
    assert float(ROUTING.different_experts(0.0)) == 0.0


def test_expected_number_is_that_of_random_draws() -> None:
    generator = np.random.default_rng(0)
    for tokens in (2, 5, 20):
        seen = [len({e for _ in range(tokens) for e in generator.choice(128, 8, replace=False)}) for _ in range(300)]
        assert float(ROUTING.different_experts(float(tokens))) == pytest.approx(np.mean(seen), rel=0.02)


def test_routing_is_that_of_the_model_and_none_of_a_dense_one() -> None:
    assert ExpertRouting.of_model(MIXTURE) == ROUTING
    assert ExpertRouting.of_model(find_shape("Qwen3-8B")) is None


def test_a_step_costs_its_experts_once_however_many_tokens_share_them() -> None:
    costs = Costs.of_model(MIXTURE, {"expert_s": 1e-4, "base_s": 1e-3})
    times_s = np.asarray(bare_step_time_s(costs, sequences=np.array([1.0, 4.0, 4000.0]), kv_tokens=0.0))
    assert times_s[0] == pytest.approx(1e-3 + 8e-4, rel=1e-4)
    assert times_s[0] < times_s[1] < 1e-3 + 4 * 8e-4
    assert times_s[2] == pytest.approx(1e-3 + 128e-4, rel=1e-4)
