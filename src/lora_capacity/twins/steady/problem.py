"""What the steady twin solves: the configurations with what follows from them, and a server's state in time."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Real

from lora_capacity.costs import Costs
from lora_capacity.scenarios.scenarios import Scenarios
from lora_capacity.twins.steady.residence import ResidenceTime

KV_CACHE_FILL = 0.97
"""Share of the KV cache in use when it bounds the batch: a prompt must fit whole, so the last blocks stay free.

Source: mean of the overloaded runs of the published H100 measurements (arXiv 2508.08343)."""

TINY = 1e-9
"""Keeps quotients finite; far below any rate, count or queue that matters."""

_MOST_PROMPTS = 20.0
"""Prompts in a budget from which on none is cut, ``e^{-20}`` of them."""

_LEAST_PEAKEDNESS = 0.5
"""That of arrivals like clockwork, over stays that outlast their gaps."""

_LEAST_ROOM = 0.2
"""Requests by which a full batch varies: as good as not at all."""

_LRU_LOG_SECONDS = (-6.0, 18.0)
"""Logarithms of the seconds between which an LRU slot's characteristic time is sought: 2 ms to 2 years."""

_LRU_BISECTIONS = 14
"""Halvings of that range: the time is then known to 0.15 %."""


class Problem(NamedTuple):
    """Configurations and costs, and what follows from them for the whole horizon.

    Classes come first in its arrays: sums over the few classes then run along whole rows of configurations.

    Attributes:
        costs: What steps and loads cost.
        scenarios: The configurations; those without LoRA have a slot that no adapter asks for.
        max_loras: Slots that the servers are started with, 0 without LoRA.
        residence: Distribution of a request's residence in the batch.
        adapters: Adapters of each class.
        rate_per_s: Requests per second of one adapter.
        offered_per_s: Requests per second of all adapters and the base model.
        tokens_per_sequence: Tokens a step for each running request: one decode token, and its prompt spread over its
            residence.
        cut_steps: Steps that a prompt takes more by ``long_prefill_token_threshold``; None without one.
        most_running_by: Running requests that fit into the KV cache, the token budget and the places of the batch, in
            the order of `Bottleneck`.
        most_running: The least of them, and of what clients hold.
        disk_load_s: Time to load one adapter from disk.
        resident_share: See `resident_share`.
        arrival_cv: Coefficient of variation of the gaps between an adapter's requests.
        input_cv: Coefficient of variation of the prompt lengths.
        residence_cv2: Squared coefficient of variation of the residence.
        residence_overlap: Twice the mean overlap of two stays that begin together: 1 if exponential, 2 if constant.
    """

    costs: Costs
    scenarios: Scenarios
    max_loras: Real[Array, " configs"]
    residence: ResidenceTime
    adapters: Real[Array, "classes configs"]
    rate_per_s: Float[Array, "classes configs"]
    offered_per_s: Float[Array, " configs"]
    tokens_per_sequence: Float[Array, " configs"]
    cut_steps: Float[Array, " configs"] | None
    most_running_by: Float[Array, "bounds configs"]
    most_running: Float[Array, " configs"]
    disk_load_s: Float[Array, "classes configs"]
    resident_share: Float[Array, "classes configs"]
    arrival_cv: Float[Array, " configs"]
    input_cv: Float[Array, " configs"]
    residence_cv2: Float[Array, " configs"]
    residence_overlap: Float[Array, " configs"]

    @classmethod
    def of(cls, costs: Costs, scenarios: Scenarios, residence: ResidenceTime) -> Self:
        """Derive what does not change over the horizon."""
        max_loras = scenarios.max_loras
        scenarios = dataclasses.replace(scenarios, max_loras=jnp.maximum(max_loras, 1))
        adapters, rate_per_s = scenarios.class_count.T, scenarios.class_rate_per_s.T
        tokens_per_sequence, cut_steps = 1.0 + scenarios.mean_input_tokens / scenarios.mean_output_tokens, None
        if scenarios.long_prefill_token_threshold is not None:
            limits = (scenarios.long_prefill_token_threshold, scenarios.max_num_batched_tokens)
            cut, uncut = (further_chunks(scenarios.mean_input_tokens, limit) for limit in limits)
            cut_steps = jnp.maximum(cut - uncut, 0.0)
            tokens_per_sequence /= 1.0 + cut_steps / scenarios.mean_output_tokens
        kv_cache_tokens = KV_CACHE_FILL * scenarios.kv_cache_tokens
        if scenarios.watermark_blocks is not None:
            # That requests grow into what admissions leave free is left out.
            watermark_tokens = scenarios.watermark_blocks * scenarios.block_size
            kv_cache_tokens = jnp.minimum(kv_cache_tokens, scenarios.kv_cache_tokens - watermark_tokens)
        most_running_by = jnp.stack(
            [
                kv_cache_tokens / scenarios.kv_tokens_per_request,
                scenarios.max_num_batched_tokens / tokens_per_sequence,
                scenarios.most_active_seqs + 0.0 * tokens_per_sequence,
            ]
        )
        most_running = jnp.minimum(most_running_by.min(axis=0), scenarios.max_pending)
        return cls(
            costs=costs,
            scenarios=scenarios,
            max_loras=max_loras,
            residence=residence,
            adapters=adapters,
            rate_per_s=rate_per_s,
            offered_per_s=(adapters * rate_per_s).sum(axis=0) + scenarios.base_rate_per_s,
            tokens_per_sequence=tokens_per_sequence,
            cut_steps=cut_steps,
            most_running_by=most_running_by,
            most_running=most_running,
            disk_load_s=jnp.asarray(costs.loads.disk_s + costs.loads.disk_rank_s * scenarios.class_rank.T),
            resident_share=resident_share(adapters, rate_per_s, scenarios.max_loras),
            arrival_cv=_given_or_one(scenarios.arrival_cv, scenarios.horizon_s),
            input_cv=_given_or_one(scenarios.input_cv, scenarios.horizon_s),
            residence_cv2=jnp.broadcast_to(residence.cv2, scenarios.horizon_s.shape),
            residence_overlap=jnp.broadcast_to(residence.overlap, scenarios.horizon_s.shape),
        )

    def running(self, state: "ServerState") -> Float[Array, " configs"]:
        """Requests in the batch, by Little's law."""
        sent_per_s = self.offered_per_s * state.accepted * state.admitted
        return jnp.minimum(sent_per_s * self.residence_s(state), self.most_running)

    def most_waiting(self, state: "ServerState") -> Float[Array, " configs"]:
        """Requests that clients hold besides the batch, as far as they may."""
        return jnp.maximum(self.scenarios.max_pending - self.running(state), 0.0)

    def burst(self, rate_per_s: Float[Array, "*shape"], time_s: Float[Array, " configs"]) -> Array:
        """Requests of one source that come together where those within a time of each other count as one burst.

        It is idle for ``burst / rate`` on average until the next: `peakedness` were times exponential.
        """
        return self._peakedness(rate_per_s, time_s, jnp.ones_like(time_s))

    def peakedness(self, rate_per_s: Float[Array, "*shape"], time_s: Float[Array, " configs"]) -> Array:
        """Variance over mean of the requests of one source, an adapter, were each to stay for ``time_s`` on average.

        1 for Poisson arrivals, and for others from 1 for short stays to ``(1 + cv²) / 2`` for long ones.
        """
        return self._peakedness(rate_per_s, time_s, self.residence_overlap)

    def _peakedness(
        self, rate_per_s: Float[Array, "*shape"], time_s: Float[Array, " configs"], overlap: Float[Array, " configs"]
    ) -> Array:
        """``1 + κ φ(κ/time) / (1 − φ(κ/time)) − rate · time``, the gaps having the transform ``φ``.

        ``κ`` is `overlap`; for gamma gaps ``φ(s) = (1 + s · cv²/rate)^{−1/cv²}``. It is exact for exponential stays, of
        which ``κ`` is 1. For others an exponential stands for how long two stays overlap that begin a time apart: its
        start ``κ/2 · time`` and its integral are right.

        Source: GI/M/∞ by Takács, Introduction to the Theory of Queues (1962), chapter 3.
        """
        load = rate_per_s * time_s
        cv2 = self.arrival_cv**2
        short = -jnp.expm1(-jnp.log1p(overlap * cv2 / jnp.maximum(load, TINY)) / cv2)
        found = 1.0 + overlap * (1.0 / short - 1.0) - load
        return jnp.clip(found, _LEAST_PEAKEDNESS, jnp.maximum(1.0, overlap * 0.5 * (1.0 + cv2)))

    def peakedness_of_batch(self, time_s: Float[Array, " configs"]) -> Float[Array, " configs"]:
        """`peakedness` of the requests of all sources, which are independent."""
        each = self.adapters * self.rate_per_s * self.peakedness(self.rate_per_s, time_s)
        base_per_s = self.scenarios.base_rate_per_s
        return (each.sum(axis=0) + base_per_s * self.peakedness(base_per_s, time_s)) / self.offered_per_s

    def batch_variance(self, state: "ServerState", running: Float[Array, " configs"]) -> Float[Array, " configs"]:
        """Variance of the requests in the batch: more where a longer step keeps them longer, little where it is full.

        Near its limit a batch varies at most by the room that is left. A full one does not vary, unless tokens bound
        it: those that hold many leave room for others.
        """
        free = running * self.peakedness_of_batch(self.residence_s(state)) / state.batch_free_share
        sequences = jnp.minimum(self.scenarios.most_active_seqs, self.scenarios.max_pending)
        least = jnp.where(self.most_running < sequences, jnp.sqrt(self.most_running), _LEAST_ROOM)
        room = jnp.maximum(self.most_running - running, least)
        return free * room**2 / (free + room**2)

    def residence_s(self, state: "ServerState") -> Float[Array, " configs"]:
        """Mean residence of a request in the batch: a step for each output token, and those in which it is held up."""
        steps = self.scenarios.mean_output_tokens
        return (steps if self.cut_steps is None else steps + self.cut_steps) * state.step_s


def further_chunks(prompt_tokens: Float[Array, " configs"], room: Real[Array, " configs"]) -> Float[Array, " configs"]:
    """Steps after the first that prompts take on average if a step has so much room for one, by exponential lengths."""
    return 1.0 / jnp.expm1(jnp.minimum(room / prompt_tokens, _MOST_PROMPTS))


def _given_or_one(values: Array | None, like: Float[Array, " configs"]) -> Float[Array, " configs"]:
    return jnp.ones_like(like) if values is None else values


class ServerState(NamedTuple):
    """What one interval hands to the next, and one iteration within an interval to the next.

    Attributes:
        active: Adapters that have requests in the batch, of each class.
        loaded_once: Adapters loaded from disk so far, of each class.
        waiting: Requests in the queue.
        held: Requests that wait by chance for a slot.
        step_s: Step time.
        batch_free_share: Share of the step time that does not depend on the batch.
        held_share: Share of the adapters becoming active that find no slot free by chance.
        held_s: How long those then wait.
        accepted: Share of the offered requests that clients send, less than 1 once they hold all that they may.
        admitted: Share of those sent that enter the batch, less than 1 while a full batch keeps requests queued.
    """

    active: Float[Array, "classes configs"]
    loaded_once: Float[Array, "classes configs"]
    waiting: Float[Array, " configs"]
    held: Float[Array, " configs"]
    step_s: Float[Array, " configs"]
    batch_free_share: Float[Array, " configs"]
    held_share: Float[Array, " configs"]
    held_s: Float[Array, " configs"]
    accepted: Float[Array, " configs"]
    admitted: Float[Array, " configs"]

    @classmethod
    def empty(cls, problem: Problem) -> Self:
        """Return a server that has just started: nothing runs, a step takes its least time."""
        none, no_adapter = jnp.zeros_like(problem.offered_per_s), jnp.zeros_like(problem.rate_per_s)
        step = problem.costs.step
        step_s, one = none + step.base_s + jnp.where(problem.max_loras > 0, step.lora_s, 0.0), none + 1.0
        return cls(no_adapter, no_adapter, none, none, step_s, one, none, none, one, one)


class Interval(NamedTuple):
    """What the balance of an interval is solved from.

    Attributes:
        start: The server at its start.
        duration_s: Its length.
        end_s: Its end, seconds from the start of the horizon.
        overfilled_share: Share of it in which the backlogs that come with the slots overfill the batch.
    """

    start: ServerState
    duration_s: Float[Array, " configs"]
    end_s: Float[Array, " configs"]
    overfilled_share: Float[Array, " configs"]


def resident_share(
    adapters: Real[Array, "classes configs"],
    rate_per_s: Float[Array, "classes configs"],
    max_loras: Real[Array, " configs"],
) -> Float[Array, "classes configs"]:
    """Chance that an adapter still has its slot when its next request comes, while slots are not all in use.

    Least-recently-used slots keep an adapter for a characteristic time ``t`` that solves ``Σ adapters · (1 −
    e^{−rate·t}) = slots``, here by bisection over its logarithm.

    Source: the characteristic-time approximation of LRU caches by Che, Tung and Wang (Hierarchical Web Caching
        Systems, 2002).
    """
    shortest, longest = _LRU_LOG_SECONDS
    low = jnp.full_like(max_loras, shortest, dtype=rate_per_s.dtype)
    high = jnp.full_like(max_loras, longest, dtype=rate_per_s.dtype)
    for _ in range(_LRU_BISECTIONS):
        middle = 0.5 * (low + high)
        fits = (adapters * -jnp.expm1(-rate_per_s * jnp.exp(middle))).sum(axis=0) < max_loras
        low, high = jnp.where(fits, middle, low), jnp.where(fits, high, middle)
    # Comparisons have no gradient: nothing is lost by not following the bisection back.
    return -jnp.expm1(-rate_per_s * jnp.exp(jax.lax.stop_gradient(0.5 * (low + high))))
