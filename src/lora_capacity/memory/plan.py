"""GPU memory from first principles: what weights, adapter slots and activations take, and the KV cache that is left."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.display import Display, Displayed
from lora_capacity.engines import NEWEST, ServerConfig, VllmBehaviour
from lora_capacity.errors import check_number, check_type
from lora_capacity.hardware import Gpu, Processor, find_gpu
from lora_capacity.memory.buffers import resident_memory
from lora_capacity.memory.deployment import Deployment, MemoryTerms, Start
from lora_capacity.memory.estimated import EstimatedTerms
from lora_capacity.memory.kv_cache import kv_cache_layout
from lora_capacity.models import ModelShape, find_shape, split_model
from lora_capacity.schema import Number, check_column
from lora_capacity.status import Status
from lora_capacity.words import gibibytes, spoken

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class MemoryPlan(Displayed):
    """Where the memory of a GPU goes, of the tightest where there are several; all arrays ``[configs]``.

    Attributes:
        status: :class:`~lora_capacity.status.Status` codes: ``OK``, ``NO_KV_CACHE`` or ``OOM``.
        kv_cache_tokens: Tokens that the KV cache holds, as vLLM logs them; 0 where nothing is left. Where the server
            does not start this is what would have been left.
        kv_cache_requests: Requests of ``max_model_len`` that it holds at once.
        kv_bytes_per_token: Bytes that a token takes in it; where layers keep only a part of a sequence, on average over
            one of ``max_model_len``.
        kv_cache_bytes: Memory left for the KV cache, negative where memory is short.
        weight_bytes: The base model, or what a GPU holds of it, its rotary table and the segments around them.
        slot_bytes: All adapter slots, with the segments around them.
        activation_bytes: Most memory that comes and goes while vLLM profiles a step.
        other_bytes: Everything else outside the KV cache.
        cuda_graph_bytes: The captured CUDA graphs.
        headroom_no_kv_cache_bytes: KV cache beyond what one request of ``max_model_len`` needs; negative: refused.
        headroom_oom_bytes: GPU memory free at the tightest moment of the start; negative: out of memory.
    """

    status: IntArray
    kv_cache_tokens: IntArray
    kv_cache_requests: FloatArray
    kv_bytes_per_token: FloatArray
    kv_cache_bytes: FloatArray
    weight_bytes: FloatArray
    slot_bytes: FloatArray
    activation_bytes: FloatArray
    other_bytes: FloatArray
    cuda_graph_bytes: FloatArray
    headroom_no_kv_cache_bytes: FloatArray
    headroom_oom_bytes: FloatArray

    @property
    def headroom_bytes(self) -> FloatArray:
        """What is to spare before the server does not start, for either reason; negative: what it lacks."""
        return np.minimum(self.headroom_no_kv_cache_bytes, self.headroom_oom_bytes)

    def _display(self) -> Display:
        rows = [
            {"": name, **{str(place): gibibytes(float(size)) for place, size in enumerate(getattr(self, field))}}
            for field, name in (PARTS | {"headroom_bytes": "headroom"}).items()
        ]
        heads = {
            "start": [spoken(Status(code).label) for code in self.status],
            "KV tokens": self.kv_cache_tokens.tolist(),
        }
        told = [{"": name, **{str(place): each for place, each in enumerate(column)}} for name, column in heads.items()]
        return Display("Memory of a GPU, by configuration", rows=[*told, *rows])


PARTS = {
    "weight_bytes": "weights",
    "slot_bytes": "adapter slots",
    "activation_bytes": "activations",
    "cuda_graph_bytes": "CUDA graphs",
    "other_bytes": "context, libraries",
    "kv_cache_bytes": "KV cache",
}
"""Fields of a plan that the memory is shared out to, and what they are called."""


def plan_memory(
    model: ModelShape | str,
    gpu: Gpu | Processor | str,
    memory: MemoryTerms | None = None,
    *,
    behaviour: VllmBehaviour | str = NEWEST,
    max_loras: ArrayLike | None = None,
    max_lora_rank: ArrayLike | None = None,
    max_num_seqs: ArrayLike | None = None,
    max_num_batched_tokens: ArrayLike | None = None,
    gpu_memory_utilization: ArrayLike | None = None,
    max_model_len: ArrayLike | None = None,
    target_modules: str | tuple[str, ...] = "all-linear",
    block_size: int = 16,
    deployment: Deployment | None = None,
    quantile: float = 0.5,
) -> MemoryPlan:
    """Plan the memory of each GPU as a starting vLLM server does.

    KV bytes = utilization · memory − (weights + slots) − activations − other (− CUDA graphs, where the version counts
    them), or what the server is told. Every slot is reserved in full, at ``max_lora_rank``, whatever the adapters'
    ranks. The server runs out of memory when what comes before the KV cache exceeds the GPU's memory, or else
    utilization · memory plus CUDA graphs not counted in it does. Of several pipeline stages the one with the smallest
    KV cache decides.

    Leaves out expert parallelism, speculative decoding, and LoRA on multimodal encoders.

    Args:
        model: Layer shapes, the folder or ``config.json`` of a model, or the name of a well-known one.
        gpu: A GPU, or its name.
        memory: Amounts that shapes do not tell; None: as they are estimated for any server.
        behaviour: The vLLM version, or its rules.
        max_loras: Slots; 0 for a server without LoRA. This and the following broadcast to ``[configs]``; what is not
            given is vLLM's default.
        max_lora_rank: Rank that slots are reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        gpu_memory_utilization: Share of the memory to plan with.
        max_model_len: Longest sequence, tokens.
        target_modules: Modules that slots are reserved for (``ServerConfig.reserved_modules``).
        block_size: Tokens of a KV block.
        deployment: How the model is laid out on GPUs; None: on one, with vLLM's defaults.
        quantile: How much of the uncertainty of ``memory`` to count in: 0.5 for what is expected, 0.95 for a KV cache
            that all but one of twenty servers exceed.

    Returns:
        Bytes per purpose, KV tokens, headrooms and status, per configuration.

    Raises:
        InputError: If a setting is out of range, ``target_modules`` names an unknown module, or parallelism does not
            divide the model.

    Valid for: measured with vLLM 0.8.5 on an H100 within 0.2 % of the KV tokens, with coefficients fitted there.

    Source: vLLM 0.8.5, ``v1/worker/gpu_worker.py`` (``determine_available_memory``), ``v1/core/kv_cache_utils.py``.
    """
    shape, gpu, behaviour = _named(model, gpu, behaviour)
    memory = EstimatedTerms.bundled() if memory is None else memory
    check_type("memory", memory, MemoryTerms, "terms of memory, such as EstimatedTerms")
    check_type("target_modules", target_modules, (str, tuple), "all-linear, attention, or a tuple of names")
    check_number("block_size", block_size, minimum=1, integer=True)
    check_number("quantile", quantile, minimum=0, maximum=1)
    deployment = check_type("deployment", deployment or Deployment(), Deployment, "a Deployment")
    given: dict[str, Any] = {
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    if any(value is None for value in given.values()):
        usual = ServerConfig.with_defaults(behaviour, gpu, shape)
        given = {name: getattr(usual, name) if value is None else value for name, value in given.items()}
    utilization = given.pop("gpu_memory_utilization")
    slots, rank, seqs, step_tokens, length, share = np.broadcast_arrays(
        *(_counts(name, value, minimum=int(name != "max_loras")) for name, value in given.items()),
        check_column("gpu_memory_utilization", utilization, Number(0, 1, exclusive=True)),
    )
    shards = split_model(shape, deployment.tensor_parallel_size, deployment.pipeline_parallel_size)
    starts = [
        Start(shard, gpu, behaviour, deployment, slots, rank, seqs, step_tokens, length, block_size) for shard in shards
    ]
    plans = [_plan_stage(start, memory, share, target_modules, quantile) for start in starts]
    return plans[0] if len(plans) == 1 else _tightest(plans)


def _named(
    model: ModelShape | str, gpu: Gpu | Processor | str, behaviour: VllmBehaviour | str
) -> tuple[ModelShape, Gpu, VllmBehaviour]:
    """Return what names stand for."""
    if isinstance(model, str):
        model = find_shape(model)
    if isinstance(gpu, str):
        gpu = find_gpu(gpu)
    if isinstance(behaviour, str):
        behaviour = VllmBehaviour.for_version(behaviour)
    check_type("model", model, ModelShape, "a ModelShape, or the name or path of a model")
    check_type("gpu", gpu, (Gpu, Processor), "a Gpu, or its name")
    check_type("behaviour", behaviour, VllmBehaviour, "a version of vLLM, or its VllmBehaviour")
    return model, gpu.gpu if isinstance(gpu, Processor) else gpu, behaviour


def _plan_stage(
    start: Start, memory: MemoryTerms, share: FloatArray, target_modules: str | tuple[str, ...], quantile: float
) -> MemoryPlan:
    """Plan the memory of a GPU of one pipeline stage."""
    shard, behaviour, slots = start.shard, start.behaviour, start.max_loras
    sharded = start.deployment.fully_sharded_loras
    # One replay for these servers and for one without slots.
    reserved = resident_memory(
        shard,
        behaviour,
        np.append(slots, 0),
        np.append(start.max_lora_rank, 1),
        target_modules,
        fully_sharded_loras=sharded,
    ).reserved_bytes
    resident, bare = reserved[:-1], reserved[-1]
    activations, other, graphs = memory.amounts(start, quantile)
    graphs_counted = graphs if behaviour.counts_cuda_graphs else np.zeros_like(graphs)
    limit = start.gpu.memory_bytes * share
    kv_bytes = limit - resident - activations - other - graphs_counted
    given_bytes = memory.kv_cache_memory_bytes
    if given_bytes is not None:
        kv_bytes = np.full(slots.shape, float(given_bytes))
        limit = kv_bytes + resident + activations + other + graphs_counted
    cache = kv_cache_layout(shard, behaviour, start.deployment.kv_element_bytes(shard), start.block_size)
    request_blocks = cache.request_blocks(start.max_model_len, start.max_num_batched_tokens)
    spare_kv = kv_bytes - request_blocks * cache.block_bytes
    spare_profiling = start.gpu.memory_bytes - (resident + activations + other)
    # Graphs are captured only once the KV cache stands, so a server that vLLM refuses never meets them.
    spare_serving = np.where(spare_kv >= 0, start.gpu.memory_bytes - limit - (graphs - graphs_counted), np.inf)
    spare = np.minimum(spare_profiling, spare_serving)
    return MemoryPlan(
        status=np.select([spare < 0, spare_kv < 0], [Status.OOM, Status.NO_KV_CACHE], Status.OK).astype(np.int64),
        kv_cache_tokens=cache.tokens(kv_bytes, start.max_model_len, start.max_num_batched_tokens),
        kv_cache_requests=np.maximum(kv_bytes // cache.block_bytes, 0) / request_blocks,
        kv_bytes_per_token=cache.bytes_per_token(start.max_model_len, start.max_num_batched_tokens),
        kv_cache_bytes=kv_bytes,
        weight_bytes=np.broadcast_to(bare, slots.shape).astype(np.float64),
        slot_bytes=(resident - bare).astype(np.float64),
        activation_bytes=activations,
        other_bytes=other,
        cuda_graph_bytes=graphs,
        headroom_no_kv_cache_bytes=spare_kv,
        headroom_oom_bytes=spare,
    )


def _tightest(plans: list[MemoryPlan]) -> MemoryPlan:
    """Return, configuration by configuration, the plan of the stage that lets the fewest requests in."""
    rooms = np.stack([plan.headroom_bytes for plan in plans])
    requests = np.stack([plan.kv_cache_requests for plan in plans])
    starts = np.stack([plan.status == Status.OK for plan in plans])
    # Where a stage does not start the one that lacks most, else the one with the smallest cache.
    stage = np.where(starts.all(axis=0), requests.argmin(axis=0), rooms.argmin(axis=0))[None]
    columns = {
        entry.name: np.take_along_axis(np.stack([getattr(plan, entry.name) for plan in plans]), stage, axis=0)[0]
        for entry in dataclasses.fields(MemoryPlan)
    }
    return MemoryPlan(**columns)


def _counts(name: str, value: ArrayLike, minimum: int = 1) -> IntArray:
    return check_column(name, value, Number(minimum), whole=True).astype(np.int64)
