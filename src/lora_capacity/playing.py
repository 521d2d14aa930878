"""Many configurations played by the event twin, on every core or device at hand.

The loop of a batch turns until its last server is done, so servers with about as much to do go together. Sizes are
rounded up, so that batches share what was compiled.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError, check_number
from lora_capacity.status import Status
from lora_capacity.sweep import Progress, simulate
from lora_capacity.twin import Results, Scenarios, StayLaw
from lora_capacity.twin.events import EventResults, RequestTables, draw_requests, lay_out_requests, simulate_events
from lora_capacity.twin.events.requests import TICKS
from lora_capacity.workload import LengthDistribution, Workload

BATCH = 64
"""Most configurations in a batch: more leave each core's cache, fewer use less of its vector units."""

MAX_BATCH_REQUESTS = 2**24
"""Most requests in the tables of a batch, which take 20 bytes each; bounds a configuration too."""

_MARGIN = 1.5
"""Requests laid out per request that the steady twin sees completed, where clients hold requests back."""

_Draw = Callable[[Scenarios, Sequence[int], NDArray[np.int64]], RequestTables]
"""Returns the requests of some configurations, given their indices and the most requests of each."""

_play_batch = jax.jit(simulate_events, static_argnames="full_prompt_must_fit")


def play(
    calibration: Calibration,
    scenarios: Scenarios,
    input_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> EventResults:
    """Run the event twin over configurations with Poisson arrivals and lengths from a sample.

    Args:
        calibration: Whose costs and vLLM version hold.
        scenarios: The configurations, ``[configs]``.
        input_tokens: Prompt lengths to draw from, paired with the next, ``[sample]`` or ``[configs, sample]``.
        output_tokens: Answer lengths.
        seed: Whole number >= 0; what happens in a configuration depends on it and on the configuration's index alone.
        progress: Called after every batch.

    Returns:
        What happened, with NumPy leaves, ``[configs]``; adapters class by class, padding last.

    Raises:
        InputError: If the seed is no such number, a request needs more KV blocks than its server has, or a
            configuration has over 16 million requests.
    """
    seed = int(check_number("seed", seed, minimum=0, integer=True))
    configs = scenarios.status.shape[0]
    inputs, outputs = (
        np.broadcast_to(column, (configs, np.shape(column)[-1])) for column in (input_tokens, output_tokens)
    )

    def draw(part: Scenarios, indices: Sequence[int], most: NDArray[np.int64]) -> RequestTables:
        return draw_requests(part, inputs[indices], outputs[indices], seed=seed, indices=indices, most=most)

    stays = StayLaw.of_lengths(LengthDistribution.from_histogram(*np.unique(output_tokens, return_counts=True)))
    return _play(calibration, scenarios, stays, draw, progress)


def play_workload(
    calibration: Calibration,
    scenarios: Scenarios,
    workload: Workload,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> EventResults:
    """Run the event twin over configurations of one workload, with its own arrivals; a trace is replayed.

    Args:
        calibration: Whose costs and vLLM version hold.
        scenarios: The configurations as `build_scenarios` lays them out, ``[configs]``.
        workload: Their workload.
        seed: Whole number >= 0 of `Workload.sample_requests`: configurations share the requests of shared adapters.
        progress: Called after every batch.

    Returns:
        As `play`.

    Raises:
        InputError: As `play` and `Workload.sample_requests`.
    """
    served = np.asarray(scenarios.class_count).sum(axis=1).astype(int)
    rates, ranks = workload.adapters.deal(int(served.max()))
    _, class_of = np.unique(np.stack([rates, ranks], axis=1), axis=0, return_inverse=True)

    def draw(part: Scenarios, indices: Sequence[int], most: NDArray[np.int64]) -> RequestTables:
        requests = [
            workload.sample_requests(int(served[i]), seed).select(slice(n))
            for i, n in zip(indices, most.tolist(), strict=True)
        ]
        classes = [class_of.reshape(-1)[: served[i]] for i in indices]
        return lay_out_requests(part, requests, classes, seed=seed, indices=indices)

    return _play(calibration, scenarios, StayLaw.of_lengths(workload.output_tokens), draw, progress)


def _play(
    calibration: Calibration, scenarios: Scenarios, stays: StayLaw, draw: _Draw, progress: Progress | None
) -> EventResults:
    """Play batches of configurations with about as much to do, and return them in the order given."""
    host: Any = jax.tree.map(np.asarray, scenarios)
    configs = len(host.status)
    most, work = _sizes(host, simulate(calibration, scenarios, stays))
    size = min(BATCH, configs, max(1, MAX_BATCH_REQUESTS // int(most.max())))
    adapters = _rounded(int(host.class_count.sum(axis=1).max()) + 1) - 1
    order = np.argsort(-work, kind="stable")  # the longest first, so that no core waits for another at the end

    def run(start: int) -> EventResults:
        rows = order[start : start + size]
        part: Scenarios = jax.tree.map(lambda values: values[rows], host)
        tables = _padded(draw(part, rows.tolist(), most[rows]), adapters, size)
        return _run_batch(calibration, _filled(part, size), tables, len(rows))

    starts = range(0, configs, size)
    parts, done = [], 0
    on_cpu = jax.local_devices()[0].platform == "cpu"
    with ThreadPoolExecutor((os.cpu_count() or 1) if on_cpu else 1) as pool:
        for part in pool.map(run, starts):
            parts.append(part)
            done += len(part.steps)
            if progress is not None:
                progress(done, configs)
    back = np.argsort(order)
    results: EventResults = jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *parts)
    return results


def _sizes(host: Any, steady: Results) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the most requests that each configuration can need, and about how many turns it takes."""
    starts = host.status <= Status.OUTSIDE_CALIBRATION
    rate = (host.class_count * host.class_rate_per_s).sum(axis=1) + host.base_rate_per_s
    arriving = rate * host.horizon_s
    arriving = arriving + 6.0 * np.sqrt(arriving) + 1.0  # beyond six standard deviations is never
    completed = np.where(starts, steady.completed_per_s * host.horizon_s, 0.0)
    most = np.where(starts, np.minimum(arriving, _MARGIN * completed + host.max_pending + 1.0), 1.0)
    if most.max() > MAX_BATCH_REQUESTS:
        raise InputError(
            "horizon_s",
            float(host.horizon_s[most.argmax()]),
            f"one in which at most {MAX_BATCH_REQUESTS} requests arrive",
            "simulate a shorter time, or set max_pending",
        )
    steps = np.where(starts, host.horizon_s / steady.step_time_s, 0.0)
    return np.ceil(most / 1024.0).astype(np.int64) * 1024, steps + completed


def _run_batch(calibration: Calibration, part: Scenarios, tables: RequestTables, count: int) -> EventResults:
    """Play a batch and return its first ``count`` configurations, adapters in the order of their classes."""
    must_fit = calibration.behaviour.full_prompt_must_fit
    batch: Any = _play_batch(calibration.costs, part, tables, full_prompt_must_fit=must_fit)
    results: Any = jax.tree.map(lambda values: np.asarray(values)[:count], batch)
    class_of = np.asarray(tables.class_of)[:count]
    by_class = np.argsort(np.where(class_of < 0, np.iinfo(np.int32).max, class_of), axis=1, kind="stable")
    played: EventResults = dataclasses.replace(
        results,
        adapter_arrived=np.take_along_axis(results.adapter_arrived, by_class, axis=1),
        adapter_completed=np.take_along_axis(results.adapter_completed, by_class, axis=1),
    )
    return played


def _filled(part: Any, size: int) -> Scenarios:
    """Fill a batch up with servers that do not start."""
    more = size - len(part.status)
    status: Any = np.pad(part.status, (0, more), constant_values=Status.OOM)
    filled: Scenarios = dataclasses.replace(_edge(part, more), status=status)
    return filled


def _padded(tables: RequestTables, adapters: int, size: int) -> RequestTables:
    """Widen tables to ``adapters``, behind which stands the base model, to ``size`` rows, and to a round length."""
    host: Any = jax.tree.map(np.asarray, tables)
    more = adapters - host.rank.shape[1]
    longer = _rounded(host.arrival.shape[1]) - host.arrival.shape[1]
    far = np.iinfo(np.int32).max

    def wide(values: NDArray[Any], fill: int, columns: int = more) -> NDArray[Any]:
        return np.pad(values, [(0, 0), (0, columns)], constant_values=fill)

    table = np.pad(host.table, [(0, 0), (0, longer), (0, 0)])
    adapter = table[..., 0]
    adapter[adapter == host.rank.shape[1]] = adapters
    padded = dataclasses.replace(
        host,
        arrival=wide(host.arrival, far, longer),
        table=table,
        head=np.concatenate([wide(host.head[:, :-1], int(TICKS)), host.head[:, -1:]], axis=1),
        rank=wide(host.rank, 0),
        class_of=wide(host.class_of, -1),
        arrived=wide(host.arrived, 0),
        longest_output=(1 << int(host.longest_output).bit_length()) - 1,
    )
    rows: RequestTables = _edge(padded, size - len(host.arrival))
    return rows


def _edge(tree: Any, more: int) -> Any:
    """Repeat the last configuration."""
    return jax.tree.map(lambda v: np.pad(v, [(0, more)] + [(0, 0)] * (v.ndim - 1), mode="edge"), tree)


def _rounded(size: int) -> int:
    """Return the next number of the form 2^n or 1.5 · 2^n that is a multiple of 16."""
    power = max(16, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power >= 64 and size <= power * 3 // 4 else power
