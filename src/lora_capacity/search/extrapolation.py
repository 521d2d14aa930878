"""How much farther off a configuration's capacity may be beyond what its calibration was fitted over."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.calibration import extrapolation as calibrated
from lora_capacity.run.runner import Traffic
from lora_capacity.scenarios import Scenarios
from lora_capacity.workload import Workload

_SETTINGS = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
_LENGTHS = ("input_tokens", "output_tokens")


def extrapolation_error(
    calibration: Calibration, scenarios: Scenarios, columns: Mapping[str, NDArray[Any]], traffic: Traffic
) -> Float[np.ndarray, " configs"]:
    """Return the standard deviation that extrapolating adds to the logarithm of each configuration's capacity.

    That of its mean step, by the rule of `lora_capacity.calibration.extrapolation`.

    Args:
        calibration: Coefficients, their errors, and the ranges that they were fitted over.
        scenarios: The configurations, ``[configs]``.
        columns: What is predicted of them: ``mean_running``, ``mean_waiting`` and ``active_adapters``.
        traffic: A workload, whose lengths count too, each by the tokens of requests that long; others' do not.

    Returns:
        0 within the ranges, and where nothing is predicted.
    """
    host: Any = scenarios.take(slice(None))
    adapters = host.class_count.sum(axis=1)
    offered_per_s = host.requests_per_s * (host.mean_input_tokens + host.mean_output_tokens)
    given = {name: getattr(host, name) for name in _SETTINGS}
    given |= {"adapters": adapters, "offered_tokens_per_s": offered_per_s}
    beyond = {name: calibrated.log_beyond(calibration, name, values) for name, values in given.items()}
    if isinstance(traffic, Workload):
        for name in _LENGTHS:
            lengths = getattr(traffic, name)
            far = np.average(
                calibrated.log_beyond(calibration, name, lengths.tokens), weights=lengths.tokens * lengths.probability
            )
            beyond[name] = np.full(adapters.shape, far)
    running, prompt_tokens = columns["mean_running"], host.mean_input_tokens / host.mean_output_tokens
    step = {
        "tokens": running * (1.0 + prompt_tokens),
        "prefill_tokens": running * prompt_tokens,
        "kv_tokens": running * host.kv_tokens_per_request,
        "adapters": columns["active_adapters"],
        "skipped": np.zeros_like(running),
        "queued": columns["mean_waiting"],
        "loaded": adapters,
        "max_loras": host.max_loras,
        "max_lora_rank": host.max_lora_rank,
    }
    return calibrated.extrapolation_error(calibration, beyond, step)
