"""How long commands take from the start of their process to their answer, cold and warm.

python benchmarks/commands.py --json results.json

Cold: the user's folder of what JAX and Numba compiled is empty. Warm: as the second time on the same day. Medians over
several runs; seconds of the processor count all cores, and memory is the most at any time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import REPOSITORY, environment

WORKLOAD = str(REPOSITORY / "examples" / "few_busy.yaml")
DERIVED = ("--model", "Qwen3-8B", "--gpu", "A100-80GB")
COMMANDS: dict[str, tuple[str, ...]] = {
    "--help": ("--help",),
    "memory": ("memory", *DERIVED, "--max-loras", "8", "--max-lora-rank", "16"),
    "optimize --engine steady": ("optimize", WORKLOAD, "--engine", "steady"),
    "optimize": ("optimize", WORKLOAD),
    "predict": ("predict", WORKLOAD),
    "simulate": ("simulate", WORKLOAD, "--adapters", "24", "--max-loras", "12"),
    "simulate --engine event": ("simulate", WORKLOAD, "--adapters", "24", "--max-loras", "12", "--engine", "event"),
}


def main() -> None:
    """Time all commands, print a table and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each, cold and warm")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    commands = [timed(name, command, arguments.runs) for name, command in COMMANDS.items()]
    # Only now: a process begins with the memory of the one that starts it, which JAX makes large.
    where = environment("jax", "jaxlib", "numba", "numpy") | {"load_average": load_average}
    found = {"environment": where, "runs": arguments.runs, "commands": commands}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def timed(name: str, command: tuple[str, ...], runs: int) -> dict[str, Any]:
    """Run a command cold, each time with a new cache, and as often again with what the last one kept."""
    told: dict[str, Any] = {"command": name}
    with tempfile.TemporaryDirectory() as folder:
        cold = [run(command, Path(folder) / str(i)) for i in range(runs)]
        warm = [run(command, Path(folder) / str(runs - 1)) for _ in range(runs)]
    for kind, rows in (("cold", cold), ("warm", warm)):
        told[kind] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    line = "  ".join(
        f"{kind} {told[kind]['seconds']:5.2f} s, {told[kind]['cpu_s']:5.2f} of CPU"
        for kind in told
        if kind != "command"
    )
    print(f"{name:26} {line}, {told['warm']['memory_mb']:,.0f} MB", flush=True)
    return told


def run(command: tuple[str, ...], cache: Path) -> dict[str, float]:
    """Return what one run takes; it must succeed."""
    began_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_capacity_cli", *command],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "memory_mb": used.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
