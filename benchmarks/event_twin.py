"""How fast the event twin is: an hour of serving per configuration, light and overloaded ones mixed.

python benchmarks/event_twin.py --json results.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import environment

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.run import LengthSample, simulate
from lora_capacity.run.compile import compiled_twin
from lora_capacity.run.compiled import build_server
from lora_capacity.run.requests import draw_requests
from lora_capacity.run.resources import available_cores
from lora_capacity.scenarios import Scenarios, pack_scenarios
from lora_capacity.status import Status
from lora_capacity.twins.compiled import simulate_server
from lora_capacity.twins.events import simulate_events
from lora_capacity.twins.events.requests import TICKS
from lora_capacity.twins.reference import Config, StepState
from lora_capacity.twins.reference import simulate as simulate_plainly
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
    figures: dict[str, Any] = {
        "environment": environment("jax", "jaxlib", "numba", "numpy"),
        "calibration": calibration.name,
    }
    figures["mix"] = time_play(calibration, mix(calibration, arguments.configs, arguments.horizon_s))
    figures["alone"] = time_alone(calibration, mix(calibration, 32, arguments.horizon_s))
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
    configs = len(scenarios.status)
    return {
        "configs": configs,
        "horizon_s": float(scenarios.horizon_s[0]),
        "cores": available_cores(),
        "first_s": first_s,
        "run_s": run_s,
        "ms_per_config": 1e3 * run_s / configs,
        "core_ms_per_config": 1e3 * cpu_s / configs,
        "turns_per_config": float(np.asarray(played.events.iterations).mean()),
        "broken_off": int((np.asarray(played.status) == Status.STEP_LIMIT).sum()),
    }


def time_alone(calibration: Calibration, scenarios: Scenarios) -> dict[str, Any]:
    """Time single servers, drawing left out: by the twin for processors, by the one in JAX, and what XLA counts.

    The latter is what an estimate for accelerators can stand on: operations and bytes of one turn.
    """
    rules, seconds, memory = calibration.behaviour.scheduler, {"processors": 0.0, "jax": 0.0}, []
    run = compiled_twin(rules, 16, 0)
    tables = draw_requests(scenarios, *length_pairs(), seed=0, most=50_000).tables
    configs = len(scenarios.status)
    for i in range(configs):
        one: Any = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i : i + 1], (scenarios, tables))
        host, own = jax.tree.map(lambda leaf: leaf[0], one)
        for _ in range(2):  # the first compiles
            start = time.process_time()
            jax.block_until_ready(run(calibration.costs, np.float32(0.0), *one))
            in_jax_s = time.process_time() - start
            server = build_server(calibration.costs, host, own, rules)
            memory.append(sum(array.nbytes for array in (*server, *jax.tree.leaves(own))))
            start = time.process_time()
            simulate_server(server)
            on_core_s = time.process_time() - start
        seconds["processors"] += on_core_s
        seconds["jax"] += in_jax_s
    cost = jax.jit(simulate_events).lower(calibration.costs, scenarios, tables).compile().cost_analysis()
    return {
        "configs": configs,
        "core_ms_per_config": {name: 1e3 * each / configs for name, each in seconds.items()},
        "memory_mb_per_config": float(np.mean(memory)) / 1e6,
        "largest_mb": max(memory) / 1e6,
        "turn_flops_per_config": cost.get("flops", 0.0) / configs,
        "turn_bytes_per_config": cost.get("bytes accessed", 0.0) / configs,
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
    scenarios = mix(calibration, 72, REFERENCE_S)
    tables = draw_requests(scenarios, *length_pairs(), seed=0, most=50_000).tables
    plain_s, twin_s = [], []
    for i in range(0, len(scenarios.status), 16):
        host, own = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], (scenarios, tables))
        count = int(own.arrived.sum())
        adapter, inputs, outputs = own.table[:count].T
        server = build_server(calibration.costs, host, own, calibration.behaviour.scheduler)
        start = time.process_time()
        simulate_server(server)
        twin_s.append(time.process_time() - start)
        config = Config(
            max_num_seqs=2048,
            max_num_batched_tokens=2048,
            max_loras=int(host.max_loras),
            max_cpu_loras=int(host.class_count.sum()),
            kv_blocks=int(host.kv_cache_tokens) // 16 - 1,
        )
        step: Any = calibration.costs.step

        def duration_s(state: StepState, step: Any = step) -> float:
            """Return about what a step takes: the lookup costs nothing worth timing."""
            return float(step.base_s + step.token_s * state.tokens + step.kv_token_s * state.kv_tokens)

        start = time.process_time()
        simulate_plainly(
            Requests(own.arrival[:count] / TICKS * REFERENCE_S, adapter, inputs, outputs),
            config,
            duration_s,
            max_pending=MAX_PENDING,
            horizon_s=REFERENCE_S,
        )
        plain_s.append(time.process_time() - start)
    return {
        "horizon_s": REFERENCE_S,
        "reference_s_per_config": sum(plain_s) / len(plain_s),
        "twin_s_per_config": sum(twin_s) / len(twin_s),
        "times_faster": sum(plain_s) / sum(twin_s),
    }


if __name__ == "__main__":
    main()
