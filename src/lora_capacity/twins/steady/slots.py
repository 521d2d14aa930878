"""The adapters' cycle in one interval of the steady twin: idle, waiting for a slot, active.

An adapter is *idle* until a request comes (``1/rate`` on average); it *waits* for a slot while requests pile up; it is
*active* for the `ResidenceTime.busy_period` of an infinite-server queue that starts with all that has piled up.

Two things keep an active adapter from refilling itself, so that it drains and gives its slot up. When clients hold no
more than ``max_pending`` requests, a request enters only as another completes, and the adapter gets only its share of
the completions. When the batch is full, its new requests queue behind older ones. The batch stays full once the
backlogs that come with the slots overfill it; until then busy adapters hold their slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.twins.steady.residence import ResidenceTime

BURST_CV = 1.7
"""Relative spread of the requests that one adapter in a slot keeps running: it comes with a backlog and drains it.

Source: ``√(drain time / (2 · mean stay) − 1)`` for exponential stays, 1.1 to 1.5 for backlogs of 50 to 500, and more as
the backlogs differ."""

BURST_MARGIN = 1.75
"""By how many standard deviations the requests that want to run must exceed the batch for it to stay full."""

BURST_WIDTH = 0.45
"""How gradually that sets in, in standard deviations."""

TINY = 1e-9
"""Keeps quotients finite."""

_HANDOVER_STEPS = 5


class Fixed(NamedTuple):
    """What does not change over the horizon; ``[configs]`` or ``[classes, configs]``."""

    adapters: Array
    rate: Array
    offered_per_s: Array
    tokens_per_sequence: Array
    bounds: Array
    most_running: Array
    most_waiting: Array
    disk_s: Array
    resident: Array


class State(NamedTuple):
    """What an interval hands to the next; ``[classes, configs]`` for the adapters, else ``[configs]``."""

    active: Array
    touched: Array
    waiting: Array
    step_s: Array
    accepted: Array
    fill: Array


class Cycle(NamedTuple):
    """The adapters' cycle in an interval; ``[classes, configs]``."""

    active: Array
    activations_per_s: Array
    served_per_s: Array
    open_share: Array
    backlog: Array
    wait_s: Array


def cycle_slots_free(stays: ResidenceTime, fixed: Fixed, start: State, guess: State, stay_s: Array, dt: Array) -> Cycle:
    """Slots to spare: an adapter is active from its request to the end of its busy period."""
    admitted = fixed.rate * guess.accepted * guess.fill
    none = jnp.zeros_like(admitted)
    period_s = stay_s * stays.busy_period(admitted * stay_s)
    active = (start.active + dt * fixed.adapters * admitted) / (1.0 + dt * (1.0 / period_s + admitted))
    return Cycle(active, (fixed.adapters - active) * admitted, 1.0 / period_s + admitted, none + 1.0, none, none)


def cycle_slots_taken(
    scenarios: Scenarios,
    stays: ResidenceTime,
    fixed: Fixed,
    start: State,
    guess: State,
    crowded: Array,
    stay_s: Array,
    dt: Array,
) -> Cycle:
    """All slots in use: as one is given up it goes to an adapter that waits, with all its backlog."""
    spread = _age_spread(fixed, start)
    inactive = jnp.maximum(fixed.adapters - guess.active, 0.0)
    wait_s = _backlog_wait_s(guess.waiting, inactive * fixed.rate, fixed.rate, spread)
    backlog = fixed.rate * wait_s
    turn = fixed.rate / (1.0 + backlog)

    arriving = fixed.rate * guess.accepted
    drain_s = stay_s * stays.drain(backlog)
    capped = guess.accepted < 0.999
    own_share = jnp.where(capped, jnp.minimum((guess.active * fixed.rate).sum(axis=0) / fixed.offered_per_s, 0.9), 0.0)
    closed_share = jnp.where(capped, 1.0, crowded)
    open_s = stay_s * stays.busy_period(arriving * stay_s, backlog)
    closed_s = drain_s / (1.0 - own_share)
    release = (1.0 - closed_share) / open_s + closed_share / closed_s
    served = (1.0 + backlog) * ((1.0 - closed_share) / open_s + closed_share / drain_s) + (
        1.0 - closed_share
    ) * arriving

    kept = 1.0 + dt * release
    slots = jnp.minimum(scenarios.max_loras, fixed.adapters.sum(axis=0))
    handed = jnp.zeros_like(slots)
    for _ in range(_HANDOVER_STEPS):
        holders = (start.active + handed * turn * fixed.adapters) / (kept + handed * turn)
        slope = turn * (fixed.adapters * kept - start.active) / (kept + handed * turn) ** 2
        handed = handed + jnp.maximum(slots - holders.sum(axis=0), 0.0) / jnp.maximum(slope.sum(axis=0), TINY)
    active = (start.active + handed * turn * fixed.adapters) / (kept + handed * turn)
    activations_per_s = handed * turn * (fixed.adapters - active) / dt
    open_share = jnp.broadcast_to(1.0 - closed_share, backlog.shape)
    return Cycle(active, activations_per_s, served, open_share, backlog, jnp.broadcast_to(wait_s, backlog.shape))


def crowded_share(scenarios: Scenarios, stays: ResidenceTime, fixed: Fixed, start: State) -> Array:
    """Share of the interval in which the backlogs of the adapters that get a slot overfill the batch."""
    spread = _age_spread(fixed, start)
    inactive = jnp.maximum(fixed.adapters - start.active, 0.0)
    backlog = fixed.rate * _backlog_wait_s(start.waiting, inactive * fixed.rate, fixed.rate, spread)
    turns = inactive * fixed.rate / (1.0 + backlog)
    running = (turns * (1.0 + backlog)).sum(axis=0) / jnp.maximum((turns * stays.drain(backlog)).sum(axis=0), TINY)
    width = burst_width(scenarios.max_loras)
    excess = jnp.log(jnp.maximum(scenarios.max_loras * running, TINY) / fixed.most_running) / width - 0.5 * width
    return jax.nn.sigmoid((excess - BURST_MARGIN) / BURST_WIDTH)


def burst_width(max_loras: Array) -> Array:
    """Standard deviation of the logarithm of the requests that the adapters in the slots want to run."""
    return jnp.sqrt(jnp.log1p(BURST_CV**2 / max_loras))


def _age_spread(fixed: Fixed, start: State) -> Array:
    """``spread`` of `_backlog_wait_s`: from 1 at the start to 1/2 once every adapter has had a slot."""
    passes = start.touched.sum(axis=0) / jnp.maximum(fixed.adapters.sum(axis=0), TINY)
    return 1.0 / (1.0 + passes)


def _backlog_wait_s(waiting: Array, arrivals_per_s: Array, rate: Array, spread: Array) -> Array:
    """How long the oldest request has waited, from how many wait.

    Solves ``waiting = Σ arrivals · w · (1 + spread · rate·w) / (1 + rate·w)``: an adapter that has waited ``w`` brings
    ``1 + rate·w`` requests, one that has waited a while ``1 + spread·rate·w`` on average. ``spread`` is 1 while all
    have waited since the start and 1/2 when their ages are even.
    """
    wait_s = waiting / jnp.maximum(arrivals_per_s.sum(axis=0), TINY)
    for _ in range(4):
        pile = (1.0 + spread * rate * wait_s) / (1.0 + rate * wait_s)
        wait_s = waiting / jnp.maximum((arrivals_per_s * pile).sum(axis=0), TINY)
    return wait_s


def resident_share(count: Array, rate: Array, max_loras: Array) -> Array:
    """Chance that an adapter still has its slot when its next request comes, while slots are not all in use.

    Least-recently-used slots keep an adapter for a characteristic time ``t`` that solves ``Σ count · (1 −
    e^{−rate·t}) = slots``.

    Source: the characteristic-time approximation of LRU caches by Che, Tung and Wang.
    """
    low, high = jnp.full_like(max_loras, -6.0, dtype=rate.dtype), jnp.full_like(max_loras, 18.0, dtype=rate.dtype)
    for _ in range(14):
        middle = 0.5 * (low + high)
        fits = (count * -jnp.expm1(-rate * jnp.exp(middle))).sum(axis=0) < max_loras
        low, high = jnp.where(fits, middle, low), jnp.where(fits, high, middle)
    return -jnp.expm1(-rate * jnp.exp(jax.lax.stop_gradient(0.5 * (low + high))))
