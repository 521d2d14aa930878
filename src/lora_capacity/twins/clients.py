"""What clients see of a server: the engine's times behind a front end that is one event loop.

A reading of the metrics takes the loop for as long as there are lines to write, one for every combination of waiting
and running adapters since the start. Requests that come in and tokens that go out wait meanwhile, as in a queue with
one server (Pollaczek and Khinchine's mean), and the tokens that a stream has missed leave together as one chunk.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from lora_capacity.costs import FrontEndCosts
from lora_capacity.scenarios import ClientView, Results, Scenarios

_OUTPUTS_AT_A_TIME = 128.0
"""Outputs of a step after which the loop turns to its streams, so that tokens of larger batches leave one by one.

Source: ``VLLM_V1_OUTPUT_PROC_CHUNK_SIZE`` in ``envs.py``, vLLM 0.8.5."""

_BATCH_VARIANCE = 3.0
"""Variance of the batch over its mean: more than Poisson's 1, since a larger batch takes longer steps. What clients see
hardly depends on it: from 2 to 4 the errors on the published runs stay the same to 0.02 points."""

_MOST_BUSY = 0.9
"""Share of the time that readings can take of the loop: a slow answer puts off the next reading."""

_TINY = 1e-6
"""Keeps logarithms and quotients of probabilities finite in single precision."""

_LEAST_LOG_CHANCE = -60.0
"""Rarer combinations never come twice, and the exponential would underflow."""

_TIMES, _TIME_WEIGHTS = np.polynomial.legendre.leggauss(4)
_NORMALS, _NORMAL_WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
"""Nodes over the horizon, and of a normal distribution: what is integrated is smooth, more of them change nothing."""


def seen_by_clients(front_end: FrontEndCosts, scenarios: Scenarios, results: Results) -> ClientView:
    """Return mean latencies as clients measure them.

    The first token comes later by ``response + adapter_response · first requests + 2 · wait + streamed_token ·
    running``, where a request and its first token both wait for readings, ``wait = E[s · u / (1 - u)] / 2``, of
    ``s = lines · (adapter_set + adapter_name · running adapters)`` seconds each and a share ``u`` of the time together.
    Of the tokens of a stream, a share ``E[max(s - gap, 0)] / interval`` leaves in another one's chunk while no more
    than 128 requests run, so that gaps between chunks are longer. The time per output token is the engine's: the first
    and the last one wait alike.

    It leaves out that each adapter waits in bursts, and what a busy machine adds to both processes.

    Args:
        front_end: Coefficients.
        scenarios: The configurations, ``[configs]``, or one without that axis.
        results: What the engine does, in the same shape.
    """
    adapters = scenarios.class_count.sum(axis=-1)
    requests = scenarios.requests_per_s * scenarios.horizon_s
    served = -jnp.expm1(-scenarios.class_rate_per_s * scenarios.horizon_s[..., None])
    first_share = (scenarios.class_count * served).sum(axis=-1) / jnp.maximum(requests, _TINY)
    line_s = front_end.adapter_set_s + front_end.adapter_name_s * jnp.minimum(results.active_adapters, adapters)
    reading_s = line_s[..., None] * _adapter_sets(scenarios, results)
    interval_s = jnp.asarray(front_end.metrics_interval_s)
    readings_per_s = jnp.where(interval_s > 0, 1.0 / jnp.maximum(interval_s, _TINY), 0.0)[..., None]
    busy = jnp.minimum(reading_s * readings_per_s, _MOST_BUSY)
    missed_s = jnp.maximum(reading_s - results.itl_s[..., None], 0.0)
    joined = _over_horizon(jnp.minimum(missed_s * readings_per_s, _MOST_BUSY))
    wait_s = _over_horizon(jnp.asarray(reading_s * busy / (1.0 - busy))) / 2.0
    later_s = (
        front_end.response_s
        + front_end.adapter_response_s * first_share
        + 2.0 * wait_s
        + front_end.streamed_token_s * results.mean_running
    )
    spread = jnp.sqrt(_BATCH_VARIANCE * results.mean_running) + _TINY
    together = jax.scipy.special.ndtr((_OUTPUTS_AT_A_TIME - results.mean_running) / spread)
    return ClientView(
        ttft_s=results.answered_ttft_s + later_s,
        tpot_s=results.tpot_s,
        itl_s=results.itl_s / (1.0 - together * joined),
    )


def _adapter_sets(scenarios: Scenarios, results: Results) -> Float[Array, "*shape times"]:
    """Combinations of waiting and running adapters seen until each time.

    A step shows a new one where an adapter waits for it, or the running ones have changed since they were last seen
    without one that waits. Adapters run independently, so that a combination's log probability is nearly normal; of
    ``n`` steps, combinations of probability ``p`` show ``(1 - (1 - p)^n) / p`` different ones.
    """
    rate, count, step_s = map(jnp.asarray, (scenarios.class_rate_per_s, scenarios.class_count, results.step_time_s))
    completed = jnp.maximum(results.completed_per_s, _TINY)
    running = -jnp.expm1(-rate * (results.mean_running / completed)[..., None])
    running *= jnp.minimum(results.active_adapters / jnp.maximum((count * running).sum(axis=-1), _TINY), 1.0)[..., None]
    idle = (1.0 - running) * jnp.exp(-rate * (results.mean_waiting / completed)[..., None])
    arriving = -jnp.expm1(-rate * step_s[..., None])
    activated = jnp.maximum((count * rate * idle).sum(axis=-1), jnp.minimum(results.loads_per_s, completed))
    waits = -jnp.expm1(-(count * rate * (running + idle)).sum(axis=-1) * step_s)
    changes = -jnp.expm1(-2.0 * activated * step_s)
    unseen = changes * (1.0 - waits) / jnp.maximum(1.0 - (1.0 - changes) * waits, _TINY)
    entropy, variance = _information(running, count)
    none = jnp.clip(jnp.exp(-(count * rate).sum(axis=-1) * step_s), _TINY, 1.0 - _TINY)
    of_waiting = _information(arriving, count)[0] - _information(none[..., None], jnp.ones_like(none)[..., None])[0]
    of_waiting = jnp.maximum(of_waiting, 0.0) / (1.0 - none)
    steps = scenarios.horizon_s[..., None] * (_TIMES + 1.0) / 2.0 / step_s[..., None]
    return _different(waits[..., None] * steps, entropy + of_waiting, variance) + _different(
        unseen[..., None] * steps, entropy, variance
    )


def _information(
    chance: Float[Array, "*shape classes"], count: Float[Array, "*shape classes"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Entropy of independent yes-or-no draws of all adapters, and the variance of their log probability."""
    chance = jnp.clip(chance, _TINY, 1.0 - _TINY)
    yes, no = jnp.log(chance), jnp.log1p(-chance)
    entropy = -(count * (chance * yes + (1.0 - chance) * no)).sum(axis=-1)
    return entropy, (count * chance * (1.0 - chance) * (yes - no) ** 2).sum(axis=-1)


def _different(
    draws: Float[Array, "*shape times"], entropy: Float[Array, "*shape"], variance: Float[Array, "*shape"]
) -> Float[Array, "*shape times"]:
    """Different outcomes among so many draws, where log probabilities are normal."""
    log_chance = jnp.sqrt(variance)[..., None] * _NORMALS - entropy[..., None]
    times = draws[..., None] * jnp.exp(jnp.maximum(log_chance, _LEAST_LOG_CHANCE))[..., None, :]
    new = jnp.where(times > _TINY, -jnp.expm1(-times) / jnp.maximum(times, _TINY), 1.0)
    share: Array = (new * (_NORMAL_WEIGHTS / _NORMAL_WEIGHTS.sum())).sum(axis=-1)
    return draws * share


def _over_horizon(values: Float[Array, "*shape times"]) -> Float[Array, "*shape"]:
    """Mean over the horizon."""
    mean: Array = (values * (_TIME_WEIGHTS / 2.0)).sum(axis=-1)
    return mean
