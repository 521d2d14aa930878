"""``lora-capacity memory``: whether a server fits its GPUs, and how many slots."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.words import REFUSALS, plural
from lora_capacity_cli.completion import GPU, MODEL
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, Modules, examples, format_option
from lora_capacity_cli.output import (
    gibibytes,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    shown,
    stacked_bar,
)

if TYPE_CHECKING:
    from lora_capacity.hardware import Gpu
    from lora_capacity.memory import EstimatedTerms, MemoryAnswer, MemoryQuestion

_KEYS = {"weight_bytes": "weights_bytes", "slot_bytes": "slots_bytes"}
"""Keys of ``per_gpu`` that are called otherwise than the field of a plan."""

_FLAG_NAMES = {"target_modules": "lora_target_modules"}
"""vLLM's names of settings that are called otherwise here."""

_NEEDS = {"lora_target_modules": "restricts_target_modules", "specialize_active_lora": "specializes_active_lora"}
"""Flags that only some versions have, and the rule that says so."""

_OPTIONS: dict[str, tuple[Any, str]] = {
    "tensor_parallel_size": (int, "GPUs for tensor parallelism."),
    "pipeline_parallel_size": (int, "Stages of pipeline parallelism."),
    "quantization": (str, "Quantization of the weights, if config.json does not say: fp8, awq, gptq, int8, ..."),
    "kv_cache_dtype": (str, "Data type of the KV cache: auto, fp8, ..."),
    "max_loras": (int, "Slots on the GPU; 0 for a server without LoRA."),
    "max_cpu_loras": (int, "Adapters in host memory. [default: --max-loras]"),
    "max_lora_rank": (int, "Largest rank that a slot holds."),
    "lora_target_modules": (Modules(), "Modules that slots are reserved for, separated by commas."),
    "max_num_seqs": (int, "Maximum concurrent sequences."),
    "max_num_batched_tokens": (int, "Token budget of a step."),
    "gpu_memory_utilization": (float, "Share of GPU memory that vLLM may use."),
    "max_model_len": (int, "Maximum tokens of a request, prompt plus output."),
    "block_size": (int, "Tokens per KV block."),
    "enforce_eager": (bool, "No CUDA graphs."),
    "fully_sharded_loras": (bool, "Shard adapters over the GPUs as far as possible."),
    "specialize_active_lora": (bool, "CUDA graphs for every power of two of active adapters (vLLM 0.16 or later)."),
    "enable_lora": (bool, "Whether the server has adapter slots. [default: yes, or as --serve-line says]"),
}
"""vLLM's flags, their types, and what they are for."""


def _flag_options(command: Any) -> Any:
    """Add vLLM's flags to the command, which gets those given as ``flags``."""
    for name, (kind, text) in reversed(_OPTIONS.items()):
        flag = f"--{name.replace('_', '-')}"
        words = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
        default = {"default": None} if kind is bool else {}
        command = click.option(words, name, type=None if kind is bool else kind, help=text, **default)(command)
    return command


@command(
    epilog=examples(
        "lora-capacity memory --model Qwen3-8B --gpu L4 --max-loras 4 --max-lora-rank 16",
        'lora-capacity memory --gpu A10G --serve-line "vllm serve Qwen/Qwen3-8B --enable-lora"',
    )
)
@click.option("--model", type=MODEL, metavar="DIR|NAME", help="Model: its folder, config.json, or name (Qwen3-8B).")
@click.option("--gpu", type=GPU, metavar="NAME", help="GPU: RTX 4090, L4, A100-80GB, H100, ...")
@click.option("--gpu-memory-gib", type=float, metavar="GIB", help="GPU memory as nvidia-smi reports it.")
@click.option(
    "--host-memory-gib",
    type=float,
    metavar="GIB",
    help="Host memory for adapters; the answer then says how large --max-cpu-loras can be.",
)
@click.option("--vllm-version", metavar="VERSION", help="vLLM version. [default: newest supported]")
@click.option(
    "--serve-line", metavar="LINE", help="A `vllm serve ...` command to read settings from; other options override it."
)
@click.option(
    "--config",
    type=FILE,
    metavar="FILE",
    help="A `vllm serve --config` file to read settings from; other options override it.",
)
@click.option("--adapter", type=FILE, metavar="DIR", help="An adapter; its adapter_config.json gives rank and modules.")
@click.option("--layouts", type=FILE, metavar="FILE", help="Layouts of further model architectures.")
@click.option(
    "--terms", type=FILE, metavar="FILE.json", help="Memory terms written by `fit STARTUPS.csv`. [default: bundled]"
)
@_flag_options
@format_option
def memory(
    model: str | None,
    gpu: str | None,
    gpu_memory_gib: float | None,
    host_memory_gib: float | None,
    vllm_version: str | None,
    serve_line: str | None,
    config: Path | None,
    adapter: Path | None,
    layouts: Path | None,
    terms: Path | None,
    output_format: str,
    **flags: Any,
) -> None:
    """Check whether a server fits its GPUs, where memory goes, and how many adapter slots fit.

    No calibration is needed: weights, slots and KV cache follow from the model's shape. Activations and other terms are
    estimated; intervals show how far off they may be.
    """
    from lora_capacity.memory import EstimatedTerms, answer_memory

    given = {name: value for name, value in flags.items() if value is not None}
    told, ignored = _told(serve_line, config)
    given = told | given | ({"model": model} if model is not None else {})
    known = EstimatedTerms.bundled() if terms is None else EstimatedTerms.from_file(terms)
    question = _question(given, _gpu(gpu, gpu_memory_gib), known, vllm_version, adapter, layouts, lora=not told)
    answer = answer_memory(question)
    document = _document(question, answer) | {"not_looked_at": ignored}
    if host_memory_gib is not None:
        document["most_max_cpu_loras"] = _most_on_host(question, answer, host_memory_gib)
    if output_format == "json":
        print_json(document)
    else:
        _print(question, answer, document)


def _most_on_host(question: "MemoryQuestion", answer: "MemoryAnswer", memory_gib: float) -> int:
    """Return how many adapters of ``max_lora_rank`` host memory holds."""
    from lora_capacity.errors import check_number

    gib = check_number("--host-memory-gib", memory_gib, minimum=0, exclusive=True)
    if not question.enable_lora:
        raise InputError("--host-memory-gib", memory_gib, "nothing without LoRA", "it is for adapters")
    return int(gib * BYTES_PER_GIB // answer.host_bytes_per_adapter)


def _told(serve_line: str | None, config: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Return what a line or file says, and the flags in it that have nothing to do with memory."""
    from lora_capacity.engines import read_serve_config, read_serve_line

    if serve_line is not None and config is not None:
        raise InputError("--config", str(config), "nothing beside --serve-line", "write its flags into the line")
    if serve_line is not None:
        return read_serve_line(serve_line)
    return ({}, []) if config is None else read_serve_config(config)


def _gpu(name: str | None, memory_gib: float | None) -> "Gpu":
    from lora_capacity.errors import check_number
    from lora_capacity.hardware import Gpu, find_gpu

    if name is None and memory_gib is None:
        raise InputError("--gpu", None, "a GPU name, or --gpu-memory-gib")
    known = find_gpu(name).gpu if name is not None else Gpu("GPU", 1)
    if memory_gib is None:
        return known
    gib = check_number("--gpu-memory-gib", memory_gib, minimum=0, exclusive=True)
    return Gpu(f"GPU of {gib:g} GiB" if name is None else known.name, round(gib * BYTES_PER_GIB))


def _question(
    given: dict[str, Any],
    gpu: "Gpu",
    terms: "EstimatedTerms",
    version: str | None,
    adapter: Path | None,
    layouts: Path | None,
    *,
    lora: bool,
) -> "MemoryQuestion":
    from lora_capacity.engines import NEWEST, ServerConfig, VllmBehaviour, smallest_max_lora_rank
    from lora_capacity.memory import Deployment, MemoryQuestion
    from lora_capacity.models import find_shape, read_adapter

    behaviour = VllmBehaviour.for_version(version or NEWEST)
    for flag, rule in _NEEDS.items():
        if given.get(flag) and not getattr(behaviour, rule):
            raise InputError(
                f"--{flag.replace('_', '-')}", given[flag], f"nothing: vLLM {behaviour.version} has no such flag"
            )
    if "model" not in given:
        raise InputError("--model", None, "a model's folder, config.json or name")
    shape = find_shape(given["model"], given.get("quantization"), layouts)
    enabled = bool(given.get("enable_lora", lora)) and given.get("max_loras") != 0
    if not enabled and any(given.get(name) for name in ("max_loras", "max_lora_rank", "lora_target_modules")):
        raise InputError("--enable-lora", "off", "on, for a server with slots for adapters")
    settings = {name: value for name, value in given.items() if name not in ("model", "quantization", "enable_lora")}
    flags = [entry.name for entry in dataclasses.fields(Deployment)]
    deployed = {name: settings.pop(name) for name in flags if name in settings}
    if settings.get("max_loras") == 0:
        del settings["max_loras"]
    if "lora_target_modules" in settings:
        settings["target_modules"] = settings.pop("lora_target_modules")
    modules: tuple[str, ...] = ()
    if adapter is not None:
        found = read_adapter(adapter, settings.get("max_lora_rank") or behaviour.max_lora_ranks[-1], shape)
        settings.setdefault("max_lora_rank", smallest_max_lora_rank(found.rank, behaviour))
        modules = found.target_modules
    server = ServerConfig.with_defaults(behaviour, gpu, shape, **settings)
    return MemoryQuestion(shape, gpu, terms, server, Deployment(**deployed), enabled, modules)


def _document(question: "MemoryQuestion", answer: "MemoryAnswer") -> dict[str, Any]:
    from lora_capacity.memory import PARTS

    plan, server = answer.plans["expected"], question.server
    status = answer.status()
    lacks = f" ({gibibytes(answer.lacking_bytes)} too little per GPU)"
    return {
        "model": question.model.name,
        "gpu": question.gpu.name,
        "gpu_memory_bytes": question.gpu.memory_bytes,
        "vllm_version": server.vllm_version,
        "status": status.label,
        "reason": REFUSALS[status.label] + lacks if status.label in REFUSALS else None,
        "status_range": {name: answer.status(name).label for name in answer.plans},
        "settings": _settings(question),
        "per_gpu": {_KEYS.get(field, field): float(getattr(plan, field)[0]) for field in PARTS}
        | {"slot_bytes": answer.slot_bytes},
        "kv_bytes_per_token": float(plan.kv_bytes_per_token[0]),
        "kv_cache_tokens": {name: int(each.kv_cache_tokens[0]) for name, each in answer.plans.items()},
        "kv_cache_requests": {name: float(each.kv_cache_requests[0]) for name, each in answer.plans.items()},
        "most_max_loras": dict(answer.most_max_loras),
        "most_max_loras_by_rank": {str(rank): most for rank, (most, _) in answer.slots_by_rank.items()},
        "host_bytes_per_adapter": answer.host_bytes_per_adapter,
        "host_bytes": answer.host_bytes,
        "remedies": [dataclasses.asdict(each) | {"flag": _flag(each.flag)} for each in answer.remedies],
    }


def _flag(name: str) -> str:
    return f"--{_FLAG_NAMES.get(name, name).replace('_', '-')}"


def _settings(question: "MemoryQuestion") -> dict[str, Any]:
    server = question.server
    names = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "max_model_len", "block_size")
    slots = ("max_loras", "max_cpu_loras", "max_lora_rank")
    found = {name: getattr(server, name) for name in (*slots * question.enable_lora, *names)}
    found |= dataclasses.asdict(question.deployment)
    return {"enable_lora": question.enable_lora} | found | {"quantization": question.model.quantization or None}


def _print(question: "MemoryQuestion", answer: "MemoryAnswer", document: dict[str, Any]) -> None:
    from lora_capacity.memory import PARTS

    plan, gpu = answer.plans["expected"], question.gpu
    starts = "starts" if document["reason"] is None else document["reason"]
    title = f"{question.model.name} on {_gpus(question)}, vLLM {question.server.vllm_version}: {starts}"
    counted = question.behaviour.counts_cuda_graphs
    share = question.server.gpu_memory_utilization
    parts = {
        label: max(float(getattr(plan, field)[0]), 0.0)
        for field, label in PARTS.items()
        if field != "cuda_graph_bytes" or counted
    }
    stacked_bar(title, {label: size / gpu.memory_bytes for label, size in parts.items()}, share)
    low, expected, high = (document["kv_cache_tokens"][name] for name in ("low", "expected", "high"))
    requests = document["kv_cache_requests"]
    facts = {label: gibibytes(float(getattr(plan, field)[0])) for field, label in PARTS.items()}
    if not counted:
        facts["CUDA graphs"] += ", outside --gpu-memory-utilization"
    facts["KV cache"] += f", {shown(document['kv_bytes_per_token'])} bytes per token"
    facts["KV tokens"] = f"{expected:,} (90 % interval: {low:,} to {high:,})"
    length = question.server.max_model_len
    facts[f"concurrent requests of {length:,} tokens"] = (
        f"{shown(requests['expected'])} ({shown(requests['low'])} to {shown(requests['high'])})"
    )
    if question.enable_lora:
        most = answer.most_max_loras
        facts["one slot"] = f"{gibibytes(answer.slot_bytes)} at rank {question.server.max_lora_rank}"
        facts["maximum slots"] = f"{most['expected']:,} ({most['low']:,} to {most['high']:,})"
        facts["host memory"] = (
            f"{gibibytes(answer.host_bytes)} for {plural(question.server.max_cpu_loras, 'adapter')}, "
            f"{gibibytes(answer.host_bytes_per_adapter)} each"
        )
        if "most_max_cpu_loras" in document:
            facts["maximum adapters in host memory"] = f"{document['most_max_cpu_loras']:,}"
    print_facts("Each GPU", facts)
    if question.enable_lora:
        rows = [
            {"max_lora_rank": rank, "one slot": gibibytes(size), "maximum max_loras": most}
            for rank, (most, size) in answer.slots_by_rank.items()
        ]
        print_table("Slots by rank", rows)
    rows = [
        {
            "flag": f"{_flag(each.flag)} {'' if each.value is True else shown_value(each.value)}".strip(),
            "memory freed": gibibytes(each.room_bytes),
            "KV tokens": each.kv_cache_tokens,
            "starts": each.starts,
        }
        for each in answer.remedies
    ]
    print_table("Flags that free memory", rows)
    print_warnings(_warnings(answer, document))


def shown_value(value: Any) -> str:
    """Return a flag's value as it is written."""
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _gpus(question: "MemoryQuestion") -> str:
    count = question.deployment.tensor_parallel_size * question.deployment.pipeline_parallel_size
    return question.gpu.name if count == 1 else f"{count} x {question.gpu.name}"


def _warnings(answer: "MemoryAnswer", document: dict[str, Any]) -> list[str]:
    found = []
    if document["status"] == "ok" and document["status_range"]["low"] != "ok":
        found.append("close to the limit: one in twenty such servers would not start")
    held = document["settings"].get("max_cpu_loras", 0)
    if held > document.get("most_max_cpu_loras", held):
        found.append(f"host memory is too small for max_cpu_loras {held:,}: vLLM does not check, and fails later")
    if document["not_looked_at"]:
        found.append(f"ignored, no effect on memory: {', '.join(document['not_looked_at'])}")
    return found
