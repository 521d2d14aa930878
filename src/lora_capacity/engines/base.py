"""What any inference engine answers for one of its versions: defaults, limits of flags, memory and scheduler rules."""

from dataclasses import dataclass

from lora_capacity.errors import InputError
from lora_capacity.hardware.gpu import Gpu

DEVICES = ("gpu", "cpu")
"""What a server computes on, which decides what its step time is made of."""


@dataclass(frozen=True)
class BatchBudget:
    """Default batch limits of a server on GPUs of at least some size.

    Attributes:
        min_memory_bytes: Smallest GPU memory that these limits are for, bytes.
        max_num_batched_tokens: Most tokens in a step.
        max_num_seqs: Most requests in a step.
        not_on: Words in the names of GPUs that are left out, in lower case.
    """

    min_memory_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int
    not_on: tuple[str, ...] = ()

    def holds_on(self, gpu: Gpu) -> bool:
        """Whether these limits are for a GPU."""
        name = gpu.name.lower()
        return gpu.memory_bytes >= self.min_memory_bytes and not any(word in name for word in self.not_on)


@dataclass(frozen=True)
class SchedulerRules:
    """In what the schedulers of the versions differ; by default that of vLLM 0.8.5.

    Attributes:
        full_prompt_must_fit: Whether a request is admitted only if there are KV blocks for its whole prompt, not just
            for its first chunk.
        async_scheduling: Whether a step is scheduled while the one before still runs. A request that gets its last
            token there keeps its place and its blocks for one step more, and what arrives meanwhile waits for one more.
        running_adapters_in_use: Whether an adapter is in use as long as any of its requests runs; otherwise only when
            one is scheduled in the step at hand. Without asynchronous scheduling that is the same.
        skipped_first: Whether skipped requests come before one that is preempted; otherwise that one goes to the
            front of the queue.
        uncached_blocks_first: Whether, with prefix caching, freed KV blocks that are not full are the next to be taken;
            otherwise they wait behind those freed earlier, as full ones do.
        uncut_if_alone: Whether a request that is alone in the server gets more than ``long_prefill_token_threshold``
            tokens in a step.
    """

    full_prompt_must_fit: bool = False
    async_scheduling: bool = False
    running_adapters_in_use: bool = False
    skipped_first: bool = False
    uncached_blocks_first: bool = False
    uncut_if_alone: bool = False


@dataclass(frozen=True)
class EngineBehaviour:
    """Defaults and rules of one version of an engine on one kind of device.

    Attributes:
        engine: Name of the engine, for messages.
        version: The version as given.
        device: One of `DEVICES`.
        gpu_memory_utilization: Default share of the GPU memory that the server plans with.
        batch_budgets: Default batch limits, largest GPUs first.
        block_size: Default tokens of a KV block.
        max_lora_rank: Default rank that slots are reserved for.
        max_lora_ranks: Allowed values of ``max_lora_rank``, ascending.
        lora_extra_vocab_tokens: Tokens by which each slot may extend the vocabulary.
        embedding_architectures: Models in which slots are reserved for the embedding and the output head too.
        headless_embedding_architectures: Models in which they are reserved for the embedding, but not for the head.
        adapts_experts: Whether slots are reserved for the experts of a mixture.
        restricts_target_modules: Whether slots can be reserved for chosen modules only (``lora_target_modules``).
        lora_graph_captures: How often CUDA graphs are captured with LoRA: once, or with and without adapters.
        specializes_active_lora: Whether graphs and kernels can follow the adapters in a step
            (``specialize_active_lora``).
        packed_expand_outputs: Outputs that a block of the LoRA expand kernel works on where several are fused.
        samples_by_sorting: Whether top-k and top-p sort the logits when a step is profiled, which takes copies of them.
        keeps_expert_workspace: Whether the workspace of a mixture's experts stays allocated while tokens are sampled.
        counts_cuda_graphs: Whether the memory of CUDA graphs is taken off the KV cache.
        hybrid_kv_cache: Whether layers that see a window of tokens keep only that window.
        logs_kv_tokens_as_concurrency: Whether the KV cache is logged as concurrent requests of ``max_model_len`` times
            that length; otherwise as blocks of every group of layers.
        has_watermark: Whether a share of the KV blocks can be kept free when requests are admitted (``watermark``).
        has_active_limit: Whether fewer requests may run than the server has places for (``max_num_active_seqs``).
        scheduler: Rules of the scheduler.
    """

    engine: str
    version: str
    device: str
    gpu_memory_utilization: float
    batch_budgets: tuple[BatchBudget, ...]
    block_size: int
    max_lora_rank: int
    max_lora_ranks: tuple[int, ...]
    lora_extra_vocab_tokens: int
    embedding_architectures: tuple[str, ...]
    headless_embedding_architectures: tuple[str, ...]
    adapts_experts: bool
    restricts_target_modules: bool
    lora_graph_captures: int
    specializes_active_lora: bool
    packed_expand_outputs: int
    samples_by_sorting: bool
    keeps_expert_workspace: bool
    counts_cuda_graphs: bool
    hybrid_kv_cache: bool
    logs_kv_tokens_as_concurrency: bool
    has_watermark: bool
    has_active_limit: bool
    scheduler: SchedulerRules

    def reserved_modules(self, target_modules: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """Return the modules that slots are reserved for: ``all-linear``, unless the version can be told which.

        Args:
            target_modules: Modules that the adapters adapt.
        """
        return target_modules if self.restricts_target_modules else "all-linear"

    def batch_budget(self, gpu: Gpu) -> BatchBudget:
        """Return the default batch limits of a server on a GPU."""
        return next(budget for budget in self.batch_budgets if budget.holds_on(gpu))


def smallest_max_lora_rank(rank: int, behaviour: EngineBehaviour) -> int:
    """Return the smallest allowed ``max_lora_rank`` that takes adapters of a rank.

    Args:
        rank: Largest rank among the adapters.
        behaviour: The engine's version at hand.

    Raises:
        InputError: If the rank is below 1 or above the largest that the version takes.
    """
    largest = behaviour.max_lora_ranks[-1]
    if not 1 <= rank <= largest:
        version = f"{behaviour.engine} {behaviour.version}"
        raise InputError("rank", rank, f"1 to {largest}, the largest max_lora_rank of {version}")
    return next(allowed for allowed in behaviour.max_lora_ranks if allowed >= rank)
