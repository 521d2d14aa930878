"""Configurations run by the event twin for processors, one after the other."""

import contextlib
import dataclasses
import functools
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from lora_capacity.costs import Costs, StepTerms, experts_time_s, launched_grids, step_terms
from lora_capacity.engines import SchedulerRules
from lora_capacity.files import locked_folder
from lora_capacity.run.drawn import order_of_loading
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.compiled import ADAPTER, REQUEST, STEP, Server, keep_compiled, records, simulate_server
from lora_capacity.twins.compiled.state import COUNTS, SUMS
from lora_capacity.twins.events import RequestTables
from lora_capacity.twins.events.kv_cache import usable_blocks
from lora_capacity.twins.events.requests import TICKS
from lora_capacity.twins.events.results import Observed, summarise

_FIRST_CALL = threading.Lock()
"""Lets one thread compile the twin while the others wait for it."""

_UNBOUNDED = 2**60
"""Requests that clients may have unanswered where nothing bounds them."""


@jax.jit
def _terms(costs: Costs, tokens: Any, **server: Any) -> StepTerms:
    """Return the terms of steps of so many tokens, of their experts too."""
    found = step_terms(costs, tokens, **server)
    return found._replace(fixed_s=found.fixed_s + experts_time_s(costs, tokens))


_summarised = jax.jit(jax.vmap(summarise, in_axes=(0, None, 0)))
"""Returns the results of several servers at once."""


def build_server(
    costs: Costs,
    scenario: Any,
    tables: Any,
    rules: SchedulerRules,
    *,
    warmup_s: float = 0.0,
    samples: int = 0,
    rows: int = 0,
    entries: int = 0,
    key: Sequence[int] = (),
) -> Server:
    """Return a server that has not begun.

    Args:
        costs: What steps and loads cost.
        scenario: Its configuration, without an axis of configurations, on the host, as the next.
        tables: Its requests.
        rules: What its version's scheduler does.
        warmup_s: Time at the beginning that is not observed.
        samples: Parts of the horizon in a series.
        rows: Steps to write down.
        entries: Requests that can run or wait preempted; 0: as many as are likely to.
        key: Seed of the order of adapters in the tables, for those loaded at the start.
    """
    count = int((tables.arrival < np.iinfo(np.int32).max).sum())
    horizon_s, base = float(scenario.horizon_s), tables.rank.size
    most_tokens = int(scenario.max_num_batched_tokens)
    # Each running request needs a token of every step, so there are never more of them than tokens in a step.
    most_running = int(min(scenario.most_active_seqs, most_tokens))
    requests = records(count, REQUEST)
    requests["sent_s"] = tables.arrival[:count] / TICKS * horizon_s
    requests["following"] = tables.following[:count]
    for name, column in zip(("adapter", "prompt", "output"), tables.table[:count].T, strict=True):
        requests[name] = column
    for name, optional in (("shared", tables.shared_blocks), ("cached", tables.cached_tokens)):
        if optional is not None:
            requests[name] = optional[:count]
    adapters = records(base + 1, ADAPTER)
    adapters["head"] = np.minimum(tables.head, count)
    adapters["disk_s"][:base] = costs.loads.disk_s + costs.loads.disk_rank_s * tables.rank
    adapters["grids"] = launched_grids(costs, max_loras=scenario.max_loras, adapters=np.arange(base + 1.0))
    served = int(scenario.class_count.sum())
    room = served if scenario.max_cpu_loras is None else int(scenario.max_cpu_loras)
    steps = records(most_tokens + 1, STEP)
    tokens = np.arange(1 << most_tokens.bit_length(), dtype=np.float32)
    limits = {"loaded": min(served, room), "max_loras": scenario.max_loras, "max_lora_rank": scenario.max_lora_rank}
    terms = _terms(costs, tokens, **{name: np.float32(value) for name, value in limits.items()})
    for name, values in terms._asdict().items():
        steps[name] = np.broadcast_to(values, tokens.shape)[: most_tokens + 1]
    step: Any = costs.step
    bounds = scenario.bounds
    unbounded: Any = [np.inf] * 3 if bounds is None else (bounds.ttft_s, bounds.tpot_s, bounds.e2el_s)
    block_size = int(scenario.block_size)
    numbers: dict[str, Any] = {
        "max_num_batched_tokens": most_tokens,
        "max_num_seqs": most_running,
        "kv_blocks": usable_blocks(np.asarray(scenario.kv_cache_tokens, dtype=int), block_size),
        "block_size": block_size,
        "watermark_blocks": scenario.watermark_blocks or 0,
        "long_prefill_token_threshold": scenario.long_prefill_token_threshold or 0,
        "max_loras": int(scenario.max_loras),
        "max_cpu_loras": max(room, 1),
        "max_pending": int(min(scenario.max_pending, _UNBOUNDED)),
        "prefix_caching": tables.shared_blocks is not None,
        "warmup_s": warmup_s,
        "horizon_s": horizon_s,
        **dict(zip(("max_ttft_s", "max_tpot_s", "max_e2el_s"), unbounded, strict=True)),
        "prompt_token_s": float(step.prefill_token_s) - float(step.decode_token_s),
        "kv_token_s": step.kv_token_s,
        "skipped_request_s": step.skipped_request_s,
        "queued_request_s": step.queued_request_s,
        "host_to_gpu_load_s": costs.loads.host_to_gpu_load_s,
        **dataclasses.asdict(rules),
    }
    likely = 2 * min(most_running, count) + 64
    server = Server.empty(numbers, adapters, requests, steps, entries=entries or likely, samples=samples, rows=rows)
    if scenario.loaded_at_start:
        server.load_all(order_of_loading(served, key))
    return server


def observed(scenario: Any, tables: Any, server: Server) -> Observed:
    """Return what was seen of a server; arguments as of `build_server`."""
    n, t = server.numbers[0], server.totals[0]
    adapters = server.adapters[:-1]
    *answered, waits = server.histograms
    arrival_s = tables.arrival / TICKS * n["horizon_s"]
    seen: dict[str, Any] = {
        "status": np.int32(scenario.status),
        "observed_s": np.float32(n["horizon_s"] - n["warmup_s"]),
        "kv_blocks": np.int32(n["kv_blocks"]),
        "sums": np.array([t[name] for name in SUMS], np.float32),
        "counts": np.array([t[name] for name in COUNTS], np.int32),
        "kept_bounds": np.array([t[name] for name in ("answered", "in_time", "ended_in_time", "good")], np.int32),
        "most": np.array([t[name] for name in ("max_running", "max_adapters", "max_kv_blocks")], np.int32),
        "histograms": np.stack(answered).astype(np.int32),
        "arrived": np.int32(((arrival_s >= n["warmup_s"]) & (arrival_s < n["horizon_s"])).sum()),
        "unanswered": np.int32(t["unanswered"]),
        "unanswered_s": np.float32(t["unanswered_s"]),
        "unanswered_histogram": waits.astype(np.float32),
        "worst_wait_s": adapters["worst_wait_s"].astype(np.float32),
        "adapter_arrived": np.asarray(tables.arrived),
        "adapter_completed": adapters["completed"].astype(np.int32),
        "class_of": np.asarray(tables.class_of),
        "series": server.series.astype(np.float32),
        "bottleneck": np.int32(t["bottleneck"]),
        "iterations": np.int32(t["iterations"]),
    }
    return Observed(**seen)


def run_compiled(
    costs: Costs,
    part: Scenarios,
    tables: RequestTables,
    keys: Sequence[Sequence[int]],
    rules: SchedulerRules,
    *,
    warmup_s: float,
    samples: int,
) -> tuple[Results, NDArray[np.int32]]:
    """Run configurations, whose results have their adapters in the order of the tables.

    Args:
        costs: What steps and loads cost.
        part: The configurations, ``[configs]``.
        tables: Their requests.
        keys: Seeds of the order of adapters in each.
        rules: What their version's scheduler does.
        warmup_s: As of `lora_capacity.twins.events.simulate_events`, as the next.
        samples: See there.

    Returns:
        What happened, and how many requests clients have sent, ``[configs]``.
    """
    host, columns = jax.tree.map(np.asarray, (part, tables))
    configs, simulate = len(host.status), _simulation()
    seen, sent = [], np.zeros(configs, np.int32)
    for row in range(configs):
        scenario, own = jax.tree.map(lambda values, row=row: values[row], (host, columns))
        build = functools.partial(
            build_server, costs, scenario, own, rules, warmup_s=warmup_s, samples=samples, key=keys[row]
        )
        server = build()
        while scenario.starts and not simulate(server):  # for want of entries
            server = build(entries=2 * server.entries.size)
        seen.append(observed(scenario, own, server))
        sent[row] = server.numbers[0]["sent"]
    width = 1 << (configs - 1).bit_length()
    everything = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
    rows = np.minimum(np.arange(width), configs - 1)  # a power of two of them, so that few shapes are compiled
    wider, everything = jax.tree.map(lambda leaf: leaf[rows], (host, everything))
    results: Any = _summarised(wider, costs.front_end, everything)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:configs], results), sent


def _simulation() -> Callable[[Server], bool]:
    """Return the compiled twin, from what is kept beside JAX's programs if anything is."""
    with _FIRST_CALL:
        if not simulate_server.signatures:  # type: ignore[attr-defined]
            _compile()
    return simulate_server


def _compile() -> None:
    """Compile the twin, or load it; what is kept and cannot be read is made anew.

    Of several processes that begin at once one compiles, and the others load what it kept.
    """
    empty = Server.empty(
        {"kv_blocks": 1, "block_size": 1}, records(1, ADAPTER), records(0, REQUEST), records(1, STEP), entries=1
    )
    kept: Any = jax.config
    folder = kept.jax_compilation_cache_dir
    if folder is None:
        simulate_server(empty)
        return
    kept_in = Path(folder) / "event_twin"
    keep_compiled(simulate_server, kept_in)
    with locked_folder(Path(folder)) if Path(folder).is_dir() else contextlib.nullcontext():
        try:
            simulate_server(empty)
        except Exception:
            shutil.rmtree(kept_in, ignore_errors=True)
            simulate_server(empty)
