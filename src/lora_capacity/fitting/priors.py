"""Where coefficients are believed to lie before they are fitted, and how firmly.

A belief is a centre and a standard deviation of the logarithm. Beliefs decide only what the measurements leave open,
such as the rank's share when all adapters had one rank.
"""

import numpy as np

from lora_capacity.measurements import Profile
from lora_capacity.measurements.runs import FloatArray

Belief = tuple[float, float]

_GPU: dict[str, Belief] = {
    "base_s": (12e-3, 0.5),
    "lora_s": (1.5e-3, 0.7),
    "token_s": (30e-6, 0.5),
    "expand_block_s": (1.5e-9, 0.5),
    "shrink_block_s": (0.3e-9, 0.7),
    "adapter_s": (0.15e-3, 0.7),
    "adapter_rank_s": (6e-6, 0.5),
    "active_block_factor": (0.5, 0.5),
    "queued_request_s": (0.3e-6, 0.7),
    "lora_listing_s": (0.2e-6, 0.5),
}
# A large data-centre GPU: memory bandwidth, and matrix products as far as serving reaches.
_GPU_BANDWIDTH_BYTES_PER_S = 2.0e12
_GPU_COMPUTE_FLOP_PER_S = 3.5e14
_PREFILL_SHARE_ON_TOP = 0.4

# The scheduler's own log of the published runs: what it takes longer with a queue when slots are fewer than adapters.
_PASSED_OVER: Belief = (0.2e-6, 0.3)
_HOST_SPREAD = 0.4
# CPUs differ more than data-centre GPUs do: their own step times set the scale.
_CPU_BANDWIDTH_BYTES_PER_S = 2.0e10
_SCALE_SPREAD = 0.7
_LOOSE_SPREAD = 1.5
_ADAPTER_SHARE = (
    0.01  # of the base step, for each different adapter: a CPU's kernels do not depend on how many there are
)


def priors(profile: Profile) -> dict[str, Belief]:
    """Return what is believed of every coefficient of the profile's device."""
    host_to_gpu_load_s = float(np.median(profile.loading["host_to_gpu_load_s"]))
    beliefs = _of_gpu(profile) if profile.device == "gpu" else _of_cpu(profile)
    return beliefs | {"host_to_gpu_load_s": (host_to_gpu_load_s, _HOST_SPREAD), "skipped_request_s": _PASSED_OVER}


def _of_gpu(profile: Profile) -> dict[str, Belief]:
    """Return usual values, and what follows from shapes: of KV cache, prompts and activations."""
    model = profile.model
    moved = sum(module.input_size + 2 * sum(module.output_sizes) for module in model.linear_modules)
    activation_bytes = model.num_layers * model.dtype_bytes * moved
    prompt_s = 2.0 * model.weight_bytes / model.dtype_bytes / _GPU_COMPUTE_FLOP_PER_S
    return _GPU | {
        "kv_token_s": (model.kv_bytes_per_token / _GPU_BANDWIDTH_BYTES_PER_S, 0.3),
        "prefill_token_s": (_PREFILL_SHARE_ON_TOP * prompt_s, 1.0 if profile.tells_prefill else 0.3),
        "lora_token_s": (activation_bytes / _GPU_BANDWIDTH_BYTES_PER_S, 0.3),
    }


def _of_cpu(profile: Profile) -> dict[str, Belief]:
    """Return values of the order of the profile's own step times."""
    decode, adapters = profile.decode, profile.adapters
    base_s, token_s = _line(decode["batch"], decode["step_s"])
    lora_s, lora_token_s = _line(adapters["running"], adapters["step_s"])
    on_top_s = max(lora_token_s - token_s, 0.1 * token_s)
    return {
        "base_s": (base_s, _SCALE_SPREAD),
        "lora_s": (max(lora_s - base_s, 0.1 * base_s), _SCALE_SPREAD),
        "token_s": (0.5 * token_s, _LOOSE_SPREAD),
        "decode_token_s": (0.5 * token_s, _LOOSE_SPREAD),
        "lora_token_s": (0.5 * on_top_s, _LOOSE_SPREAD),
        "lora_token_rank_s": (0.5 * on_top_s / float(np.median(adapters["max_lora_rank"])), _LOOSE_SPREAD),
        "kv_token_s": (profile.model.kv_bytes_per_token / _CPU_BANDWIDTH_BYTES_PER_S, _SCALE_SPREAD),
        "adapter_s": (_ADAPTER_SHARE * base_s, _LOOSE_SPREAD),
    }


def _line(batch: FloatArray, step_s: FloatArray) -> tuple[float, float]:
    """Return a step's time without tokens and the time of a token, both positive, by a straight line."""
    slope, start = np.polyfit(batch, step_s, 1) if np.unique(batch).size > 1 else (0.0, float(step_s.min()))
    least_s = float(step_s.min())
    return max(float(start), 0.1 * least_s), max(float(slope), 1e-3 * least_s / float(batch.max()))
