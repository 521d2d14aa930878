"""Names of what a vLLM server tells of itself at /metrics.

Where versions call a metric differently, the newer name stands first. Source: vLLM 0.8.5 and 0.32.0,
v1/metrics/loggers.py; of the V0 engine, 0.8.5, engine/metrics.py.
"""

from collections.abc import Mapping

TOTALS: Mapping[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "preemptions": ("vllm:num_preemptions_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "generation_tokens": ("vllm:generation_tokens_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    "external_prefix_hits": ("vllm:external_prefix_cache_hits_total",),
}
"""Gauges and counters, which add up over engines: requests in the batch and not in it, and sums since the start. Prefix
hits and queries are counted in tokens, in 0.8.5 in blocks."""

WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason"
"""Those not in the batch, by the label ``reason``; 0.20.0 and later."""

SKIPPED = "deferred"
"""The reason of requests that the scheduler skips, as for want of an adapter slot."""

ONLY_V0 = ("vllm:num_requests_swapped", "vllm:cpu_cache_usage_perc")
"""Metrics that only the V0 engine has, whose scheduler is another one."""

KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""Share of the KV cache in use, 0 to 1, despite the name."""

HISTOGRAMS: Mapping[str, tuple[str, ...]] = {
    "ttft": ("vllm:time_to_first_token_seconds",),
    "itl": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "e2e": ("vllm:e2e_request_latency_seconds",),
    "queued": ("vllm:request_queue_time_seconds",),
    "served": ("vllm:request_inference_time_seconds",),
    "input_tokens": ("vllm:request_prompt_tokens",),
    "output_tokens": ("vllm:request_generation_tokens",),
}
"""Histograms, of which the parts are ``_bucket``, ``_sum`` and ``_count``; of tokens once a request ends."""

FINISHED = "vllm:request_success_total"
"""Requests that ended, by the label ``finished_reason``."""

BROKEN_OFF = ("abort", "error")
"""Reasons for which a request ends without all of its output; with others (``stop``, ``length``, ``repetition``) it has
it. Source: ``FinishReason`` in vLLM 0.32.0, v1/engine/__init__.py."""

CACHE_CONFIG = "vllm:cache_config_info"
"""Blocks of the KV cache and their size, as labels ``num_gpu_blocks`` and ``block_size``."""

LORA_REQUESTS = "vllm:lora_requests_info"
"""When a combination of adapters was last seen, by the labels ``running_lora_adapters`` and ``waiting_lora_adapters``,
and the slots, as label ``max_lora``: 0 where the V0 engine has LoRA off."""
