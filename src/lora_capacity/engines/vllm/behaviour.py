"""What a vLLM version does by default, and how its scheduler and memory planner differ from other versions."""

import re
from dataclasses import dataclass
from typing import Self

from lora_capacity.errors import InputError
from lora_capacity.units import BYTES_PER_GIB

DEVICES = ("gpu", "cpu")
"""What a server computes on, which decides what its step time is made of."""


@dataclass(frozen=True)
class BatchBudget:
    """Default batch limits of ``vllm serve`` on GPUs of at least some size.

    Attributes:
        min_memory_bytes: Smallest GPU memory that these limits are for, bytes.
        max_num_batched_tokens: Most tokens in a step.
        max_num_seqs: Most requests in a step.
    """

    min_memory_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True)
class SchedulerRules:
    """In what the schedulers of the versions differ; by default that of 0.8.5.

    Attributes:
        full_prompt_must_fit: Whether a request is admitted only if there are KV blocks for its whole prompt, not just
            for its first chunk.
        async_scheduling: Whether a step is scheduled while the one before still runs. A request that gets its last
            token there keeps its place and its blocks for one step more, and what arrives meanwhile waits for one more.
        running_adapters_in_use: Whether an adapter is in use as long as any of its requests runs; otherwise only when
            one is scheduled in the step at hand. Without asynchronous scheduling that is the same.
        passed_over_first: Whether requests that were passed over come before one that is preempted; otherwise that one
            goes to the front of the queue.
    """

    full_prompt_must_fit: bool = False
    async_scheduling: bool = False
    running_adapters_in_use: bool = False
    passed_over_first: bool = False


@dataclass(frozen=True)
class VllmBehaviour:
    """Defaults and rules of one vLLM version.

    Source: read in the Python sources of 0.8.5 and 0.32.0 (``config.py`` or ``config/``, ``engine/arg_utils.py``,
    ``v1/core/sched/scheduler.py``, ``v1/worker/gpu_worker.py``, ``lora/``). Where the two differ, the version of the
    change is the one stated at :meth:`for_version`, which may be off by some releases between them.

    Attributes:
        version: The version as given.
        gpu_memory_utilization: Default share of the GPU memory that the server plans with.
        batch_budgets: Default batch limits, largest GPUs first.
        block_size: Default tokens of a KV block.
        max_lora_rank: Default rank that slots are reserved for.
        max_lora_ranks: Allowed values of ``max_lora_rank``, ascending.
        lora_extra_vocab_tokens: Tokens by which each slot may extend the vocabulary.
        embedding_architectures: Models in which slots are reserved for the embedding and the output head too.
        counts_cuda_graphs: Whether the memory of CUDA graphs is taken off the KV cache.
        restricts_target_modules: Whether slots can be reserved for chosen modules only (``lora_target_modules``).
        scheduler: Rules of the scheduler.
    """

    version: str
    gpu_memory_utilization: float
    batch_budgets: tuple[BatchBudget, ...]
    block_size: int
    max_lora_rank: int
    max_lora_ranks: tuple[int, ...]
    lora_extra_vocab_tokens: int
    embedding_architectures: tuple[str, ...]
    counts_cuda_graphs: bool
    restricts_target_modules: bool
    scheduler: SchedulerRules

    @classmethod
    def for_version(cls, version: str, device: str = "gpu") -> Self:
        """Return the behaviour of a vLLM version.

        CUDA graphs change at 0.21 by the log message in 0.32.0's ``gpu_worker.py``. Rank 1 and the end of vocabulary
        extension (0.12) are placed by common report; 0.92 of the memory together with the CUDA graphs that it makes up
        for; module choice, the models with adapted embeddings and the limits of the largest GPUs at 0.32, where they
        were read. That prompts must fit whole is read in 0.19.0 and not in 0.18.1; asynchronous scheduling is off by
        default in the sources of 0.13.0 and on in those of 0.14.0; the adapter
        rule is read in 0.33.0 and not in 0.32.0. A queue of their own for those passed over is
        read in 0.18.0 to 0.30.0, neither in 0.17.1 nor 0.31.0. These four are seen in the schedules of 0.8.5, 0.13,
        0.14, 0.26, 0.32 and 0.33. From 0.9.2 to 0.13 those passed over go back in reverse order, which is left out.

        Args:
            version: As ``vllm.__version__`` has it (``0.8.5``, ``0.32.0rc1``, ``v0.11.2.post1``).
            device: One of `DEVICES`; vLLM's platform for CPUs turns asynchronous scheduling off.

        Raises:
            InputError: If it is not a version, or older than 0.8, whose default engine is another.
        """
        found = re.match(r"v?(\d+)\.(\d+)", str(version))
        if found is None:
            raise InputError("vllm_version", version, "a version such as 0.8.5")
        release = (int(found[1]), int(found[2]))
        if release < (0, 8):
            raise InputError("vllm_version", version, "0.8 or later, whose default is the V1 engine", "upgrade vLLM")
        budgets: tuple[BatchBudget, ...] = (BatchBudget(70 * BYTES_PER_GIB, 8192, 1024), BatchBudget(0, 2048, 256))
        if release >= (0, 32):
            budgets = (BatchBudget(160 * BYTES_PER_GIB, 16384, 1024), *budgets)
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)
        return cls(
            version=version,
            gpu_memory_utilization=0.92 if release >= (0, 21) else 0.9,
            batch_budgets=budgets,
            block_size=16,
            max_lora_rank=16,
            max_lora_ranks=(1, *ranks) if release >= (0, 12) else ranks,
            lora_extra_vocab_tokens=0 if release >= (0, 12) else 256,
            embedding_architectures=("LlamaForCausalLM", f"{'Qwen3' if release >= (0, 32) else 'Mistral'}ForCausalLM"),
            counts_cuda_graphs=release >= (0, 21),
            restricts_target_modules=release >= (0, 32),
            scheduler=SchedulerRules(
                full_prompt_must_fit=release >= (0, 19),
                async_scheduling=release >= (0, 14) and device == "gpu",
                running_adapters_in_use=release >= (0, 33),
                passed_over_first=(0, 18) <= release < (0, 31),
            ),
        )

    def batch_budget(self, gpu_memory_bytes: int) -> BatchBudget:
        """Return the default batch limits on a GPU of this memory, bytes."""
        return next(budget for budget in self.batch_budgets if gpu_memory_bytes >= budget.min_memory_bytes)


def smallest_max_lora_rank(rank: int, behaviour: VllmBehaviour) -> int:
    """Return the smallest allowed ``max_lora_rank`` that takes adapters of a rank.

    Args:
        rank: Largest rank among the adapters.
        behaviour: The vLLM version at hand.

    Raises:
        InputError: If the rank is below 1 or above the largest that the version takes.
    """
    largest = behaviour.max_lora_ranks[-1]
    if not 1 <= rank <= largest:
        raise InputError("rank", rank, f"1 to {largest}, the largest max_lora_rank of vLLM {behaviour.version}")
    return next(allowed for allowed in behaviour.max_lora_ranks if allowed >= rank)
