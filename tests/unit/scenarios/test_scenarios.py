from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.memory import plan_memory
from lora_capacity.scenarios import Scenarios, build_scenarios, extrapolations, pack_scenarios
from lora_capacity.scenarios.scenarios import kv_tokens_per_request
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import AdapterMix, LengthDistribution, Workload
from tests.examples import LLAMA_8B, MEMORY, make_calibration

CALIBRATION = make_calibration()
PROMPTS = LengthDistribution.from_histogram([100, 300], [1, 1])
ANSWERS = LengthDistribution.from_histogram([40, 160], [3, 1])
WORKLOAD = Workload(AdapterMix([0.4, 0.1], [8, 32]), PROMPTS, ANSWERS, base_rate_per_s=0.5, horizon_s=600.0)
PLAIN: dict[str, Any] = {
    "class_count": [[4.0, 2.0]],
    "class_rate_per_s": [0.1, 0.2],
    "class_rank": [8.0, 16.0],
    "base_rate_per_s": 0.0,
    "mean_input_tokens": 200.0,
    "mean_output_tokens": 70.0,
    "kv_tokens_per_request": 250.0,
    "horizon_s": 600.0,
    "max_pending": np.inf,
    "adapters": 6,
    "max_loras": 4,
    "max_lora_rank": 16,
}


def build(adapters: Any = 8, max_loras: Any = 4, **settings: Any) -> Scenarios:
    return build_scenarios(WORKLOAD, CALIBRATION, adapters, max_loras, **settings)


def test_laying_out_compiles_nothing() -> None:
    """A search lays out hundreds of different numbers of configurations: JAX would compile something for each."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append(name) if "backend_compile" in name else None
    )
    jax.jit(lambda x: x + 1)(np.ones(13))
    assert compiled  # so compilations are heard of
    compiled.clear()
    build(np.full(23, 8), np.full(23, 4)).scaled(np.full(23, 1.1))
    assert not compiled


def test_a_workload_is_laid_out_class_by_class() -> None:
    """The first adapters served are dealt out in turn; classes go by rate."""
    scenarios = build([1, 3, 8], [1, 2, 8])
    np.testing.assert_array_equal(scenarios.class_count, [[0, 1], [1, 2], [4, 4]])
    np.testing.assert_allclose(scenarios.class_rate_per_s, [[0.1, 0.4]] * 3)
    np.testing.assert_array_equal(scenarios.class_rank, [[32, 8]] * 3)
    for name, value in {
        "base_rate_per_s": 0.5,
        "mean_input_tokens": 200.0,
        "mean_output_tokens": 70.0,
        "horizon_s": 600.0,
        "max_pending": np.inf,
    }.items():
        np.testing.assert_allclose(getattr(scenarios, name), [value] * 3, err_msg=name)
    np.testing.assert_array_equal(scenarios.max_loras, [1, 2, 8])


@pytest.mark.parametrize(
    ("name", "high", "inside", "told"),
    [
        ("input_tokens", 299.0, 300.0, "input_tokens 300 is outside the calibrated range 0 to 299"),
        ("output_tokens", 100.0, 160.0, "output_tokens 160 is outside the calibrated range 0 to 100"),
        # 8 adapters of 0.4 and 0.1 requests a second in turn and the base model's, of 270 tokens each
        ("offered_tokens_per_s", 600.0, 675.0, "offered_tokens_per_s 675 is outside the calibrated range 0 to 600"),
        (
            "max_num_batched_tokens",
            1024.0,
            2048.0,
            "max_num_batched_tokens 2048 is outside the calibrated",
        ),
        ("max_num_seqs", 128.0, 256.0, "max_num_seqs 256 is outside the calibrated range 0 to 128"),
    ],
)
def test_lengths_loads_and_limits_beyond_those_fitted_over_are_extrapolations(
    name: str, high: float, inside: float, told: str
) -> None:
    for largest, status in ((high, Status.OUTSIDE_CALIBRATION), (inside, Status.OK)):
        calibration = make_calibration(fitted_ranges={name: (0.0, largest)})
        limits = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
        assert int(build_scenarios(WORKLOAD, calibration, 8, 4, **limits).status[0]) == status
        server = calibration.server(max_loras=4, max_cpu_loras=8, max_lora_rank=32, **limits)
        sentences = extrapolations(WORKLOAD, calibration, server)
        assert [each.startswith(told) for each in sentences] == [True] * (status != Status.OK)


def test_a_request_holds_its_prompt_and_half_its_answer_weighted_by_its_stay() -> None:
    """Answers of 40 and 160 tokens stay 30 and 40 of 70 steps per request; prompts do not matter for the stay."""
    while_there = (0.75 * 40 * 20 + 0.25 * 160 * 80) / (0.75 * 40 + 0.25 * 160)
    assert kv_tokens_per_request(WORKLOAD) == pytest.approx(200 + while_there + 8)
    assert kv_tokens_per_request(WORKLOAD, block_size=32) == pytest.approx(200 + while_there + 16)
    np.testing.assert_allclose(build().kv_tokens_per_request, [200 + while_there + 8], rtol=1e-6)
    np.testing.assert_allclose(build(block_size=32).kv_tokens_per_request, [200 + while_there + 16], rtol=1e-6)


def test_the_rank_is_by_default_the_smallest_that_holds_the_adapters_served() -> None:
    np.testing.assert_array_equal(build([1, 2, 8], 1).max_lora_rank, [8, 32, 32])
    np.testing.assert_array_equal(build([1, 8], 1, max_lora_rank=[16, 64]).max_lora_rank, [16, 64])
    np.testing.assert_array_equal(build([1, 8], 1, max_lora_rank=None).max_lora_rank, [8, 32])


def test_settings_broadcast_over_the_configurations_and_default_to_vllm_s() -> None:
    scenarios = build(8, [1, 4], max_num_seqs=[64, 128], max_num_batched_tokens=4096)
    np.testing.assert_array_equal(scenarios.max_num_seqs, [64, 128])
    np.testing.assert_array_equal(scenarios.max_num_batched_tokens, [4096, 4096])
    budget = CALIBRATION.behaviour.batch_budget(CALIBRATION.gpu)
    defaults = build(8, [1, 4])
    np.testing.assert_array_equal(defaults.max_num_seqs, [budget.max_num_seqs] * 2)
    np.testing.assert_array_equal(defaults.max_num_batched_tokens, [budget.max_num_batched_tokens] * 2)


def test_a_watermark_is_a_share_of_all_blocks() -> None:
    calibration = make_calibration(vllm_version="0.33.0")
    scenarios = build_scenarios(WORKLOAD, calibration, 8, [1, 4], watermark=0.01)
    blocks = np.asarray(scenarios.kv_cache_tokens, int) // 16
    assert blocks[0] > blocks[1]
    np.testing.assert_array_equal(scenarios.watermark_blocks, blocks // 100)
    assert build(8, 4).watermark_blocks is None


def test_a_threshold_of_long_prompts_is_refused_where_prompts_share_a_prefix() -> None:
    sharing = replace(WORKLOAD, shared_prefix_tokens=64)
    assert build(8, 4, long_prefill_token_threshold=32).long_prefill_token_threshold.tolist() == [32.0]
    with pytest.raises(InputError, match="0 where prompts share a prefix; give requests"):
        build_scenarios(sharing, CALIBRATION, 8, 4, long_prefill_token_threshold=32)


def test_the_kv_cache_is_what_the_memory_plan_leaves() -> None:
    scenarios = build(64, [4, 64], max_num_seqs=256, max_num_batched_tokens=2048, gpu_memory_utilization=0.8)
    plan = plan_memory(
        LLAMA_8B,
        CALIBRATION.gpu,
        MEMORY,
        behaviour=CALIBRATION.behaviour,
        max_loras=np.array([4, 64]),
        max_lora_rank=32,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.8,
        max_model_len=LLAMA_8B.max_position_embeddings,
    )
    np.testing.assert_array_equal(scenarios.kv_cache_tokens, plan.kv_cache_tokens)
    np.testing.assert_array_equal(scenarios.status, plan.status)
    assert scenarios.kv_cache_tokens[0] > scenarios.kv_cache_tokens[1]


def test_what_does_not_start_or_was_never_measured_is_marked() -> None:
    scenarios = build([8, 400, 400], [4, 4, 400], max_lora_rank=64)
    assert [Status(int(code)) for code in scenarios.status[:2]] == [Status.OK, Status.OUTSIDE_CALIBRATION]
    assert not Status(int(scenarios.status[2])).started


def test_plain_numbers_are_laid_out_as_given() -> None:
    scenarios = pack_scenarios(
        CALIBRATION, **PLAIN | {"mean_input_tokens": [200.0, 300.0], "max_pending": [10.0, np.inf]}
    )
    np.testing.assert_array_equal(scenarios.class_count, [[4, 2], [4, 2]])
    np.testing.assert_allclose(scenarios.mean_input_tokens, [200, 300])
    np.testing.assert_array_equal(scenarios.max_pending, [10, np.inf])
    np.testing.assert_array_equal(scenarios.max_lora_rank, [16, 16])


@pytest.mark.parametrize(
    ("adapters", "max_loras", "settings", "words"),
    [
        (8, 0, {}, "max_loras: 0 is not allowed; allowed: >= 1 for a server of 8 adapters; without LoRA only the base"),
        (8, -1, {}, "max_loras: -1 is not allowed"),
        (8, 2.5, {}, "max_loras: 2.5 is not allowed; allowed: a whole number >= 0"),
        (-1, 1, {}, "-1 is not allowed; allowed: "),
        ([16, 8], 4, {"max_cpu_loras": [4, 3]}, "max_cpu_loras: 3 is not allowed; allowed: .* >= max_loras 4"),
        (8, 4, {"max_cpu_loras": 4.5}, "max_cpu_loras: 4.5 is not allowed"),
        (8, 4, {"max_lora_rank": 8}, "max_lora_rank: 8 is not allowed; allowed: >= 32, .*; use at least 32"),
        (8, 4, {"max_lora_rank": 48}, "max_lora_rank: 48 is not allowed; allowed: one of "),
        (8, 4, {"max_num_seqs": 0}, "max_num_seqs: 0 is not allowed"),
        (8, 4, {"max_num_seqs": 1.5}, "max_num_seqs: 1.5 is not allowed; allowed: a whole number"),
        (8, 4, {"max_num_batched_tokens": 100, "max_num_seqs": 128}, "max_num_batched_tokens: 100 is not allowed"),
        (8, 4, {"gpu_memory_utilization": 1.2}, "gpu_memory_utilization: 1.2 is not allowed"),
        (8, 4, {"max_model_len": 300}, "max_model_len: 300 is not allowed; allowed: >= 460, "),
        (8, 4, {"max_model_len": 10**6}, "max_model_len: 1000000 is not allowed; allowed: at most the 131072 tokens"),
        (8, 4, {"max_num_sequences": 3}, "max_num_sequences: .* did you mean 'max_num_seqs'"),
    ],
)
def test_what_no_server_takes_is_refused(adapters: Any, max_loras: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        build(adapters, max_loras, **settings)
    assert str(caught.value).isprintable()


def test_a_server_without_lora_has_the_base_model_s_traffic_and_the_slots_memory() -> None:
    """Slots that no adapter takes are reserved all the same, those beyond the adapters too."""
    scenarios = build([0, 0, 8, 8], [0, 4, 4, 12], max_lora_rank=32)
    np.testing.assert_array_equal(scenarios.class_count.sum(axis=1), [0, 0, 8, 8])
    np.testing.assert_allclose(scenarios.requests_per_s, [0.5, 0.5, 2.5, 2.5])
    bare, idle, used, more = np.asarray(scenarios.kv_cache_tokens)
    assert bare > idle == used > more
    # Ranges of adapters, slots and ranks say nothing of a server without any.
    assert [Status(int(code)) for code in scenarios.status] == [
        Status.OK,
        Status.OUTSIDE_CALIBRATION,
        Status.OK,
        Status.OK,
    ]
    server = CALIBRATION.server(max_loras=0)
    assert extrapolations(WORKLOAD, CALIBRATION, server, 0) == []


def test_a_gpu_too_small_for_the_model_does_not_start() -> None:
    small = make_calibration(gpu=type(CALIBRATION.gpu)("small", 14 * BYTES_PER_GIB))
    scenarios = build_scenarios(WORKLOAD, small, 8, 4)
    assert not Status(int(scenarios.status[0])).started
