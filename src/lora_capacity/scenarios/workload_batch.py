"""Many workloads, each on a server of its own, as columns; with adapters and slots chosen they become `Scenarios`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.engines import ServerConfig, smallest_max_lora_rank
from lora_capacity.engines.vllm.config import SCHEDULING
from lora_capacity.errors import InputError
from lora_capacity.scenarios.scenarios import Scenarios, check_lengths, kv_tokens_per_request
from lora_capacity.status import Status
from lora_capacity.workload import Workload
from lora_capacity.workload.adapters import AdapterMix, Adapters

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MOST_CLASSES = 16
"""Adapters of more different rates are merged into as many classes: the error is of second order in their spread."""

_MOST_SLOTS = 2048
"""Slots beyond which the search for the most that start does not look; far above what any GPU has room for."""

_NOT_TOLD = (
    *("block_size", "status", "bounds", "arrival_cv", "input_cv"),
    *("class_shared_tokens", "base_shared_tokens", "cached_share", "max_cpu_loras", "loaded_at_start"),
    *("long_prefill_token_threshold", "max_num_active_seqs", "watermark_blocks"),
)
"""Fields of `Scenarios` that are no column here: told apart, or as by default, Poisson arrivals included."""

_FIXED = ("max_lora_rank", "max_model_len", "block_size", "target_modules", *SCHEDULING)
"""Settings that no column tells: surrogates know them at their defaults only."""


@dataclass(frozen=True, eq=False)
class WorkloadBatch:
    """Workloads on servers, adapters and slots left open; arrays ``[workloads]`` unless said otherwise.

    Rates and ranks are assigned round-robin to the adapters, as `AdapterMix` does; a list of adapters is one round.

    Attributes:
        rates_per_s: Requests per second of the adapters of a round, > 0, ``[workloads, round]``.
        ranks: Their ranks, ``[workloads, round]``.
        most_adapters: Adapters that there are; infinite for a mix.
        base_rate_per_s: Requests per second without an adapter.
        mean_input_tokens: Mean prompt length.
        mean_output_tokens: Mean output length.
        output_spread: Standard deviation of the output length over its mean.
        kv_tokens_per_request: Mean tokens that a running request holds in the KV cache.
        gpu_memory_bytes: Memory of the GPU.
        gpu_memory_utilization: Share of it that the server plans with.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_pending: Most in-flight requests of all clients; infinite if unbounded.
        horizon_s: Time observed, from an empty server.
    """

    rates_per_s: FloatArray
    ranks: FloatArray
    most_adapters: FloatArray
    base_rate_per_s: FloatArray
    mean_input_tokens: FloatArray
    mean_output_tokens: FloatArray
    output_spread: FloatArray
    kv_tokens_per_request: FloatArray
    gpu_memory_bytes: FloatArray
    gpu_memory_utilization: FloatArray
    max_num_seqs: FloatArray
    max_num_batched_tokens: FloatArray
    max_pending: FloatArray
    horizon_s: FloatArray

    @classmethod
    def of(cls, workload: Workload, calibration: Calibration, **settings: Any) -> Self:
        """Return one workload on one server.

        Args:
            workload: Adapters and traffic.
            calibration: Whose GPU and vLLM's defaults hold.
            **settings: Other server settings by vLLM's names; those that no column tells only at their defaults.

        Raises:
            InputError: If a setting is not allowed, or requests are longer than the model takes.
        """
        rates, ranks = workload.adapters.deal(_round_length(workload.adapters))
        check_lengths(workload, calibration)
        for name, given in (("shared_prefix_tokens", workload.shares_prefix), ("cached_share", workload.cached_share)):
            if given:
                remedy = "use `optimize` or `simulate`, which take others"
                raise InputError(
                    f"requests.{name}", getattr(workload, name), "0, which surrogates are made for", remedy
                )
        if workload.over_time is not None:
            allowed = "constant rates, which surrogates are made for"
            raise InputError("arrivals.profile", "traffic over time", allowed, "use `optimize` or `simulate`")
        server = calibration.server(**settings)
        _check_fixed(server, int(ranks.max()), settings)
        mean = workload.mean_output_tokens
        variance = max(workload.second_moment_output_tokens - mean**2, 0.0)
        numbers: dict[str, float] = {
            "most_adapters": np.inf if workload.adapters.max_count is None else workload.adapters.max_count,
            "base_rate_per_s": workload.base_rate_per_s,
            "mean_input_tokens": workload.mean_input_tokens,
            "mean_output_tokens": mean,
            "output_spread": np.sqrt(variance) / mean,
            "kv_tokens_per_request": kv_tokens_per_request(workload),
            "gpu_memory_bytes": calibration.gpu.memory_bytes,
            "gpu_memory_utilization": server.gpu_memory_utilization,
            "max_num_seqs": server.max_num_seqs,
            "max_num_batched_tokens": server.max_num_batched_tokens,
            "max_pending": np.inf if workload.max_pending is None else workload.max_pending,
            "horizon_s": workload.horizon_s,
        }
        columns = {name: np.array([value], np.float64) for name, value in numbers.items()}
        return cls(rates_per_s=rates[np.newaxis], ranks=ranks[np.newaxis].astype(np.float64), **columns)

    def __len__(self) -> int:
        return int(self.horizon_s.size)

    @property
    def tokens_per_request(self) -> FloatArray:
        """Mean tokens of a request, prompt and output, ``[workloads]``."""
        return self.mean_input_tokens + self.mean_output_tokens

    def take(self, rows: IntArray | list[int] | slice) -> Self:
        """Return the workloads of some rows, which may repeat."""
        return replace(self, **{entry.name: getattr(self, entry.name)[rows] for entry in fields(self)})

    def offered_per_s(self, adapters: ArrayLike) -> FloatArray:
        """Return the requests per second that the first A adapters and the base model send.

        Args:
            adapters: A, ``[workloads, …]``.

        Returns:
            In the shape of ``adapters``.
        """
        count = np.asarray(adapters, np.int64)
        size = self.rates_per_s.shape[1]
        sums = np.concatenate([np.zeros((len(self), 1)), np.cumsum(self.rates_per_s, axis=1)], axis=1)
        part = np.take_along_axis(sums, (count % size).reshape(len(self), -1), axis=1).reshape(count.shape)
        total, base = (column_like(values, count) for values in (sums[:, -1], self.base_rate_per_s))
        return np.asarray(count // size * total + part + base)

    def adapters_at(self, load_per_s: ArrayLike) -> IntArray:
        """Return the most adapters that send, with the base model, no more requests per second than ``load_per_s``.

        Args:
            load_per_s: ``[workloads, …]``.

        Returns:
            In the shape of ``load_per_s``; 0 where not even one does.
        """
        load = np.asarray(load_per_s, np.float64)
        size = self.rates_per_s.shape[1]
        sums = np.cumsum(self.rates_per_s, axis=1)
        left = np.maximum(load - column_like(self.base_rate_per_s, load), 0.0)
        whole = np.floor(left / column_like(sums[:, -1], load) * (1.0 + 1e-12))
        # What is left of a large load carries the rounding of all of it.
        rest = left - whole * column_like(sums[:, -1], load) + 1e-12 * load
        kinds = sums[:, :-1].reshape(len(self), *[1] * (load.ndim - 1), size - 1)
        beyond = rest[..., np.newaxis] >= kinds
        count = whole * size + beyond.sum(axis=-1)
        return np.asarray(np.minimum(count, column_like(self.most_adapters, load)), np.int64)

    def max_lora_rank(self, adapters: ArrayLike, calibration: Calibration) -> FloatArray:
        """Return the smallest ``max_lora_rank`` that serves the first A adapters, in the shape ``[workloads, …]``."""
        count = np.asarray(adapters, np.int64)
        largest = np.maximum.accumulate(self.ranks, axis=1)
        place = np.minimum(np.maximum(count, 1), self.ranks.shape[1]) - 1
        needed = np.take_along_axis(largest, place.reshape(len(self), -1), axis=1).reshape(count.shape)
        allowed = np.array(calibration.behaviour.max_lora_ranks, np.float64)
        return np.asarray(allowed[np.minimum(np.searchsorted(allowed, needed), allowed.size - 1)])

    def scenarios(self, calibration: Calibration, adapters: NDArray[Any], max_loras: IntArray) -> Scenarios:
        """Return one configuration per workload.

        Args:
            calibration: Model, GPU and coefficients; the GPU's memory is each workload's own.
            adapters: A, ``[workloads]``: whole numbers, in round-robin order; or fractions, of equally many of each
                kind, so that what a server sustains can be told between two numbers of adapters.
            max_loras: S, from 1 to A, ``[workloads]``.

        Returns:
            Configurations with float32 NumPy leaves, ``[workloads]``.
        """
        rank = self.max_lora_rank(np.ceil(adapters), calibration)
        kv_cache_tokens, status = self.plan(calibration, max_loras, rank)
        rates, ranks, counts = self._classes(adapters)
        columns: dict[str, Any] = {
            "class_count": counts,
            "class_rate_per_s": rates,
            "class_rank": ranks,
            "max_loras": max_loras,
            "max_lora_rank": rank,
            "kv_cache_tokens": kv_cache_tokens,
        }
        shared = {entry.name for entry in fields(Scenarios)} - {*columns, *_NOT_TOLD}
        columns |= {name: getattr(self, name) for name in shared}
        leaves: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in columns.items()}
        whole: dict[str, Any] = {
            "block_size": np.full(len(self), calibration.behaviour.block_size, np.int32),
            "status": status.astype(np.int32),
        }
        return Scenarios(**leaves, **whole)

    def plan(self, calibration: Calibration, max_loras: IntArray, rank: FloatArray) -> tuple[FloatArray, IntArray]:
        """Return the KV cache in tokens and the `Status` of the start of each server, ``[workloads]`` each."""
        server, tokens, status = calibration.server(), np.zeros(len(self)), np.zeros(len(self), np.int64)
        for memory_bytes in np.unique(self.gpu_memory_bytes):
            rows = np.flatnonzero(self.gpu_memory_bytes == memory_bytes)
            plan = calibration.plan_memory(
                server,
                gpu_memory_bytes=memory_bytes,
                max_loras=max_loras[rows],
                max_lora_rank=rank[rows],
                max_num_seqs=self.max_num_seqs[rows],
                max_num_batched_tokens=self.max_num_batched_tokens[rows],
                gpu_memory_utilization=self.gpu_memory_utilization[rows],
            )
            tokens[rows], status[rows] = plan.kv_cache_tokens, plan.status
        return tokens, status

    def most_slots(self, calibration: Calibration) -> IntArray:
        """Return the most slots with which each server starts, 0 where none does, ``[workloads]``."""
        rank = self.max_lora_rank(np.full(len(self), self.ranks.shape[1]), calibration)
        low, high = np.zeros(len(self), np.int64), np.full(len(self), _MOST_SLOTS + 1)
        while np.any(high - low > 1):
            middle = (low + high) // 2
            _, status = self.plan(calibration, np.maximum(middle, 1), rank)
            starts = (status == Status.OK) & (middle > 0)
            low, high = np.where(starts, middle, low), np.where(starts, high, middle)
        return low

    def _classes(self, adapters: NDArray[Any]) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Rates, ranks and counts of classes, ``[workloads, classes]`` each."""
        size = self.rates_per_s.shape[1]
        if np.issubdtype(adapters.dtype, np.floating):
            counts = np.repeat(adapters[:, np.newaxis] / size, size, axis=1)
        else:
            counts = ((adapters[:, np.newaxis] + size - 1 - np.arange(size)) // size).astype(np.float64)
        if size <= _MOST_CLASSES:
            return self.rates_per_s, self.ranks, counts
        order = np.argsort(self.rates_per_s, axis=1, kind="stable")
        rates, ranks, counts = (
            np.take_along_axis(values, order, axis=1) for values in (self.rates_per_s, self.ranks, counts)
        )
        starts = np.linspace(0, size, _MOST_CLASSES, endpoint=False).astype(int)
        total = np.add.reduceat(counts, starts, axis=1)
        share = 1.0 / np.maximum(total, 1.0)
        mean_rate = np.where(total > 0, np.add.reduceat(counts * rates, starts, axis=1) * share, rates[:, starts])
        return mean_rate, np.add.reduceat(counts * ranks, starts, axis=1) * share, total


def _check_fixed(server: ServerConfig, largest_rank: int, given: Mapping[str, Any]) -> None:
    """Refuse a setting that would change the server and that no column tells."""
    rank = smallest_max_lora_rank(largest_rank, server.behaviour)
    plain = replace(server, **{name: server.defaults[name] for name in _FIXED} | {"max_lora_rank": rank})
    for name in _FIXED:
        if given.get(name) is not None and getattr(server, name) != getattr(plain, name):
            allowed = f"{getattr(plain, name)}, which surrogates are trained for"
            raise InputError(name, given[name], allowed, "use `optimize` or `simulate`, which take others")


def _round_length(adapters: Adapters) -> int:
    """Adapters after which rates and ranks repeat together, or all there are."""
    if isinstance(adapters, AdapterMix):
        return int(np.lcm(adapters.rates_per_s.size, adapters.ranks.size))
    return adapters.max_count or 1


def column_like(values: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """Return values ``[workloads]`` with as many axes as ``like`` has."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
