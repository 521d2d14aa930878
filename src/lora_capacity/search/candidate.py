"""Candidates: configurations with what the twins say of each, and what surrounds a recommended one."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

from lora_capacity.search.objective import Columns
from lora_capacity.words import percent, shown
from lora_capacity.workload import Workload

COMPARED = {
    "throughput_tokens_per_s": "throughput",
    "itl_s": "inter-token latency",
    "ttft_s": "time to first token",
    "attainment": "requests within bounds",
}
"""Figures in which the twins are compared, and their names."""


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
        service: Throughput as a share of the offered load.
        served: Share of arriving requests that are served by the end or in service.
        attainment: Share of arriving requests that keep the workload's bounds.
        goodput_per_s: Requests per second that do.
        itl_s: Mean inter-token latency.
        tpot_s: Mean over requests of their time per output token after the first.
        ttft_s: Mean time to first token.
        client_itl_s: Mean inter-token latency as clients see it, behind the server's front end, as the next two.
        client_tpot_s: Mean over requests of their time per output token after the first.
        client_ttft_s: Mean time to first token.
        mean_running: Requests in the batch.
        mean_waiting: Requests waiting.
        active_adapters: Different adapters in the batch.
        kv_usage: Share of the KV cache in use.
        loads_per_s: Adapter loads into GPU slots per second.
        limit: Bottleneck at the offered load (`Bottleneck` label; ``none`` while it keeps up).
        limit_beyond: Bottleneck at the load at which it fails; empty if it fails at no load tried.
        critical_load: Headroom: times the offered load at which it fails, which is to starve with the objective
            ``throughput``, else to fall behind or miss the bounds; the highest load tried if it does not fail there.
        starving_probability: Chance that it fails, given the calibration's error and the next.
        extrapolation_error: What lying beyond the ranges that the calibration was fitted over adds to the error of the
            capacity: a standard deviation of its logarithm; 0 within.
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
    service: float
    served: float
    attainment: float
    goodput_per_s: float
    itl_s: float
    tpot_s: float
    ttft_s: float
    client_itl_s: float
    client_tpot_s: float
    client_ttft_s: float
    mean_running: float
    mean_waiting: float
    active_adapters: float
    kv_usage: float
    loads_per_s: float
    limit: str
    limit_beyond: str
    critical_load: float
    starving_probability: float
    extrapolation_error: float
    status: str

    @classmethod
    def from_columns(cls, columns: Columns) -> list[Self]:
        """Return one candidate per row of the columns that `assess` returns."""
        names = [entry.name for entry in fields(cls)]
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        return [cls(**dict(zip(names, row, strict=True))) for row in rows]


@dataclass(frozen=True)
class Neighbour:
    """A configuration with one adapter or slot more or less.

    Attributes:
        change: ``one more adapter``, ``one more slot`` or ``one slot fewer``.
        candidate: The configuration.
        gain_tokens_per_s: Throughput that it brings over the recommended one; negative: costs; NaN: does not start.
        verdict: Label of `judge`.
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
class Played:
    """What the event twin says of the recommended configuration.

    Attributes:
        seeds: Seeds that it was played with, none of which the search has seen.
        mean: Means over them; ``critical_load`` and ``starving_probability`` with the chance of an hour, which
            is what they differ by.
        error: Standard deviation of the logarithm of the capacity, of the seeds and the calibration together.
        refused: How many configurations these seeds refused.
    """

    seeds: tuple[int, ...]
    mean: Candidate
    error: float
    refused: int

    def differences(self, steady: Candidate) -> dict[str, float]:
        """Return how far the steady twin's figures lie from these.

        Args:
            steady: The same configuration as the steady twin predicts it.

        Returns:
            Shares of these figures, by name; positive where the steady twin says more.
        """
        pairs = {name: (getattr(steady, name), getattr(self.mean, name)) for name in COMPARED}
        return {name: other / own - 1.0 if own else math.nan for name, (other, own) in pairs.items()}


@dataclass(frozen=True)
class OverTime:
    """What a plan for the peak of traffic over time leaves unused.

    Attributes:
        peak_start_s: Where the peak window begins.
        peak_end_s: Where it ends.
        peak_per_s: Requests per second of the adapters served and the base model in it.
        mean_per_s: The same over the horizon.
        unused: Share of the requests which the server could take over the horizon, each second as many as it keeps
            its bounds with, that do not come.
    """

    peak_start_s: float
    peak_end_s: float
    peak_per_s: float
    mean_per_s: float
    unused: float

    @classmethod
    def of(cls, workload: Workload, told: Candidate) -> Self:
        """Return what a plan leaves unused of a workload whose traffic changes over time."""
        windows: Any = workload.over_time
        rates = workload.rates_over_time(told.max_cpu_loras).sum(axis=1)
        mean, peak = float(rates @ windows.lengths_s / workload.horizon_s), float(rates[workload.peak])
        start_s, end_s = windows.edges_s[workload.peak : workload.peak + 2].tolist()
        return cls(start_s, end_s, peak, mean, 1.0 - mean / (peak * max(told.critical_load, 1.0)))

    @property
    def words(self) -> str:
        """What it says, in a sentence."""
        return (
            f"Planned for the peak, {self.peak_start_s:,.0f} to {self.peak_end_s:,.0f} s, with "
            f"{shown(self.peak_per_s)} requests/s ({shown(self.mean_per_s)} on average); {percent(self.unused)} of the "
            "server's capacity goes unused over the horizon."
        )
