"""Many configurations at once: grids, and the steady twin over all of them on every core or device at hand.

A sweep is cut into chunks of one shape, so that it compiles once, and small enough that a chunk stays in a core's
cache. With several devices a chunk is sharded over them; on the CPU, whose single device runs such a chunk on one core,
as many chunks are in flight as there are cores.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from lora_capacity.costs import Costs
from lora_capacity.errors import InputError, check_type
from lora_capacity.run.resources import available_cores, check_affordable
from lora_capacity.run.tasks import run_tasks
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.steady import ResidenceTime, simulate_steady
from lora_capacity.twins.steady.cached import ROUNDS, Saved, nothing_saved, saved_by_prefixes

Progress = Callable[[int, int], None]
"""Called with the configurations done and their total."""


def check_progress(progress: object, name: str = "progress") -> None:
    """Refuse what cannot be called as the work goes on."""
    allowed = "None, or a function of what is done and the total"
    check_type(name, progress, (Callable, type(None)), allowed)  # type: ignore[arg-type]  # an abstract class


CHUNK_CPU, CHUNK_ACCELERATOR = 128, 16384
"""Configurations per device in a chunk. A core's cache holds the former, and a search asks for a few dozen at a time:
512 take a sixth less of a core each, but four times as long where few are asked for. The latter fills a GPU."""

_CHUNKS_SENT = 64
"""Chunks that go to another machine together: a fifth of a second of work."""

_CLASS_STEP = 4
"""Classes are padded to a multiple of this, so that workloads with about as many share what was compiled."""

_simulate_chunk = jax.jit(simulate_steady)


def enable_compilation_cache(path: str | Path) -> None:
    """Keep what JAX compiles in a folder, so that later processes need not compile it again.

    Args:
        path: The folder; made if absent.

    Raises:
        InputError: If the folder cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(path), error.strerror or "unusable", "a folder that can be written to") from None
    config: Any = jax.config
    config.update("jax_compilation_cache_dir", str(path))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


_BYTES_EACH, _SECONDS_EACH = 1000.0, 2e-5
"""What a configuration takes on the host: columns, results and the table made of them; and the steady twin's time."""


def check_configurations(field: str, count: int) -> None:
    """Refuse more configurations than memory holds; as `check_affordable`."""
    check_affordable(field, count, _BYTES_EACH, _SECONDS_EACH, "use a coarser grid, or less of it at a time")


def grid(adapters: Sequence[int], max_loras: Sequence[int], **axes: Sequence[Any] | None) -> dict[str, NDArray[Any]]:
    """Return every combination of the values that has no more slots than adapters.

    Args:
        adapters: Adapters served, A.
        max_loras: Slots, S.
        **axes: Values of other settings by vLLM's names; those that are None are left out.

    Returns:
        One column per name, ``[configs]``, the last varying fastest: arguments for `build_scenarios`.

    Raises:
        InputError: If an axis is empty, no combination is left, or there are more than memory holds.
    """
    values = {"adapters": adapters, "max_loras": max_loras} | {k: v for k, v in axes.items() if v is not None}
    for name, given in values.items():
        if not len(given):
            raise InputError(name, "none", "at least one value")
    check_configurations(" × ".join(values), math.prod(len(given) for given in values.values()))
    columns = dict(zip(values, (c.ravel() for c in np.meshgrid(*values.values(), indexing="ij")), strict=True))
    kept = columns["max_loras"] <= columns["adapters"]
    if not kept.any():
        raise InputError("max_loras", min(max_loras), f"at most the number of adapters, {max(adapters)}")
    return {name: column[kept] for name, column in columns.items()}


def run_steady(
    costs: Costs, scenarios: Scenarios, residence: ResidenceTime, *, progress: Progress | None = None
) -> Results:
    """Run the steady twin over configurations, in chunks of one shape and on all local devices.

    It compiles once per number of classes (rounded up to a multiple of 4), whatever the number of configurations.

    Args:
        costs: What steps and loads cost.
        scenarios: The configurations, ``[configs]``.
        residence: How long requests stay in the batch: of all, leaves ``[nodes]``, or of each, ``[nodes, configs]``.
        progress: Called after every chunk.

    Returns:
        Predictions with NumPy leaves, ``[configs]``.
    """
    if scenarios.class_shared_tokens is None and scenarios.cached_share is None:
        return _run_chunks(costs, scenarios, residence, progress)
    host: Any = jax.tree.map(np.asarray, scenarios)
    if host.cached_share is not None:
        given = Saved(host.cached_share * host.mean_input_tokens, np.zeros_like(host.cached_share))
        return _with_saved(costs, host, residence, given, progress)
    saved = nothing_saved(host)
    results = _with_saved(costs, host, residence, saved, None)
    for _ in range(ROUNDS):
        saved = saved.halfway(saved_by_prefixes(host, results, saved))
        results = _with_saved(costs, host, residence, saved, None)
    if progress is not None:
        progress(len(host.status), len(host.status))
    return results


def _with_saved(costs: Costs, host: Any, residence: ResidenceTime, saved: Saved, progress: Progress | None) -> Results:
    """Solve servers whose prompts are shorter by what is found, and whose KV cache has room for what is held once."""
    prompts, held = host.mean_input_tokens, host.kv_tokens_per_request
    room = held / np.maximum(held - saved.kv_tokens, 1.0)
    smaller = dataclasses.replace(
        host.without_cache(),
        mean_input_tokens=(prompts - saved.prompt_tokens).astype(prompts.dtype),
        kv_cache_tokens=(host.kv_cache_tokens * room).astype(host.kv_cache_tokens.dtype),
        watermark_blocks=None if host.watermark_blocks is None else (host.watermark_blocks * room).astype(np.int32),
    )
    results: Any = _run_chunks(costs, smaller, residence, progress)
    tokens = prompts + host.mean_output_tokens
    whole: dict[str, Any] = {
        "throughput_tokens_per_s": (results.completed_per_s * tokens).astype(results.completed_per_s.dtype),
        "offered_tokens_per_s": (host.requests_per_s * tokens).astype(results.completed_per_s.dtype),
    }
    told: Results = dataclasses.replace(results, **whole)
    return told


def _run_chunks(costs: Costs, scenarios: Scenarios, residence: ResidenceTime, progress: Progress | None) -> Results:
    configs, classes = scenarios.class_count.shape
    host = with_classes(scenarios, classes + -classes % _CLASS_STEP)
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    size = (CHUNK_CPU if on_cpu else CHUNK_ACCELERATOR) * len(devices)
    starts = range(0, configs, size)
    done = 0

    def count(_: Results) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(configs * done // len(starts), configs)

    chunks = _Chunks(costs, host, jax.tree.map(np.asarray, residence), size)
    threads = max(1, available_cores() // len(devices)) if on_cpu else 1
    parts = run_tasks(chunks.run, starts, count, threads=threads, together=_CHUNKS_SENT)
    results: Results = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:configs], *parts)
    return dataclasses.replace(results, class_service=results.class_service[:, :classes])


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Configurations, ``[configs]``, to be run in chunks of one size on the devices of whichever process does it."""

    costs: Costs
    host: Scenarios
    residence: ResidenceTime
    size: int

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.local_devices()), ("configs",))

    @functools.cached_property
    def _costs(self) -> Costs:
        costs: Costs = self._placed(self.costs)
        return costs

    @functools.cached_property
    def _residence(self) -> ResidenceTime:
        residence: ResidenceTime = self._placed(self.residence)
        return residence

    def _placed(self, tree: Any, *axes: str | None) -> Any:
        """Put arrays on the devices: a share of the axis of configurations on each, or all on all."""
        spec: Any = PartitionSpec
        return jax.device_put(tree, NamedSharding(self._mesh, spec(*axes)))

    def run(self, start: int) -> Results:
        """Return what happens in the chunk that begins there; the last one is filled up."""
        if self.residence.weight.ndim == 2:
            own = _padded(jax.tree.map(np.transpose, self.residence), start, self.size)
            times = self._placed(jax.tree.map(np.transpose, own), None, "configs")
        else:
            times = self._residence
        chunk = self._placed(_padded(self.host, start, self.size), "configs")
        results: Results = jax.tree.map(np.asarray, _simulate_chunk(self._costs, chunk, times))
        return results


def with_classes(scenarios: Scenarios, classes: int) -> Scenarios:
    """Return the same configurations with another number of classes, for speed or for a common shape.

    Too few are filled up with classes without adapters. Too many are merged: adapters whose rates fall into one of
    ``classes`` equal intervals of the logarithm become adapters of their mean rate and rank, in each configuration
    apart, so that neither the number of adapters nor the load changes. The error is of second order in the interval:
    200 rates that span a factor of 24 merged into 16 move the throughput by under 0.1 %.

    Args:
        scenarios: The configurations; no configuration's classes of adapters have rates of 0.
        classes: Classes wanted, at least 1.

    Returns:
        Configurations with NumPy leaves, ``[configs, classes]`` where they were ``[configs, any]``.
    """
    host: Any = jax.tree.map(np.asarray, scenarios)
    count, rate = host.class_count, host.class_rate_per_s
    missing = classes - count.shape[1]
    if missing >= 0:
        wider = [(0, 0), (0, missing)]
        padded: Scenarios = dataclasses.replace(
            host,
            class_count=np.pad(count, wider),
            class_rate_per_s=np.pad(rate, wider, mode="edge"),
            class_rank=np.pad(host.class_rank, wider, mode="edge"),
        )
        if host.class_shared_tokens is not None:
            shared: Any = np.pad(host.class_shared_tokens, wider)
            padded = dataclasses.replace(padded, class_shared_tokens=shared)
        return padded
    log_rate = np.log(rate.max(axis=0))
    edges = np.linspace(log_rate.min(), log_rate.max(), classes + 1)[1:-1]
    member = (np.searchsorted(edges, log_rate)[:, None] == np.arange(classes)).astype(count.dtype)
    total = count @ member
    share = 1.0 / np.maximum(total, 1.0)
    merged_rate, merged_rank = (count * rate) @ member * share, (count * host.class_rank) @ member * share
    absent = total == 0
    merged: Scenarios = dataclasses.replace(
        host,
        class_count=total,
        class_rate_per_s=np.where(absent, rate[:, -1:], merged_rate),
        class_rank=np.where(absent, host.class_rank[:, -1:], merged_rank),
    )
    if host.class_shared_tokens is not None:
        shared = (count * host.class_shared_tokens) @ member * share
        merged = dataclasses.replace(merged, class_shared_tokens=shared)
    return merged


def _padded(tree: Any, start: int, size: int) -> Any:
    """Cut out a chunk; the last configuration is repeated to fill it up."""

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        chunk = values[start : start + size]
        return np.pad(chunk, [(0, size - len(chunk))] + [(0, 0)] * (chunk.ndim - 1), mode="edge")

    return jax.tree.map(cut, tree)
