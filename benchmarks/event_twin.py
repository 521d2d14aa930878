"""How fast the event twin is: an hour of serving per configuration, light and overloaded ones mixed.

python benchmarks/event_twin.py --json results.json
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import REPOSITORY, environment

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.run import LengthSample, simulate
from lora_capacity.run.batches import Batches, Observation, bytes_per_configuration
from lora_capacity.run.compile import compiled_twin
from lora_capacity.run.requests import draw_requests
from lora_capacity.scenarios import Scenarios, pack_scenarios
from lora_capacity.status import Status
from lora_capacity.twins.events import simulate_events
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import LengthDistribution, Requests

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
    (adapters, slots) for adapters in range(32, 385, 32) for slots in (8, 16, 32, 64, 96, 128, 192) if slots <= adapters
)
MAX_PENDING = 26_000
REFERENCE_S = 300.0


def main() -> None:
    """Run everything, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="llama-3.1-8b-instruct-h100-64gb")
    parser.add_argument("--configs", type=int, default=384, help="configurations in all")
    parser.add_argument("--horizon-s", type=float, default=3600.0, help="time served")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    calibration = load_calibration(arguments.calibration)
    figures: dict[str, Any] = {"environment": environment("jax", "jaxlib", "numpy"), "calibration": calibration.name}
    figures["mix"] = time_play(calibration, mix(calibration, arguments.configs, arguments.horizon_s))
    figures["compile"] = compiled(calibration, mix(calibration, 64, arguments.horizon_s))
    figures["against_reference"] = time_reference(calibration)
    figures["growth"] = growth(calibration)
    text = json.dumps(figures, indent=2, default=str)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


def mix(calibration: Calibration, configs: int, horizon_s: float) -> Scenarios:
    """Return configurations that start: idle ones and hopeless ones, few adapters and many."""
    every = [(rates, adapters, slots) for rates in RATES_PER_S for adapters, slots in GRID]
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, configs).astype(int)]
    rates, adapters, slots = (np.array([row[column] for row in chosen]) for column in range(3))
    return started(calibration, rates, adapters, slots, horizon_s)


def started(
    calibration: Calibration, rates_per_s: np.ndarray, adapters: np.ndarray, slots: np.ndarray, horizon_s: float
) -> Scenarios:
    """Return those of the configurations that start."""
    inputs, outputs = length_pairs()
    scenarios = pack_scenarios(
        calibration,
        class_count=np.stack([np.bincount(np.arange(count) % 3, minlength=3) for count in adapters]),
        class_rate_per_s=rates_per_s,
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
    starts = np.asarray(scenarios.status) <= Status.OUTSIDE_CALIBRATION
    chosen: Scenarios = jax.tree.map(lambda leaf: np.asarray(leaf)[starts], scenarios)
    return chosen


def time_play(calibration: Calibration, scenarios: Scenarios) -> dict[str, float]:
    """Play the configurations as a sweep does, drawing of requests included, once everything is compiled."""
    inputs, outputs = length_pairs()
    start = time.perf_counter()
    simulate(calibration, scenarios, LengthSample(inputs, outputs), engine="event", seed=1)
    first_s = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    played = simulate(calibration, scenarios, LengthSample(inputs, outputs), engine="event")
    run_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    configs, turns = len(scenarios.status), np.asarray(played.events.iterations)
    stays = ResidenceTime.of_lengths(LengthDistribution.from_histogram(*np.unique(outputs, return_counts=True)))
    steady = simulate(calibration, scenarios, stays)
    plan = Batches.plan(calibration, scenarios, steady, int(outputs.max()), Observation())
    batches = plan.cut(np.ones(configs, dtype=bool))
    pieces = [rows for batch in batches for rows in batch.pieces()]
    sizes = [bytes_per_configuration(batch.requests, batch.adapters, plan.longest_output) for batch in batches]
    return {
        "configs": configs,
        "horizon_s": float(scenarios.horizon_s[0]),
        "at_a_time": batches[0].width,
        "cores": plan.at_once,
        "first_s": first_s,
        "run_s": run_s,
        "ms_per_config": 1e3 * run_s / configs,
        "core_ms_per_config": 1e3 * cpu_s / configs,
        "turns_per_config": float(turns.mean()),
        "waste": 1.0 - float(turns.sum() / sum(batches[0].width * turns[rows].max() for rows in pieces)),
        "memory_mb_per_config": float(np.mean(np.repeat(sizes, [batch.rows.size for batch in batches]))) / 1e6,
        "largest_mb": max(sizes) / 1e6,
        "broken_off": int((np.asarray(played.status) == Status.STEP_LIMIT).sum()),
    }


def compiled(calibration: Calibration, scenarios: Scenarios) -> dict[str, Any]:
    """How long compiling takes, and what XLA counts for a turn of a batch, on which an estimate can stand."""
    inputs, outputs = length_pairs()
    took = []
    for _ in range(2):
        start = time.perf_counter()
        simulate(
            calibration, jax.tree.map(lambda leaf: leaf[:1], scenarios), LengthSample(inputs, outputs), engine="event"
        )
        took.append(time.perf_counter() - start)
    tables = draw_requests(scenarios, inputs, outputs, seed=0, most=1024).tables
    cost = jax.jit(simulate_events).lower(calibration.costs, scenarios, tables).compile().cost_analysis()
    return {
        "configs": len(scenarios.status),
        "compile_s": took[0] - took[1],
        "turn_flops_per_config": cost.get("flops", 0.0) / len(scenarios.status),
        "turn_bytes_per_config": cost.get("bytes accessed", 0.0) / len(scenarios.status),
    }


def growth(calibration: Calibration) -> list[dict[str, Any]]:
    """How time grows with the horizon, with the adapters at equal load, and with the load: exponents of a power law."""
    configs = 32
    rate = np.array([[0.1, 0.1, 0.1]])

    def case(adapters: int, slots: int, per_adapter: float, horizon_s: float) -> Scenarios:
        return started(
            calibration,
            np.repeat(rate * per_adapter / 0.1, configs, axis=0),
            np.full(configs, adapters),
            np.full(configs, slots),
            horizon_s,
        )

    series = {
        "horizon_s": [(x, case(96, 32, 0.1, x)) for x in (900.0, 1800.0, 3600.0)],
        "adapters": [(x, case(x, 32, 9.6 / x, 1800.0)) for x in (48, 96, 192, 384)],
        "requests_per_s": [(96 * x, case(96, 32, x, 1800.0)) for x in (0.025, 0.05, 0.1, 0.2)],
    }
    rows = []
    for name, points in series.items():
        took = [(float(x), time_play(calibration, scenarios)["ms_per_config"]) for x, scenarios in points]
        exponent = float(np.polyfit(*np.log(np.array(took)).T, 1)[0])
        rows.append({"along": name, "ms_per_config": dict(took), "exponent": exponent})
    return rows


def length_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Lengths with the moments of the published runs, independent."""
    rng = np.random.default_rng(0)
    laws = (LengthDistribution.from_moments(*moments, 4, 1024) for moments in ((223.0, 248.0), (197.0, 207.0)))
    inputs, outputs = (law.sample(rng, 4096) for law in laws)
    return inputs, outputs


def time_reference(calibration: Calibration) -> dict[str, float]:
    """The plain-Python scheduler on some of the configurations, and the twin on the same requests."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.reference.scheduler import Config, StepState
    from tests.reference.scheduler import simulate as simulate_plainly

    scenarios = mix(calibration, 72, REFERENCE_S)
    batch = len(scenarios.status)
    tables = draw_requests(scenarios, *length_pairs(), seed=0, most=50_000).tables
    run = compiled_twin(calibration.behaviour.scheduler, 16, 0)
    seconds, twin_s = {}, {}
    for i in range(0, batch, 16):
        host = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], scenarios)
        for _ in range(2):  # the first compiles
            one: Any = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i : i + 1], (scenarios, tables))
            start = time.process_time()
            jax.block_until_ready(run(calibration.costs, np.float32(0.0), *one))
            twin_s[i] = time.process_time() - start
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
                + step["skipped_request_s"] * state.passed_over
            )

        config = Config(
            max_num_seqs=2048,
            max_num_batched_tokens=2048,
            max_loras=int(host.max_loras),
            max_cpu_loras=int(host.class_count.sum()),
            kv_blocks=int(host.kv_cache_tokens) // 16 - 1,
        )
        start = time.process_time()
        simulate_plainly(
            Requests(arrival_s, adapter, inputs, outputs),
            config,
            duration_s,
            max_pending=MAX_PENDING,
            horizon_s=REFERENCE_S,
        )
        seconds[i] = time.process_time() - start
    return {
        "horizon_s": REFERENCE_S,
        "reference_s_per_config": sum(seconds.values()) / len(seconds),
        "twin_s_per_config": sum(twin_s.values()) / len(seconds),
        "times_faster": sum(seconds.values()) / sum(twin_s.values()),
    }


if __name__ == "__main__":
    main()
