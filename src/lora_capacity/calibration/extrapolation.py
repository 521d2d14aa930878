"""How much farther off a step time may be beyond what its calibration was fitted over."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration.model import Calibration
from lora_capacity.costs import Costs, StepCosts, step_time_s
from lora_capacity.costs.kernels import SMALL_STEP_TOKENS

_TOKENS = ("token_s", "lora_token_s", "decode_token_s")

GROWING_WITH = {
    "adapters": ("adapter_s", "lora_listing_s"),
    "max_loras": ("expand_block_s", "shrink_block_s"),
    "max_lora_rank": ("shrink_block_s", "adapter_rank_s", "lora_token_rank_s"),
    "max_num_seqs": (*_TOKENS, "kv_token_s"),
    "max_num_batched_tokens": (*_TOKENS, "prefill_token_s"),
    "offered_tokens_per_s": (*_TOKENS, "prefill_token_s", "kv_token_s"),
    "input_tokens": ("prefill_token_s", "kv_token_s"),
    "output_tokens": ("kv_token_s",),
}
"""Terms of the step time (`StepCosts`) that grow with each of the ranges that calibrations are fitted over."""

_TERMS = tuple(dict.fromkeys(name for names in GROWING_WITH.values() for name in names))

_UNREPORTED = 0.5
"""Error of the logarithm of a coefficient of which the calibration reports none: the spread of most priors of
`StepCosts`."""

_CHUNK = 128
"""Step times that are taken apart at once, so that one shape is compiled."""


def log_beyond(calibration: Calibration, name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return the logarithm of how far values lie beyond the nearest one that was fitted over, 0 within.

    Args:
        calibration: Whose ranges hold.
        name: Which of them; where there is none nothing lies beyond.
        values: Values >= 0, any shape.
    """
    low, high = calibration.fitted_ranges.get(name, (0.0, np.inf))
    with np.errstate(divide="ignore"):
        log_value = np.log(np.asarray(values, np.float64))
    below = np.maximum(np.log(low) - log_value, 0.0) if low > 0 else 0.0
    return np.asarray(np.maximum(log_value - np.log(high), 0.0) + below)


def extrapolation_error(
    calibration: Calibration, beyond: Mapping[str, NDArray[Any]], step: Mapping[str, NDArray[Any]]
) -> Float[np.ndarray, " steps"]:
    """Return the standard deviation that extrapolating adds to the logarithm of each step time.

    A term of the step time was fitted in proportion to a setting; it may as well go like another power of it, ``1 ±
    σ``. Beyond the last value that was fitted over it is then off by ``σ`` times the logarithm of how far, and the step
    time by the term's share of that. ``σ`` is the standard error that the fit reports of the term's coefficient. Terms
    err independently.

    Args:
        calibration: Coefficients and their errors.
        beyond: Of the ranges of `GROWING_WITH` how far each step lies beyond, see `log_beyond`, each ``[steps]``.
        step: Arguments of `step_time_s`, all but ``small_share``, each ``[steps]``.

    Returns:
        0 within the ranges, and where nothing is known of a step.
    """
    steps = step["tokens"].size
    if not any(each.any() for each in beyond.values()):
        return np.zeros(steps)
    padded = -(-steps // _CHUNK) * _CHUNK
    pieces = {name: np.resize(np.asarray(each, np.float32), padded) for name, each in step.items()}
    found = [
        _shares(calibration.costs, {name: each[start : start + _CHUNK] for name, each in pieces.items()})
        for start in range(0, padded, _CHUNK)
    ]
    reported = calibration.accuracy.get("coefficient_errors", {})
    variance = np.zeros(steps)
    for term in _TERMS:
        share = np.concatenate([np.asarray(chunk[term], np.float64) for chunk in found])[:steps]
        far = sum(each for name, each in beyond.items() if term in GROWING_WITH[name])
        variance += (share * reported.get(term, _UNREPORTED) * far) ** 2
    return np.asarray(np.nan_to_num(np.sqrt(variance)))


@jax.jit
def _shares(costs: Costs, step: Mapping[str, Any]) -> dict[str, Array]:
    """Shares of the step time by term."""
    small = jax.numpy.where(step["tokens"] < SMALL_STEP_TOKENS, 1.0, 0.0)
    nothing: dict[str, Any] = dict.fromkeys((entry.name for entry in dataclasses.fields(StepCosts)), 0.0)
    # A factor of other terms, no time of its own.
    nothing["active_block_factor"] = costs.step.active_block_factor

    def alone_s(term: str) -> Array:
        only = dataclasses.replace(costs, step=StepCosts(**nothing | {term: getattr(costs.step, term)}))
        return step_time_s(only, **step, small_share=small)

    whole_s = step_time_s(costs, **step, small_share=small)
    return {term: alone_s(term) / whole_s for term in _TERMS}
