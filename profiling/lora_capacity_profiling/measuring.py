"""Measuring one point of a campaign on a server that runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.units import MS_PER_S
from lora_capacity.workload import Workload
from lora_capacity.workload.requests import BASE_MODEL
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.folder import Finished
from lora_capacity_profiling.load import LoadResult, at_once
from lora_capacity_profiling.planning import ServerPlan
from lora_capacity_profiling.points import (
    CLOSED_LOOP_WAVES,
    AdapterBatch,
    Decode,
    Loading,
    Point,
    Prefill,
    ServingRun,
)
from lora_capacity_profiling.serving import Served, serve_workload, warm_up

_LONGEST_S = 1800.0
"""Of a closed loop: several times the slowest of the package's campaigns on an H100."""

_FEWEST_GAPS = 4
"""Gaps between tokens in which the whole batch ran; a mean of fewer is noise, and all gaps count instead."""

_BUNDLED = 0.05
"""Share of tokens that came together with others, from which on a median gap means nothing: it would be too long."""

_OUTLIER_SPREAD = 0.1
"""Repeats further apart are repeated: an undisturbed server's are within a few per cent of each other."""

_MOST_EXTRA_REPEATS = 2
"""A machine that is disturbed more often than that does not get quiet by trying on."""

_LEAST_LOAD_MS = 1e-3
"""Where a load drowns in noise its difference of means is negative, which no table may hold."""

_WARM_UP_OUTPUT_TOKENS = 16
"""Steps of a full batch and of a batch of one: PyTorch's allocator and the caches of kernels have seen both."""

Row = dict[str, Any]


class _Disturbed(ServerError):
    """A repeat that tells nothing."""


@dataclass(frozen=True)
class Target:
    """A server that points are measured on.

    Attributes:
        served: The server; its name of the model is written into rows, too.
        plan: What it was started as.
        adapter_names: Its names of the adapters, by rank.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        max_model_len: Longest sequence in tokens, where it was told.
        kv_cache_tokens: Tokens that its KV cache holds; NaN where it does not tell.
        gpu: Name of the GPU.
        repeats: How often a latency is measured.
    """

    served: Served
    plan: ServerPlan
    adapter_names: Mapping[int, Sequence[str]]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    kv_cache_tokens: float
    gpu: str
    repeats: int

    def adapters(self, rank: int, count: int) -> list[str]:
        """Return the names of the first adapters of a rank.

        Raises:
            ServerError: If there are not so many.
        """
        names = self.adapter_names.get(rank, ())
        if len(names) < count:
            raise ServerError(f"the server has {len(names)} adapters of rank {rank}, and {count} are needed")
        return list(names[:count])

    def closed_loop(
        self, names: Sequence[str], count: int, batch: int, input_tokens: int, output_tokens: int
    ) -> LoadResult:
        """Send equal requests, ``batch`` in flight, round-robin to adapters (or to the base model, without any).

        Raises:
            ServerError: If not all are answered.
        """
        adapter = np.arange(count) % len(names) if names else np.full(count, BASE_MODEL)
        ones = np.ones(count, dtype=np.int64)
        requests = at_once(adapter, ones * input_tokens, ones * output_tokens)
        result = replace(self.served, adapters=names).load(requests, _LONGEST_S, max_pending=batch, record_pieces=True)
        if not result.completed.all():
            why = next(iter(result.failures), f"no answer within {_LONGEST_S:g} s")
            raise ServerError(f"{int((~result.completed).sum())} of {count} requests were not answered: {why}")
        return result


def prepare(target: Target) -> None:
    """Have a server do all that it does only once: load adapters, and set up batches of every size.

    Raises:
        ServerError: If it does not answer.
    """
    warm_up(target.served)
    if any(isinstance(point, Decode | AdapterBatch | ServingRun) for point in target.plan.points):
        one = target.served.adapters[: max(target.plan.max_loras, 1)]
        for batch in (target.max_num_seqs, 1):
            target.closed_loop(one, batch, batch, 1, _WARM_UP_OUTPUT_TOKENS)


def measure(point: Point, target: Target) -> Finished:
    """Measure a point.

    Latencies are measured ``repeats`` times, and up to twice more where repeats are more than 10 % apart; the row is
    that of the median repeat.

    Args:
        point: The point; no `KvCapacity`, which the start of its server measures.
        target: The server that it belongs to.

    Raises:
        InputError: If so many connections cannot be opened.
        ServerError: If the server does not answer as it should.
    """
    if isinstance(point, ServingRun):
        return _serving(point, target)
    table, column, once = _LATENCIES[type(point)]
    rows = _repeated(target, column, lambda: once(point, target))
    # Of an even number the lower of the two in the middle: what disturbs a server only ever slows it down.
    middle = rows[(len(rows) - 1) // 2]
    return Finished(point.id, table, middle, tuple(round(row[column], 4) for row in rows))


def _repeated(target: Target, column: str, once: Callable[[], Row]) -> list[Row]:
    """Return the rows of all repeats, by what is compared."""
    rows: list[Row] = []
    wanted, tries_left = target.repeats, target.repeats + _MOST_EXTRA_REPEATS
    while len(rows) < wanted:
        tries_left -= 1
        try:
            rows.append(once())
        except _Disturbed:
            if tries_left < wanted - len(rows):
                raise
            continue
        values = [row[column] for row in rows]
        apart = max(values) > min(values) * (1.0 + _OUTLIER_SPREAD)
        if len(rows) == wanted > 1 and apart and tries_left > 0:
            wanted += 1
    return sorted(rows, key=lambda row: float(row[column]))


def _decode(point: Decode, target: Target) -> Row:
    result = target.closed_loop([], point.batch_size, point.batch_size, 1, point.output_tokens)
    return {
        **_backbone(point.batch_size, 1, result, target),
        **_gaps(result, point.batch_size),
        "output_tokens": point.output_tokens,
        "mean_running": point.batch_size,
        "max_running": point.batch_size,
        "mean_tpot_ms": MS_PER_S * float(result.tpot_s.mean()),
    }


def _prefill(point: Prefill, target: Target) -> Row:
    result = target.closed_loop([], point.num_prompts, point.batch_size, point.input_tokens, 1)
    return {**_backbone(point.batch_size, point.input_tokens, result, target), "output_tokens": 1}


def _backbone(batch: int, input_tokens: int, result: LoadResult, target: Target) -> Row:
    return {
        "model": target.served.base_model,
        "batch_size": batch,
        "input_tokens": input_tokens,
        "mean_ttft_ms": MS_PER_S * float(result.ttft_s.mean()),
        "duration": result.duration_s,
        "num_prompts": len(result.requests),
        "kv_cache_tokens": _known(target.kv_cache_tokens),
    }


def _adapter_batch(point: AdapterBatch, target: Target) -> Row:
    names = target.adapters(point.max_lora_rank, point.served_adapters)
    result = target.closed_loop(names, point.batch_size, point.batch_size, 1, point.output_tokens)
    return {
        "model": target.served.base_model,
        "max_num_seqs": target.max_num_seqs,
        "max_loras": point.max_loras,
        "served_adapters": point.served_adapters,
        "max_lora_rank": point.max_lora_rank,
        "adapter_rank": point.max_lora_rank,
        "input_tokens": 1,
        "output_tokens": point.output_tokens,
        "mean_running": point.batch_size,
        "mean_unique_adapters": point.served_adapters,
        **_gaps(result, point.batch_size),
    }


def _gaps(result: LoadResult, batch: int) -> Row:
    """Return the time between tokens while the whole batch ran, from its last first token to its first last one."""
    begin_s, end_s = float(result.first_token_s.max()), float(result.last_token_s.min())
    whole = [times[(times >= begin_s) & (times <= end_s)] for times in result.piece_s]
    if min(times.size for times in whole) <= _FEWEST_GAPS:
        whole = list(result.piece_s)
    gaps_s = np.concatenate([np.diff(times) for times in whole])
    pieces = sum(times.size for times in result.piece_s)
    tokens_per_piece = float(result.requests.output_tokens.sum()) / max(pieces, 1)
    if not gaps_s.size or gaps_s.sum() <= 0:
        raise _Disturbed("all tokens of an output came at once: is the stream interval 1, and is a core free?")
    mean_s = float(gaps_s.mean()) / tokens_per_piece
    together = float(np.mean(gaps_s < 0.1 * mean_s)) + tokens_per_piece - 1.0
    median_s = float(np.median(gaps_s)) if together < _BUNDLED else mean_s
    return {
        "mean_itl_ms": MS_PER_S * mean_s,
        "median_itl_ms": MS_PER_S * median_s,
        "output_throughput": batch / mean_s,
    }


def _loading(point: Loading, target: Target) -> Row:
    """Return what switching adapters adds to the time to first token, from host memory and from disk.

    The server has one slot, and caches are LRU. Asking the same adapter again loads nothing; asking round-robin as many
    as host memory holds loads each from there; asking round-robin twice as many reads each from disk.
    """
    names = target.adapters(point.adapter_rank, point.adapters)
    held = names[: target.plan.max_cpu_loras]
    same_s = _first_token_s(target, names[:1], point.adapters * point.rounds)
    host_s = _first_token_s(target, held, len(held) * point.rounds)
    disk_s = _first_token_s(target, names, len(names) * point.rounds)
    return {
        "model": target.served.base_model,
        "max_lora_rank": point.max_lora_rank,
        "adapter_rank": point.adapter_rank,
        "max_loras": 1,
        "max_cpu_loras": target.plan.max_cpu_loras,
        "disk_loads": len(names) * point.rounds,
        "mean_disk_load_ms": max(MS_PER_S * (disk_s - host_s), _LEAST_LOAD_MS),
        "memory_loads": len(held) * point.rounds,
        "mean_memory_load_ms": max(MS_PER_S * (host_s - same_s), _LEAST_LOAD_MS),
    }


def _first_token_s(target: Target, names: Sequence[str], count: int) -> float:
    """Return the mean time to first token of the middle half of requests that follow each other, seconds."""
    target.closed_loop(names, len(names), 1, 1, 1)  # brings those in that are held
    times_s: NDArray[np.float64] = np.sort(target.closed_loop(names, count, 1, 1, 1).ttft_s)
    quarter = times_s.size // 4
    return float(times_s[quarter : times_s.size - quarter].mean())


_LATENCIES: Mapping[type[Point], tuple[str, str, Callable[[Any, Target], Row]]] = {
    Decode: ("backbone_latency", "mean_itl_ms", _decode),
    Prefill: ("backbone_latency", "mean_ttft_ms", _prefill),
    AdapterBatch: ("adapter_latency", "mean_itl_ms", _adapter_batch),
    Loading: ("adapter_loading", "mean_disk_load_ms", _loading),
}
"""Of points measured several times: the table of their rows, the column that is compared, and what measures once."""


def _serving(point: ServingRun, target: Target) -> Finished:
    ranks = point.adapter_ranks
    of_rank = {rank: iter(target.adapters(rank, ranks.count(rank))) for rank in set(ranks)}
    names = [next(of_rank[rank]) for rank in ranks]
    shares = np.array([point.rate_shares[i % len(point.rate_shares)] for i in range(len(ranks))])
    capacity_per_s = _capacity_per_s(point, target, names, shares)
    scale = point.load * capacity_per_s / shares.sum()
    rates_per_s = [float(f"{share * scale:.4g}") for share in point.rate_shares]
    workload = _workload(point, rates_per_s)
    serving = serve_workload(replace(target.served, adapters=names), workload)
    if serving.result.failures:
        raise ServerError(f"requests failed: {next(iter(serving.result.failures))}")
    about = {
        "run_id": f"slots{point.max_loras}-rank{point.max_lora_rank}/adapters{len(names)}-load{point.load:g}",
        "set": "profile",
        "scenario": f"rank{point.max_lora_rank}-load{point.load:g}",
        "model": target.served.base_model,
        "max_loras": point.max_loras,
        "max_lora_rank": point.max_lora_rank,
        "max_num_seqs": target.max_num_seqs,
        "max_num_batched_tokens": target.max_num_batched_tokens,
        "max_model_len": "" if target.max_model_len is None else target.max_model_len,
        "gpu": target.gpu,
    }
    row = serving.row(about)
    throughput = float(str(row["input_throughput"])) + float(str(row["output_throughput"]))
    return Finished(point.id, "serving_runs", row, (round(throughput, 3),), "tokens_per_s")


def _workload(point: ServingRun, rates_per_s: list[float]) -> Workload:
    return Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": rates_per_s, "ranks": list(point.ranks)}},
            "requests": {"input_tokens": _lengths(point.input_tokens), "output_tokens": _lengths(point.output_tokens)},
            "horizon_s": point.horizon_s,
        }
    )


def _lengths(given: tuple[tuple[str, float], ...]) -> dict[str, float]:
    return {name: int(value) if name in ("min", "max") else value for name, value in given}


def _capacity_per_s(point: ServingRun, target: Target, names: list[str], shares: NDArray[np.float64]) -> float:
    """Return the capacity for such requests: completed per second in a closed loop of ``max_num_seqs``."""
    count = CLOSED_LOOP_WAVES * target.max_num_seqs
    workload = _workload(point, [1.0])
    random = np.random.default_rng(0)
    requests = at_once(
        random.choice(len(names), count, p=shares / shares.sum()),
        workload.input_tokens.sample(random, count),
        workload.output_tokens.sample(random, count),
    )
    result = replace(target.served, adapters=names).load(requests, _LONGEST_S, max_pending=target.max_num_seqs)
    if not result.completed.all():
        raise ServerError(f"requests failed: {next(iter(result.failures), 'not answered in time')}")
    # The middle half: at the beginning the batch fills, at the end it empties.
    ends_s = np.sort(result.last_token_s)
    first, last = count // 4, 3 * count // 4
    return float((last - first) / (ends_s[last] - ends_s[first]))


def _known(value: float) -> object:
    return "" if math.isnan(value) else value
