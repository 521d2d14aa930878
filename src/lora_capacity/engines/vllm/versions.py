"""vLLM's defaults and rules by version, as a table of dated changes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from lora_capacity.engines.base import BatchBudget, EngineBehaviour, SchedulerRules
from lora_capacity.errors import InputError
from lora_capacity.units import BYTES_PER_GIB

Release = tuple[int, int]
"""Major and minor version."""


@dataclass(frozen=True)
class Change:
    """A rule that holds from a release on, up to its next change.

    Attributes:
        since: The first release that has it.
        rule: Field of `EngineBehaviour`, or ``scheduler.`` and a field of `SchedulerRules`.
        value: The rule.
        source: File of vLLM that it was read in, and how its release was found.
    """

    since: Release
    rule: str
    value: Any
    source: str


_OLDEST = (0, 8)
"""First release whose default engine is V1, the one described here."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``max_lora_rank`` that 0.8.5 allows (``LoRAConfig`` in ``config.py``)."""

_BUDGETS = (BatchBudget(70 * BYTES_PER_GIB, 8192, 1024), BatchBudget(0, 2048, 256))
_LARGEST_BUDGET = BatchBudget(160 * BYTES_PER_GIB, 16384, 1024)

CHANGES = (
    Change(_OLDEST, "gpu_memory_utilization", 0.9, "config.py of 0.8.5"),
    Change(_OLDEST, "batch_budgets", _BUDGETS, "engine/arg_utils.py of 0.8.5"),
    Change(_OLDEST, "block_size", 16, "config.py of 0.8.5; the same in 0.32.0"),
    Change(_OLDEST, "max_lora_rank", 16, "config.py of 0.8.5; the same in 0.32.0"),
    Change(_OLDEST, "max_lora_ranks", _RANKS, "config.py of 0.8.5"),
    Change(_OLDEST, "lora_extra_vocab_tokens", 256, "config.py of 0.8.5"),
    Change(
        _OLDEST,
        "embedding_architectures",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "lora/ and the models of 0.8.5",
    ),
    Change(_OLDEST, "counts_cuda_graphs", False, "v1/worker/gpu_worker.py of 0.8.5"),
    Change(_OLDEST, "restricts_target_modules", False, "config.py of 0.8.5 has no such flag"),
    Change((0, 12), "max_lora_ranks", (1, *_RANKS), "config/ of 0.32.0; placed by common report"),
    Change((0, 12), "lora_extra_vocab_tokens", 0, "config/ of 0.32.0; placed by common report"),
    Change((0, 14), "scheduler.async_scheduling", True, "config/ of 0.14.0, not of 0.13.0"),
    Change((0, 18), "scheduler.skipped_first", True, "v1/core/sched/scheduler.py of 0.18.0, not of 0.17.1"),
    Change((0, 19), "scheduler.full_prompt_must_fit", True, "v1/core/sched/scheduler.py of 0.19.0, not of 0.18.1"),
    Change((0, 21), "counts_cuda_graphs", True, "log message in v1/worker/gpu_worker.py of 0.32.0"),
    Change((0, 21), "gpu_memory_utilization", 0.92, "config/ of 0.32.0; placed with the CUDA graphs it makes up for"),
    Change((0, 31), "scheduler.skipped_first", False, "v1/core/sched/scheduler.py of 0.31.0, not of 0.30.0"),
    Change((0, 32), "batch_budgets", (_LARGEST_BUDGET, *_BUDGETS), "engine/arg_utils.py of 0.32.0, where it was read"),
    Change(
        (0, 32),
        "embedding_architectures",
        ("LlamaForCausalLM", "Qwen3ForCausalLM"),
        "lora/ and the models of 0.32.0, where it was read",
    ),
    Change((0, 32), "restricts_target_modules", True, "config/ of 0.32.0, where it was read"),
    Change((0, 33), "scheduler.running_adapters_in_use", True, "v1/core/sched/scheduler.py of 0.33.0, not of 0.32.0"),
)
"""Ascending by release. What is placed by report, or where it was read, may be off by some releases. The rules of the
scheduler are seen in the schedules of 0.8.5, 0.13, 0.14, 0.26, 0.32 and 0.33. From 0.9.2 to 0.13 skipped requests go
back in reverse order, which is left out."""

ON_DEVICE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpu": MappingProxyType({}),
        "cpu": MappingProxyType(
            {
                "scheduler.async_scheduling": False,
                "block_size": 128,
                "batch_budgets": (BatchBudget(0, 2048, 128),),
            }
        ),
    }
)
"""Rules that a device overrides. On CPUs vLLM turns asynchronous scheduling off (platforms/cpu.py of 0.32.0), tells
blocks of 128 tokens in its metrics (seen of 0.32.0), and has batch limits of its own (engine/arg_utils.py there)."""


@dataclass(frozen=True)
class VllmBehaviour(EngineBehaviour):
    """Defaults and rules of one vLLM version; the table `CHANGES` says where each was read."""

    @classmethod
    def for_version(cls, version: str, device: str = "gpu") -> Self:
        """Return the behaviour of a vLLM version.

        Args:
            version: As ``vllm.__version__`` has it (``0.8.5``, ``0.32.0rc1``, ``v0.11.2.post1``).
            device: One of `DEVICES`.

        Raises:
            InputError: If it is not a version, or older than 0.8, whose default engine is another.
        """
        found = re.match(r"v?(\d+)\.(\d+)", str(version))
        if found is None:
            raise InputError("vllm_version", version, "a version such as 0.8.5")
        release = (int(found[1]), int(found[2]))
        if release < _OLDEST:
            raise InputError("vllm_version", version, "0.8 or later, whose default is the V1 engine", "upgrade vLLM")
        rules = {change.rule: change.value for change in CHANGES if change.since <= release}
        rules |= ON_DEVICE[device]
        nested = "scheduler."
        scheduler = {name.removeprefix(nested): rule for name, rule in rules.items() if name.startswith(nested)}
        own = {name: rule for name, rule in rules.items() if not name.startswith(nested)}
        return cls(engine="vLLM", version=version, device=device, scheduler=SchedulerRules(**scheduler), **own)
