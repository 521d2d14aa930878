"""Adapters that host memory has not room for: how often one has to be read from disk again as it becomes active.

Host memory keeps the `max_cpu_loras` adapters used last. An active adapter is used in every step, so what matters is
the gap from the end of one active time to the beginning of the next: an adapter is still there if that is shorter than
the characteristic time ``t`` in which as many others are used as there is room for.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real

from lora_capacity.twins.steady.balance import FirstToken
from lora_capacity.twins.steady.problem import TINY, Interval, Problem
from lora_capacity.twins.steady.slots import AdapterCycle

_LOG_SECONDS = (-6.0, 18.0)
"""Logarithms of the seconds between which the characteristic time is sought: 2 ms to 2 years."""

_BISECTIONS = 20
"""Halvings of that range: the time is then known to some millionths."""

RELOADS_OF_EVICTED = 1.0 / 6.0
"""Active adapters, as a share of the slots, that a load into the last free slot evicts; see `_loads` of the
equations."""


def disk_reloads_per_s(
    problem: Problem,
    interval: Interval,
    cycle: AdapterCycle,
    loaded_once: Float[Array, "classes configs"],
    max_cpu_loras: Real[Array, " configs"],
) -> Float[Array, "classes configs"]:
    """Return the adapters that are read from disk again per second.

    The gap is an idle time, exponential with ``1/rate``, and the wait ``w`` for a slot. An adapter is then there with
    the chance ``1 − e^{−rate·(t − w)}``, and holds room for a share ``active + (1 − active) · E[min(gap, t)] / E[gap]``
    of the time; ``t`` is where the room of all adapters that were loaded once adds up to ``max_cpu_loras``. With no
    more room than slots, active adapters that lose their slot to another lose host memory too.

    Source: the characteristic-time approximation of LRU caches by Che, Tung and Wang (Hierarchical Web Caching
        Systems, 2002), with gaps that begin where use ends; Martina, Garetto and Leonardi (A unified approach to the
        performance analysis of caching systems, 2014) for gaps that are not exponential.

    Args:
        problem: The configurations.
        interval: The interval.
        cycle: Its adapters' cycle.
        loaded_once: Adapters that were loaded by its end, of each class.
        max_cpu_loras: Adapters that host memory holds.
    """
    rate_per_s, wait_s = problem.rate_per_s, cycle.wait_s + cycle.chance_wait_s
    adapters = jnp.maximum(problem.adapters, TINY)
    active = jnp.clip(cycle.active / adapters, 0.0, 1.0)
    gap_s = 1.0 / rate_per_s + wait_s

    def held_share(time_s: Float[Array, " configs"]) -> Float[Array, "classes configs"]:
        idle_s = -jnp.expm1(-rate_per_s * jnp.maximum(time_s - wait_s, 0.0)) / rate_per_s
        return active + (1.0 - active) * (jnp.minimum(time_s, wait_s) + idle_s) / gap_s

    low, high = (jnp.full_like(problem.offered_per_s, end) for end in _LOG_SECONDS)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        fits = (loaded_once * held_share(jnp.exp(middle))).sum(axis=0) < max_cpu_loras
        low, high = jnp.where(fits, middle, low), jnp.where(fits, high, middle)
    time_s = jnp.exp(jax.lax.stop_gradient(0.5 * (low + high)))
    missed = jnp.exp(-rate_per_s * jnp.maximum(time_s - wait_s, 0.0))
    first_per_s = (loaded_once - interval.start.loaded_once) / interval.duration_s
    again_per_s = jnp.maximum(cycle.activations_per_s - first_per_s, 0.0)
    max_loras = problem.scenarios.max_loras
    crowded = jnp.where(cycle.slots_taken, 1.0, cycle.held_share)
    evicted = jnp.where(max_cpu_loras > max_loras, 0.0, crowded * max_loras * RELOADS_OF_EVICTED)
    full = loaded_once.sum(axis=0) > max_cpu_loras
    return jnp.where(full, again_per_s * missed + cycle.activations_per_s * evicted, 0.0)


def with_reloads(
    problem: Problem,
    first: FirstToken,
    reloads_per_s: Float[Array, "classes configs"],
    completed_per_s: Float[Array, " configs"],
) -> FirstToken:
    """Return times to first token with the reads from disk that a request waits for.

    It waits for the read of its own adapter, if it is the one that makes it active, and for what is left, half on
    average, of one that it comes into.

    Args:
        problem: The configurations.
        first: The times without.
        reloads_per_s: What `disk_reloads_per_s` returns.
        completed_per_s: Requests completed per second.
    """
    per_s = reloads_per_s.sum(axis=0)
    time_share = (reloads_per_s * problem.disk_load_s).sum(axis=0)
    load_s = time_share / jnp.maximum(per_s, TINY)
    own = jnp.minimum(per_s / jnp.maximum(completed_per_s, TINY), 1.0)
    others = jnp.minimum(time_share, 1.0)
    return first._replace(
        prompt_s=first.prompt_s + (own + 0.5 * others) * load_s,
        prompt_variance_s2=first.prompt_variance_s2 + (own * (1.0 - own) + others * (1.0 / 3.0)) * load_s**2,
    )
