import math
import socket
import time
from collections.abc import Callable

import numpy as np
import pytest
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.metrics import Histogram, Sampler, Snapshot, parse_prometheus
from lora_capacity_profiling.server import Server

from lora_capacity.errors import InputError
from tests.unit.profiling.test_server import wait_until

OF_0_8_5 = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 7.0
vllm:num_requests_waiting{model_name="m"} 3.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.125
vllm:num_preemptions_total{model_name="m"} 4.0
vllm:num_preemptions_created{model_name="m"} 1.7e+09
vllm:prompt_tokens_total{model_name="m"} 1000.0
vllm:generation_tokens_total{model_name="m"} 2.5e+03
vllm:request_success_total{finished_reason="stop",model_name="m"} 2.0
vllm:request_success_total{finished_reason="length",model_name="m"} 5.0
vllm:request_success_total{finished_reason="abort",model_name="m"} 11.0
vllm:time_to_first_token_seconds_bucket{le="0.001",model_name="m"} 0.0
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 6.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 8.0
vllm:time_to_first_token_seconds_count{model_name="m"} 8.0
vllm:time_to_first_token_seconds_sum{model_name="m"} 1.6
vllm:time_per_output_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
vllm:time_per_output_token_seconds_count{model_name="m"} 10.0
vllm:time_per_output_token_seconds_sum{model_name="m"} 0.2
vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0
"""

OF_0_32_WITH_TWO_ENGINES = """
vllm:num_requests_running{engine="0",model_name="m"} 7.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 90.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="m"} 1.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="+Inf",model_name="m"} 1.0
vllm:inter_token_latency_seconds_bucket{engine="1",le="0.01",model_name="m"} 2.0
vllm:inter_token_latency_seconds_bucket{engine="1",le="+Inf",model_name="m"} 3.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 1.0
vllm:inter_token_latency_seconds_count{engine="1",model_name="m"} 3.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 0.01
vllm:inter_token_latency_seconds_sum{engine="1",model_name="m"} 0.07
vllm:lora_requests_info{max_lora="2",running_lora_adapters="a,b",waiting_lora_adapters=""} 1.79e+09
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",num_gpu_blocks="4096"} 1.0
vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="1",num_gpu_blocks="4000"} 1.0
"""


def test_metrics_of_0_8_5() -> None:
    snapshot = Snapshot.from_text(OF_0_8_5)
    assert (snapshot.running, snapshot.waiting, snapshot.kv_usage, snapshot.preemptions) == (7, 3, 0.125, 4)
    assert (snapshot.prompt_tokens, snapshot.generation_tokens, snapshot.completed) == (1000, 2500, 7)
    assert (snapshot.ttft.mean_s, snapshot.itl.mean_s) == pytest.approx((0.2, 0.02))
    assert math.isnan(snapshot.kv_cache_tokens)
    assert math.isnan(snapshot.e2e.mean_s)


def test_metrics_of_0_32_are_taken_over_engines() -> None:
    snapshot = Snapshot.from_text(OF_0_32_WITH_TWO_ENGINES)
    assert (snapshot.running, snapshot.waiting, snapshot.kv_usage) == (9, 1, 0.375)
    assert snapshot.kv_cache_tokens == 8096 * 128
    assert snapshot.itl.mean_s == pytest.approx(0.02)
    assert snapshot.itl.counts.tolist() == [3, 4]
    assert math.isnan(snapshot.preemptions)


def test_text_without_metrics_of_vllm_is_refused() -> None:
    with pytest.raises(ServerError, match="no metric of vLLM"):
        Snapshot.from_text("go_goroutines 12\n")


def test_labels_may_hold_anything() -> None:
    text = r'x{a="one \"two\" }{ \\ \n,b=\"c\"",d=""} 3 1700000000' + "\nx 4\nx{e=broken} y\nx{\nxy 5\n"
    assert parse_prometheus(text, ["x"]) == {"x": [({"a": 'one "two" }{ \\ \n,b="c"', "d": ""}, 3.0), ({}, 4.0)]}


def histogram(*counts: float) -> Histogram:
    return Histogram(np.array([1.0, 2.0, 4.0, np.inf]), np.array(counts), 30.0, counts[-1])


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.6, 2.4), (0.75, 3.0), (1.0, 4.0)]
)
def test_quantiles_lie_evenly_within_a_bucket(share: float, expected: float) -> None:
    assert histogram(10, 10, 20, 20).quantile_s(share) == pytest.approx(expected)


def test_beyond_the_last_bound_it_is_the_answer() -> None:
    assert histogram(10, 10, 18, 20).quantile_s(0.95) == 4.0


def test_quantiles_of_nothing_are_unknown() -> None:
    assert math.isnan(histogram(0, 0, 0, 0).quantile_s(0.5))
    assert math.isnan(Snapshot.from_text(OF_0_32_WITH_TWO_ENGINES).ttft.quantile_s(0.5))


def test_times_between_two_readings() -> None:
    later = Histogram(np.array([1.0, 2.0, 4.0, np.inf]), np.array([10.0, 12, 20, 21]), 36.0, 21.0)
    added = later.since(histogram(10, 10, 18, 18))
    assert added.counts.tolist() == [0, 2, 2, 3]
    assert (added.mean_s, added.count) == (2.0, 3)


def test_sampler_takes_first_and_last_and_some_between(launch: Callable[..., Server]) -> None:
    server = launch()
    began_s = time.monotonic()
    with Sampler(server.endpoint, interval_s=0.1) as sampler:
        assert wait_until(lambda: sampler.window.at_s.size >= 5)
    window = sampler.window
    assert window.at_s.size <= 2 + (time.monotonic() - began_s) / 0.1
    assert window.missed == 0
    assert np.all(np.diff(window.at_s) > 0)
    assert window.first.kv_cache_tokens == 1600
    summary = window.summary()
    assert math.isnan(summary.pop("cached_share"))  # nothing was looked up
    assert summary == {
        "mean_running": 0,
        "mean_waiting": 0,
        "mean_skipped": 0,
        "mean_running_2nd_half": 0,
        "mean_waiting_2nd_half": 0,
        "max_running": 0,
        "max_waiting": 0,
        "mean_kv_usage": 0.25,
        "max_kv_usage": 0.25,
        "preemptions": 0,
    }


def test_sampler_passes_over_what_fails(launch: Callable[..., Server]) -> None:
    server = launch()
    with Sampler(server.endpoint, interval_s=0.05) as sampler:
        server.stop()
        assert wait_until(lambda: sampler.window.missed >= 2)
    assert sampler.window.at_s.size >= 1


def test_sampler_of_a_silent_server_ends_and_has_no_window() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sampler = Sampler(Endpoint("127.0.0.1", listener.getsockname()[1]), interval_s=60, timeout_s=0.2)
        with sampler:
            pass
    with pytest.raises(ServerError, match="answered none of 2 samples"):
        _ = sampler.window


def test_interval_must_be_positive() -> None:
    with pytest.raises(InputError, match="interval_s: 0 is not allowed"):
        Sampler(Endpoint("127.0.0.1", 1), interval_s=0)
