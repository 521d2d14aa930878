"""A serving run as one row of a table that ``fit --runs`` and ``validate`` read."""

import math
from collections.abc import Mapping

from lora_capacity.errors import check_keys
from lora_capacity_profiling.load import LoadResult
from lora_capacity_profiling.metrics import Window

ABOUT_COLUMNS = (
    "run_id",
    "set",
    "scenario",
    "model",
    "max_loras",
    "max_cpu_loras",
    "max_lora_rank",
    "ranks",
    "rates",
    "rate_values",
    "rate_counts",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "status",
    "gpu",
)
"""Columns that say what was run; the others are measured."""

MEASURED_COLUMNS = (
    "mean_input_tokens",
    "mean_output_tokens",
    "std_input_tokens",
    "std_output_tokens",
    "max_output_tokens",
    "completed",
    "duration_s",
    "completed_input_tokens",
    "completed_output_tokens",
    "input_throughput",
    "output_throughput",
    *(f"{share}_{name}_ms" for name in ("ttft", "tpot", "itl") for share in ("mean", "median", "p99")),
    "mean_running",
    "mean_waiting",
    "mean_running_2nd_half",
    "mean_waiting_2nd_half",
    "max_running",
    "max_waiting",
    "mean_kv_usage",
    "max_kv_usage",
    "preemptions",
    "arrivals",
)
"""Columns that are measured: by the client; from ``mean_running`` to ``preemptions``, from the server's metrics."""


def serving_run_row(
    about: Mapping[str, object], result: LoadResult | None, window: Window | None = None
) -> dict[str, object]:
    """Return one row with all columns; what is not known is empty text.

    Args:
        about: What was run, by names of :data:`ABOUT_COLUMNS`; lists as text with blanks between.
        result: What the client saw; None if the server did not start.
        window: What the server's metrics said meanwhile.

    Raises:
        InputError: If a name is unknown.
    """
    check_keys("about", about, ABOUT_COLUMNS)
    measured: dict[str, float] = {}
    if result is not None:
        measured |= result.summary()
    if window is not None:
        measured |= window.summary()
    row = {name: about.get(name, "") for name in ABOUT_COLUMNS}
    return row | {name: _cell(measured.get(name)) for name in MEASURED_COLUMNS}


def _cell(value: float | None) -> object:
    return "" if value is None or math.isnan(value) else value
