"""What the optimizer answers: the configuration to run, how safe it is, what is next to it and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_capacity.optimize.choice import Objective
from lora_capacity.server import ServerConfig


@dataclass(frozen=True)
class Candidate:
    """One configuration and what is predicted of it; numbers are NaN where the server does not start.

    Attributes:
        max_cpu_loras: Adapters served, A.
        max_loras: Slots, S.
        max_lora_rank: Rank that the slots are reserved for.
        max_num_seqs: Most running requests.
        max_num_batched_tokens: Most tokens in a step.
        kv_cache_tokens: Tokens that the KV cache holds.
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        offered_tokens_per_s: Arriving tokens per second.
        itl_s: Mean inter-token latency.
        ttft_s: Mean time to first token.
        mean_running: Requests in the batch.
        mean_waiting: Requests waiting.
        active_adapters: Different adapters in the batch.
        kv_usage: Share of the KV cache in use.
        loads_per_s: Adapter loads into GPU slots per second.
        limit: What holds it back at the offered load (`Limit` label; ``none`` while it keeps up).
        limit_beyond: What holds it back at the load at which it starves.
        critical_load: Times the offered load at which it starves, within the factors tried.
        starving_probability: Chance that it starves, given the calibration's error.
        status: `Status` label.
    """

    max_cpu_loras: int
    max_loras: int
    max_lora_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    throughput_tokens_per_s: float
    offered_tokens_per_s: float
    itl_s: float
    ttft_s: float
    mean_running: float
    mean_waiting: float
    active_adapters: float
    kv_usage: float
    loads_per_s: float
    limit: str
    limit_beyond: str
    critical_load: float
    starving_probability: float
    status: str


@dataclass(frozen=True)
class Neighbour:
    """The best configuration with one adapter or slot more or less.

    Attributes:
        change: ``one more adapter``, ``one more slot``, ``one slot fewer``.
        candidate: The configuration.
        gain_tokens_per_s: Throughput that it brings over the recommended one; negative: costs; NaN: does not start.
        verdict: ``acceptable``, ``risky``, ``starved``, ``too_slow`` (beyond a latency bound), ``no_kv_cache`` or ``oom``.
    """

    change: str
    candidate: Candidate
    gain_tokens_per_s: float
    verdict: str


@dataclass(frozen=True)
class MemoryMargin:
    """How far the recommended server is from not starting.

    Attributes:
        kv_cache_tokens: Tokens that the KV cache holds.
        spare_kv_cache_tokens: Tokens beyond one request of ``max_model_len``, below which vLLM refuses to start.
        spare_bytes: GPU memory free at the tightest moment of the start.
    """

    kv_cache_tokens: int
    spare_kv_cache_tokens: int
    spare_bytes: float


@dataclass(frozen=True)
class Recommendation:
    """The configuration to run.

    Attributes:
        calibration: Name of the calibration.
        model: Name of the model.
        objective: What was looked for.
        threshold: Share below the offered load that counts as starved.
        risk: Highest acceptable probability of starving.
        best: The recommended configuration.
        server: Its settings under vLLM's names; ``server.serve_command(model)`` is the command line.
        memory: How far it is from not starting.
        neighbours: One adapter or slot more or less.
        runners_up: The best of other slot counts, best first, at most five.
        counts: Configurations looked at, by verdict (`Neighbour.verdict`).
        warnings: What the user should know, one sentence each.
    """

    calibration: str
    model: str
    objective: Objective
    threshold: float
    risk: float
    best: Candidate
    server: ServerConfig
    memory: MemoryMargin
    neighbours: tuple[Neighbour, ...]
    runners_up: tuple[Candidate, ...]
    counts: Mapping[str, int]
    warnings: tuple[str, ...]

    @property
    def explanation(self) -> tuple[str, ...]:
        """Why this configuration, in sentences."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the recommendation as a JSON object; NaN and infinity become null."""
        raise NotImplementedError
