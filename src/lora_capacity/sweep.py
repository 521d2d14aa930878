"""Many configurations at once: grids, and the steady twin over all of them on every device at hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.twin import Results, Scenarios, StayLaw

Progress = Callable[[int, int], None]
"""Called with the configurations done and their total."""


def enable_compilation_cache(path: str | Path) -> None:
    """Keep what JAX compiles in a folder, so that later processes need not compile it again.

    Args:
        path: The folder; made if absent.
    """
    raise NotImplementedError


def grid(adapters: Sequence[int], max_loras: Sequence[int], **axes: Sequence[Any]) -> dict[str, NDArray[Any]]:
    """Return every combination of the values that has no more slots than adapters.

    Args:
        adapters: Adapters served, A.
        max_loras: Slots, S.
        **axes: Values of other settings by vLLM's names; names whose value is None are left out.

    Returns:
        One column per name, ``[configs]``, the last varying fastest: arguments for `build_scenarios`.

    Raises:
        InputError: If an axis is empty or no combination is left.
    """
    raise NotImplementedError


def simulate(
    calibration: Calibration, scenarios: Scenarios, stays: StayLaw, *, progress: Progress | None = None
) -> Results:
    """Run the steady twin over configurations, in chunks of one shape and on all local devices.

    Args:
        calibration: Whose costs hold.
        scenarios: The configurations, ``[configs]``.
        stays: The law of the output lengths.
        progress: Called after every chunk.

    Returns:
        Predictions with NumPy leaves, ``[configs]``.
    """
    raise NotImplementedError


def table(scenarios: Scenarios, results: Results, threshold: float = 0.1) -> dict[str, NDArray[Any]]:
    """Return configurations and predictions as named columns, units in the names, codes as labels.

    Args:
        scenarios: The configurations.
        results: Their predictions.
        threshold: Share below the offered load from which throughput counts as starved.

    Returns:
        Columns ``[configs]``: ``max_cpu_loras``, ``max_loras``, ``max_lora_rank``, ``max_num_seqs``,
        ``max_num_batched_tokens``, ``kv_cache_tokens``, ``throughput_tokens_per_s``, ``offered_tokens_per_s``, ``service``,
        ``starved`` (bool), ``completed_per_s``, ``mean_running``, ``mean_waiting``, ``step_time_s``, ``itl_s``, ``ttft_s``,
        ``active_adapters``, ``kv_usage``, ``loads_per_s``, ``limit`` and ``status`` (labels).
    """
    raise NotImplementedError
