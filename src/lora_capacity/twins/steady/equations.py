"""The equations of one interval's balance: from a guess of the server's state, the state that follows from it.

Read `follow` first: adapters in slots, requests that want to run, the queue and what completes, loads, the step time.
Each depends on those before it; what an earlier one needs of a later one it takes from the guess.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lora_capacity.costs import step_time_s
from lora_capacity.costs.kernels import mean_rows
from lora_capacity.scenarios.results import Bottleneck
from lora_capacity.twins.steady.balance import Demand, Loads, Observed, Queue, Step
from lora_capacity.twins.steady.chance import Overflow, overflow
from lora_capacity.twins.steady.first_token import first_token, piled_up
from lora_capacity.twins.steady.host_memory import disk_reloads_per_s, with_reloads
from lora_capacity.twins.steady.problem import TINY, Interval, Problem, ServerState
from lora_capacity.twins.steady.slots import AdapterCycle, adapter_cycle, burst_width

SKIPPED_KV_SHARE = 0.5
"""Share of the queue that the scheduler looks at in a step that a full KV cache ends: it stops at the first request
that has its slot but no blocks, which stands anywhere in the queue."""

_MAX_LOADING_SHARE = 0.85
"""Largest share of the time that loads may block the engine: steps become at most seven times as long, so that one bad
guess does not lead the iteration away."""

_LEAST_FREE_SHARE = 0.05
"""Least share of a step that does not depend on the batch: its feedback then makes the batch vary twenty times more."""

_LEAST_DIFFERENCE = 1e-3
"""Share of a batch by which it is taken to vary at least where a slope is: single precision tells no smaller one."""

_LEAST_VARIABILITY = 0.01
"""Least variability of arrivals and residence: as good as clockwork."""

_LEAST_COMPLETED = 0.1
"""Share of the requests completed besides which others come to wait: keeps a bad guess from emptying the batch."""

_LEAST_HELD = 1e-6
"""Share of waiting adapters below which their wait does not matter."""

_KV_CACHE = 0
"""Place of the KV cache in `Problem.most_running_by`, which has the order of `Bottleneck`."""


def follow(problem: Problem, interval: Interval, guess: ServerState) -> tuple[ServerState, Observed]:
    """Evaluate all equations once: the damped next guess, and what the server does in the interval."""
    cycle = adapter_cycle(problem, interval, guess)
    demand = _demand(problem, guess, cycle)
    held = _held(problem, interval, guess, cycle)
    queue = _queue(problem, interval, guess, cycle, demand, held)
    running = queue.completed_per_s * problem.residence_s(guess)  # Little's law
    loads = _loads(problem, interval, guess, cycle)
    step = _step(problem, guess, cycle, queue, running, loads)
    by_chance = _full_by_chance(problem, interval, guess, demand, running, step.fixed_share)
    first = first_token(problem, guess, cycle, queue, step, by_chance)
    if loads.reloads_per_s is not None:
        first = with_reloads(problem, first, loads.reloads_per_s, queue.completed_per_s)
    return _next_guess(problem, guess, cycle, queue, loads, step, held), Observed(
        running=running,
        waiting=jnp.minimum(
            queue.mean_waiting + 0.5 * (interval.start.held + held),
            jnp.maximum(problem.scenarios.max_pending - running, 0.0),  # of this turn: not those of the guess
        ),
        completed_per_s=queue.completed_per_s,
        first_token=first,
        step_s=step.time_s,
        active_adapters=_adapters_in_step(cycle, running),
        loads_per_s=loads.per_s,
        bottleneck=_bottleneck(problem, cycle, queue),
        batch_full_share=queue.batch_full_share,
        class_completed_per_s=_class_completed_per_s(problem, cycle, demand, queue),
    )


def _demand(problem: Problem, guess: ServerState, cycle: AdapterCycle) -> Demand:
    """Requests that want to run, by Little's law: those admitted per second times their residence."""
    residence_s = problem.residence_s(guess)
    by_class = cycle.active * cycle.served_per_s * residence_s
    total = by_class.sum(axis=0) + problem.scenarios.base_rate_per_s * guess.accepted * residence_s
    fitting, overfull_share = _clipped_log_normal(total, problem.most_running, burst_width(problem.scenarios.max_loras))
    return Demand(by_class, total, fitting, overfull_share)


def _clipped_log_normal(
    mean: Float[Array, " configs"], most: Float[Array, " configs"], width: Float[Array, " configs"]
) -> tuple[Float[Array, " configs"], Float[Array, " configs"]]:
    """Mean of ``min(X, most)`` and chance of ``X > most``, for log-normal ``X`` with ``width`` of its logarithm.

    ``mean · Φ(m − width/2) + most · Φ(−m − width/2)`` with ``m = ln(most / mean) / width``, by the partial expectation
    of a log-normal variable.
    """
    margin = jnp.log(most / jnp.maximum(mean, TINY)) / width
    over = jax.scipy.stats.norm.cdf(-margin - 0.5 * width)
    return mean * jax.scipy.stats.norm.cdf(margin - 0.5 * width) + most * over, over


def _held(problem: Problem, interval: Interval, guess: ServerState, cycle: AdapterCycle) -> Float[Array, " configs"]:
    """Requests that wait by chance for a slot, by Little's law, as far as they have come by the end of the interval."""
    settled = cycle.chance_wait_s * (cycle.activations_per_s * piled_up(cycle)).sum(axis=0)
    arrived = interval.duration_s * cycle.held_share * problem.offered_per_s
    # What arrives also runs: a pile does not grow, nor shrink, as fast as requests come.
    settled = jnp.clip(settled, interval.start.held - 0.5 * arrived, interval.start.held + 0.5 * arrived)
    return jnp.minimum(settled, problem.most_waiting(guess))


def _queue(
    problem: Problem,
    interval: Interval,
    guess: ServerState,
    cycle: AdapterCycle,
    demand: Demand,
    held: Float[Array, " configs"],
) -> Queue:
    """Return the queue for slots where all are in use, else the one in order of arrival, as long as clients let it."""
    start, duration_s = interval.start, interval.duration_s
    most_per_s = problem.most_running / problem.residence_s(guess)
    in_order = jnp.maximum(start.waiting + duration_s * (problem.offered_per_s - most_per_s), 0.0)
    unbounded = jnp.where(cycle.slots_taken, _queue_for_slots(problem, interval, guess, cycle, demand), in_order)
    most_waiting = problem.most_waiting(guess)
    waiting = jnp.minimum(unbounded, most_waiting)
    clients_full = unbounded >= most_waiting
    completed_per_s = _completed_per_s(problem, interval, guess, cycle, demand, waiting, clients_full)
    return Queue(
        waiting=waiting,
        mean_waiting=0.5 * (start.waiting + waiting),
        clients_full=clients_full,
        batch_full_share=jnp.where(cycle.slots_taken, demand.overfull_share, jnp.where(in_order > 0.0, 1.0, 0.0)),
        # Some are completed however many come to wait.
        completed_per_s=jnp.clip(
            completed_per_s - jnp.where(cycle.slots_taken, 0.0, (held - start.held) / duration_s),
            _LEAST_COMPLETED * completed_per_s,
            problem.most_running / problem.residence_s(guess),
        ),
    )


def _queue_for_slots(
    problem: Problem, interval: Interval, guess: ServerState, cycle: AdapterCycle, demand: Demand
) -> Float[Array, " configs"]:
    """Requests that wait for a slot at the end of the interval.

    While the batch has room, requests of adapters without a slot join, and an adapter that gets one takes its backlog
    along: ``d waiting/dt = skipped − drained``, by one implicit Euler step with ``drained`` in proportion to the queue.
    While the batch is full, whatever it does not complete is left over.
    """
    start, duration_s = interval.start, interval.duration_s
    drained_per_s = (cycle.activations_per_s * (cycle.burst + cycle.backlog)).sum(axis=0)
    without_slot = jnp.maximum(problem.adapters - cycle.active * cycle.open_share, 0.0)
    skipped_per_s = (without_slot * problem.rate_per_s).sum(axis=0)
    with_room = (start.waiting + duration_s * skipped_per_s) / (1.0 + duration_s * drained_per_s / guess.waiting)
    fitting_per_s = demand.fitting / problem.residence_s(guess)
    left_over = jnp.maximum(start.waiting + duration_s * (problem.offered_per_s - fitting_per_s), 0.0)
    return with_room + demand.overfull_share * (left_over - with_room)


def _completed_per_s(
    problem: Problem,
    interval: Interval,
    guess: ServerState,
    cycle: AdapterCycle,
    demand: Demand,
    waiting: Float[Array, " configs"],
    clients_full: Bool[Array, " configs"],
) -> Float[Array, " configs"]:
    """Requests completed per second: what arrives and does not join the queue, at most what the batch completes.

    Where clients hold all that they may, some requests are never sent, and arrivals less growth of the queue would
    count them as completed: there it is what fits into the batch.
    """
    residence_s, start, duration_s = problem.residence_s(guess), interval.start, interval.duration_s
    most_per_s = problem.most_running / residence_s
    at_hand_per_s = problem.offered_per_s + start.waiting / duration_s
    conserved_per_s = jnp.clip(problem.offered_per_s + (start.waiting - waiting) / duration_s, 0.0, most_per_s)
    fitting_per_s = jnp.minimum(demand.fitting / residence_s, at_hand_per_s)
    return jnp.where(
        cycle.slots_taken,
        jnp.where(clients_full, fitting_per_s, conserved_per_s),
        jnp.minimum(most_per_s, at_hand_per_s),
    )


def _loads(problem: Problem, interval: Interval, guess: ServerState, cycle: AdapterCycle) -> Loads:
    """Loads from disk, and from the host into slots; both block the engine.

    Each adapter is read from disk once, and again as often as host memory had to make room for others; an adapter that
    was loaded before the first request is taken to be there still as it is first asked for with the chance
    ``max_cpu_loras / adapters``.

    Where all slots are in use, newcomers evict adapters that are still active and must come back at once: vLLM touches
    the adapters of a step in the order of a hash set, and evicts the one touched longest ago. With ``k`` newcomers and
    as many adapters that have left at random places of that order, those of the others are evicted at whose place more
    have come than left: a share ``½ (1 − ∫₀¹ (1 − u²)^k du)``, a sixth for a single newcomer, and for Poisson numbers
    of them ``½ (1 − √(π/4k) erf(√k))``.

    Source: ``_apply_adapters`` in ``vllm/lora/worker_manager.py`` and the LRU lists in ``vllm/lora/models.py``, vLLM
        0.8.5; zeros of a random walk that returns by Feller, An Introduction to Probability Theory I (1968), chapter 3.
    """
    start, duration_s, max_loras = interval.start, interval.duration_s, problem.scenarios.max_loras
    never_loaded = problem.adapters - start.loaded_once
    inactive = jnp.maximum(problem.adapters - start.active, TINY)
    first_per_s = cycle.activations_per_s * jnp.clip(never_loaded / inactive, 0.0, 1.0)
    # Those never loaded become fewer as they are loaded, by an exponential that never turns negative.
    loaded_once = problem.adapters - never_loaded * jnp.exp(-duration_s * first_per_s / jnp.maximum(never_loaded, TINY))
    fewer_slots = problem.adapters.sum(axis=0) > max_loras
    crowded = jnp.where(cycle.slots_taken, 1.0, cycle.held_share)
    newcomers = jnp.maximum(cycle.activations_per_s.sum(axis=0) * guess.step_s, TINY)
    root = jnp.sqrt(newcomers)
    evicted = 0.5 * max_loras * (1.0 - 0.5 * jnp.sqrt(jnp.pi) * jax.lax.erf(root) / root)
    missing = crowded + (1.0 - crowded) * (1.0 - problem.resident_share)
    first_loads_per_s = (loaded_once - start.loaded_once) / duration_s
    loads_per_s = (cycle.activations_per_s * missing).sum(axis=0) + crowded * evicted / guess.step_s
    loads_per_s = jnp.where(fewer_slots, loads_per_s, 0.0)
    disk_loads_per_s, reloads_per_s = first_loads_per_s * _first_loads_share(problem), None
    if problem.scenarios.max_cpu_loras is not None:
        reloads_per_s = disk_reloads_per_s(problem, interval, cycle, loaded_once, problem.scenarios.max_cpu_loras)
        disk_loads_per_s += reloads_per_s
    time_share = loads_per_s * problem.costs.loads.host_to_gpu_load_s + (disk_loads_per_s * problem.disk_load_s).sum(
        axis=0
    )
    return Loads(loaded_once, loads_per_s, jnp.minimum(time_share, _MAX_LOADING_SHARE), reloads_per_s)


def _first_loads_share(problem: Problem) -> Float[Array, " configs"] | float:
    """Share of the first loads of adapters that come from disk."""
    scenarios = problem.scenarios
    if scenarios.loaded_at_start is None:
        return 1.0
    room = jnp.inf if scenarios.max_cpu_loras is None else scenarios.max_cpu_loras
    there = jnp.minimum(room / jnp.maximum(problem.adapters.sum(axis=0), TINY), 1.0)
    return jnp.where(scenarios.loaded_at_start, 1.0 - there, 1.0)


def _full_by_chance(
    problem: Problem,
    interval: Interval,
    guess: ServerState,
    demand: Demand,
    running: Float[Array, " configs"],
    free_share: Float[Array, " configs"],
) -> Overflow:
    """How often the batch is full by chance, and how many requests wait then.

    A longer step keeps requests longer, so that their number varies by more than that of arrivals; and a full batch
    completes fewer for each of them. Bursts count as far as they last as long as the queue that they meet.
    """
    most, residence_s = problem.most_running, problem.residence_s(guess)
    mean = jnp.maximum(demand.total, TINY)
    longer = free_share + (1.0 - free_share) * most / jnp.maximum(running, TINY)
    ratio = mean / most * longer
    most_per_s = most / (residence_s * longer)
    lasting_s = residence_s + 1.0 / (most_per_s * jnp.maximum((1.0 - ratio) ** 2, 1e-4))
    bursts = 2.0 * problem.peakedness_of_batch(jnp.minimum(lasting_s, interval.end_s)) - 1.0
    variability = jnp.maximum(0.5 * (bursts + problem.residence_cv2), _LEAST_VARIABILITY)
    curvature = 0.5 / (variability * problem.offered_per_s * interval.end_s)
    peakedness = problem.peakedness_of_batch(residence_s) / free_share
    return overflow(mean, peakedness, most, ratio, curvature, variability)


def _step(
    problem: Problem,
    guess: ServerState,
    cycle: AdapterCycle,
    queue: Queue,
    running: Float[Array, " configs"],
    loads: Loads,
) -> Step:
    """Step time that a running request sees, longer by the share of the time in which loads block the engine.

    Steps count by the requests in them, which see more than a moment picked at random has on average: by the variance
    over the mean, less what is due to longer steps alone. Of Poisson arrivals each adds itself (Wolff, Poisson arrivals
    see time averages, 1982), and its adapter unless that is active; in a full batch, or where all slots are in use,
    there is no room to vary.
    """
    scenarios = problem.scenarios
    kv_cache_bounds = jnp.argmin(problem.most_running_by, axis=0) == _KV_CACHE
    skipped_while_full = jnp.where(kv_cache_bounds, SKIPPED_KV_SHARE, 0.0)
    skipped_share = 1.0 - queue.batch_full_share * (1.0 - skipped_while_full)
    variance = problem.batch_variance(guess, running)
    own = guess.batch_free_share * variance / jnp.maximum(running, TINY)
    idle_per_s = (jnp.maximum(problem.adapters - cycle.active, 0.0) * problem.rate_per_s).sum(axis=0)
    new_adapters = jnp.where(cycle.slots_taken, 0.0, idle_per_s / problem.offered_per_s)
    own_adapter = jnp.minimum(own, 1.0) * new_adapters
    prompts = running * (problem.tokens_per_sequence - 1.0)

    def time_s(sequences: Array, prefill_tokens: Array, adapters: Array) -> Float[Array, " configs"]:
        return step_time_s(
            problem.costs,
            tokens=sequences + prefill_tokens,
            prefill_tokens=prefill_tokens,
            kv_tokens=sequences * scenarios.kv_tokens_per_request,
            adapters=adapters,
            skipped=jnp.where(cycle.slots_taken, queue.mean_waiting * skipped_share, 0.0),
            queued=queue.mean_waiting,
            loaded=_loaded(problem),
            max_loras=problem.max_loras,
            max_lora_rank=scenarios.max_lora_rank,
            rows=mean_rows(
                sequences, variance, prefill_tokens / scenarios.mean_input_tokens, scenarios.mean_input_tokens
            ),
            prompt_tokens=scenarios.mean_input_tokens,
        )

    adapters = _adapters_in_step(cycle, running) + own_adapter
    computed_s = time_s(running + own, prompts, adapters)
    decode_s = time_s(running + own, 0.0 * prompts, adapters)
    more = jnp.maximum(jnp.sqrt(variance), _LEAST_DIFFERENCE * running + TINY)
    larger = 1.0 + more / jnp.maximum(running, TINY)
    larger_s = time_s(running + own + more, prompts * larger, adapters + more * new_adapters)
    return Step(
        time_s=computed_s / (1.0 - loads.time_share),
        decode_s=decode_s,
        prompt_token_s=(computed_s - decode_s) / jnp.maximum(prompts, TINY),
        fixed_share=jnp.clip(1.0 - (larger_s / computed_s - 1.0) / (larger - 1.0), _LEAST_FREE_SHARE, 1.0),
    )


def _loaded(problem: Problem) -> Float[Array, " configs"]:
    """Adapters loaded on the host: all that are served, as far as there is room."""
    served = problem.adapters.sum(axis=0)
    room = problem.scenarios.max_cpu_loras
    return served if room is None else jnp.minimum(served, room)


def _adapters_in_step(cycle: AdapterCycle, running: Float[Array, " configs"]) -> Float[Array, " configs"]:
    """Different adapters in a step: the active ones, at most one for each request."""
    return jnp.minimum(cycle.active.sum(axis=0), running)


def _next_guess(
    problem: Problem,
    guess: ServerState,
    cycle: AdapterCycle,
    queue: Queue,
    loads: Loads,
    step: Step,
    held: Float[Array, " configs"],
) -> ServerState:
    """State to iterate from: step time and accepted share halfway to their new values, on a logarithmic scale.

    Those two feed back on themselves, a longer step through the larger batch that it brings; undamped they swing. The
    rest follows from them.
    """
    sent_per_s = problem.offered_per_s * guess.accepted
    accepted = jnp.where(queue.clients_full, jnp.minimum(1.0, queue.completed_per_s / problem.offered_per_s), 1.0)
    return ServerState(
        active=cycle.active,
        loaded_once=loads.loaded_once,
        waiting=jnp.maximum(queue.waiting, TINY),
        held=held,
        step_s=jnp.sqrt(guess.step_s * step.time_s),
        batch_free_share=step.fixed_share,
        held_share=0.5 * (guess.held_share + cycle.held_share),
        held_s=0.5 * (guess.held_s + cycle.free_wait_s / jnp.maximum(cycle.held_share, _LEAST_HELD)),
        accepted=jnp.sqrt(guess.accepted * accepted),
        admitted=jnp.where(cycle.slots_taken, 1.0, jnp.minimum(1.0, queue.completed_per_s / sent_per_s)),
    )


def _bottleneck(problem: Problem, cycle: AdapterCycle, queue: Queue) -> Int[Array, " configs"]:
    """`Bottleneck` of an interval: the tightest bound of the batch where that is full most of the time, else slots."""
    tightest = jnp.argmin(problem.most_running_by, axis=0) + Bottleneck.KV_CACHE
    return jnp.where(
        queue.batch_full_share > 0.5, tightest, jnp.where(cycle.slots_taken, Bottleneck.SLOTS, Bottleneck.NONE)
    )


def _class_completed_per_s(
    problem: Problem, cycle: AdapterCycle, demand: Demand, queue: Queue
) -> Float[Array, "classes configs"]:
    """Requests of each class completed per second: as they arrive, or as they want to run where slots are taken."""
    in_order = queue.completed_per_s * problem.adapters * problem.rate_per_s / problem.offered_per_s
    by_slot = demand.by_class * queue.completed_per_s / jnp.maximum(demand.total, TINY)
    return jnp.where(cycle.slots_taken, by_slot, in_order)
