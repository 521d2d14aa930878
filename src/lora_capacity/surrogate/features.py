"""Features of a workload on a server, in units that people know.

How long requests stay in the batch, how many adapters are busy and what load a full batch completes are those of a
server with unbounded memory (`closed_form.full_batch`). What the memory at hand makes of that are five features, each
of which grows with memory: a model that must not fall in them cannot promise less of a server with more memory.

Fewer slots than busy adapters do, as long as the adapters, which then wait for a slot, come with enough requests to
fill the batch. How many that takes is told for a server that just starves.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lora_capacity.calibration import Calibration
from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.surrogate.closed_form import FullBatch, full_batches
from lora_capacity.surrogate.simulation import residence_times
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.twins.steady.slots import BURST_MARGIN, burst_width

_SLOTS = (1, 4, 8, 16, 32, 64, 128, 256)
"""Slots at which the closed form is asked; between them features are interpolated. The paper's grids end at 384."""

_LOSSES = (0.05, 0.15, 0.3)
"""Shares of the full load whose cost in slots is told: from what is within any model's error to what starves."""

_SHORT = 0.1
"""Share of the load that a server that just starves leaves, so that its requests wait that share of the horizon."""

_LEAST_SHARE, _LEAST_BUSY, _LEAST_SLOTS = 0.01, 0.1, 0.5
"""Floors under features of which the logarithm is taken; a server for which they hold serves nothing."""

_drain = jax.jit(ResidenceTime.drain)


@dataclass(frozen=True)
class Feature:
    """A column of the features.

    Attributes:
        name: Its name, with the unit.
        meaning: In words.
        logarithmic: Whether its effects go by ratios; the linear part of a model then takes its logarithm.
        grows_with_memory: Whether it grows with the GPU's memory; the others do not change.
    """

    name: str
    meaning: str
    logarithmic: bool = True
    grows_with_memory: bool = False


FEATURES = (
    Feature("mean_rate_per_s", "mean request rate of an adapter"),
    Feature("largest_rate_share", "largest rate over the mean"),
    Feature("median_rate_share", "median rate over the mean"),
    Feature("smallest_rate_share", "smallest rate over the mean"),
    Feature("max_lora_rank", "rank that slots are reserved for"),
    Feature("mean_rank", "mean rank of the adapters"),
    Feature("mean_input_tokens", "mean prompt length"),
    Feature("mean_output_tokens", "mean output length"),
    Feature("output_spread", "standard deviation of the output length over its mean", logarithmic=False),
    Feature("base_share", "base model's traffic over the full load", logarithmic=False),
    Feature("batch", "requests in a full batch"),
    Feature("full_load_tokens_per_s", "load that a full batch completes with one slot"),
    Feature("stay_s", "seconds that a request stays in a full batch"),
    Feature("adapters_at_full_load", "adapters that send the full load"),
    Feature("busy_adapters", "adapters with a request running, at full load"),
    Feature("requests_per_busy_adapter", "requests in a full batch per busy adapter"),
    Feature("busiest_running", "requests that the busiest adapter keeps running"),
    Feature("median_running", "requests that the median adapter keeps running"),
    Feature("idlest_running", "requests that the idlest adapter keeps running"),
    Feature("running_per_turn", "requests that an adapter keeps running that waited for a slot"),
    Feature("slots_for_full_batch", "slots whose adapters, waiting for a slot, fill the batch"),
    Feature("slots_for_5_percent", "slots that cost 5 % of the full load"),
    Feature("slots_for_15_percent", "slots that cost 15 % of the full load"),
    Feature("slots_for_30_percent", "slots that cost 30 % of the full load"),
    Feature("kv_share", "requests that the KV cache holds, over those in a full batch", grows_with_memory=True),
    Feature("memory_load_share", "full load that the memory allows, over that of any memory", grows_with_memory=True),
    Feature("slots_that_fit", "slots with which the server starts", grows_with_memory=True),
    Feature("slots_to_spare", "slots beside which the KV cache holds a full batch", grows_with_memory=True),
    Feature(
        "slots_for_memory",
        "slots whose adapters, waiting for a slot, fill the batch that memory allows",
        grows_with_memory=True,
    ),
)
NAMES = tuple(feature.name for feature in FEATURES)

SLOT_FEATURES = (
    Feature("slots", "slots given"),
    Feature("busy_adapters_per_slot", "busy adapters at full load over the slots given"),
    Feature("slots_over_15_percent", "slots given over those that cost 15 % of the full load"),
    Feature(
        "spare_per_slot", "slots beside which the KV cache holds a full batch, over those given", grows_with_memory=True
    ),
)
"""More of a workload with a number of slots, for the target ``starved``."""


@dataclass(frozen=True, eq=False)
class Described:
    """Features of workloads, and what turns predictions into numbers.

    Attributes:
        values: Features in the order of `FEATURES`.
        full_per_s: Requests per second that a full batch completes with one slot and any memory.
        most_slots: Slots with which the server starts.
    """

    values: Float[np.ndarray, "workloads features"]
    full_per_s: Float[np.ndarray, " workloads"]
    most_slots: Int[np.ndarray, " workloads"]

    def take(self, rows: Int[np.ndarray, " rows"]) -> "Described":
        """Return the features of some rows."""
        return Described(self.values[rows], self.full_per_s[rows], self.most_slots[rows])


def describe(calibration: Calibration, workloads: WorkloadBatch) -> Described:
    """Compute the features of workloads.

    Args:
        calibration: Whose servers they are.
        workloads: The workloads and servers.
    """
    count = len(workloads)
    slots = np.tile(np.array(_SLOTS), (count, 1))
    free = full_batches(calibration, workloads, slots, kv_cache_tokens=np.full(slots.shape, np.inf))
    rank = workloads.max_lora_rank(np.full(count, workloads.ranks.shape[1]), calibration)
    kv_cache_tokens, _ = workloads.plan(calibration, np.ones(count, np.int64), rank)
    bound = full_batches(calibration, workloads, slots)
    full, batch, step_s = (
        np.asarray(values[:, 0], np.float64) for values in (free.load_per_s, free.running, free.step_s)
    )
    rates, mean_rate = np.sort(workloads.rates_per_s, axis=1), workloads.rates_per_s.mean(axis=1)
    stay_s, middle = step_s * workloads.mean_output_tokens, rates.shape[1] // 2
    busy = np.maximum(free.busy_adapters[:, 0], _LEAST_BUSY).astype(np.float64)
    most_slots = workloads.most_slots(calibration)
    per_slot = calibration.slot_bytes(rank) / calibration.model.kv_bytes_per_token
    to_spare = 1.0 + (kv_cache_tokens - batch * workloads.kv_tokens_per_request) / per_slot
    lost = np.log(free.load_per_s / free.load_per_s[:, :1])
    slots_for = {
        f"slots_for_{100 * share:g}_percent": np.exp(
            [np.interp(-np.log1p(-share), -row, np.log(_SLOTS)) for row in lost]
        )
        for share in _LOSSES
    }
    per_turn = _running_per_turn(workloads, full)
    columns = {
        "mean_rate_per_s": mean_rate,
        "largest_rate_share": rates[:, -1] / mean_rate,
        "median_rate_share": rates[:, middle] / mean_rate,
        "smallest_rate_share": rates[:, 0] / mean_rate,
        "max_lora_rank": rank,
        "mean_rank": workloads.ranks.mean(axis=1),
        "mean_input_tokens": workloads.mean_input_tokens,
        "mean_output_tokens": workloads.mean_output_tokens,
        "output_spread": workloads.output_spread,
        "base_share": workloads.base_rate_per_s / full,
        "batch": batch,
        "full_load_tokens_per_s": full * workloads.tokens_per_request,
        "stay_s": stay_s,
        "adapters_at_full_load": np.maximum(full - workloads.base_rate_per_s, _LEAST_SHARE * full) / mean_rate,
        "busy_adapters": busy,
        "requests_per_busy_adapter": batch / np.maximum(busy, 1.0),
        "busiest_running": rates[:, -1] * stay_s,
        "median_running": rates[:, middle] * stay_s,
        "idlest_running": rates[:, 0] * stay_s,
        "running_per_turn": per_turn,
        "slots_for_full_batch": _slots_to_fill(per_turn, free),
        **slots_for,
        "kv_share": np.maximum(bound.kv_share[:, 0], _LEAST_SHARE),
        "memory_load_share": bound.load_per_s[:, 0] / full,
        "slots_that_fit": np.maximum(most_slots, _LEAST_SLOTS),
        "slots_to_spare": np.maximum(to_spare, _LEAST_SLOTS),
        "slots_for_memory": _slots_to_fill(per_turn, bound),
    }
    values = np.stack([columns[name] for name in NAMES], axis=1).astype(np.float64)
    return Described(values, full, most_slots)


def with_slots(
    values: Float[np.ndarray, "workloads features"], slots: Int[np.ndarray, "workloads n"]
) -> Float[np.ndarray, "workloads n more_features"]:
    """Return features of some numbers of slots per question.

    Args:
        values: Features of the workloads, ``[workloads, features]``.
        slots: ``[workloads, n]``.

    Returns:
        ``[workloads, n, features + 4]``.
    """
    given = np.maximum(slots, 1).astype(np.float64)
    busy, dear, spare = (
        values[:, NAMES.index(name), np.newaxis] for name in ("busy_adapters", "slots_for_15_percent", "slots_to_spare")
    )
    more = np.stack([given, busy / given, given / dear, spare / given], axis=-1)
    each = np.broadcast_to(values[:, np.newaxis], (*given.shape, values.shape[1]))
    return np.concatenate([each, more], axis=-1)


def _running_per_turn(
    workloads: WorkloadBatch, full_per_s: Float[np.ndarray, " workloads"]
) -> Float[np.ndarray, " workloads"]:
    """Requests that run of an adapter in a slot: it brings what came while it waited, and leaves when that is done."""
    wait_s = np.minimum(_SHORT * workloads.horizon_s, workloads.max_pending / full_per_s)
    rates = workloads.rates_per_s.T
    backlog = rates * wait_s
    stays = np.asarray(_drain(residence_times(workloads.output_spread), jnp.asarray(backlog, jnp.float32)))
    return np.asarray(rates.sum(axis=0) / (rates * stays / (1.0 + backlog)).sum(axis=0), np.float64)


def _slots_to_fill(per_turn: Float[np.ndarray, " workloads"], full: FullBatch) -> Float[np.ndarray, " workloads"]:
    """Slots from which the batch stays full, as the steady twin has it."""
    width = np.asarray(burst_width(jnp.asarray(_SLOTS)), np.float64)
    wanted = np.log(_SLOTS * per_turn[:, np.newaxis]) - width * (BURST_MARGIN + 0.5 * width)
    over = wanted - np.log(np.maximum(full.running, 1.0))
    return np.exp([np.interp(0.0, row, np.log(_SLOTS)) for row in over])
