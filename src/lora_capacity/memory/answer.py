"""Does it fit: the memory of a server on any GPU, with what is uncertain in it, and what would make room."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_capacity.engines import ServerConfig, VllmBehaviour
from lora_capacity.hardware import Gpu
from lora_capacity.memory.buffers import slot_bytes
from lora_capacity.memory.deployment import Deployment, MemoryTerms
from lora_capacity.memory.plan import MemoryPlan, plan_memory
from lora_capacity.memory.room import Remedy, most_slots, remedies
from lora_capacity.models import ModelShape, split_model, targeted_modules
from lora_capacity.status import Status

QUANTILES = {"low": 0.95, "expected": 0.5, "high": 0.05}
"""Share of the uncertainty of memory that is counted in: the KV caches of nine of ten servers lie between the outer."""

_DEPLOYED = tuple(entry.name for entry in dataclasses.fields(Deployment))


@dataclass(frozen=True)
class MemoryQuestion:
    """A server whose memory is asked for.

    Attributes:
        model: Layer shapes.
        gpu: A GPU of it.
        terms: What tells the memory that shapes do not.
        server: Its settings.
        deployment: How the model is laid out on GPUs.
        enable_lora: Whether it has slots for adapters at all.
        adapter_modules: Layers that the adapters adapt, for what they take in host memory; empty: those with slots.
    """

    model: ModelShape
    gpu: Gpu
    terms: MemoryTerms
    server: ServerConfig
    deployment: Deployment
    enable_lora: bool = True
    adapter_modules: tuple[str, ...] = ()

    @cached_property
    def behaviour(self) -> VllmBehaviour:
        """The vLLM version's rules."""
        return VllmBehaviour.for_version(self.server.vllm_version, self.server.device)

    def plan(self, changes: Mapping[str, Any] | None = None, quantile: float = QUANTILES["expected"]) -> MemoryPlan:
        """Plan the memory of servers that differ from this one.

        Args:
            changes: Settings in which they differ, by vLLM's names, numbers as one or as ``[configs]``.
            quantile: As `plan_memory` has it.

        Raises:
            InputError: If a setting is not allowed, or parallelism does not divide the model.
        """
        changes = dict(changes or {})
        deployed = {name: changes.pop(name) for name in _DEPLOYED if name in changes}
        slots = {} if self.enable_lora else {"max_loras": 0}
        return plan_memory(
            self.model,
            self.gpu,
            self.terms,
            behaviour=self.behaviour,
            deployment=dataclasses.replace(self.deployment, **deployed),
            quantile=quantile,
            **self.server.planned | slots | changes,
        )

    def slot_bytes(self, max_lora_rank: int) -> int:
        """Return the bytes of a slot on the GPU where it takes most, before the allocator's rounding."""
        sharded = self.deployment.fully_sharded_loras
        return max(
            int(
                slot_bytes(
                    shard, self.behaviour, max_lora_rank, self.server.reserved_modules, fully_sharded_loras=sharded
                )
            )
            for shard in split_model(
                self.model, self.deployment.tensor_parallel_size, self.deployment.pipeline_parallel_size
            )
        )

    @property
    def host_bytes_per_adapter(self) -> int:
        """Bytes that an adapter of ``max_lora_rank`` takes in host memory.

        The process of every GPU that shares a layer holds all of the layer's adapter.
        """
        modules = [module for layer in self.model.layers for module in layer.modules]
        wanted = targeted_modules(set(modules), self.server.reserved_modules)
        elements = sum(
            module.saved_elements(self.adapter_modules)
            for module in modules
            if module in wanted and (self.behaviour.adapts_experts or not module.experts)
        )
        copies = self.deployment.tensor_parallel_size
        return elements * self.server.max_lora_rank * self.model.dtype_bytes * copies

    @property
    def changeable(self) -> dict[str, Any]:
        """Settings that a user can change, for `remedies`."""
        server, deployment = self.server, self.deployment
        names = ("gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "max_num_seqs")
        given: dict[str, Any] = {name: getattr(server, name) for name in names}
        choices: dict[str, Any] = {}
        if not deployment.enforce_eager:
            choices["enforce_eager"] = True
        if deployment.kv_cache_dtype == "auto" and self.model.kv_cache_dtype == "auto":
            choices["kv_cache_dtype"] = "fp8"
        if self.enable_lora:
            given |= {name: getattr(server, name) for name in ("max_loras", "max_lora_rank")}
            given["max_lora_ranks"] = self.behaviour.max_lora_ranks
            if self.behaviour.restricts_target_modules and server.target_modules == "all-linear":
                layers = (module for layer in dict.fromkeys(self.model.layers) for module in layer.modules)
                attention = [module for module in layers if module.adapted and module.kind == "attention"]
                parts = (name for module in attention for name in module.parts or (module.name,))
                choices["target_modules"] = tuple(dict.fromkeys(parts))
            if deployment.tensor_parallel_size > 1 and not deployment.fully_sharded_loras:
                choices["fully_sharded_loras"] = True
        twice = 2 * deployment.tensor_parallel_size
        if self.model.num_attention_heads % twice == 0:
            choices["tensor_parallel_size"] = twice
        return given | {"choices": choices}


@dataclass(frozen=True)
class MemoryAnswer:
    """What is known of a server's memory.

    Attributes:
        plans: The memory of a GPU, ``[1]``, by the names of `QUANTILES`.
        slot_bytes: Bytes of a slot on a GPU.
        most_max_loras: Most slots with which it starts at its ``max_lora_rank``, by the names of `QUANTILES`.
        slots_by_rank: The same, as expected, by ``max_lora_rank``; with the bytes of a slot.
        host_bytes_per_adapter: Bytes that an adapter takes in host memory.
        host_bytes: Bytes that ``max_cpu_loras`` of them take.
        remedies: What makes room, what makes it start first.
    """

    plans: Mapping[str, MemoryPlan]
    slot_bytes: int
    most_max_loras: Mapping[str, int]
    slots_by_rank: Mapping[int, tuple[int, int]]
    host_bytes_per_adapter: int
    host_bytes: int
    remedies: tuple[Remedy, ...]

    def status(self, quantile: str = "expected") -> Status:
        """Return what becomes of the start."""
        return Status(int(self.plans[quantile].status[0]))

    @property
    def lacking_bytes(self) -> float:
        """Bytes that a GPU lacks for the start; negative: to spare."""
        return -float(self.plans["expected"].headroom_bytes[0])


def answer_memory(question: MemoryQuestion) -> MemoryAnswer:
    """Say where a server's memory goes, whether it starts, and what would make room.

    Args:
        question: The server.

    Raises:
        InputError: If parallelism does not divide the model.
    """
    plans = {name: question.plan(quantile=quantile) for name, quantile in QUANTILES.items()}
    rank = question.server.max_lora_rank
    most, by_rank, host = dict.fromkeys(QUANTILES, 0), {}, 0
    if question.enable_lora:
        ranks = question.behaviour.max_lora_ranks
        sizes = [question.slot_bytes(each) for each in ranks]
        planners = [functools.partial(question.plan, quantile=quantile) for quantile in QUANTILES.values()]
        found = dict(zip(QUANTILES, most_slots(planners, ranks, sizes), strict=True))
        most = {name: counts[ranks.index(rank)] for name, counts in found.items()}
        by_rank = dict(zip(ranks, zip(found["expected"], sizes, strict=True), strict=True))
        host = question.host_bytes_per_adapter
    return MemoryAnswer(
        plans=plans,
        slot_bytes=by_rank[rank][1] if question.enable_lora else 0,
        most_max_loras=most,
        slots_by_rank=by_rank,
        host_bytes_per_adapter=host,
        host_bytes=host * question.server.max_cpu_loras,
        remedies=tuple(remedies(question.plan, question.changeable)),
    )
