"""How much farther off a prediction may be beyond what its calibration was fitted over."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.costs import Costs, StepCosts, step_time_s
from lora_capacity.costs.kernels import SMALL_STEP_TOKENS
from lora_capacity.run.runner import Traffic
from lora_capacity.run.steady import CHUNK_CPU
from lora_capacity.scenarios import Scenarios
from lora_capacity.workload import LengthDistribution, Workload

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


def extrapolation_error(
    calibration: Calibration, scenarios: Scenarios, columns: Mapping[str, NDArray[Any]], traffic: Traffic
) -> Float[np.ndarray, " configs"]:
    """Return the standard deviation that extrapolating adds to the logarithm of each configuration's capacity.

    A term of the step time was fitted in proportion to a setting; it may as well go like another power of it, ``1 ±
    σ``. Beyond the last value that was fitted over it is then off by ``σ`` times the logarithm of how far, and the step
    time by the term's share of that. ``σ`` is the standard error that the fit reports of the term's coefficient. Terms
    err independently.

    Args:
        calibration: Coefficients, their errors, and the ranges that they were fitted over.
        scenarios: The configurations, ``[configs]``.
        columns: What is predicted of them: ``mean_running``, ``mean_waiting`` and ``active_adapters``.
        traffic: A workload, whose lengths count too, each by the tokens of requests that long; others' do not.

    Returns:
        0 within the ranges, and where nothing is predicted.
    """
    host: Any = scenarios.take(slice(None))
    settings = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    given = {name: getattr(host, name) for name in settings}
    given["adapters"] = host.class_count.sum(axis=1)
    given["offered_tokens_per_s"] = host.requests_per_s * (host.mean_input_tokens + host.mean_output_tokens)
    beyond = {name: _log_beyond(calibration, name, values) for name, values in given.items()}
    if isinstance(traffic, Workload):
        for name in ("input_tokens", "output_tokens"):
            beyond[name] = np.full(host.status.shape, _lengths_beyond(calibration, name, getattr(traffic, name)))
    if not any(each.any() for each in beyond.values()):
        return np.zeros(host.status.shape)
    reported = calibration.accuracy.get("coefficient_errors", {})
    variance = np.zeros(host.status.shape)
    for term, share in _shares(calibration.costs, host, columns).items():
        far = sum(beyond[name] for name, terms in GROWING_WITH.items() if term in terms and name in beyond)
        variance += (share * reported.get(term, _UNREPORTED) * far) ** 2
    return np.asarray(np.nan_to_num(np.sqrt(variance)))


def _log_beyond(calibration: Calibration, name: str, values: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithm of how far values lie beyond the nearest one fitted over, 0 within."""
    low, high = calibration.fitted_ranges.get(name, (0.0, np.inf))
    with np.errstate(divide="ignore"):
        log_value = np.log(np.asarray(values, np.float64))
    below = np.maximum(np.log(low) - log_value, 0.0) if low > 0 else 0.0
    return np.asarray(np.maximum(log_value - np.log(high), 0.0) + below)


def _lengths_beyond(calibration: Calibration, name: str, lengths: LengthDistribution) -> float:
    """The same of request lengths, the mean over tokens."""
    tokens = lengths.tokens * lengths.probability
    return float((_log_beyond(calibration, name, lengths.tokens) * tokens).sum() / tokens.sum())


def _shares(costs: Costs, host: Any, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Shares of the step time by term, each ``[configs]``."""
    running, prompt_tokens = columns["mean_running"], host.mean_input_tokens / host.mean_output_tokens
    tokens = running * (1.0 + prompt_tokens)
    quantities = {
        "tokens": tokens,
        "prefill_tokens": running * prompt_tokens,
        "kv_tokens": running * host.kv_tokens_per_request,
        "adapters": columns["active_adapters"],
        "skipped": np.zeros_like(tokens),
        "queued": columns["mean_waiting"],
        "loaded": host.class_count.sum(axis=1),
        "max_loras": host.max_loras,
        "max_lora_rank": host.max_lora_rank,
        "small_share": np.where(tokens < SMALL_STEP_TOKENS, 1.0, 0.0),
    }
    configs = tokens.size
    padded = -(-configs // CHUNK_CPU) * CHUNK_CPU  # in pieces of one shape, which is compiled once
    pieces = {name: np.resize(each.astype(np.float32), padded) for name, each in quantities.items()}
    found = [
        _shares_of_chunk(costs, {name: each[start : start + CHUNK_CPU] for name, each in pieces.items()})
        for start in range(0, padded, CHUNK_CPU)
    ]
    return {term: np.concatenate([np.asarray(chunk[term], np.float64) for chunk in found])[:configs] for term in _TERMS}


@jax.jit
def _shares_of_chunk(costs: Costs, quantities: Mapping[str, Array]) -> dict[str, Array]:
    whole_s = step_time_s(costs, **quantities)
    nothing: dict[str, Any] = dict.fromkeys((entry.name for entry in dataclasses.fields(StepCosts)), 0.0)
    # A factor of other terms, no time of its own.
    nothing["active_block_factor"] = costs.step.active_block_factor

    def alone(term: str) -> Costs:
        return dataclasses.replace(costs, step=StepCosts(**nothing | {term: getattr(costs.step, term)}))

    return {term: step_time_s(alone(term), **quantities) / whole_s for term in _TERMS}
