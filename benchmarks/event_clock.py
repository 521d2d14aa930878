"""What the event twin's clock of whole ticks does to an hour of serving, against a clock in double precision.

python benchmarks/event_clock.py --json docs/data/event_clock.json

The twin counts time in ticks of a 2^30th of the horizon, 3.4 µs of an hour, with step times in single precision;
the plain-Python reference serves the same requests with both in double precision.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import REPOSITORY, environment

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.costs import step_time_s
from lora_capacity.run.requests import pack_requests
from lora_capacity.scenarios import build_scenarios
from lora_capacity.twins.events import simulate_events
from lora_capacity.workload import Workload

sys.path.insert(0, str(REPOSITORY))
from tests.reference.scheduler import Config, Simulation, StepState, simulate

CONFIGURATIONS = ((8, 8), (12, 8))
"""Adapters and slots: enough slots, and too few of them."""


def main() -> None:
    """Serve the same requests by both, print the differences and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", default="llama-3.1-8b-instruct-h100-64gb")
    parser.add_argument("--workload", type=Path, default=REPOSITORY / "examples" / "few_busy.yaml")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    calibration, workload = load_calibration(arguments.calibration), Workload.from_file(arguments.workload)
    figures = [compare(calibration, workload, *each) for each in CONFIGURATIONS]
    print(json.dumps(figures, indent=1))
    if arguments.json is not None:
        whole = {"environment": environment("jax", "jaxlib", "numpy"), "calibration": calibration.name}
        whole |= {"workload": arguments.workload.name, "configurations": figures}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


def compare(calibration: Calibration, workload: Workload, adapters: int, max_loras: int) -> dict[str, Any]:
    """Return what both say of one configuration."""
    scenarios = build_scenarios(workload, calibration, [adapters], [max_loras])
    requests = workload.sample_requests(adapters, 0)
    ranks = workload.adapters.deal(adapters)[1]
    rates_and_ranks = np.stack(workload.adapters.deal(adapters), axis=1)
    _, classes = np.unique(rates_and_ranks, axis=0, return_inverse=True)
    tables = pack_requests(scenarios, [requests], [classes.reshape(-1)], seed=None)
    found = jax.jit(simulate_events)(calibration.costs, scenarios, tables)
    host: Any = jax.tree.map(lambda leaf: float(np.asarray(leaf)[0]), scenarios_of_one(scenarios))
    horizon_s = host["horizon_s"]
    config = Config(
        max_num_seqs=int(host["max_num_seqs"]),
        max_num_batched_tokens=int(host["max_num_batched_tokens"]),
        max_loras=max_loras,
        max_cpu_loras=adapters,
        kv_blocks=int(host["kv_cache_tokens"]) // 16 - 1,
    )
    with jax.enable_x64(True):
        duration_s = StepTime(calibration, max_loras, host["max_lora_rank"], ranks)
        right = simulate(requests, config, duration_s, max_pending=int(host["max_pending"]), horizon_s=horizon_s)
    ours = {
        "throughput_tokens_per_s": float(found.throughput_tokens_per_s[0]),
        "ttft_s": float(found.ttft_s[0]),
        "itl_s": float(found.itl_s[0]),
        "steps": float(found.events.steps[0]),
    }
    theirs = measured(right, requests, horizon_s)
    difference = {name: ours[name] / theirs[name] - 1.0 for name in ours}
    return {"adapters": adapters, "max_loras": max_loras, "ticks": ours, "double": theirs, "difference": difference}


def scenarios_of_one(scenarios: Any) -> dict[str, Any]:
    """Return the settings that are numbers, by name."""
    names = ("horizon_s", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens", "max_pending", "max_lora_rank")
    return {name: getattr(scenarios, name) for name in names}


class StepTime:
    """Duration of the reference's steps by the calibration's costs."""

    def __init__(self, calibration: Calibration, max_loras: int, max_lora_rank: float, ranks: Any) -> None:
        """Compile for one server."""
        costs = calibration.costs
        self.step_s = jax.jit(partial(step_time_s, costs, max_loras=float(max_loras), max_lora_rank=max_lora_rank))
        self.loads, self.ranks = costs.loads, ranks
        self.decoding: set[int] = set()

    def __call__(self, state: StepState) -> float:
        """Return the duration of a step, loads included."""
        self.decoding -= set(state.preempted)
        prefill = sum(tokens for number, tokens in state.scheduled.items() if number not in self.decoding)
        self.decoding |= set(state.sampling)
        compute_s = self.step_s(
            tokens=float(state.tokens),
            prefill_tokens=float(prefill),
            kv_tokens=float(state.kv_tokens),
            adapters=float(len(state.adapters)),
            skipped=float(state.passed_over),
        )
        disk_s = sum(self.loads.disk_s + self.loads.disk_rank_s * self.ranks[i] for i in state.disk_loads)
        return float(compute_s) + float(self.loads.host_to_gpu_load_s) * len(state.host_loads) + float(disk_s)


def measured(result: Simulation, requests: Any, horizon_s: float) -> dict[str, float]:
    """Return the reference's results as the twin defines them."""
    done = result.finished_s <= horizon_s
    tokens = (requests.input_tokens + requests.output_tokens)[done].sum()
    first = np.isfinite(result.first_token_s)
    whole = done & (requests.output_tokens > 1)
    gaps = (result.finished_s - result.first_token_s)[whole].sum() / (requests.output_tokens - 1)[whole].sum()
    return {
        "throughput_tokens_per_s": float(tokens / horizon_s),
        "ttft_s": float(np.mean((result.first_token_s - result.sent_s)[first])),
        "itl_s": float(gaps),
        "steps": float(len(result.steps)),
    }


if __name__ == "__main__":
    main()
