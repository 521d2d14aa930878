"""How fast the event twin is: an hour of serving per configuration, light and overloaded ones mixed.

python benchmarks/event_twin.py --json results.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.status import Status
from lora_capacity.twin import Scenarios, StayLaw, lay_out, simulate_steady
from lora_capacity.twin.events import RequestTables, draw_requests, simulate_events
from lora_capacity.workload import LengthDistribution, Requests

REPOSITORY = Path(__file__).parents[1]
RATES_PER_S = (
    (0.1, 0.05, 0.025),
    (1.6, 0.8, 0.4),
    (0.05, 0.0125, 0.003125),
    (0.4, 0.05, 0.0125),
    (0.4, 0.05, 0.025),
    (0.8, 0.4, 0.05),
    (3.2, 1.6, 0.025),
)
"""Rates of the adapters in the published scenarios (arXiv 2508.08343)."""

GRID = tuple(
    (adapters, slots) for adapters in (32, 96, 192, 384) for slots in (8, 16, 32, 96, 192) if slots <= adapters
)
MAX_PENDING, MOST_REQUESTS = 26_000, 180_000
REFERENCE_S = 300.0


def main() -> None:
    """Run everything, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="llama-3.1-8b-instruct-h100-64gb")
    parser.add_argument("--configs", type=int, default=128, help="configurations in all")
    parser.add_argument("--batch", type=int, default=64, help="configurations in a batch")
    parser.add_argument("--horizon-s", type=float, default=3600.0, help="time served")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    calibration = load_calibration(arguments.calibration)
    figures: dict[str, Any] = {"environment": environment(), "calibration": calibration.name} | vars(arguments)
    batches = laid_out(calibration, arguments.configs, arguments.batch, arguments.horizon_s)
    figures |= time_batches(calibration, batches)
    figures["against_reference"] = time_reference(calibration, arguments.batch)
    figures["horizons"] = [
        {"horizon_s": horizon_s}
        | time_batches(calibration, laid_out(calibration, arguments.batch, arguments.batch, horizon_s))
        for horizon_s in (225.0, 450.0, 900.0)
    ]
    text = json.dumps(figures, indent=2, default=str)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


def laid_out(
    calibration: Calibration, configs: int, batch: int, horizon_s: float
) -> list[tuple[Scenarios, RequestTables]]:
    """Batches of configurations that start, those of like work together: a batch lasts as long as its longest."""
    every = [(rates, adapters, slots) for rates in RATES_PER_S for adapters, slots in GRID]
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, configs).astype(int)]
    inputs, outputs = length_pairs()
    adapters, slots = (np.array([row[column] for row in chosen]) for column in (1, 2))
    scenarios = lay_out(
        calibration,
        class_count=np.stack([np.bincount(np.arange(count) % 3, minlength=3) for count in adapters]),
        class_rate_per_s=np.array([row[0] for row in chosen]),
        class_rank=np.full((1, 3), 16.0),
        base_rate_per_s=0.0,
        mean_input_tokens=inputs.mean(),
        mean_output_tokens=outputs.mean(),
        kv_tokens_per_request=360.0,
        horizon_s=horizon_s,
        max_pending=MAX_PENDING,
        adapters=adapters,
        max_loras=slots,
        max_lora_rank=16,
        max_num_seqs=2048,
        max_num_batched_tokens=2048,
    )
    order = np.argsort(-predicted_turns(calibration, scenarios, outputs))
    order = order[np.asarray(scenarios.status)[order] <= Status.OUTSIDE_CALIBRATION]
    parts = []
    for first in range(0, len(order), batch):
        rows = np.resize(order[first : first + batch], batch)
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], scenarios)
        parts.append((part, draw_requests(part, inputs, outputs, seed=first, most=MOST_REQUESTS)))
    return parts


def length_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Lengths with the moments of the published runs, independent."""
    rng = np.random.default_rng(0)
    laws = (LengthDistribution.from_moments(*moments, 4, 1024) for moments in ((223.0, 248.0), (197.0, 207.0)))
    inputs, outputs = (law.sample(rng, 4096) for law in laws)
    return inputs, outputs


def predicted_turns(calibration: Calibration, scenarios: Scenarios, outputs: np.ndarray) -> np.ndarray:
    """Turns per second by the steady twin: a step, or an admission."""
    tokens, count = np.unique(outputs, return_counts=True)
    stays = StayLaw.of_lengths(LengthDistribution.from_histogram(tokens, count))
    settled = jax.jit(simulate_steady)(calibration.costs, scenarios, stays)
    return np.nan_to_num(np.asarray(1.0 / settled.step_time_s + settled.completed_per_s))


def time_batches(calibration: Calibration, batches: list[tuple[Scenarios, RequestTables]]) -> dict[str, Any]:
    """All batches, one on each core at a time; compiling apart."""
    start = time.perf_counter()
    shapes = {}
    for batch in batches:
        shapes.setdefault(str(jax.tree.map(np.shape, batch)), batch)
    compiled = {
        shape: jax.jit(simulate_events).lower(calibration.costs, *batch).compile() for shape, batch in shapes.items()
    }
    compile_s = (time.perf_counter() - start) / len(compiled)

    def play(batch: tuple[Scenarios, RequestTables]) -> Any:
        run = compiled[str(jax.tree.map(np.shape, batch))]
        return jax.block_until_ready(run(calibration.costs, *batch))

    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(play, batches))
    run_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    configs = sum(batch[0].horizon_s.shape[0] for batch in batches)
    turns = np.concatenate([np.asarray(result.turns) for result in results])
    memory = [run.memory_analysis() for run in compiled.values()]
    size = batches[0][0].horizon_s.shape[0]
    return {
        "configs": configs,
        "compile_s": compile_s,
        "run_s": run_s,
        "ms_per_config": 1e3 * run_s / configs,
        "core_ms_per_config": 1e3 * cpu_s / configs,
        "turns_per_config": float(turns.mean()),
        "core_us_per_turn": 1e6 * cpu_s / float(turns.sum()),
        "memory_mb_per_config": max(m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory) / size / 1e6,
        "broken_off": int(sum((np.asarray(r.settled.status) == Status.STEP_LIMIT).sum() for r in results)),
    }


def time_reference(calibration: Calibration, batch: int) -> dict[str, float]:
    """The plain-Python scheduler on some of the configurations, and the twin on the same requests."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.reference.scheduler import Config, StepState, simulate

    ((scenarios, tables),) = laid_out(calibration, batch, batch, REFERENCE_S)
    run = jax.jit(simulate_events).lower(calibration.costs, scenarios, tables).compile()
    start = time.process_time()
    turns = np.asarray(jax.block_until_ready(run(calibration.costs, scenarios, tables)).turns)
    twin_s = time.process_time() - start
    seconds = {}
    for i in range(0, batch, 16):
        host = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], scenarios)
        count = int(tables.arrived[i].sum())
        adapter, inputs, outputs = np.asarray(tables.table)[i, :count].T
        arrival_s = np.asarray(tables.arrival)[i, :count] * (REFERENCE_S / 2**30)
        step = {name: float(value) for name, value in vars(calibration.costs.step).items()}

        def duration_s(state: StepState, step: dict[str, float] = step) -> float:
            return (
                step["base_s"]
                + step["lora_s"]
                + step["token_s"] * state.tokens
                + step["kv_token_s"] * state.kv_tokens
                + step["adapter_s"] * len(state.adapters)
                + step["passed_over_s"] * state.passed_over
            )

        config = Config(
            max_num_seqs=2048,
            max_num_batched_tokens=2048,
            max_loras=int(host.max_loras),
            max_cpu_loras=int(host.class_count.sum()),
            kv_blocks=int(host.kv_cache_tokens) // 16 - 1,
        )
        start = time.process_time()
        simulate(
            Requests(arrival_s, adapter, inputs, outputs),
            config,
            duration_s,
            max_pending=MAX_PENDING,
            horizon_s=REFERENCE_S,
        )
        seconds[i] = time.process_time() - start
    rows = list(seconds)
    twin_share_s = twin_s * turns[rows].sum() / turns.sum()
    return {
        "horizon_s": REFERENCE_S,
        "reference_s_per_config": sum(seconds.values()) / len(rows),
        "twin_s_per_config": twin_share_s / len(rows),
        "times_faster": sum(seconds.values()) / twin_share_s,
    }


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        "devices": [str(device) for device in jax.devices()],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    main()
