"""Finds the best numbers of adapters and slots by a grid that is refined where it matters."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_capacity.calibration import Calibration
from lora_capacity.optimize.choice import Objective
from lora_capacity.optimize.recommendation import Recommendation
from lora_capacity.sweep import Progress
from lora_capacity.workload import Workload


def optimize(
    workload: Workload,
    calibration: Calibration,
    *,
    adapters: Sequence[int] | None = None,
    max_loras: Sequence[int] | None = None,
    max_num_batched_tokens: Sequence[int] | None = None,
    max_num_seqs: Sequence[int] | None = None,
    objective: Objective | None = None,
    settings: Mapping[str, Any] | None = None,
    starvation_threshold: float = 0.1,
    risk: float = 0.05,
    progress: Progress | None = None,
) -> Recommendation:
    """Recommend how many adapters to serve and how many slots to reserve.

    Args:
        workload: Adapters and traffic.
        calibration: Model, GPU and coefficients.
        adapters: Numbers of adapters to consider; all that can make sense if not given.
        max_loras: Numbers of slots to consider; all that can make sense if not given.
        max_num_batched_tokens: Token budgets to consider; vLLM's default if not given.
        max_num_seqs: Batch limits to consider; vLLM's default if not given.
        objective: What to look for; the highest throughput if not given.
        settings: Other server settings by vLLM's names.
        starvation_threshold: Share below the offered load from which throughput counts as starved.
        risk: Highest acceptable probability of starving.
        progress: Called with done and total parts of the search.

    Raises:
        InputError: If a value is not allowed.
        InfeasibleError: If no configuration is acceptable; says what came closest.
    """
    raise NotImplementedError
