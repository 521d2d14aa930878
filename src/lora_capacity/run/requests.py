"""Requests for the event twin: drawn or given, packed into tables of one shape."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.errors import InputError
from lora_capacity.run.drawn import NEVER, Drawn, LeftOut, order_of_touching
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.events.kv_cache import usable_blocks
from lora_capacity.twins.events.requests import TICKS, RequestTables
from lora_capacity.twins.events.state import WINDOW
from lora_capacity.workload import BASE_MODEL, Requests

_LEFT_OUT = 2
"""Stream of random numbers for what tables leave out; that of `order_of_touching` is 1."""


def draw_requests(
    scenarios: Scenarios,
    input_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    seed: int,
    indices: Sequence[int] | None = None,
    most: ArrayLike | None = None,
    warmup_s: float = 0.0,
) -> Drawn:
    """Draw Poisson arrivals for every configuration, and their lengths from a sample.

    Args:
        scenarios: The configurations.
        input_tokens: Prompt lengths to draw from, paired with the next, ``[sample]`` or ``[configs, sample]``.
        output_tokens: Output lengths.
        seed: Configuration ``i`` depends on it and ``i`` alone.
        indices: ``i`` of each configuration, for a part of many; by default they count from 0.
        most: Most requests in the table of a configuration; for clients that hold requests back, since a server
            completes far fewer than arrive. One value or ``[configs]``; another value draws other requests.
        warmup_s: Time at the beginning that attainment leaves out.

    Raises:
        InputError: As `pack_requests`.
    """
    configs = scenarios.horizon_s.shape[0]
    inputs, outputs = (
        np.broadcast_to(column, (configs, np.shape(column)[-1])) for column in (input_tokens, output_tokens)
    )
    counts, rates = np.asarray(scenarios.class_count, dtype=int), np.asarray(scenarios.class_rate_per_s, dtype=float)
    base, horizon_s = np.asarray(scenarios.base_rate_per_s, dtype=float), np.asarray(scenarios.horizon_s, dtype=float)
    cut = None if most is None else np.broadcast_to(np.asarray(most, dtype=int), (configs,))
    indices = range(configs) if indices is None else indices
    requests, classes, left_out = [], [], []
    for i, index in enumerate(indices):
        rng = np.random.default_rng([seed, index])
        own = np.repeat(np.arange(counts.shape[1]), counts[i])
        rate = np.append(rates[i][own], base[i])
        size = rng.poisson(rate.sum() * horizon_s[i])
        drawn_until_s = horizon_s[i]
        if cut is None or size < cut[i]:
            spacing = np.cumsum(rng.exponential(size=size + 1))  # uniform times in order, without sorting
            arrival_s = spacing[:-1] / spacing[-1] * horizon_s[i]
        else:
            arrival_s = np.cumsum(rng.exponential(1.0 / rate.sum(), cut[i]))
            drawn_until_s = min(arrival_s[-1], horizon_s[i])
            arrival_s = arrival_s[arrival_s < horizon_s[i]]
        adapter = _whose(rng, rate, arrival_s.size)
        pair = rng.integers(inputs.shape[1], size=arrival_s.size)
        requests.append(Requests(arrival_s, adapter, inputs[i][pair], outputs[i][pair]))
        classes.append(own)
        rest = np.random.default_rng([seed, index, _LEFT_OUT])
        left_out.append(_arrivals_after(rest, rate, drawn_until_s, horizon_s[i], warmup_s))
    tables = pack_requests(scenarios, requests, classes, seed=seed, indices=indices)
    return Drawn(scenarios, tables, left_out, [[seed, index] for index in indices], warmup_s)


def _whose(rng: np.random.Generator, rate: NDArray[np.float64], size: int) -> NDArray[np.int32]:
    """Draw for whom requests are, given the rate of every adapter and, last, of the base model."""
    place = np.searchsorted(np.cumsum(rate), rng.random(size) * rate.sum(), side="right")
    place = np.minimum(place, np.flatnonzero(rate)[-1])
    return np.where(place == rate.size - 1, BASE_MODEL, place).astype(np.int32)


def _arrivals_after(
    rng: np.random.Generator, rate: NDArray[np.float64], begin_s: float, end_s: float, warmup_s: float
) -> LeftOut | None:
    """Draw how many Poisson arrivals there are between two times, given rates as of `_whose`."""
    if begin_s >= end_s:
        return None
    unobserved_s = np.clip(warmup_s, begin_s, end_s) - begin_s
    unobserved, observed = rng.poisson(rate.sum() * np.array([unobserved_s, end_s - begin_s - unobserved_s]))
    return LeftOut(rng.multinomial(unobserved + observed, rate / rate.sum())[:-1], int(observed))


def pack_first(
    scenarios: Scenarios,
    requests: Sequence[Requests],
    classes: Sequence[ArrayLike],
    most: Sequence[int],
    *,
    seed: int,
    indices: Sequence[int],
    warmup_s: float = 0.0,
    **caching: Any,
) -> Drawn:
    """Pack the first of given requests into tables, ``most`` of each configuration; else as `pack_requests`.

    ``warmup_s`` is the time at the beginning that attainment leaves out.
    """
    first = [given.select(slice(n)) for given, n in zip(requests, most, strict=True)]
    tables = pack_requests(scenarios, first, classes, seed=seed, indices=indices, **caching)
    rest = [
        _counted(given.select(slice(n, None)), np.size(own), warmup_s) if n < len(given) else None
        for given, own, n in zip(requests, classes, most, strict=True)
    ]
    return Drawn(scenarios, tables, rest, [[seed, index] for index in indices], warmup_s)


def _counted(rest: Requests, adapters: int, warmup_s: float) -> LeftOut:
    by_adapter = np.bincount(rest.adapter[rest.adapter != BASE_MODEL], minlength=adapters)
    return LeftOut(by_adapter, int((rest.arrival_s >= warmup_s).sum()))


def pack_requests(
    scenarios: Scenarios,
    requests: Sequence[Requests],
    classes: Sequence[ArrayLike],
    *,
    seed: int | None,
    indices: Sequence[int] | None = None,
    longest_prefix: int = 0,
    cached: bool = False,
) -> RequestTables:
    """Pack given requests into tables; they stay as they are.

    Args:
        scenarios: The configurations, ``[configs]``.
        requests: The requests of each, in order of arrival.
        classes: For each configuration the class of every adapter, in the order in which requests number adapters.
        seed: For the order in which a step touches adapters, which is that of a hash set in vLLM; None for that of
            their numbers.
        indices: As in `draw_requests`.
        longest_prefix: Room for blocks of shared prefixes; 0: without prefix caching.
        cached: Whether the requests' cached tokens count.

    Raises:
        InputError: If a request needs more KV blocks than a server that starts has.
    """
    block_size = np.asarray(scenarios.block_size, dtype=int)
    blocks = usable_blocks(np.asarray(scenarios.kv_cache_tokens, dtype=int), block_size)
    starts = np.asarray(scenarios.starts)
    for i, given in enumerate(requests):
        needed = int((given.input_tokens + given.output_tokens).max(initial=1)) - 1
        if starts[i] and -(-needed // block_size[i]) > blocks[i]:
            allowed = f"at most the KV cache, {blocks[i] * block_size[i]} tokens"
            raise InputError("input_tokens + output_tokens", needed + 1, allowed, "use fewer slots or shorter requests")
    size = 1024 * -(-max(max(len(given) for given in requests) + WINDOW, 1) // 1024)
    adapters = 16 * -(-(max(np.size(own) for own in classes) + 1) // 16) - 1
    configs = len(requests)
    arrival = np.full((configs, size), NEVER, dtype=np.int32)
    longest = max(int(given.output_tokens.max(initial=1)) for given in requests)
    largest = max(adapters, longest, *(int(given.input_tokens.max(initial=1)) for given in requests))
    table = np.zeros((configs, size, 3), dtype=np.int16 if largest <= np.iinfo(np.int16).max else np.int32)
    following = np.zeros((configs, size), dtype=np.int32)
    head = np.empty((configs, adapters + 1), dtype=np.int32)
    rank, class_of = np.zeros((configs, adapters), dtype=np.float32), np.full((configs, adapters), -1, dtype=np.int32)
    arrived = np.zeros((configs, adapters), dtype=np.int32)
    shared, known = np.zeros((2, configs, size), dtype=np.int32)
    indices = range(configs) if indices is None else indices
    for i, (index, given, own) in enumerate(zip(indices, requests, map(np.asarray, classes), strict=True)):
        order = np.arange(own.size) if seed is None else order_of_touching(own.size, [seed, index])
        place = np.empty_like(order)
        place[order] = np.arange(own.size)
        count = len(given)
        adapter = np.where(given.adapter == BASE_MODEL, adapters, np.append(place, 0)[given.adapter])
        ticks = np.round(given.arrival_s / float(scenarios.horizon_s[i]) * TICKS)
        arrival[i, :count] = np.minimum(ticks, NEVER)
        table[i, :count] = np.stack([adapter, given.input_tokens, given.output_tokens], axis=1)
        head[i], following[i, :count] = _queues(adapter, adapters + 1)
        # The block of a prompt's last token is computed again in any case, so nothing is lost by its being its own.
        shared[i, :count] = np.minimum(given.shared_prefix_tokens, given.input_tokens - 1) // block_size[i]
        known[i, :count] = given.cached_tokens
        arrived[i] = np.bincount(adapter, minlength=adapters + 1)[:adapters]
        class_of[i, : own.size] = own[order]
        rank[i, : own.size] = np.asarray(scenarios.class_rank)[i][own[order]]
    columns: dict[str, Any] = {
        "arrival": arrival,
        "table": table,
        "following": following,
        "head": head,
        "rank": rank,
        "class_of": class_of,
        "arrived": arrived,
    }
    if longest_prefix:
        columns["shared_blocks"] = shared
    if cached:
        columns["cached_tokens"] = known
    return RequestTables(**columns, longest_output=longest, longest_prefix=longest_prefix)


def _queues(adapter: NDArray[np.integer[Any]], adapters: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the first request of each adapter, and the next of the same adapter after each request."""
    narrow = adapter.astype(np.int16) if adapters <= np.iinfo(np.int16).max else adapter
    order = np.argsort(narrow, kind="stable")  # radix sort if narrow
    whose = adapter[order]
    same = whose[1:] == whose[:-1]
    following = np.full(adapter.size, TICKS, dtype=np.int32)
    following[order[:-1][same]] = order[1:][same]
    head = np.full(adapters, TICKS, dtype=np.int32)
    first = np.append(True, ~same)[: adapter.size]
    head[whose[first]] = order[first]
    return head, following
