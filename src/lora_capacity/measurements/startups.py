"""Starts of servers as people log them: what was asked for, and what vLLM said of the memory."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_capacity.engines import NEWEST, VllmBehaviour
from lora_capacity.errors import InputError
from lora_capacity.hardware import Gpu, catalogue, find_gpu
from lora_capacity.memory import Deployment
from lora_capacity.models import ModelShape, ModelShard, find_shape, split_model
from lora_capacity.models.hf_config import read_config
from lora_capacity.tables import Column, read_table
from lora_capacity.units import BYTES_PER_GIB

_TEXT, _NUMBER = Column("text", required=False, blank=True), Column(required=False, blank=True)
_COLUMNS = {
    "id": Column("text"),
    "vllm_version": _TEXT,
    "engine": _TEXT,
    "gpu": _TEXT,
    "gpu_memory_gib": _NUMBER,
    "num_gpus_tp": _NUMBER,
    "pp": _NUMBER,
    "model": _TEXT,
    "dtype": _TEXT,
    "quantization": _TEXT,
    "kv_cache_dtype": _TEXT,
    "max_model_len": _NUMBER,
    "gpu_memory_utilization": _NUMBER,
    "max_num_seqs": _NUMBER,
    "max_num_batched_tokens": _NUMBER,
    "enforce_eager": _TEXT,
    "enable_lora": _TEXT,
    "max_loras": _NUMBER,
    "max_lora_rank": _NUMBER,
    "model_load_gib": _NUMBER,
    "activation_peak_gib": _NUMBER,
    "non_torch_gib": _NUMBER,
    "cuda_graph_gib": _NUMBER,
    "kv_cache_gib": _NUMBER,
    "kv_cache_tokens": _NUMBER,
    "num_gpu_blocks": _NUMBER,
    "block_size": _NUMBER,
    "outcome": _TEXT,
}
STARTUP_COLUMNS = tuple(_COLUMNS)
"""Columns of a table of starts; what a log does not tell stays blank."""

_MAP_COLUMNS = {"model_as_written_in_table": Column("text"), "config_file": _TEXT}
_CONFIGS = "model_configs"
"""Folder of configurations beside the map."""

_OLDEST = "0.8.0"
"""Version whose rules are taken for older ones, whose default engine was another."""
_V0_PROMPT_TOKENS = 32768
"""Longest sequence up to which V0 computed prompts whole, in a step of as many tokens (``config.py`` of 0.8.5)."""
_V0_STEP_TOKENS, _V0_SEQS = 2048, 256  # its batch limits otherwise
_REPORTED_SHARE = 0.97
"""Memory that drivers report, as a share of what is printed on a card that is not in the catalogue: from 0.92 (L4, with
error correction) to 1 (H100)."""

_SCHEMES = {
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "fp8": "fp8",
    "awq": "awq",
    r"w4a16|int4|auto-?round": "w4a16",
    "gptq": "gptq",
    r"bitsandbytes|bnb": "bitsandbytes",
    r"w8a8|w8a16|int8": "int8",
}
"""Schemes of quantized weights by words that people have for them, the most telling first."""

_WEIGHTS = re.compile(
    r"(^[\w-]+/)|([-_. ](awq|gptq|fp8|bf16|fp16|int[48]|w\da\d+|bnb|\d-?bit|nvfp4|dynamic|quantized)\b)+.*$",
    re.IGNORECASE,
)
"""Who published a model, and the words for its weights that end its name."""

_ENDINGS = ("", "-hf", "-Instruct")


@dataclass(frozen=True)
class Startup:
    """One start of a server: what it was told, and what it logged (GiB per GPU; NaN: not seen).

    Attributes:
        id: Its name in the table.
        model: The model as the table writes it.
        engine: ``V0`` or ``V1``.
        vllm_version: As logged.
        gpu_text: The GPU as the table writes it.
        quantization: As the table writes it.
        lora: Whether adapters were enabled.
        settings: Settings that were told, by vLLM's names.
        deployment: How the model was laid out.
        dtype: Type of the weights that are not quantized.
        gpu_memory_gib: Memory that vLLM saw.
        logged: Columns of what was logged, by name.
        outcome: ``ok``, ``no_kv_cache``, ``oom``, or other words.
        config: Content of the model's ``config.json``; None where the map has none, and a bundled shape is looked for.
    """

    id: str
    model: str
    engine: str
    vllm_version: str
    gpu_text: str
    quantization: str
    lora: bool
    settings: Mapping[str, float]
    deployment: Deployment
    dtype: str
    gpu_memory_gib: float
    logged: Mapping[str, float]
    outcome: str
    config: Mapping[str, Any] | None

    @property
    def family(self) -> str:
        """Architecture of the model, as vLLM calls it; empty where its shape is not known."""
        try:
            return self.shape.architecture
        except InputError:
            return ""

    @property
    def behaviour(self) -> VllmBehaviour:
        """Rules of the version, or of the nearest one that has the V1 engine."""
        found = re.search(r"\b0\.(\d+)(?:\.(\d+))?", self.vllm_version)
        version = found[0] if found else NEWEST  # where a log does not tell it
        older = found is not None and int(found[1]) < int(_OLDEST.split(".")[1])
        behaviour = VllmBehaviour.for_version(_OLDEST if older else version)
        return dataclasses.replace(behaviour, samples_by_sorting=True) if self.is_v0 else behaviour

    @property
    def is_v0(self) -> bool:
        """Whether the older engine ran, which had other batch limits."""
        return self.engine.startswith("V0")

    @property
    def gpu_kind(self) -> str:
        """Name of the GPU in the catalogue, or as the table has it."""
        words = re.sub(r"\(.*?\)", "", self.gpu_text).replace("-class", "").strip()
        names = sorted(catalogue(), key=len, reverse=True)
        for each in (words, *re.split(r"[/,]", words)):
            try:
                return find_gpu(each.strip()).name
            except InputError:
                continue
        told = _plain(words)
        # A name that several cards have stands for the largest of them, as servers mostly have that one.
        sizes = [name for name in names if told and _plain(name).startswith(told)]
        if sizes:
            return max(sizes, key=lambda name: (catalogue()[name].memory_bytes or 0, -len(name)))
        return next((name for name in names if _names(name, words)), words or "unnamed")

    @property
    def gpu(self) -> Gpu:
        """The GPU, with the memory that was logged, or else that of the catalogue or of the card's name.

        Raises:
            InputError: If none of these tells it.
        """
        kind = self.gpu_kind
        if not math.isnan(self.gpu_memory_gib):
            return Gpu(kind, int(self.gpu_memory_gib * BYTES_PER_GIB))
        if kind in catalogue():
            return catalogue()[kind].gpu
        printed = re.search(r"(\d+) ?GB", self.gpu_text)
        if printed is None:
            raise InputError(f"{self.id}: gpu", self.gpu_text, "a GPU of the catalogue, or a memory in gpu_memory_gib")
        return Gpu(kind, int(int(printed[1]) * _REPORTED_SHARE * BYTES_PER_GIB))

    @property
    def shape(self) -> ModelShape:
        """Layer shapes of the model.

        Raises:
            InputError: If neither the map nor the bundled shapes have it, or its configuration is not supported.
        """
        if not self.model:
            raise InputError(f"{self.id}: model", "", "the name of a model")
        shape = self._named() if self.config is None else self._read(self.config)
        return dataclasses.replace(shape, dtype_bytes=4) if self.dtype == "float32" else shape

    def _named(self) -> ModelShape:
        """Return the shape of a name as people write it: without a word for the weights, or an ending."""
        plain = _WEIGHTS.sub("", self.model)
        for name in (self.model, *(plain + ending for ending in _ENDINGS)):
            with contextlib.suppress(InputError):
                return find_shape(name, quantization=self._scheme)
        return find_shape(self.model, quantization=self._scheme)

    def _read(self, config: Mapping[str, Any]) -> ModelShape:
        try:
            return ModelShape.from_hf_config(config, self.model, self._scheme)
        except InputError:
            if self._scheme is None or "quantization_config" not in config:
                raise
        # A description of quantized weights that is cut short: the table's own word for them counts.
        return ModelShape.from_hf_config({**config, "quantization_config": None}, self.model, self._scheme)

    @property
    def _scheme(self) -> str | None:
        words = f"{self.quantization} {self.model if self.quantization else ''}".lower()
        return next((scheme for pattern, scheme in _SCHEMES.items() if re.search(pattern, words)), None)

    def first_shard(self, shape: ModelShape) -> ModelShard:
        """Return what the first GPU holds of the model, which is the one whose memory a log tells."""
        return split_model(shape, self.deployment.tensor_parallel_size, self.deployment.pipeline_parallel_size)[0]

    def plan_settings(self, shape: ModelShape, gpu: Gpu) -> dict[str, Any]:
        """Return the settings of `plan_memory`, by name, with vLLM's defaults for those not told."""
        told, behaviour = self.settings, self.behaviour
        length = int(told.get("max_model_len", shape.max_position_embeddings))
        budget = behaviour.batch_budget(gpu)
        tokens, seqs = budget.max_num_batched_tokens, budget.max_num_seqs
        if self.is_v0:
            seqs = _V0_SEQS
            tokens = max(_V0_STEP_TOKENS, length if length <= _V0_PROMPT_TOKENS else 0)
        return {
            "max_loras": int(told.get("max_loras", 1)) if self.lora else 0,
            "max_lora_rank": int(told.get("max_lora_rank", behaviour.max_lora_rank)),
            "max_num_seqs": int(told.get("max_num_seqs", seqs)),
            "max_num_batched_tokens": int(told.get("max_num_batched_tokens", tokens)),
            "gpu_memory_utilization": told.get("gpu_memory_utilization", behaviour.gpu_memory_utilization),
            "max_model_len": length,
            "block_size": behaviour.block_size,
            "behaviour": behaviour,
            "deployment": self.deployment,
        }


def read_startups(facts: str | Path, models: str | Path | None = None) -> list[Startup]:
    """Read a table of starts.

    Args:
        facts: CSV file, one start a row, with columns of `STARTUP_COLUMNS`; of these only ``id`` must be there.
        models: CSV file with the columns ``model_as_written_in_table`` and ``config_file``; the files lie in the folder
            ``model_configs`` beside it. None: models are paths, or names of bundled shapes.

    Raises:
        InputError: If a file cannot be read, or a cell does not hold what it should.
    """
    return [server for _, server in read_servers(facts, models, _COLUMNS)]


def read_servers(
    facts: str | Path, models: str | Path | None, columns: Mapping[str, Column]
) -> Iterator[tuple[dict[str, Any], Startup]]:
    """Yield the rows of a table of facts, each with the server that it is about.

    Args:
        facts: CSV file, one fact a row.
        models: As of `read_startups`.
        columns: Its columns; those of `STARTUP_COLUMNS` tell of the server.

    Raises:
        InputError: If a file cannot be read, or a cell does not hold what it should.
    """
    files: dict[str, Path] = {}
    if models is not None:
        table = read_table(Path(models), _MAP_COLUMNS)
        named = zip(table["model_as_written_in_table"], table["config_file"], strict=True)
        files = {name: Path(models).parent / _CONFIGS / file for name, file in named if file}
    blank = {name: "" if column.kind == "text" else math.nan for name, column in _COLUMNS.items()}
    told = read_table(Path(facts), columns)
    for values in zip(*told.values(), strict=True):
        row = dict(zip(told, values, strict=True))
        yield row, _startup(blank | row, files.get(row.get("model", "")))


_SETTINGS = (
    *("max_model_len", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "max_loras"),
    "max_lora_rank",
)
_LOGGED = (
    *("model_load_gib", "activation_peak_gib", "non_torch_gib", "cuda_graph_gib", "kv_cache_gib", "kv_cache_tokens"),
    *("num_gpu_blocks", "block_size"),
)


def _startup(row: Mapping[str, Any], config: Path | None) -> Startup:
    cache = str(row["kv_cache_dtype"]).lower()
    one = {name: 1 if math.isnan(row[name]) else int(row[name]) for name in ("num_gpus_tp", "pp")}
    return Startup(
        id=row["id"],
        model=row["model"],
        engine=row["engine"],
        vllm_version=row["vllm_version"],
        gpu_text=row["gpu"],
        quantization=row["quantization"],
        lora=row["enable_lora"] == "True",
        settings={name: row[name] for name in _SETTINGS if not math.isnan(row[name])},
        deployment=Deployment(
            tensor_parallel_size=one["num_gpus_tp"],
            pipeline_parallel_size=one["pp"],
            kv_cache_dtype="fp8" if cache.startswith("fp8") else "auto",
            enforce_eager=row["enforce_eager"] == "True",
        ),
        dtype=row["dtype"],
        gpu_memory_gib=row["gpu_memory_gib"],
        logged={name: row[name] for name in _LOGGED},
        outcome=row["outcome"],
        config=None if config is None else read_config(config)[0],
    )


def _names(name: str, words: str) -> bool:
    """Whether words have a name in them, as words of their own: "A100" does not name an A10."""
    parts = r"[\s-]*".join(map(re.escape, re.split(r"[\s-]+", name)))
    return re.search(rf"(?<![a-z0-9]){parts}(?![a-z0-9])", words, re.IGNORECASE) is not None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
