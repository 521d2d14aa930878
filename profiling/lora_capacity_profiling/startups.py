"""What a vLLM server's log tells of its start, as a row of the table that `validate --startup` and `fit` read."""

import re
from collections.abc import Mapping
from pathlib import Path

from lora_capacity.measurements.startups import STARTUP_COLUMNS
from lora_capacity_profiling.runs import append_rows
from lora_capacity_profiling.startlog import StartOutcome, StartReport

# Source of all patterns: the messages in vLLM 0.8.5 to 0.33.0: v1/engine/core.py and config.py (settings), v1/worker/
# gpu_worker.py, gpu_model_runner.py and worker/worker.py (memory), utils/mem_utils.py, v1/core/kv_cache_utils.py.
_SETTINGS = {
    "model": r"""model=['"]([^'"]+)['"], (?:speculative|tokenizer)""",
    "dtype": r"dtype=torch\.(\w+)",
    "max_model_len": r"max_seq_len=(\d+)",
    "num_gpus_tp": r"tensor_parallel_size=(\d+)",
    "pp": r"pipeline_parallel_size=(\d+)",
    "quantization": r"[ ,]quantization=([\w-]+)",
    "enforce_eager": r"enforce_eager=(True|False)",
    "kv_cache_dtype": r"kv_cache_dtype=([\w.]+)",
}
"""Settings in the line that names the engine and its configuration."""

_ARGUMENTS = (
    *("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enable_lora", "max_loras", "max_lora_rank"),
    "block_size",
)
"""Settings that are in the line of arguments that are not defaults."""

_NUMBER = r"(-?[\d.]+)"
_MEMORY = {
    "gpu_memory_gib": (rf"Free memory on device[^(]*\([\d.]+/{_NUMBER} GiB", rf"total_gpu_memory \({_NUMBER}GiB\)"),
    "gpu_memory_utilization": (
        rf"Desired GPU memory utilization is \({_NUMBER},",
        rf"gpu_memory_utilization \({_NUMBER}\)",
    ),
    "model_load_gib": (rf"Model loading took {_NUMBER} GiB", rf"model weights take {_NUMBER}GiB"),
    "activation_peak_gib": (
        rf"GiB for weight, {_NUMBER} GiB for peak activation",
        rf"torch peak memory increase: {_NUMBER}GiB",
        rf"PyTorch activation peak memory takes {_NUMBER}GiB",
    ),
    "non_torch_gib": (
        rf"{_NUMBER} GiB for non-torch memory",
        rf"non-torch forward increase memory: {_NUMBER}GiB",
        rf"non_torch_memory takes {_NUMBER}GiB",
    ),
    "cuda_graph_gib": (rf"Graph capturing finished in [\d.]+ secs, took {_NUMBER} GiB",),
    "kv_cache_gib": (
        rf"Available KV cache memory: {_NUMBER} GiB",
        rf"memory reserved for KV Cache is {_NUMBER}GiB",
    ),
    "kv_cache_tokens": (r"KV cache size: ([\d,]+) tokens",),
    "num_gpu_blocks": (r"# (?:cuda|GPU|gpu) blocks: (\d+)",),
    "max_num_batched_tokens": (r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)",),
}
"""Amounts of memory, with every wording that versions have for them; of several GPUs the first that says so."""


def startup_row(text: str, name: str) -> dict[str, object]:
    """Return the row of one start; what the log does not tell is left out.

    Args:
        text: The log, of one start.
        name: What to call the row.
    """
    engine = re.search(r"Initializing (?:a|an) (V\d) LLM engine \(v?([^)]+)\)", text)
    version = engine[2] if engine else _first((r"vLLM API server version v?(\S+)", r"\bvLLM v(\d\S+)"), text)
    row: dict[str, object] = {"id": name, "vllm_version": version, "engine": engine[1] if engine else None}
    line = next((each for each in text.splitlines() if "LLM engine (v" in each), "")
    row |= {key: _first((pattern,), line) for key, pattern in _SETTINGS.items()}
    row["quantization"] = None if row["quantization"] == "None" else row["quantization"]
    told = next((each for each in text.splitlines() if "non-default args" in each), "")
    row |= {key: _first((rf"""['"]?\b{key}['"]?[:=] ?([\w.]+)""",), told) for key in _ARGUMENTS}
    found = {key: _first(patterns, text) for key, patterns in _MEMORY.items()}
    row |= {key: value.replace(",", "") for key, value in found.items() if value is not None and row.get(key) is None}
    report = StartReport.from_log(text, started=_came_up(text, found))
    row["outcome"] = report.outcome.value if report.outcome != StartOutcome.FAILED else report.reason
    return {key: value for key, value in row.items() if value is not None}


def append_startup(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a table of starts, made if absent.

    Args:
        path: The table, CSV.
        row: As `startup_row` makes it.

    Raises:
        InputError: If the file is no table of starts, or cannot be written.
    """
    append_rows(path, [row], STARTUP_COLUMNS, "gpu_memory_gib", "a table of starts")


def _came_up(text: str, found: Mapping[str, str | None]) -> bool:
    """Whether the server started: it says so, or has a KV cache and no complaint after it."""
    if "Application startup complete" in text:
        return True
    has_cache = found["kv_cache_tokens"] is not None or found["num_gpu_blocks"] is not None
    return has_cache and re.search(r"out of memory|OutOfMemoryError|is larger than the maximum", text) is None


def _first(patterns: tuple[str, ...], text: str) -> str | None:
    """Return what the first pattern that occurs holds, or None."""
    matches = (re.search(pattern, text) for pattern in patterns)
    return next((match[1] for match in matches if match), None)
