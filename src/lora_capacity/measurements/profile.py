"""A profile folder: tables of how one server behaved, and what server that was."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_capacity.engines import DEVICES, VllmBehaviour
from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.hardware import Gpu, find_gpu
from lora_capacity.measurements.runs import FloatArray, IntArray, take_rows
from lora_capacity.measurements.schemas import PROFILE_TABLES, TableSchema
from lora_capacity.models import ModelShape, find_shape
from lora_capacity.reading import read_mapping
from lora_capacity.schema import ABSENT, Count, JsonModel, Share, briefly, validated
from lora_capacity.status import Status
from lora_capacity.units import BYTES_PER_GIB, MS_PER_S

Table = dict[str, np.ndarray]

_PUBLISHED_SERVER = {
    "vllm_version": "0.8.5",
    "gpu_memory_utilization": 0.9,
    "max_num_seqs": 2048,
    "max_num_batched_tokens": 2048,
}
_PUBLISHED_MODELS = {
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen-2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}

_MANY_PROMPTS = 1000  # fewer, sent at once, are over before the server has filled a step
_REQUIRED_KEYS = ("model_shape", "gpu", "server")


class _Server(JsonModel):
    """``server`` of a ``profile.json``, as far as fits use it."""

    vllm_version: str
    gpu_memory_utilization: Share
    max_num_seqs: Count
    max_num_batched_tokens: Count
    max_model_len: Count = ABSENT
    block_size: Count = ABSENT


@dataclass(frozen=True)
class CapacityRows:
    """Server starts and what they reported; arrays ``[rows]``.

    Attributes:
        max_loras: Slots; 0 for a server without LoRA.
        max_lora_rank: Rank that slots were reserved for (any positive number without LoRA).
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        kv_cache_tokens: Reported size of the KV cache; NaN where the server did not start.
        cuda_graph_bytes: Reported memory of the CUDA graphs; NaN where not recorded.
        status: :class:`~lora_capacity.status.Status` of each start.
        gpu_memory_utilization: Share of the memory that every server planned with.
        max_model_len: Longest sequence of every server, tokens.
        behaviour: The vLLM version.
        target_modules: Modules that slots were reserved for.
        block_size: Tokens of a KV block.
    """

    max_loras: IntArray
    max_lora_rank: IntArray
    max_num_seqs: IntArray
    max_num_batched_tokens: IntArray
    kv_cache_tokens: FloatArray
    cuda_graph_bytes: FloatArray
    status: IntArray
    gpu_memory_utilization: float
    max_model_len: int
    behaviour: VllmBehaviour
    target_modules: str | tuple[str, ...] = "all-linear"
    block_size: int = 16

    def take(self, chosen: IntArray) -> "CapacityRows":
        """Return the rows of these indices."""
        return take_rows(self, chosen)

    def started(self) -> "CapacityRows":
        """Return the rows of servers that told their KV cache.

        Raises:
            InputError: If there is none.
        """
        rows = np.flatnonzero(np.isfinite(self.kv_cache_tokens))
        if not rows.size:
            raise InputError("kv_cache_tokens", "none", "at least one server that started")
        return self.take(rows)


@dataclass(frozen=True)
class Profile:
    """Measurements of one model on one GPU.

    Attributes:
        folder: Where they were read.
        model: Layer shapes.
        gpu: The GPU.
        server: The server's version and settings, by vLLM's names.
        device: ``gpu`` or ``cpu``.
        kv_capacity: Starts: slots, rank, KV cache or why none.
        decode: Closed batches without adapters: ``batch``, ``output_tokens``, ``step_s``.
        prefill: Prompts answered by one token: ``input_tokens``, ``prompts``, ``duration_s``, and whether they came one
            at a time, ``alone``.
        adapters: Closed batches with adapters: ``running``, ``max_loras``, ``max_lora_rank``, ``unique``,
            ``output_tokens``, ``step_s``.
        loading: Loads: ``rank``, ``host_to_gpu_load_s``, ``disk_s``.
    """

    folder: Path
    model: ModelShape
    gpu: Gpu
    server: dict[str, Any]
    device: str
    kv_capacity: CapacityRows
    decode: Table
    prefill: Table
    adapters: Table
    loading: Table

    @property
    def tells_prefill(self) -> bool:
        """Whether prompts of different lengths were timed."""
        return np.unique(self.prefill["input_tokens"]).size >= 2

    @property
    def behaviour(self) -> VllmBehaviour:
        """Defaults and rules of the server's version."""
        return VllmBehaviour.for_version(str(self.server["vllm_version"]), self.device)


def read_profile(folder: str | Path, model: str | None = None) -> Profile:
    """Read the tables of a profile folder, and ``profile.json`` beside them.

    Without a ``profile.json`` the folder is taken for the published H100 tables (arXiv 2508.08343), and ``model``
    chooses among its models.

    Args:
        folder: The folder.
        model: Which model of the tables; may be left out where ``profile.json`` names it.

    Raises:
        InputError: If a table or a column is missing or malformed, or the model does not occur.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "a profile folder")
    shape, gpu, server, device = _describe(folder, model)
    tables = {name: _rows(folder / f"{name}.csv", schema, shape.name) for name, schema in PROFILE_TABLES.items()}
    decode, prefill = _split_backbone(tables["backbone_latency"])
    behaviour = VllmBehaviour.for_version(str(server["vllm_version"]), device)
    capacity = _capacity_rows(tables["kv_capacity"], tables["backbone_latency"], server, behaviour, shape)
    return Profile(
        folder,
        shape,
        gpu,
        server,
        device,
        capacity,
        decode,
        prefill,
        _adapters(tables["adapter_latency"]),
        _loading(tables["adapter_loading"]),
    )


def _describe(folder: Path, model: str | None) -> tuple[ModelShape, Gpu, dict[str, Any], str]:
    path = folder / "profile.json"
    if not path.exists():
        known = ", ".join(_PUBLISHED_MODELS)
        if model is None:
            raise InputError("model", None, f"one of {known}", f"{folder} has no profile.json, so say which model")
        if model not in _PUBLISHED_MODELS:
            raise InputError("model", model, f"one of {known}", nearest_hint(model, _PUBLISHED_MODELS))
        shape = dataclasses.replace(find_shape(_PUBLISHED_MODELS[model]), name=model)
        return shape, find_gpu("H100-64GB").gpu, dict(_PUBLISHED_SERVER), "gpu"
    content = read_mapping(path)
    for key in _REQUIRED_KEYS:
        if key not in content:
            raise InputError(f"{path}: {key}", None, f"an object with {', '.join(_REQUIRED_KEYS)}")
    shape = ModelShape.from_json(content["model_shape"])
    if model is not None and model != shape.name:
        raise InputError("model", model, f"the profile's model, {shape.name}")
    server = content["server"]
    if not isinstance(server, Mapping):
        raise InputError(f"{path}: server", briefly(server), "a mapping")
    validated(_Server, {key: server[key] for key in _Server.model_fields if key in server}, f"{path}: server")
    return shape, Gpu.from_json(content["gpu"]), dict(server), _device(path, content)


def _device(path: Path, content: Mapping[str, Any]) -> str:
    device = content.get("device", DEVICES[0])
    if device not in DEVICES:
        raise InputError(f"{path}: device", device, ", ".join(DEVICES))
    return str(device)


def _rows(path: Path, schema: TableSchema, model: str) -> Table:
    table = schema.read(path)
    chosen = table["model"] == model
    if not chosen.any():
        raise InputError(f"{path}, model", model, f"a model of the table: {', '.join(sorted(set(table['model'])))}")
    return {name: values[chosen] for name, values in table.items()}


def _split_backbone(table: Table) -> tuple[Table, Table]:
    step_ms = np.where(np.isnan(table["median_step_ms"]), table["median_itl_ms"], table["median_step_ms"])
    decoding = (table["output_tokens"] > 1) & (step_ms > 0)
    prefilling = (table["output_tokens"] == 1) & (table["num_prompts"] >= _MANY_PROMPTS)
    alone = (table["output_tokens"] == 1) & (table["batch_size"] == 1)
    # Prompts by themselves tell less of a busy server: they count where nothing else is measured.
    prefilling = prefilling if prefilling.any() else alone
    decode = {
        "batch": table["batch_size"][decoding],
        "output_tokens": table["output_tokens"][decoding],
        "step_s": step_ms[decoding] / MS_PER_S,
    }
    prefill = {
        "input_tokens": table["input_tokens"][prefilling],
        "prompts": table["num_prompts"][prefilling],
        "duration_s": table["duration"][prefilling],
        "alone": alone[prefilling],
    }
    return decode, prefill


def _adapters(table: Table) -> Table:
    served, running = table["served_adapters"], table["mean_running"]
    lora = (served > 0) & ~np.isnan(table["max_loras"])
    drawn = served * (1.0 - (1.0 - 1.0 / np.maximum(served, 1.0)) ** running)
    unique = np.where(np.isnan(table["mean_unique_adapters"]), drawn, table["mean_unique_adapters"])
    return {
        "running": running[lora],
        "max_loras": table["max_loras"][lora],
        "max_lora_rank": table["max_lora_rank"][lora],
        "served": served[lora],
        "unique": unique[lora],
        "output_tokens": table["output_tokens"][lora],
        "step_s": table["median_itl_ms"][lora] / MS_PER_S,
    }


def _loading(table: Table) -> Table:
    return {
        "rank": table["adapter_rank"],
        "host_to_gpu_load_s": table["mean_memory_load_ms"] / MS_PER_S,
        "disk_s": table["mean_disk_load_ms"] / MS_PER_S,
    }


def _capacity_rows(
    starts: Table, backbone: Table, server: dict[str, Any], behaviour: VllmBehaviour, model: ModelShape
) -> CapacityRows:
    """Join starts with LoRA and, since they tell the memory without slots, the batches without."""
    bare = ~np.isnan(backbone["kv_cache_tokens"])
    nothing = np.full(int(bare.sum()), np.nan)
    labels = {status.label: int(status) for status in Status}
    for label in starts["status"]:
        if label not in labels:
            raise InputError("kv_capacity.csv, status", label, "ok, no_kv_cache or oom")
    started = [labels[label] for label in starts["status"]]

    def column(name: str, without: Float[np.ndarray, " batches"]) -> Float[np.ndarray, " starts"]:
        return np.concatenate([starts[name], without])

    seqs = np.full(starts["max_loras"].size, float(server["max_num_seqs"]))
    return CapacityRows(
        max_loras=column("max_loras", 0.0 * nothing.astype(bool)).astype(np.int64),
        max_lora_rank=column("max_lora_rank", np.full(nothing.size, 8.0)).astype(np.int64),
        max_num_seqs=np.concatenate([seqs, backbone["batch_size"][bare]]).astype(np.int64),
        max_num_batched_tokens=np.full(seqs.size + nothing.size, int(server["max_num_batched_tokens"])),
        kv_cache_tokens=column("kv_cache_tokens", backbone["kv_cache_tokens"][bare]),
        cuda_graph_bytes=column("cuda_graph_gib", nothing) * BYTES_PER_GIB,
        status=np.array([*started, *([int(Status.OK)] * nothing.size)]),
        gpu_memory_utilization=float(server["gpu_memory_utilization"]),
        max_model_len=int(server.get("max_model_len", model.max_position_embeddings)),
        behaviour=behaviour,
        block_size=int(server.get("block_size", behaviour.block_size)),
    )
