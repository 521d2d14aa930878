"""A small server and its workloads, given in plain numbers, for tests that need one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, LoadCosts, LoraKernels, StepCosts
from lora_capacity.hardware import Gpu
from lora_capacity.memory import MemoryModel
from lora_capacity.models import ModelShape
from lora_capacity.run.compile import IN_ONE_PIECE, in_one_piece
from lora_capacity.run.steady import run_steady
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import LengthDistribution

LLAMA_8B = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, False, 131072, "LlamaForCausalLM")
MEMORY = MemoryModel(700e6, 200e6, 14.0, 250e6, 100e6)
LENGTHS = LengthDistribution.from_moments(200.0, 200.0, 4, 1024)
STEP = {"base_s": 0.01, "token_s": 4e-5, "kv_token_s": 6e-8, "adapter_s": 2e-4, "adapter_rank_s": 4e-6}
KERNELS = {"expand_block_s": 1.5e-9, "shrink_block_s": 2e-10, "skipped_request_s": 4e-7}
LOADS = {"host_to_gpu_load_s": 0.01, "disk_s": 0.045, "disk_rank_s": 0.003}


def make_costs(kernels: LoraKernels | None = None, /, **given: float) -> Costs:
    """Costs in which every coefficient that is not given is 0; kernels of the 8B model, unless given."""
    names = {cls: [field.name for field in dataclasses.fields(cls)] for cls in (StepCosts, LoadCosts)}
    assert set(given) <= {name for group in names.values() for name in group}
    step, loads = ({name: given.get(name, 0.0) for name in group} for group in names.values())
    return Costs(step=StepCosts(**step), loads=LoadCosts(**loads), kernels=kernels or LoraKernels.of_model(LLAMA_8B))


COSTS = make_costs(**STEP, **KERNELS, **LOADS)


def make_calibration(**changes: Any) -> Calibration:
    """A calibration of an 8B model on an 80 GiB GPU."""
    content: dict[str, Any] = {
        "name": "example",
        "model": LLAMA_8B,
        "gpu": Gpu("H100", 80 * BYTES_PER_GIB),
        "vllm_version": "0.8.5",
        "costs": COSTS,
        "memory": MEMORY,
        "fitted_ranges": {"adapters": (8.0, 384.0), "max_loras": (4.0, 384.0)},
        "capacity_error": 0.05,
    }
    return Calibration(**(content | changes))


def make_scenarios(count: Any, rate_per_s: Any, **changes: Any) -> Scenarios:
    """Configurations of a server without bounds that matter, over a horizon without end; ``[configs]`` broadcast.

    Args:
        count: Adapters of each class, ``[classes]`` or ``[configs, classes]``.
        rate_per_s: Rate of an adapter of each class, likewise.
        **changes: Other fields of `Scenarios`.
    """
    fields = {
        "base_rate_per_s": 0.0,
        "mean_input_tokens": 250.0,
        "mean_output_tokens": 200.0,
        "kv_tokens_per_request": 450.0,
        "horizon_s": 1e5,
        "max_pending": np.inf,
        "max_loras": np.sum(count, axis=-1),
        "max_lora_rank": 16.0,
        "max_num_seqs": 1e5,
        "max_num_batched_tokens": 1e6,
        "kv_cache_tokens": 1e8,
        "block_size": 16,
        "status": Status.OK,
        "arrival_cv": 1.0,
    } | {name: value for name, value in changes.items() if name != "class_rank"}
    columns = np.broadcast_arrays(*map(np.atleast_1d, fields.values()), np.ones(np.shape(count)[:-1]))[:-1]
    shape = (columns[0].size, np.shape(count)[-1])
    classes = {
        "class_count": count,
        "class_rate_per_s": rate_per_s,
        "class_rank": changes.get("class_rank", 16.0),
    }
    values = {name: np.broadcast_to(value, shape) for name, value in classes.items()}
    values |= dict(zip(fields, columns, strict=True))
    whole = {name: jnp.asarray(np.asarray(values.pop(name), dtype=np.int32)) for name in ("block_size", "status")}
    return Scenarios(**{name: jnp.asarray(np.asarray(value, dtype=float)) for name, value in values.items()}, **whole)


STAYS = ResidenceTime.of_lengths(LENGTHS)


def simulate(scenarios: Scenarios, costs: Costs = COSTS, stays: ResidenceTime = STAYS) -> Results:
    """What the steady twin predicts, by the program that the runner compiles for every number of configurations."""
    return run_steady(costs, scenarios, stays)


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an event twin as the runner does on a CPU, but without optimization, which short runs do not repay."""
    options = dict(IN_ONE_PIECE) | {"xla_backend_optimization_level": 0}
    compiled: Callable[..., Any] = jax.jit(in_one_piece(function), compiler_options=options)
    return compiled
