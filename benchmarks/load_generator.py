"""What the load generator itself takes, against a server without a model: it must not be what is measured.

python benchmarks/load_generator.py --json results.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environment import REPOSITORY, environment
from lora_capacity_profiling.load import run_load
from lora_capacity_profiling.material import write_model
from lora_capacity_profiling.metrics import Snapshot
from lora_capacity_profiling.server import Server

from lora_capacity.units import MS_PER_S
from lora_capacity.workload import Workload

FAKE = REPOSITORY / "tests" / "unit" / "profiling" / "fake"
ADAPTERS = 32
RATES_PER_S = (1, 10, 40, 160)
STEP_S = 0.01
DURATION_S = 20.0
US_PER_S = 1e6


def main() -> None:
    """Run everything, print a table and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        measure(server, RATES_PER_S[0])  # connections and code that are new
        figures = {
            "environment": environment("numpy"),
            "adapters": ADAPTERS,
            "step_s": STEP_S,
            "duration_s": DURATION_S,
        }
        figures["runs"] = [measure(server, rate) for rate in RATES_PER_S]
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def serve(folder: Path) -> Server:
    """Start the server of the tests: it sends a token a step to every request, one by one, and computes nothing."""
    return Server.launch(
        write_model(folder / "tiny", num_hidden_layers=1),
        {"enable_lora": True, "lora_modules": [f"a{index}=x" for index in range(ADAPTERS)]},
        log=folder / "log",
        environment={"PYTHONPATH": str(FAKE), "FAKE_VLLM": "ok", "FAKE_VLLM_STEP_S": str(STEP_S)},
    )


def measure(server: Server, rate_per_s: float) -> dict[str, float]:
    """Send Poisson requests of all adapters; compare what the client saw with what the server says."""
    workload = Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": [rate_per_s / ADAPTERS], "ranks": [8]}},
            "requests": {
                "input_tokens": {"mean": 223, "std": 200, "min": 4, "max": 1024},
                "output_tokens": {"mean": 50, "std": 20, "min": 4, "max": 200},
            },
            "horizon_s": DURATION_S,
        }
    )
    names = [f"a{index}" for index in range(ADAPTERS)]
    before = Snapshot.of(server.endpoint)
    requests = workload.sample_requests(ADAPTERS, seed=1)
    # Longer than the last request takes, so that the server's means are of the same requests.
    result = run_load(server.endpoint, requests, names, base_model="fake", duration_s=4 * DURATION_S)
    after = Snapshot.of(server.endpoint)
    row, tokens = result.summary(), int(requests.output_tokens.sum())
    return {
        "requests_per_s": len(requests) / DURATION_S,
        "tokens_per_s": tokens / DURATION_S,
        "failed": sum(result.failures.values()),
        "core_share": result.cpu_s / result.duration_s,
        "us_per_token": US_PER_S * result.cpu_s / tokens,
        "lag_median_ms": MS_PER_S * float(np.median(result.lag_s)),
        "lag_p99_ms": MS_PER_S * float(np.percentile(result.lag_s, 99)),
        "itl_client_ms": row["mean_itl_ms"],
        "itl_server_ms": MS_PER_S * after.itl.since(before.itl).mean_s,
        "ttft_client_ms": row["mean_ttft_ms"],
        "ttft_server_ms": MS_PER_S * after.ttft.since(before.ttft).mean_s,
    }


def report(figures: dict[str, Any]) -> None:
    """Print the figures."""
    where = figures["environment"]
    print(f"{where['machine']}, {where['cores']} cores, load {where['load_average']:.1f}, Python {where['python']}")
    print(
        f"the server's step takes {MS_PER_S * STEP_S:g} ms; latencies as the client saw them, and as the server did\n"
    )
    heads = (
        "requests/s",
        "tokens/s",
        "of a core",
        "µs/token",
        "late, ms",
        "99 %",
        "ITL ms",
        "server",
        "TTFT ms",
        "server",
    )
    print("".join(f"{head:>12}" for head in heads))
    for row in figures["runs"]:
        cells = [
            f"{row['requests_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['core_share']:.1%}",
            f"{row['us_per_token']:.0f}",
            f"{row['lag_median_ms']:.2f}",
            f"{row['lag_p99_ms']:.2f}",
            *(f"{row[f'{name}_{who}_ms']:.2f}" for name in ("itl", "ttft") for who in ("client", "server")),
        ]
        print("".join(f"{cell:>12}" for cell in cells))
        if row["failed"]:
            sys.exit(f"{row['failed']} requests failed")


if __name__ == "__main__":
    main()
