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

from lora_capacity.twins.steady.chance import Overflow, overflow
from lora_capacity.twins.steady.problem import TINY, Interval, Problem, ServerState
from lora_capacity.twins.steady.residence import MAX_LOAD

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


_SETTLES_WITHIN = 0.008
"""Share of the horizon within which waits for slots must settle to count as settled from the start."""

_NEARLY_POISSON = 1e-3
"""Peakedness this near 1 counts as 1, by the first terms of its series: within rounding of single precision."""

_MOST_ACTIVE = 0.999
"""Largest share of the time that an adapter may be active: keeps its logarithm finite."""

_FEWEST_SOURCES = 1e-3
"""Least share of a slot that an adapter asks for: as good as adapters without end."""

_LEAST_SPREAD = 0.02
"""Least peakedness of the adapters active at once: as good as a fixed number."""


class AdapterCycle(NamedTuple):
    """The adapters' cycle in an interval.

    Attributes:
        active: Adapters in slots with requests in the batch.
        activations_per_s: Adapters that become active per second.
        served_per_s: Requests admitted per second for each active adapter.
        open_share: Share of the time in which an active adapter's new requests join its batch.
        burst: Requests that come together when an adapter becomes due; 1 for Poisson arrivals.
        backlog: Requests that have piled up behind them when it gets its slot.
        wait_s: How long the first has then waited.
        held_share: Share of the adapters becoming active that waited for a slot.
        free_wait_s: Mean wait of all of them, if slots are not all in use for long.
        wait_cv2: Squared coefficient of variation of that wait.
        slots_taken: Whether all slots are in use and adapters wait for one.
    """

    active: Float[Array, "classes configs"]
    activations_per_s: Float[Array, "classes configs"]
    served_per_s: Float[Array, "classes configs"]
    open_share: Float[Array, "classes configs"]
    burst: Float[Array, "classes configs"]
    backlog: Float[Array, "classes configs"]
    wait_s: Float[Array, "classes configs"]
    held_share: Float[Array, " configs"]
    free_wait_s: Float[Array, " configs"]
    wait_cv2: Float[Array, " configs"]
    slots_taken: Bool[Array, " configs"]

    @property
    def chance_wait_s(self) -> Float[Array, " configs"]:
        """`free_wait_s` where it holds, else 0."""
        return jnp.where(self.slots_taken, 0.0, self.free_wait_s)


def adapter_cycle(problem: Problem, interval: Interval, guess: ServerState) -> AdapterCycle:
    """Return the adapters' cycle.

    Where waits for slots settle soon, adapters wait as long as keeps no more of them active than there are slots, and
    longer by chance. Where they do not, they wait as long as the queue that has grown so far takes.
    """
    max_loras = problem.scenarios.max_loras
    free, alone, wanted, hold_s, fluid_s = _cycle_slots_free(problem, interval, guess)
    fewer_slots = problem.adapters.sum(axis=0) > max_loras
    # Clients that hold all that they may hand a request in only as one is completed: then adapters drain too.
    drain = (interval.start.accepted < _UNBOUNDED_CLIENTS) & (interval.start.held_share > 0.5)
    settles = _settled_wait_s(problem, alone, hold_s) < _SETTLES_WITHIN * problem.scenarios.horizon_s
    slots_taken = fewer_slots & (drain | ~settles)
    held = _held_by_chance(problem, interval, guess, wanted, hold_s)
    hand_over_s = hold_s / jnp.clip(wanted.sum(axis=0), TINY, max_loras)
    taken = _cycle_slots_taken(problem, interval, guess)
    cycle = AdapterCycle(*(jnp.where(slots_taken, a, b) for a, b in zip(taken, free, strict=True)))
    chance_s = held.by_chance * hand_over_s
    wait_s = fluid_s + chance_s
    return cycle._replace(
        held_share=jnp.where(fewer_slots, held.full_share, 0.0),
        free_wait_s=jnp.where(fewer_slots, jnp.minimum(wait_s, interval.end_s), 0.0),
        wait_cv2=chance_s / jnp.maximum(wait_s, TINY),
    )


def _settled_wait_s(
    problem: Problem, alone: Float[Array, "classes configs"], hold_s: Float[Array, " configs"]
) -> Float[Array, " configs"]:
    """Wait for a slot at which adapters that wait ask for no more than there are slots, without the requests piled up.

    Of equal adapters, each active for a share ``p`` of its time, ``(wanted − slots) / p`` wait then.
    """
    wanted, max_loras = alone.sum(axis=0), problem.scenarios.max_loras
    share = (alone**2 / jnp.maximum(problem.adapters, TINY)).sum(axis=0) / jnp.maximum(wanted, TINY)
    return jnp.maximum(wanted - max_loras, 0.0) / jnp.maximum(share, TINY) * hold_s / max_loras


def _cycle_slots_free(
    problem: Problem, interval: Interval, guess: ServerState
) -> tuple[
    AdapterCycle,
    Float[Array, "classes configs"],
    Float[Array, "classes configs"],
    Float[Array, " configs"],
    Float[Array, " configs"],
]:
    """Slots to spare: an adapter is active from its request to the end of its busy period, unless chance holds it up.

    ``d active/dt = (adapters − active) · due − active / period``, by one implicit Euler step. Requests in bursts share
    busy periods: of as many as Pascal's law with their peakedness ``z`` has, an adapter is idle for a share
    ``z^{−load/(z−1)}`` of the time and for ``z / rate`` at a time.

    Returns:
        The cycle; the adapters that would be active if none waited, and if as many did without keeping others waiting;
        how long one keeps its slot; how long all wait where more would be active than there are slots.
    """
    start, duration_s = interval.start, interval.duration_s
    admitted_per_s = problem.rate_per_s * guess.accepted * guess.admitted
    none = jnp.zeros_like(admitted_per_s)
    residence_s = problem.residence_s(guess)
    load = admitted_per_s * residence_s
    burst = problem.burst(problem.rate_per_s, residence_s + guess.held_share * guess.held_s)
    alone_s = residence_s * _merged_share(problem, residence_s, load) * problem.residence.busy_period(load)
    backlog = admitted_per_s * guess.held_s
    held_s = residence_s * problem.residence.busy_period(load, jnp.maximum(burst - 1.0, 0.0) + backlog)
    period_s = alone_s + guess.held_share * (held_s - alone_s)
    idle_rate_per_s = admitted_per_s / burst
    alone = _euler(problem, interval, idle_rate_per_s, alone_s)
    wanted = _euler(problem, interval, idle_rate_per_s, period_s)
    due_per_s = idle_rate_per_s / (1.0 + idle_rate_per_s * guess.held_share * guess.held_s)
    active = _euler(problem, interval, due_per_s, period_s)
    active *= jnp.minimum(1.0, problem.scenarios.max_loras / jnp.maximum(active.sum(axis=0), TINY))
    activations_per_s = jnp.maximum(active / period_s + (active - start.active) / duration_s, 0.0)
    hold_s = (activations_per_s * period_s).sum(axis=0) / jnp.maximum(activations_per_s.sum(axis=0), TINY)
    cycle = AdapterCycle(
        active=active,
        activations_per_s=activations_per_s,
        served_per_s=(burst + guess.held_share * backlog) / period_s + admitted_per_s,
        open_share=none + 1.0,
        burst=burst,
        backlog=backlog,
        wait_s=none,
        held_share=guess.held_share,
        free_wait_s=none[0],
        wait_cv2=none[0],
        slots_taken=jnp.zeros_like(duration_s, dtype=bool),
    )
    return cycle, alone, wanted, hold_s, _fluid_wait_s(problem, interval, idle_rate_per_s, period_s)


def _fluid_wait_s(
    problem: Problem,
    interval: Interval,
    idle_rate_per_s: Float[Array, "classes configs"],
    period_s: Float[Array, "classes configs"],
) -> Float[Array, " configs"]:
    """Wait for a slot at which no more adapters are active than there are slots, at most as long as the server runs.

    Adapters that wait longer become active more rarely, along a convex curve: steps of Newton's method from a wait of 0
    rise to the root and never pass it.
    """
    start, duration_s = interval.start, interval.duration_s
    wait_s = jnp.zeros_like(duration_s)
    for _ in range(_HANDOVER_ITERATIONS):
        due_per_s = idle_rate_per_s / (1.0 + idle_rate_per_s * wait_s)
        kept = 1.0 + duration_s * (1.0 / period_s + due_per_s)
        active = (start.active + duration_s * problem.adapters * due_per_s) / kept
        slope = duration_s * due_per_s**2 * (problem.adapters - active) / kept
        too_many = active.sum(axis=0) - problem.scenarios.max_loras
        step_s = jnp.maximum(too_many, 0.0) / jnp.maximum(slope.sum(axis=0), TINY)
        wait_s = jnp.minimum(wait_s + step_s, interval.end_s)
    return wait_s


def _euler(
    problem: Problem,
    interval: Interval,
    due_per_s: Float[Array, "classes configs"],
    period_s: Float[Array, "classes configs"],
) -> Float[Array, "classes configs"]:
    start, duration_s = interval.start, interval.duration_s
    return (start.active + duration_s * problem.adapters * due_per_s) / (
        1.0 + duration_s * (1.0 / period_s + due_per_s)
    )


def _merged_share(
    problem: Problem, residence_s: Float[Array, " configs"], load: Float[Array, "classes configs"]
) -> Float[Array, "classes configs"]:
    """Busy period of requests in bursts over that of Poisson arrivals, by Pascal's law of those present."""
    burst = problem.burst(problem.rate_per_s, residence_s)
    peakedness = problem.peakedness(problem.rate_per_s, residence_s)
    load = jnp.clip(load, TINY, MAX_LOAD)
    excess = peakedness - 1.0
    near = jnp.abs(excess) < _NEARLY_POISSON
    exponent = jnp.where(near, 1.0 - 0.5 * excess, jnp.log(peakedness) / jnp.where(near, 1.0, excess))
    return burst * jnp.expm1(load * exponent) / jnp.expm1(load)


def _held_by_chance(
    problem: Problem,
    interval: Interval,
    guess: ServerState,
    wanted: Float[Array, "classes configs"],
    hold_s: Float[Array, " configs"],
) -> Overflow:
    """How often all slots are in use by chance, and how many adapters wait then.

    Each adapter is active with a chance of its own, and all of them more at once while the batch, and with it the
    residence, is larger than on average; fewer where a full batch divides among them. An adapter that waits becomes
    active no second time.
    """
    max_loras = problem.scenarios.max_loras
    chance = jnp.clip(wanted / jnp.maximum(problem.adapters, TINY), 0.0, _MOST_ACTIVE)
    mean = jnp.maximum(wanted.sum(axis=0), TINY)
    own = (problem.adapters * chance * (1.0 - chance)).sum(axis=0)
    with_residence = -(problem.adapters * (1.0 - chance) * jnp.log1p(-chance)).sum(axis=0)
    common = with_residence**2 * _beyond_poisson(problem, guess)
    peakedness = jnp.maximum((own + common) / mean, _LEAST_SPREAD)
    ratio = jnp.maximum(1.0 + (mean - max_loras) / (peakedness * max_loras), TINY)
    sources = jnp.maximum(1.0 - own / mean, _FEWEST_SOURCES) / (jnp.maximum(own / mean, _LEAST_SPREAD) * max_loras)
    # The ratio falls along a line, its logarithm here too: both are 1 and 0 for the same number beyond.
    excess = ratio - 1.0
    near = jnp.abs(excess) < _NEARLY_POISSON
    bend = jnp.where(near, 1.0 - 0.5 * excess, jnp.log(ratio) / jnp.where(near, 1.0, excess))
    return overflow(mean, peakedness, max_loras, ratio, sources * bend, 0.5 * (1.0 + problem.residence_cv2))


def _beyond_poisson(problem: Problem, guess: ServerState) -> Float[Array, " configs"]:
    """Squared coefficient of variation of the batch beyond that of arrivals; below 0 where it is full."""
    residence_s = problem.residence_s(guess)
    running = jnp.maximum(problem.running(guess), 1.0)
    arrivals = problem.peakedness_of_batch(residence_s) * running
    return (problem.batch_variance(guess, running) - arrivals) / running**2


def _cycle_slots_taken(problem: Problem, interval: Interval, guess: ServerState) -> AdapterCycle:
    """All slots in use: as one is given up it goes to the adapter that has waited longest, with all its backlog."""
    rate_per_s, residence_s, drain = problem.rate_per_s, problem.residence_s(guess), problem.residence.drain
    inactive = jnp.maximum(problem.adapters - guess.active, 0.0)
    wait_s, burst = _oldest_wait_s(problem, guess, inactive, _age_spread(problem, interval.start))
    backlog = rate_per_s * wait_s
    # An inactive adapter is due once it has been idle and waited: burst/rate + wait = (burst + backlog) / rate.
    due_per_s = rate_per_s / (burst + backlog)

    arriving_per_s = rate_per_s * guess.accepted
    behind = jnp.maximum(burst - 1.0, 0.0) + backlog
    drain_s = residence_s * drain(behind)
    clients_full = guess.accepted < _UNBOUNDED_CLIENTS
    own_share = jnp.where(
        clients_full,
        jnp.minimum((guess.active * rate_per_s).sum(axis=0) / problem.offered_per_s, _MOST_OWN_SHARE),
        0.0,
    )
    closed_share = jnp.where(clients_full, 1.0, interval.overfilled_share)
    open_s = residence_s * problem.residence.busy_period(arriving_per_s * residence_s, behind)
    closed_s = drain_s / (1.0 - own_share)
    release_per_s = (1.0 - closed_share) / open_s + closed_share / closed_s
    served_per_s = (burst + backlog) * ((1.0 - closed_share) / open_s + closed_share / drain_s) + (
        1.0 - closed_share
    ) * arriving_per_s

    active, activations_per_s = _hand_over(problem, interval, due_per_s, release_per_s)
    return AdapterCycle(
        active=active,
        activations_per_s=activations_per_s,
        served_per_s=served_per_s,
        open_share=jnp.broadcast_to(1.0 - closed_share, backlog.shape),
        burst=burst,
        backlog=backlog,
        wait_s=jnp.broadcast_to(wait_s, backlog.shape),
        held_share=jnp.ones_like(interval.duration_s),
        free_wait_s=jnp.zeros_like(interval.duration_s),
        wait_cv2=jnp.zeros_like(interval.duration_s),
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


def overfilled_share(problem: Problem, start: ServerState, end_s: Float[Array, " configs"]) -> Float[Array, " configs"]:
    """Share of an interval in which the backlogs of the adapters that get a slot overfill the batch.

    An adapter that brings a backlog keeps ``(1 + backlog) / drain`` requests running on average (Little's law), all
    slots together a log-normal number; the batch stays full once its median lies well above what fits. It comes to that
    when the first slot changes hands, which takes long where all that have one are always busy.
    """
    rate_per_s = problem.rate_per_s
    inactive = jnp.maximum(problem.adapters - start.active, 0.0)
    wait_s, burst = _oldest_wait_s(problem, start, inactive, _age_spread(problem, start))
    behind = jnp.maximum(burst - 1.0, 0.0) + rate_per_s * wait_s
    due_per_s = inactive * rate_per_s / (1.0 + behind)
    running_per_slot = (due_per_s * (1.0 + behind)).sum(axis=0) / jnp.maximum(
        (due_per_s * problem.residence.drain(behind)).sum(axis=0), TINY
    )
    max_loras = problem.scenarios.max_loras
    width = burst_width(max_loras)
    wanted = jnp.maximum(max_loras * running_per_slot, TINY)
    excess = jnp.log(wanted / problem.most_running) / width - 0.5 * width
    residence_s = problem.residence_s(start)
    held_s = residence_s * problem.residence.busy_period(rate_per_s * start.accepted * residence_s)
    handed_over = -jnp.expm1(-end_s * (start.active / held_s).sum(axis=0))
    return handed_over * jax.nn.sigmoid((excess - BURST_MARGIN) / BURST_WIDTH)


def burst_width(max_loras: Real[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Standard deviation of the logarithm of the requests that the adapters in the slots want to run."""
    return jnp.sqrt(jnp.log1p(BURST_CV**2 / max_loras))


def _age_spread(problem: Problem, start: ServerState) -> Float[Array, " configs"]:
    """``spread`` of `_oldest_wait_s`: from 1 at the start to 1/2 once every adapter has had a slot."""
    passes = start.loaded_once.sum(axis=0) / jnp.maximum(problem.adapters.sum(axis=0), TINY)
    return 1.0 / (1.0 + passes)


def _oldest_wait_s(
    problem: Problem, state: ServerState, inactive: Float[Array, "classes configs"], spread: Float[Array, " configs"]
) -> tuple[Float[Array, " configs"], Float[Array, "classes configs"]]:
    """How long the oldest request has waited, from how many wait; and the bursts in which requests come meanwhile.

    Solves ``waiting = Σ arrivals · w · (burst + spread · rate·w) / (burst + rate·w)``: an adapter that has waited ``w``
    brings ``burst + rate·w`` requests, one that has waited a while ``burst + spread·rate·w`` on average. ``spread`` is
    1 while all have waited since the start and 1/2 when their ages are even.
    """
    rate_per_s = problem.rate_per_s
    arrivals_per_s = inactive * rate_per_s
    wait_s = state.waiting / jnp.maximum(arrivals_per_s.sum(axis=0), TINY)
    burst = problem.burst(rate_per_s, problem.residence_s(state) + wait_s)
    for _ in range(_BACKLOG_ITERATIONS):
        mean_over_most = (burst + spread * rate_per_s * wait_s) / (burst + rate_per_s * wait_s)
        wait_s = state.waiting / jnp.maximum((arrivals_per_s * mean_over_most).sum(axis=0), TINY)
    return wait_s, burst
