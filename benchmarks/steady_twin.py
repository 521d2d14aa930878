"""How fast the steady twin is: configurations per second against batch size, compiling and running apart.

python benchmarks/steady_twin.py --json results.json
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import REPOSITORY, environment

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.run import simulate
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.search import recommend
from lora_capacity.twins.steady import ResidenceTime, simulate_steady
from lora_capacity.workload import Workload

EXAMPLES = ("few_busy", "many_idle", "mixed_ranks")
BATCHES = (1, 16, 256, 1024, 4096, 16384)
SWEEP = 65536
BASELINE = 200
REPEATS = 5
ITERATIONS = 60


def main() -> None:
    """Run everything, print a table and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="llama-3.1-8b-instruct-h100-64gb")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    calibration = load_calibration(arguments.calibration)
    workload = Workload.from_file(REPOSITORY / "examples" / "many_idle.yaml")
    stays = ResidenceTime.of_lengths(workload.output_tokens)
    scenarios = pack_scenarios(workload, calibration, SWEEP)
    figures: dict[str, Any] = {"environment": environment("jax", "jaxlib", "numpy"), "calibration": calibration.name}
    figures["one_device"] = [time_batch(calibration, scenarios, stays, size) for size in BATCHES]
    figures["sweep"] = time_sweep(calibration, scenarios, stays)
    figures["optimize"] = [time_optimize(calibration, name) for name in EXAMPLES]
    figures["baseline"] = time_baseline(calibration, scenarios)
    figures["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def pack_scenarios(workload: Workload, calibration: Calibration, configs: int) -> Scenarios:
    """Random adapters and slots of one workload."""
    rng = np.random.default_rng(0)
    adapters = rng.integers(1, 385, configs)
    return build_scenarios(workload, calibration, adapters, np.minimum(rng.integers(1, 129, configs), adapters))


def best_s(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Shortest of several runs: other load on the machine only ever adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def time_batch(calibration: Calibration, scenarios: Scenarios, stays: ResidenceTime, size: int) -> dict[str, float]:
    """One compiled call on one device."""
    batch = jax.tree.map(lambda values: values[:size], scenarios)
    start = time.perf_counter()
    compiled = jax.jit(simulate_steady).lower(calibration.costs, batch, stays).compile()
    compile_s = time.perf_counter() - start
    run_s = best_s(lambda: jax.block_until_ready(compiled(calibration.costs, batch, stays)))
    return rates(size, compile_s, run_s)


def time_sweep(calibration: Calibration, scenarios: Scenarios, stays: ResidenceTime) -> dict[str, float]:
    """A sweep in chunks, on all cores or devices, copies to and from them included."""
    few = jax.tree.map(lambda values: values[:1], scenarios)
    start = time.perf_counter()
    simulate(calibration, few, stays)
    compile_s = time.perf_counter() - start
    return rates(SWEEP, compile_s, best_s(lambda: simulate(calibration, scenarios, stays)))


def time_optimize(calibration: Calibration, name: str) -> dict[str, Any]:
    """A whole search, first and again."""
    workload = Workload.from_file(REPOSITORY / "examples" / f"{name}.yaml")
    start = time.perf_counter()
    found = recommend(workload, calibration, engine="steady")
    first_s = time.perf_counter() - start
    again_s = best_s(lambda: recommend(workload, calibration, engine="steady"), 3)
    return {"workload": name, "first_s": first_s, "again_s": again_s, "looked_at": sum(found.counts.values())}


def time_baseline(calibration: Calibration, scenarios: Scenarios) -> dict[str, float]:
    """The crude fixed point below, one configuration at a time."""
    host = jax.tree.map(np.asarray, scenarios)
    rows = [{name: getattr(host, name)[i] for name in vars(host)} for i in range(BASELINE)]
    step = {name: float(value) for name, value in vars(calibration.costs.step).items()}
    return rates(BASELINE, 0.0, best_s(lambda: [fixed_point(step, row) for row in rows], 3))


def fixed_point(step: dict[str, float], config: dict[str, Any]) -> float:
    """A crude balance in plain Python and NumPy: no slot cycle, no queue, no loads, no horizon; tokens per second."""
    count, rate = config["class_count"], config["class_rate_per_s"]
    total_per_s = float((count * rate).sum() + config["base_rate_per_s"])
    inflation = 1.0 + config["mean_input_tokens"] / config["mean_output_tokens"]
    most = min(
        config["kv_cache_tokens"] / config["kv_tokens_per_request"],
        config["max_num_batched_tokens"] / inflation,
        config["max_num_seqs"],
    )
    step_s = step["base_s"]
    running = 0.0
    for _ in range(ITERATIONS):
        stay_s = config["mean_output_tokens"] * step_s
        running = min(total_per_s * stay_s, most)
        wanted = float((count * -np.expm1(-rate * stay_s)).sum())
        active = min(wanted, config["max_loras"], running)
        running *= min(1.0, config["max_loras"] / max(wanted, 1e-9))
        per_adapter = step["adapter_s"] + step["adapter_rank_s"] * config["max_lora_rank"]
        target = step["base_s"] + step["token_s"] * running * inflation + per_adapter * active
        target += step["kv_token_s"] * running * config["kv_tokens_per_request"]
        step_s = math.sqrt(step_s * target)
    per_request = config["mean_input_tokens"] + config["mean_output_tokens"]
    return float(running / (config["mean_output_tokens"] * step_s) * per_request)


def rates(configs: int, compile_s: float, run_s: float) -> dict[str, float]:
    """Figures of one measurement."""
    return {
        "configs": configs,
        "compile_s": compile_s,
        "run_s": run_s,
        "configs_per_s": configs / run_s,
        "compile_share": compile_s / (compile_s + run_s),
    }


def report(figures: dict[str, Any]) -> None:
    """Print the figures."""
    where = figures["environment"]
    machine = (
        f"{where['device_kind']} x {len(where['devices'])}, {where['cores']} cores, load {where['load_average']:.1f}"
    )
    print(machine, *(f"{name} {number}" for name, number in where["versions"].items()), where["commit"], sep="; ")
    print(f"\n{'':24}{'configs':>9}{'compile s':>11}{'run s':>9}{'configs/s':>11}{'compiling':>11}")
    rows = [("one device, one call", row) for row in figures["one_device"]]
    rows += [("sweep, every core", figures["sweep"]), ("plain Python, crude", figures["baseline"])]
    for name, row in rows:
        print(f"{name:24}{row['configs']:9}{row['compile_s']:11.2f}{row['run_s']:9.4f}", end="")
        print(f"{row['configs_per_s']:11.0f}{row['compile_share']:11.1%}")
    print()
    for row in figures["optimize"]:
        times = f"{row['first_s']:.2f} s, again {row['again_s']:.2f} s"
        print(f"optimize {row['workload']}: {times}, {row['looked_at']} configurations looked at")
    print(f"peak memory {figures['peak_memory_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
