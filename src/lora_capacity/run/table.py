"""What the event twin says of many configurations, as a table."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.run.steady import table
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.events import EventResults

QUANTILES = ("p50", "p95", "p99")
"""Names of the quantiles of times."""

_TOLD = (
    *("max_running", "max_adapters", "max_kv_usage", "preemptions", "disk_loads", "steps"),
    *("compute_share", "scheduling_share", "load_share", "idle_share"),
)


def event_table(scenarios: Scenarios, played: EventResults, threshold: float = 0.1) -> dict[str, NDArray[Any]]:
    """Return configurations and what happened as named columns.

    Args:
        scenarios: The configurations.
        played: What happened in them.
        threshold: Share below the offered load from which throughput counts as starved.

    Returns:
        The columns of `lora_capacity.run.steady.table`, ``[configs]``, then ``ttft_p50_s``, ``ttft_p95_s``,
        ``ttft_p99_s`` and the same of ``tpot`` and ``e2e``, ``max_running``, ``max_adapters``, ``max_kv_usage``,
        ``preemptions``, ``disk_loads``, ``steps``, ``compute_share``, ``scheduling_share``, ``load_share``,
        ``idle_share``, ``worst_service``, the smallest share of an adapter's requests that were completed, and
        ``worst_wait_s``, the longest that a request has waited for its admission.
    """
    columns = table(scenarios, played.settled, threshold)
    for time in ("ttft", "tpot", "e2e"):
        quantiles_s = np.asarray(getattr(played, f"{time}_quantiles_s")).T
        columns |= {f"{time}_{name}_s": values_s for name, values_s in zip(QUANTILES, quantiles_s, strict=True)}
    columns |= {name: np.asarray(getattr(played, name)) for name in _TOLD}
    arrived, completed = np.asarray(played.adapter_arrived), np.asarray(played.adapter_completed)
    service = np.divide(completed, arrived, out=np.ones(arrived.shape, np.float32), where=arrived > 0).min(axis=1)
    told = ~np.isnan(columns["throughput_tokens_per_s"])
    waited_s = np.asarray(played.adapter_worst_wait_s).max(axis=1)
    return columns | {"worst_service": np.where(told, service, np.nan), "worst_wait_s": waited_s}
