"""The flags of one ``vllm serve`` command that decide how many adapters it can serve."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Self

from pydantic import SkipValidation

from lora_capacity.engines.base import EngineBehaviour, smallest_max_lora_rank
from lora_capacity.engines.vllm.versions import VllmBehaviour
from lora_capacity.errors import InputError, check_keys, check_number
from lora_capacity.hardware.gpu import Gpu
from lora_capacity.models import ModelShape, expand_target_modules
from lora_capacity.schema import Count, Number, check_fields

_OF_THE_ENGINE = ("vllm_version", "device", "defaults", "layout")
_NUMBERS = (
    *("max_loras", "max_cpu_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens"),
    *("gpu_memory_utilization", "max_model_len", "block_size"),
)
_OF_LORA = ("max_loras", "max_cpu_loras", "max_lora_rank")
SCHEDULING: Mapping[str, Any] = {"watermark": 0.0, "max_num_active_seqs": None, "long_prefill_token_threshold": 0}
"""Settings of the scheduler with their defaults, the same in all versions, which do without a flag."""

FlagValue = str | int | float | bool | list[str] | tuple[str, ...]
"""Value of a flag."""


def flag_words(flags: Mapping[str, FlagValue]) -> list[str]:
    """Return flags as words of a command line.

    ``{"max_loras": 4, "enable_lora": True, "enable_prefix_caching": False}`` becomes ``--max-loras 4 --enable-lora
    --no-enable-prefix-caching``; a list gives several words after its flag.

    Args:
        flags: Values by vLLM's names, with underscores.
    """
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, list | tuple) else [str(value)])]
    return words


@dataclass(frozen=True)
class ServerConfig:
    """A server's settings, by the names of vLLM's flags.

    Attributes:
        vllm_version: The vLLM version that runs them.
        max_loras: Slots for adapters on the GPU (S); 0: the server is started without LoRA.
        max_cpu_loras: Adapters held in host memory (C), at least ``max_loras``.
        max_lora_rank: Rank that every slot is reserved for.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step, at least ``max_num_seqs``.
        gpu_memory_utilization: Share of the GPU memory that the server plans with.
        max_model_len: Longest sequence, prompt and output together, tokens.
        block_size: Tokens of a KV block.
        target_modules: Modules that the adapters adapt, see :func:`expand_target_modules`.
        enable_prefix_caching: Whether tokens that stand in the KV cache already are not computed again, as by default
            in all versions.
        watermark: Share of the KV blocks that an admission leaves free unless nothing runs.
        max_num_active_seqs: Most running requests, where those are fewer than ``max_num_seqs``, which memory is for.
        long_prefill_token_threshold: Most tokens that a prompt gets in a step; 0: as many as the step has room for.
        device: What it computes on, one of `DEVICES`.
        defaults: What vLLM would choose by itself.
        layout: Flags of how the model is laid out on GPUs, where that is not on one with vLLM's defaults.
    """

    vllm_version: str
    max_loras: Annotated[int, Number(minimum=0)]
    max_cpu_loras: Annotated[int, Number(minimum=0)]
    max_lora_rank: SkipValidation[int]
    max_num_seqs: Count
    max_num_batched_tokens: Count
    gpu_memory_utilization: Annotated[float, Number(0, 1, exclusive=True)]
    max_model_len: Count
    block_size: Count = 16
    target_modules: SkipValidation[str | tuple[str, ...]] = "all-linear"
    enable_prefix_caching: bool = True
    watermark: SkipValidation[float] = 0.0
    max_num_active_seqs: Count | None = None
    long_prefill_token_threshold: Annotated[int, Number(minimum=0)] = 0
    device: str = "gpu"
    defaults: SkipValidation[Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    layout: SkipValidation[Mapping[str, FlagValue]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_cpu_loras < self.max_loras:
            raise InputError("max_cpu_loras", self.max_cpu_loras, f"a whole number >= max_loras {self.max_loras}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            allowed = f"a whole number >= max_num_seqs {self.max_num_seqs}"
            raise InputError(
                "max_num_batched_tokens", self.max_num_batched_tokens, allowed, "lower max_num_seqs with it"
            )
        _check_rank(self.max_lora_rank, self.behaviour)
        _check_watermark(self.watermark, self.behaviour)
        if self.max_num_active_seqs is not None:
            _check_active_limit(self.max_num_active_seqs, self.max_num_seqs, self.behaviour)
        if self.long_prefill_token_threshold > self.max_model_len:
            allowed = f"a whole number from 0 to max_model_len {self.max_model_len}"
            raise InputError("long_prefill_token_threshold", self.long_prefill_token_threshold, allowed)
        object.__setattr__(self, "max_lora_rank", int(self.max_lora_rank))
        expand_target_modules(self.target_modules)

    @property
    def behaviour(self) -> EngineBehaviour:
        """Defaults and rules of the vLLM version on the device."""
        return VllmBehaviour.for_version(self.vllm_version, self.device)

    @property
    def enable_lora(self) -> bool:
        """Whether the server has slots for adapters at all."""
        return self.max_loras > 0

    @property
    def reserved_modules(self) -> str | tuple[str, ...]:
        """Modules that every slot is reserved for."""
        return self.behaviour.reserved_modules(self.target_modules)

    @property
    def planned(self) -> dict[str, Any]:
        """Settings that decide how a GPU's memory is shared out, as `plan_memory` takes them."""
        # Host memory, which `max_cpu_loras` decides, is not the GPU's.
        numbers = {name: getattr(self, name) for name in _NUMBERS if name != "max_cpu_loras"}
        return numbers | {"target_modules": self.reserved_modules}

    @classmethod
    def with_defaults(cls, behaviour: EngineBehaviour, gpu: Gpu, model: ModelShape, **given: Any) -> Self:
        """Fill in what is not given as that vLLM version would on that GPU.

        ``max_num_seqs`` shrinks to a given smaller ``max_num_batched_tokens``, as newer versions do by themselves.

        Args:
            behaviour: The vLLM version.
            gpu: The GPU, whose memory and name decide the batch limits.
            model: The base model, which decides the longest sequence.
            **given: Any of the fields but ``vllm_version``, ``device`` and ``defaults``; None counts as not given.

        Raises:
            InputError: If a name is unknown or a value is not allowed.
        """
        given = {name: value for name, value in given.items() if value is not None}
        check_keys("", given, [entry.name for entry in fields(cls) if entry.name not in _OF_THE_ENGINE])
        budget = behaviour.batch_budget(gpu)
        defaults = {
            "max_loras": 1,
            "max_cpu_loras": given.get("max_loras", 1),
            "max_lora_rank": behaviour.max_lora_rank,
            "max_num_seqs": budget.max_num_seqs,
            "max_num_batched_tokens": budget.max_num_batched_tokens,
            "gpu_memory_utilization": behaviour.gpu_memory_utilization,
            "max_model_len": model.max_position_embeddings,
            "block_size": behaviour.block_size,
            "target_modules": "all-linear",
            "enable_prefix_caching": True,
            **SCHEDULING,
        }
        values = defaults | given
        if "max_num_seqs" not in given and "max_num_batched_tokens" in given:
            tokens = check_number("max_num_batched_tokens", values["max_num_batched_tokens"], minimum=1, integer=True)
            values["max_num_seqs"] = min(budget.max_num_seqs, tokens)
        config = cls(vllm_version=behaviour.version, device=behaviour.device, **values, defaults=defaults)
        if config.max_model_len > model.max_position_embeddings:
            allowed = f"at most the {model.max_position_embeddings} tokens that {model.name} takes"
            raise InputError("max_model_len", config.max_model_len, allowed)
        return config

    @property
    def flags(self) -> dict[str, FlagValue]:
        """Every flag that a prediction rests on, by vLLM's name, defaults included: those change with the version.

        Prefix caching is told only where it is off, since all versions have it on; the scheduler's settings likewise.
        """
        flags: dict[str, FlagValue] = {name: getattr(self, name) for name in _NUMBERS}
        if self.enable_lora:
            flags = {"enable_lora": True} | flags
        else:
            flags = {name: value for name, value in flags.items() if name not in _OF_LORA}
        if self.enable_lora and self.reserved_modules != "all-linear":
            flags["lora_target_modules"] = list(expand_target_modules(self.reserved_modules))
        flags |= dict(self.layout)
        flags |= {name: value for name, usual in SCHEDULING.items() if (value := getattr(self, name)) != usual}
        return flags if self.enable_prefix_caching else flags | {"enable_prefix_caching": False}

    def serve_command(self, model_name: str) -> str:
        """Return the ``vllm serve`` line, quoted for a shell.

        Args:
            model_name: What to serve: a model's name, Hugging Face id or path.
        """
        return shlex.join(["vllm", "serve", model_name, *flag_words(self.flags)])


def _check_watermark(share: object, behaviour: EngineBehaviour) -> None:
    if not 0 <= check_number("watermark", share) < 1:
        raise InputError("watermark", share, ">= 0 and < 1")
    if share and not behaviour.has_watermark:
        raise InputError("watermark", share, f"0: vLLM {behaviour.version} has no such flag")


def _check_active_limit(active: int, most: int, behaviour: EngineBehaviour) -> None:
    if not behaviour.has_active_limit:
        raise InputError("max_num_active_seqs", active, f"nothing: vLLM {behaviour.version} has no such flag")
    if active > most:
        raise InputError("max_num_active_seqs", active, f"a whole number from 1 to max_num_seqs {most}")


def _check_rank(rank: object, behaviour: EngineBehaviour) -> None:
    if not isinstance(rank, bool) and rank in behaviour.max_lora_ranks:
        return
    largest = behaviour.max_lora_ranks[-1]
    number = check_number("max_lora_rank", rank)
    remedy = f"use {smallest_max_lora_rank(int(-(-number // 1)), behaviour)}" if 0 < number <= largest else ""
    raise InputError("max_lora_rank", rank, f"one of {', '.join(map(str, behaviour.max_lora_ranks))}", remedy)
