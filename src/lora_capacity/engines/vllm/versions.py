"""vLLM's defaults and rules by version, as a table of dated changes.

Every date was read off the sources of the releases from 0.8.5 to 0.33.0; ``tests/vllm/test_versions.py`` reads most of
them again.
"""

import re
from dataclasses import dataclass
from typing import Any, Self

from lora_capacity.engines.base import DEVICES, BatchBudget, EngineBehaviour, SchedulerRules
from lora_capacity.errors import InputError
from lora_capacity.units import BYTES_PER_GIB

Release = tuple[int, int, int]
"""Major, minor and patch version."""


@dataclass(frozen=True)
class Change:
    """A rule that holds from a release on, up to its next change.

    Attributes:
        since: The first release that has it.
        rule: Field of `EngineBehaviour`, or ``scheduler.`` and a field of `SchedulerRules`.
        value: The rule.
        source: File of vLLM that it was read in.
        devices: Those of `DEVICES` that have it.
    """

    since: Release
    rule: str
    value: Any
    source: str
    devices: tuple[str, ...] = DEVICES


_OLDEST = (0, 8, 0)
"""First release whose default engine is V1, the one described here; read in 0.8.5."""

NEWEST = "0.33.0"
"""Newest release whose sources were read."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``max_lora_rank`` that 0.8.5 allows (``LoRAConfig`` in ``config.py``)."""

_LARGE = 70 * BYTES_PER_GIB
"""Memory of a GPU with larger batch limits (``engine/arg_utils.py``)."""

_SMALL_BUDGET = BatchBudget(0, 2048, 256)
_LARGEST_BUDGET = BatchBudget(160 * BYTES_PER_GIB, 16384, 1024)
_BUDGETS = (BatchBudget(_LARGE, 8192, 1024), _SMALL_BUDGET)
_BUDGETS_BUT_A100 = (BatchBudget(_LARGE, 8192, 1024, not_on=("a100",)), _SMALL_BUDGET)
_BUDGETS_BUT_GB10 = (_LARGEST_BUDGET, BatchBudget(_LARGE, 8192, 1024, not_on=("a100", "gb10")), _SMALL_BUDGET)

_ON_GPU, _ON_CPU = ("gpu",), ("cpu",)

CHANGES = (
    Change(_OLDEST, "gpu_memory_utilization", 0.9, "config.py"),
    Change(_OLDEST, "batch_budgets", _BUDGETS, "engine/arg_utils.py"),
    Change(_OLDEST, "block_size", 16, "config.py; on NVIDIA GPUs up to 0.33.0", _ON_GPU),
    Change(_OLDEST, "block_size", 128, "platforms/cpu.py", _ON_CPU),
    Change(_OLDEST, "max_lora_rank", 16, "config.py; the same in config/lora.py of 0.33.0"),
    Change(_OLDEST, "max_lora_ranks", _RANKS, "config.py"),
    Change(_OLDEST, "lora_extra_vocab_tokens", 256, "config.py"),
    Change(_OLDEST, "adapts_experts", False, "lora/layers.py has no layer for experts"),
    Change(_OLDEST, "lora_graph_captures", 1, "v1/worker/gpu_model_runner.py"),
    Change(_OLDEST, "specializes_active_lora", False, "config.py has no such flag"),
    Change(_OLDEST, "packed_expand_outputs", 128, "lora/ops/triton_ops/lora_expand.py (BLOCK_N)"),
    Change(_OLDEST, "restricts_target_modules", False, "config.py has no such flag"),
    Change(
        _OLDEST, "samples_by_sorting", False, "v1/sample/ops/topk_topp_sampler.py, with FlashInfer as its images have"
    ),
    Change(_OLDEST, "keeps_expert_workspace", False, "model_executor/layers/fused_moe/"),
    Change(_OLDEST, "counts_cuda_graphs", False, "v1/worker/gpu_worker.py"),
    Change(_OLDEST, "hybrid_kv_cache", False, "v1/core/kv_cache_utils.py (unify_hybrid_kv_cache_specs)"),
    Change(_OLDEST, "logs_kv_tokens_as_concurrency", False, "v1/core/kv_cache_utils.py"),
    Change(_OLDEST, "has_watermark", False, "engine/arg_utils.py has no such flag"),
    Change(_OLDEST, "has_active_limit", False, "engine/arg_utils.py has no such flag"),
    Change((0, 9, 0), "samples_by_sorting", True, "v1/sample/ops/topk_topp_sampler.py"),
    Change((0, 9, 0), "batch_budgets", _BUDGETS_BUT_A100, "engine/arg_utils.py"),
    Change((0, 9, 1), "hybrid_kv_cache", True, "v1/core/kv_cache_utils.py (_get_kv_cache_config_uniform_page_size)"),
    Change((0, 9, 2), "batch_budgets", (BatchBudget(0, 2048, 32),), "engine/arg_utils.py", _ON_CPU),
    Change((0, 10, 0), "batch_budgets", (BatchBudget(0, 2048, 128),), "engine/arg_utils.py", _ON_CPU),
    Change((0, 11, 1), "max_lora_ranks", (1, *_RANKS), "config/lora.py (MaxLoRARanks)"),
    Change((0, 11, 1), "adapts_experts", True, "lora/layers/fused_moe.py"),
    Change((0, 11, 1), "lora_graph_captures", 2, "config/compilation.py (cudagraph_specialize_lora)"),
    Change((0, 12, 0), "lora_extra_vocab_tokens", 0, "config/lora.py"),
    Change((0, 13, 0), "keeps_expert_workspace", True, "v1/worker/workspace.py"),
    Change((0, 14, 0), "scheduler.async_scheduling", True, "config/vllm.py; platforms/cpu.py turns it off", _ON_GPU),
    Change((0, 15, 0), "packed_expand_outputs", 64, "lora/ops/triton_ops/utils.py (get_lora_op_configs)"),
    Change((0, 16, 0), "specializes_active_lora", True, "config/lora.py"),
    Change((0, 17, 0), "samples_by_sorting", False, "v1/sample/ops/topk_topp_triton.py"),
    Change((0, 18, 0), "scheduler.skipped_first", True, "v1/core/sched/scheduler.py"),
    Change((0, 19, 0), "restricts_target_modules", True, "config/lora.py"),
    Change((0, 19, 0), "scheduler.full_prompt_must_fit", True, "v1/core/sched/scheduler.py"),
    Change((0, 20, 0), "gpu_memory_utilization", 0.92, "config/cache.py"),
    Change((0, 20, 0), "counts_cuda_graphs", True, "envs.py (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS)"),
    Change((0, 21, 0), "logs_kv_tokens_as_concurrency", True, "v1/core/kv_cache_utils.py"),
    Change((0, 23, 0), "scheduler.uncached_blocks_first", True, "v1/core/block_pool.py (free_blocks)"),
    Change((0, 24, 0), "has_watermark", True, "config/cache.py"),
    Change((0, 28, 0), "batch_budgets", (_LARGEST_BUDGET, *_BUDGETS_BUT_A100), "engine/arg_utils.py", _ON_GPU),
    Change((0, 31, 0), "scheduler.skipped_first", False, "v1/core/sched/scheduler.py"),
    Change((0, 31, 0), "scheduler.uncut_if_alone", True, "v1/core/sched/scheduler.py"),
    Change((0, 31, 0), "has_active_limit", True, "config/scheduler.py"),
    Change((0, 33, 0), "batch_budgets", _BUDGETS_BUT_GB10, "engine/arg_utils.py", _ON_GPU),
    Change((0, 33, 0), "scheduler.running_adapters_in_use", True, "v1/core/sched/scheduler.py"),
)
"""Ascending by release. The file is that of the release in which the rule begins; each was looked for in the release
before as well. The rules of the scheduler are seen in the schedules of 0.8.5, 0.13, 0.14, 0.26, 0.32 and 0.33. From
0.9.2 to 0.13 skipped requests go back in reverse order, which is left out."""


@dataclass(frozen=True)
class Embeddings:
    """Architectures whose embedding is adapted, from a release on, up to the one that ends it.

    Attributes:
        since: The first release.
        until: The first release without, or None.
        architectures: Their names at Hugging Face.
        head: Whether the output head is adapted too.
    """

    since: Release
    until: Release | None
    architectures: tuple[str, ...]
    head: bool = True


EMBEDDINGS = (
    Embeddings(
        _OLDEST,
        None,
        (
            *("LlamaForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM"),
            *("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "NemotronForCausalLM"),
            *("ExaoneForCausalLM", "InternLM3ForCausalLM", "DeciLMForCausalLM", "SolarForCausalLM"),
            *("MiniCPMForCausalLM", "MiniCPM3ForCausalLM", "JambaForCausalLM", "TeleChat2ForCausalLM"),
        ),
    ),
    Embeddings(_OLDEST, (0, 9, 0), ("GPTBigCodeForCausalLM",)),
    Embeddings(_OLDEST, (0, 15, 0), ("MistralForCausalLM",)),
    Embeddings(_OLDEST, (0, 24, 0), ("InternLMForCausalLM", "BambaForCausalLM")),
    Embeddings(_OLDEST, (0, 32, 0), ("GlmForCausalLM",)),
    Embeddings((0, 9, 0), None, ("FalconH1ForCausalLM", "GraniteMoeHybridForCausalLM")),
    Embeddings((0, 9, 2), None, ("NemotronHForCausalLM",)),
    Embeddings((0, 10, 0), None, ("Exaone4ForCausalLM",)),
    Embeddings((0, 10, 1), None, ("Ernie4_5ForCausalLM", "Llama4ForCausalLM")),
    Embeddings((0, 10, 2), None, ("ApertusForCausalLM", "Lfm2ForCausalLM")),
    Embeddings((0, 16, 0), None, ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")),
    Embeddings((0, 29, 0), None, ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "GraniteSWAForCausalLM")),
    # Those that run on transformers' code; what adapters add to a vocabulary, before 0.12, is left out.
    Embeddings((0, 12, 0), None, ("SmolLM3ForCausalLM",), head=False),
    Embeddings((0, 25, 0), None, ("Starcoder2ForCausalLM", "GPTBigCodeForCausalLM"), head=False),
    Embeddings((0, 26, 0), None, ("OlmoForCausalLM", "Olmo2ForCausalLM"), head=False),
    Embeddings((0, 29, 0), None, ("Olmo3ForCausalLM",), head=False),
    Embeddings((0, 32, 0), None, ("GlmForCausalLM", "PhiForCausalLM", "SeedOssForCausalLM"), head=False),
)
"""Source: ``embedding_modules`` of the classes in ``model_executor/models`` that vLLM adapts, with their bases, and
``registry.py`` beside them of those that run on transformers' code."""


@dataclass(frozen=True)
class VllmBehaviour(EngineBehaviour):
    """Defaults and rules of one vLLM version; the tables `CHANGES` and `EMBEDDINGS` say where each was read."""

    @classmethod
    def for_version(cls, version: str, device: str = "gpu") -> Self:
        """Return the behaviour of a vLLM version.

        Args:
            version: As ``vllm.__version__`` has it (``0.8.5``, ``0.32.0rc1``, ``v0.11.2.post1``).
            device: One of `DEVICES`.

        Raises:
            InputError: If it is not a version, or older than 0.8, whose default engine is another.
        """
        found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(version))
        if found is None:
            raise InputError("vllm_version", version, "a version such as 0.8.5")
        release = (int(found[1]), int(found[2]), int(found[3] or 0))
        if release < _OLDEST:
            raise InputError("vllm_version", version, "0.8 or later, whose default is the V1 engine", "upgrade vLLM")
        rules = {
            change.rule: change.value for change in CHANGES if change.since <= release and device in change.devices
        }
        nested = "scheduler."
        scheduler = {name.removeprefix(nested): rule for name, rule in rules.items() if name.startswith(nested)}
        own = {name: rule for name, rule in rules.items() if not name.startswith(nested)}
        for rule, head in (("embedding_architectures", True), ("headless_embedding_architectures", False)):
            own[rule] = tuple(
                name
                for span in EMBEDDINGS
                if span.head == head and span.since <= release and (span.until is None or release < span.until)
                for name in span.architectures
            )
        return cls(engine="vLLM", version=version, device=device, scheduler=SchedulerRules(**scheduler), **own)
