"""How far predictions of given coefficients lie from measurements, in standard deviations."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from lora_capacity.costs import Costs, bare_step_time_s, step_time_s
from lora_capacity.fitting.measured import MeasuredRuns
from lora_capacity.measurements import Profile
from lora_capacity.measurements.lengths import HALF_BLOCK_TOKENS
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.steady import ResidenceTime, simulate_steady

_STEP_SPREAD, _PREFILL_SPREAD = 0.03, 0.05
"""Relative standard deviations of a step time and of a prompt's time: about what repeats of them differ by."""

_THROUGHPUT_SPREAD, _RUN_STEP_SPREAD = 0.03, 0.05
"""Relative errors that a model of a few coefficients is granted in the throughput and the step time of a run."""


def benchmark_residuals(profile: Profile) -> Callable[[Costs], Array]:
    """Closed batches with and without adapters, and prompts answered by one token.

    Prompts also cost the server's front end, each the same, so only what a longer prompt adds is compared: its tokens,
    and a larger part of a step, unless each prompt has a step to itself.
    """
    decode, prefill, adapters = profile.decode, profile.prefill, profile.adapters
    budget = float(profile.server["max_num_batched_tokens"])

    def held_tokens(
        running: Float[np.ndarray, " batches"], output_tokens: Float[np.ndarray, " batches"]
    ) -> Float[np.ndarray, " batches"]:
        return running * (1.0 + 0.5 * output_tokens + HALF_BLOCK_TOKENS)

    def residuals(costs: Costs) -> Float[Array, " residuals"]:
        step = costs.step
        held = held_tokens(decode["batch"], decode["output_tokens"])
        bare_s = bare_step_time_s(costs, sequences=decode["batch"], kv_tokens=held)
        lora_s = step_time_s(
            costs,
            tokens=adapters["running"],
            prefill_tokens=0.0,
            kv_tokens=held_tokens(adapters["running"], adapters["output_tokens"]),
            adapters=adapters["unique"],
            skipped=0.0,
            queued=0.0,
            loaded=adapters["served"],
            max_loras=adapters["max_loras"],
            max_lora_rank=adapters["max_lora_rank"],
        )
        parts = [
            jnp.log(bare_s / decode["step_s"]) / _STEP_SPREAD,
            jnp.log(lora_s / adapters["step_s"]) / _STEP_SPREAD,
        ]
        if profile.tells_prefill:
            per_prompt_s = prefill["duration_s"] / prefill["prompts"]
            per_prompt_s = per_prompt_s - per_prompt_s.mean()
            longer = prefill["input_tokens"] - prefill["input_tokens"].mean()
            steps = np.where(prefill["alone"], 0.0, 1.0 / budget)
            predicted_s = longer * (step.token_s + step.prefill_token_s + step.base_s * steps)
            scale_s = float(np.abs(per_prompt_s).mean())
            parts.append((predicted_s - per_prompt_s) / (_PREFILL_SPREAD * scale_s))
        return jnp.concatenate(parts)

    return residuals


@struct.dataclass
class RunTargets:
    """What is to be predicted of serving runs, logarithms, ``[runs]`` each.

    Attributes:
        throughput: Of the measured tokens per second.
        itl: Of the inter-token latency that the clients saw, seconds.
        step: Of the step time by Little's law, seconds; NaN where not recorded, which counts as no difference.
    """

    throughput: ArrayLike
    itl: ArrayLike
    step: ArrayLike

    @classmethod
    def of(cls, measured: MeasuredRuns) -> "RunTargets":
        """Return those of measured runs."""
        runs = measured.runs
        return cls(np.log(runs.throughput_tokens_per_s), np.log(runs.itl_s), np.log(measured.step_s))


def run_residuals(
    costs: Costs, scenarios: Scenarios, stays: ResidenceTime, targets: RunTargets
) -> Float[Array, "3 runs"]:
    """Serving runs by the steady twin: throughput, and the inter-token latency twice, ``[3, runs]``.

    The twin's latency is compared with the step time that Little's law gives from the requests running. What the
    clients saw only bounds it from above: they see longer gaps than steps, and fewer of them, when the server's front
    end falls behind and sends tokens together. Where the requests running are not recorded, gaps are all there is to
    compare with.

    Args:
        costs: The coefficients.
        scenarios: The runs as configurations, ``[runs]``.
        stays: Law of their output lengths.
        targets: What was measured.
    """
    results = simulate_steady(costs, scenarios, stays)
    log_itl = jnp.log(results.itl_s)
    beyond_gaps = log_itl - targets.itl
    shorter = (beyond_gaps < 0) & ~jnp.isnan(targets.step)
    rows = jnp.stack(
        [
            (jnp.log(results.throughput_tokens_per_s) - targets.throughput) / _THROUGHPUT_SPREAD,
            (log_itl - targets.step) / _RUN_STEP_SPREAD,
            jnp.where(shorter, 0.0, beyond_gaps) / _RUN_STEP_SPREAD,
        ]
    )
    return jnp.where(jnp.isfinite(rows), rows, 0.0)
