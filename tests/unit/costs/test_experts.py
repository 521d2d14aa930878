"""How many experts a step reads: known limits, draws, and what a step costs with them."""

import numpy as np
import pytest

from lora_capacity.costs import Costs, ExpertRouting, bare_step_time_s, step_time_s
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


def test_prompts_that_come_whole_go_to_fewer_experts_on_average() -> None:
    """Nine steps of four tokens, and one with a prompt of 200 beside: the mean over them, not that of the mean step."""
    costs = Costs.of_model(MIXTURE, {"expert_s": 1.0})
    step = dict.fromkeys(("kv_tokens", "adapters", "skipped", "queued", "loaded", "max_loras"), 0.0)
    one = [float(step_time_s(costs, tokens=4.0 + p, prefill_tokens=p, max_lora_rank=8.0, **step)) for p in (0.0, 200.0)]
    mean = step_time_s(
        costs, tokens=24.0, prefill_tokens=20.0, max_lora_rank=8.0, small_share=0.9, prompt_tokens=200.0, **step
    )
    assert float(mean) == pytest.approx(0.9 * one[0] + 0.1 * one[1], rel=1e-5)
    assert float(step_time_s(costs, tokens=24.0, prefill_tokens=20.0, max_lora_rank=8.0, **step)) > float(mean)
