"""Estimating a memory model from the KV cache that started servers reported."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from lora_capacity.hardware import Gpu
from lora_capacity.measurements import CapacityRows
from lora_capacity.memory import MemoryModel, MemoryPlan, plan_memory
from lora_capacity.memory.fitted import activation_bytes, other_bytes
from lora_capacity.models import ModelShape
from lora_capacity.units import BYTES_PER_GIB, BYTES_PER_MIB

_START = MemoryModel(
    other_bytes=0.75 * BYTES_PER_GIB,
    lora_kernel_bytes=0.2 * BYTES_PER_GIB,
    sampler_bytes_per_logit=14.0,
    compile_scratch_bytes=256 * BYTES_PER_MIB,
    cuda_graph_bytes_per_layer=100 * BYTES_PER_MIB,
)
_FITTED = ("other_bytes", "lora_kernel_bytes", "sampler_bytes_per_logit", "compile_scratch_bytes")
# Relative KV error that counts as much as a coefficient twice its starting value: only breaks ties among coefficients.
_PULL_TO_START = 1e-5
# Relative KV errors beyond this count less and less.
_OUTLIER = 2e-3


@dataclass(frozen=True)
class MemoryReport:
    """How well a memory model tells what servers reported.

    Attributes:
        started_rows: Rows with a reported KV cache.
        kv_mean_error: Mean over those of abs(predicted - reported) / reported.
        kv_max_error: Largest of those.
        startup_rows: All rows.
        startup_right: Rows of which the outcome of the start is told.
    """

    started_rows: int
    kv_mean_error: float
    kv_max_error: float
    startup_rows: int
    startup_right: int


def plan_rows(model: ModelShape, gpu: Gpu, memory: MemoryModel, rows: CapacityRows) -> MemoryPlan:
    """Plan the memory of every row's server."""
    return plan_memory(
        model,
        gpu,
        memory,
        behaviour=rows.behaviour,
        max_loras=rows.max_loras,
        max_lora_rank=rows.max_lora_rank,
        max_num_seqs=rows.max_num_seqs,
        max_num_batched_tokens=rows.max_num_batched_tokens,
        gpu_memory_utilization=rows.gpu_memory_utilization,
        max_model_len=rows.max_model_len,
        target_modules=rows.target_modules,
        block_size=rows.block_size,
    )


def score_memory(model: ModelShape, gpu: Gpu, memory: MemoryModel, rows: CapacityRows) -> MemoryReport:
    """Compare a memory model with rows, of the fit or held out."""
    plan = plan_rows(model, gpu, memory, rows)
    started = np.isfinite(rows.kv_cache_tokens)
    error = np.abs(plan.kv_cache_tokens[started] / rows.kv_cache_tokens[started] - 1)
    return MemoryReport(
        started_rows=int(started.sum()),
        kv_mean_error=float(error.mean()) if error.size else float("nan"),
        kv_max_error=float(error.max()) if error.size else float("nan"),
        startup_rows=rows.status.size,
        startup_right=int((plan.status == rows.status).sum()),
    )


def fit_memory(
    model: ModelShape, gpu: Gpu, rows: CapacityRows, *, kv_cache_is_given: bool = False
) -> tuple[MemoryModel, MemoryReport]:
    """Fit the memory model to reported KV caches by robust least squares; no coefficient is negative.

    Coefficients that the rows cannot tell apart stay near usual values: the sampler's bytes need rows that differ in
    ``max_num_seqs``, the LoRA kernels' rows with and without LoRA, the compiler's scratch rows of few sequences.

    Args:
        model: Layer shapes.
        gpu: Memory of the GPU.
        rows: At least one of a started server.
        kv_cache_is_given: Whether the servers were told the size of their KV cache, as those on a CPU always are: it is
            then the same whatever the slots, and nothing is to be learnt of what else takes memory.

    Returns:
        The model, and how well it tells the very rows it was fitted to.

    Raises:
        InputError: If no row has a KV cache.
    """
    started = rows.started()
    if kv_cache_is_given:
        given_bytes = float(np.median(started.kv_cache_tokens)) * model.kv_bytes_per_token
        memory = replace(_START, cuda_graph_bytes_per_layer=0.0, kv_cache_memory_bytes=given_bytes)
        return memory, score_memory(model, gpu, memory, rows)
    start = np.array([getattr(_START, name) for name in _FITTED])
    # The cache reported is rounded down to blocks; on average half a block was left over.
    measured = started.kv_cache_tokens + started.block_size / 2
    blocks = np.full_like(started.max_num_seqs, -(-started.max_model_len // started.block_size))

    def overhead_bytes(memory: MemoryModel) -> Float[np.ndarray, " starts"]:
        activations = activation_bytes(model, memory, started.max_num_seqs, started.max_num_batched_tokens)
        return np.asarray(activations + other_bytes(memory, started.max_loras, started.max_num_seqs, blocks))

    available_bytes = plan_rows(model, gpu, _START, started).kv_cache_bytes + overhead_bytes(_START)

    def residuals(scaled: Float[np.ndarray, " coefficients"]) -> Float[np.ndarray, " residuals"]:
        memory = replace(_START, **dict(zip(_FITTED, scaled * start, strict=True)))
        kv = (available_bytes - overhead_bytes(memory)) / model.kv_bytes_per_token
        return np.concatenate([(kv / measured - 1) / _OUTLIER, (scaled - 1) * _PULL_TO_START / _OUTLIER])

    found = least_squares(residuals, np.ones_like(start), bounds=(0, np.inf), loss="soft_l1").x * start
    graphs = rows.cuda_graph_bytes[np.isfinite(rows.cuda_graph_bytes)] / model.num_layers
    memory = replace(
        _START,
        **dict(zip(_FITTED, map(float, found), strict=True)),
        cuda_graph_bytes_per_layer=float(np.median(graphs)) if graphs.size else _START.cuda_graph_bytes_per_layer,
    )
    return memory, score_memory(model, gpu, memory, rows)
