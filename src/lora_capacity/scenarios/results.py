"""What a simulation says of each configuration."""

import enum

from flax import struct
from jax import Array


class Limit(enum.IntEnum):
    """What holds a configuration back at the end of its horizon."""

    NONE = 0
    """Nothing: the server keeps up with the arrivals."""
    SLOTS = 1
    """More adapters want to run than there are slots."""
    KV_CACHE = 2
    """The KV cache is full."""
    TOKEN_BUDGET = 3
    """Every step carries ``max_num_batched_tokens``."""
    SEQUENCES = 4
    """``max_num_seqs`` requests are running."""

    @property
    def label(self) -> str:
        """Lower-case name as it stands in files and JSON."""
        return self.name.lower()


@struct.dataclass
class Results:
    """Predictions, each ``[configs]`` unless said otherwise; NaN where the server does not start.

    Attributes:
        throughput_tokens_per_s: Input plus output tokens of requests completed within the horizon, per second.
        offered_tokens_per_s: Tokens of arriving requests per second.
        completed_per_s: Requests completed per second.
        class_service: Share of the arrivals of each class that are completed, ``[configs, classes]``.
        mean_running: Requests in the batch, mean over time.
        mean_waiting: Requests waiting, mean over time.
        step_time_s: Mean time of an engine step.
        itl_s: Mean inter-token latency over the tokens of all requests.
        ttft_s: Mean time to first token of completed requests.
        active_adapters: Different adapters in the batch, mean over time.
        kv_usage: Share of the KV cache in use, mean over time.
        loads_per_s: Adapter loads into GPU slots per second.
        limit: `Limit` that binds at the end of the horizon, int32.
        status: `Status`, int32.
    """

    throughput_tokens_per_s: Array
    offered_tokens_per_s: Array
    completed_per_s: Array
    class_service: Array
    mean_running: Array
    mean_waiting: Array
    step_time_s: Array
    itl_s: Array
    ttft_s: Array
    active_adapters: Array
    kv_usage: Array
    loads_per_s: Array
    limit: Array
    status: Array

    @property
    def service(self) -> Array:
        """Throughput as a share of the offered load, ``[configs]``."""
        return self.throughput_tokens_per_s / self.offered_tokens_per_s

    def starved(self, threshold: float = 0.1) -> Array:
        """Whether throughput is at least ``threshold`` below the offered load, ``[configs]``; False if unknown."""
        return self.service <= 1.0 - threshold
