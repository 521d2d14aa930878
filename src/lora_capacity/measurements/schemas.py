"""Schemas of measured tables: the columns that ``profile`` and ``observe`` write and ``fit`` and ``validate`` read.

The last word of a name is its unit: ``_ms``, ``_s``, ``_gib``, ``_per_s``, ``_tokens``; ``_throughput`` is in tokens/s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_capacity.tables import Column, parse_table, read_table


@dataclass(frozen=True)
class TableSchema:
    """Columns of a table, in the order in which they are written.

    Attributes:
        columns: What each column holds; None where it is written for people, and no command reads it.
    """

    columns: Mapping[str, Column | None]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        return tuple(self.columns)

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Read the columns that commands use, ``[rows]`` each.

        Raises:
            InputError: As `read_table`.
        """
        return read_table(path, self._used)

    def parse(self, text: str, source: str) -> dict[str, np.ndarray]:
        """Read a table's text, as `read` does its file.

        Args:
            text: The table, CSV.
            source: What it is, for messages.

        Raises:
            InputError: As `read_table`.
        """
        return parse_table(text, source, self._used)

    @property
    def _used(self) -> dict[str, Column]:
        return {name: column for name, column in self.columns.items() if column is not None}


_TEXT = Column("text")
_LABEL = Column("text", required=False)
_COUNT = Column("integer", minimum=1)
_OPTIONAL_COUNT = Column("integer", required=False, minimum=1)
_POSITIVE = Column(minimum=0, exclusive=True)
_OPTIONAL = Column(required=False, blank=True, minimum=0)
# What a server tells that started, and no other does.
_IF_STARTED = Column(blank=True, minimum=0)
_IF_STARTED_POSITIVE = Column(blank=True, minimum=0, exclusive=True)

KV_CAPACITY = TableSchema(
    {
        "model": _TEXT,
        "max_loras": Column("integer", minimum=0),
        "max_lora_rank": _COUNT,
        "kv_cache_tokens": _IF_STARTED,
        "model_load_gib": None,
        "cuda_graph_gib": _OPTIONAL,
        "status": _TEXT,
    }
)
"""One start of a server a row: its slots and their rank, and the KV cache left or why there is none."""

BACKBONE_LATENCY = TableSchema(
    {
        "model": _TEXT,
        "batch_size": Column(minimum=1),
        "input_tokens": Column(minimum=1),
        "output_tokens": Column(minimum=1),
        "mean_running": None,
        "max_running": None,
        "mean_itl_ms": None,
        "median_itl_ms": _OPTIONAL,
        "mean_tpot_ms": None,
        "mean_ttft_ms": None,
        "steps": None,
        "mean_step_ms": None,
        "median_step_ms": _OPTIONAL,
        "mean_scheduler_ms": None,
        "duration": _POSITIVE,
        "num_prompts": Column(minimum=1),
        "output_throughput": None,
        "kv_cache_tokens": _OPTIONAL,
    }
)
"""One closed batch without adapters a row: ``num_prompts`` requests, at most ``batch_size`` at once, ``duration`` s."""

ADAPTER_LATENCY = TableSchema(
    {
        "model": _TEXT,
        "max_num_seqs": None,
        "max_loras": _OPTIONAL,
        "served_adapters": Column(minimum=0),
        "max_lora_rank": _OPTIONAL,
        "adapter_rank": None,
        "input_tokens": Column(minimum=1),
        "output_tokens": Column(minimum=1),
        "mean_running": _POSITIVE,
        "mean_itl_ms": None,
        "median_itl_ms": _POSITIVE,
        "mean_step_ms": None,
        "median_step_ms": None,
        "mean_unique_adapters": _OPTIONAL,
        "mean_scheduler_ms": None,
        "output_throughput": None,
    }
)
"""One closed batch with adapters a row."""

ADAPTER_LOADING = TableSchema(
    {
        "model": _TEXT,
        "max_lora_rank": _COUNT,
        "adapter_rank": _COUNT,
        "max_loras": None,
        "max_cpu_loras": None,
        "disk_loads": None,
        "mean_disk_load_ms": _POSITIVE,
        "memory_loads": None,
        "mean_memory_load_ms": _POSITIVE,
    }
)
"""Adapters of one rank a row: the time of a load from disk to host memory, and from there into a slot."""

RUN_COLUMNS: Mapping[str, Column | None] = {
    "run_id": _LABEL,
    "set": _LABEL,
    "scenario": _LABEL,
    "model": _TEXT,
    "max_loras": _COUNT,
    "max_cpu_loras": _COUNT,
    "max_lora_rank": _COUNT,
    "ranks": _TEXT,
    "rates": _TEXT,
    "rate_values": _LABEL,
    "rate_counts": _LABEL,
    "max_num_seqs": _OPTIONAL_COUNT,
    "max_num_batched_tokens": _OPTIONAL_COUNT,
    "max_model_len": _OPTIONAL_COUNT,
    "base_rate_per_s": Column(required=False, minimum=0),
    "max_pending": _OPTIONAL_COUNT,
    "metrics_interval_s": Column(required=False, blank=True, minimum=0),
    "status": _TEXT,
    "gpu": _LABEL,
}
"""What was run in a serving run: the server's settings, its adapters' rates and ranks, how often its metrics were read,
and whether it started."""

MEASURED_RUN_COLUMNS: Mapping[str, Column | None] = {
    "mean_input_tokens": _IF_STARTED_POSITIVE,
    "mean_output_tokens": _IF_STARTED_POSITIVE,
    "std_input_tokens": Column(required=False, minimum=0),
    "std_output_tokens": Column(required=False, minimum=0),
    "max_output_tokens": _OPTIONAL_COUNT,
    "completed": _IF_STARTED,
    "duration_s": _IF_STARTED_POSITIVE,
    "completed_input_tokens": None,
    "completed_output_tokens": None,
    "input_throughput": _IF_STARTED,
    "output_throughput": _IF_STARTED,
    "mean_ttft_ms": _IF_STARTED,
    "median_ttft_ms": None,
    "p99_ttft_ms": None,
    "mean_tpot_ms": _OPTIONAL,
    "median_tpot_ms": None,
    "p99_tpot_ms": None,
    "mean_itl_ms": _IF_STARTED,
    "median_itl_ms": None,
    "p99_itl_ms": None,
    "mean_running": _OPTIONAL,
    "mean_waiting": None,
    "mean_skipped": None,
    "mean_running_2nd_half": None,
    "mean_waiting_2nd_half": None,
    "max_running": None,
    "max_waiting": None,
    "mean_kv_usage": _OPTIONAL,
    "max_kv_usage": None,
    "preemptions": None,
    "cached_share": Column(required=False, minimum=0),
    "arrivals": Column("integer", required=False, minimum=0),
}
"""What was measured in it: by the client; from ``mean_running`` to ``cached_share``, by the server's metrics."""

SERVING_RUNS = TableSchema({**RUN_COLUMNS, **MEASURED_RUN_COLUMNS})
"""One serving run a row."""

PROFILE_TABLES: Mapping[str, TableSchema] = {
    "kv_capacity": KV_CAPACITY,
    "backbone_latency": BACKBONE_LATENCY,
    "adapter_latency": ADAPTER_LATENCY,
    "adapter_loading": ADAPTER_LOADING,
}
"""The tables of a profile folder that ``fit`` cannot do without, by the names of their files."""
