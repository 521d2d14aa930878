"""The adapters' cycle in one interval of the steady twin: idle, waiting for a slot, active.

An adapter is *idle* until a request comes (``1/rate`` on average); it *waits* for a slot while requests pile up; it is
*active* for the `ResidenceTime.busy_period` of an M/G/∞ queue that starts with all that has piled up.

Two things keep an active adapter from refilling itself, so that it drains and gives its slot up. When clients hold no
more than ``max_pending`` requests, a request enters only as another completes, and the adapter gets only its share of
the completions. When the batch is full, its new requests queue behind older ones. The batch stays full once the
backlogs that come with the slots overfill it; until then busy adapters hold their slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Real

from lora_capacity.twins.steady.problem import TINY, Interval, Problem, ServerState

BURST_CV = 1.7
"""Relative spread of the requests that one adapter in a slot keeps running: it comes with a backlog and drains it.

Source: ``√(drain time / (2 · mean residence) − 1)`` for exponential residence, 1.1 to 1.5 for backlogs of 50 to 500,
and more as the backlogs differ."""

BURST_MARGIN = 1.75
"""By how many standard deviations the requests that want to run must exceed the batch for it to stay full."""

BURST_WIDTH = 0.45
"""How gradually that sets in, in standard deviations."""

_UNBOUNDED_CLIENTS = 0.999
"""Accepted share from which clients count as unbounded: rounding and damping leave a share of 1 just below it."""

_MOST_OWN_SHARE = 0.9
"""Largest share of the completions that may refill the adapters in the slots: they drain at most ten times slower."""

_BACKLOG_ITERATIONS = 4
"""Of the fixed point for the oldest wait, whose mean backlog varies only between ``spread`` and 1 times the whole."""

_HANDOVER_ITERATIONS = 5
"""Of Newton's method for the slots handed over. The adapters in slots are a concave function of it: steps rise to the
root and never pass it."""


class AdapterCycle(NamedTuple):
    """The adapters' cycle in an interval.

    Attributes:
        active: Adapters in slots with requests in the batch.
        activations_per_s: Adapters that become active per second.
        served_per_s: Requests admitted per second for each active adapter.
        open_share: Share of the time in which an active adapter's new requests join its batch.
        backlog: Requests that have piled up behind the first when an adapter gets its slot.
        wait_s: How long the first has then waited.
        slots_taken: Whether all slots are in use and adapters wait for one.
    """

    active: Float[Array, "classes configs"]
    activations_per_s: Float[Array, "classes configs"]
    served_per_s: Float[Array, "classes configs"]
    open_share: Float[Array, "classes configs"]
    backlog: Float[Array, "classes configs"]
    wait_s: Float[Array, "classes configs"]
    slots_taken: Bool[Array, " configs"]


def adapter_cycle(problem: Problem, interval: Interval, guess: ServerState) -> AdapterCycle:
    """Return the cycle with slots to spare, unless more adapters would then be active than there are slots."""
    max_loras = problem.scenarios.max_loras
    free = _cycle_slots_free(problem, interval, guess)
    fewer_slots = problem.adapters.sum(axis=0) > max_loras
    slots_taken = fewer_slots & (free.active.sum(axis=0) > max_loras)
    taken = _cycle_slots_taken(problem, interval, guess)
    return AdapterCycle(*(jnp.where(slots_taken, a, b) for a, b in zip(taken, free, strict=True)))


def _cycle_slots_free(problem: Problem, interval: Interval, guess: ServerState) -> AdapterCycle:
    """Slots to spare: an adapter is active from its request to the end of its busy period.

    ``d active/dt = (adapters − active) · rate − active / period``, by one implicit Euler step.
    """
    start, duration_s = interval.start, interval.duration_s
    admitted_per_s = problem.rate_per_s * guess.accepted * guess.admitted
    none = jnp.zeros_like(admitted_per_s)
    residence_s = problem.residence_s(guess)
    period_s = residence_s * problem.residence.busy_period(admitted_per_s * residence_s)
    active = (start.active + duration_s * problem.adapters * admitted_per_s) / (
        1.0 + duration_s * (1.0 / period_s + admitted_per_s)
    )
    return AdapterCycle(
        active=active,
        activations_per_s=(problem.adapters - active) * admitted_per_s,
        served_per_s=1.0 / period_s + admitted_per_s,
        open_share=none + 1.0,
        backlog=none,
        wait_s=none,
        slots_taken=jnp.zeros_like(duration_s, dtype=bool),
    )


def _cycle_slots_taken(problem: Problem, interval: Interval, guess: ServerState) -> AdapterCycle:
    """All slots in use: as one is given up it goes to the adapter that has waited longest, with all its backlog."""
    rate_per_s, residence_s, drain = problem.rate_per_s, problem.residence_s(guess), problem.residence.drain
    inactive = jnp.maximum(problem.adapters - guess.active, 0.0)
    wait_s = _oldest_wait_s(guess.waiting, inactive * rate_per_s, rate_per_s, _age_spread(problem, interval.start))
    backlog = rate_per_s * wait_s
    # An inactive adapter is due once it has been idle and waited: 1/rate + wait = (1 + backlog) / rate.
    due_per_s = rate_per_s / (1.0 + backlog)

    arriving_per_s = rate_per_s * guess.accepted
    drain_s = residence_s * drain(backlog)
    clients_full = guess.accepted < _UNBOUNDED_CLIENTS
    own_share = jnp.where(
        clients_full,
        jnp.minimum((guess.active * rate_per_s).sum(axis=0) / problem.offered_per_s, _MOST_OWN_SHARE),
        0.0,
    )
    closed_share = jnp.where(clients_full, 1.0, interval.overfilled_share)
    open_s = residence_s * problem.residence.busy_period(arriving_per_s * residence_s, backlog)
    closed_s = drain_s / (1.0 - own_share)
    release_per_s = (1.0 - closed_share) / open_s + closed_share / closed_s
    served_per_s = (1.0 + backlog) * ((1.0 - closed_share) / open_s + closed_share / drain_s) + (
        1.0 - closed_share
    ) * arriving_per_s

    active, activations_per_s = _hand_over(problem, interval, due_per_s, release_per_s)
    return AdapterCycle(
        active=active,
        activations_per_s=activations_per_s,
        served_per_s=served_per_s,
        open_share=jnp.broadcast_to(1.0 - closed_share, backlog.shape),
        backlog=backlog,
        wait_s=jnp.broadcast_to(wait_s, backlog.shape),
        slots_taken=jnp.ones_like(interval.duration_s, dtype=bool),
    )


def _hand_over(
    problem: Problem,
    interval: Interval,
    due_per_s: Float[Array, "classes configs"],
    release_per_s: Float[Array, "classes configs"],
) -> tuple[Float[Array, "classes configs"], Float[Array, "classes configs"]]:
    """Adapters in slots, and those that get one per second, such that all slots are in use.

    A class gets slots in proportion ``h`` to how often its inactive adapters are due. The implicit Euler step ``active
    = start + h · due · (adapters − active) − duration · release · active`` gives the holders for an ``h``; Newton's
    method finds the one at which they add up to the slots.
    """
    start, duration_s, adapters = interval.start, interval.duration_s, problem.adapters
    kept = 1.0 + duration_s * release_per_s
    slots = jnp.minimum(problem.scenarios.max_loras, adapters.sum(axis=0))
    handed = jnp.zeros_like(slots)
    for _ in range(_HANDOVER_ITERATIONS):
        holders = (start.active + handed * due_per_s * adapters) / (kept + handed * due_per_s)
        slope = due_per_s * (adapters * kept - start.active) / (kept + handed * due_per_s) ** 2
        handed = handed + jnp.maximum(slots - holders.sum(axis=0), 0.0) / jnp.maximum(slope.sum(axis=0), TINY)
    active = (start.active + handed * due_per_s * adapters) / (kept + handed * due_per_s)
    return active, handed * due_per_s * (adapters - active) / duration_s


def overfilled_share(problem: Problem, start: ServerState) -> Float[Array, " configs"]:
    """Share of an interval in which the backlogs of the adapters that get a slot overfill the batch.

    An adapter that brings a backlog keeps ``(1 + backlog) / drain`` requests running on average (Little's law), all
    slots together a log-normal number; the batch stays full once its median lies well above what fits.
    """
    rate_per_s = problem.rate_per_s
    inactive = jnp.maximum(problem.adapters - start.active, 0.0)
    backlog = rate_per_s * _oldest_wait_s(start.waiting, inactive * rate_per_s, rate_per_s, _age_spread(problem, start))
    due_per_s = inactive * rate_per_s / (1.0 + backlog)
    running_per_slot = (due_per_s * (1.0 + backlog)).sum(axis=0) / jnp.maximum(
        (due_per_s * problem.residence.drain(backlog)).sum(axis=0), TINY
    )
    max_loras = problem.scenarios.max_loras
    width = burst_width(max_loras)
    wanted = jnp.maximum(max_loras * running_per_slot, TINY)
    excess = jnp.log(wanted / problem.most_running) / width - 0.5 * width
    return jax.nn.sigmoid((excess - BURST_MARGIN) / BURST_WIDTH)


def burst_width(max_loras: Real[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Standard deviation of the logarithm of the requests that the adapters in the slots want to run."""
    return jnp.sqrt(jnp.log1p(BURST_CV**2 / max_loras))


def _age_spread(problem: Problem, start: ServerState) -> Float[Array, " configs"]:
    """``spread`` of `_oldest_wait_s`: from 1 at the start to 1/2 once every adapter has had a slot."""
    passes = start.loaded_once.sum(axis=0) / jnp.maximum(problem.adapters.sum(axis=0), TINY)
    return 1.0 / (1.0 + passes)


def _oldest_wait_s(
    waiting: Float[Array, " configs"],
    arrivals_per_s: Float[Array, "classes configs"],
    rate_per_s: Float[Array, "classes configs"],
    spread: Float[Array, " configs"],
) -> Float[Array, " configs"]:
    """How long the oldest request has waited, from how many wait.

    Solves ``waiting = Σ arrivals · w · (1 + spread · rate·w) / (1 + rate·w)``: an adapter that has waited ``w`` brings
    ``1 + rate·w`` requests, one that has waited a while ``1 + spread·rate·w`` on average. ``spread`` is 1 while all
    have waited since the start and 1/2 when their ages are even.
    """
    wait_s = waiting / jnp.maximum(arrivals_per_s.sum(axis=0), TINY)
    for _ in range(_BACKLOG_ITERATIONS):
        mean_over_most = (1.0 + spread * rate_per_s * wait_s) / (1.0 + rate_per_s * wait_s)
        wait_s = waiting / jnp.maximum((arrivals_per_s * mean_over_most).sum(axis=0), TINY)
    return wait_s
