"""What models look at: workload and server in units that people know.

How long requests stay, how many adapters are busy and what load a full batch completes are told for a server with
memory without end (`closed.at_limit`). What the memory at hand makes of that are five features, each of which grows
with memory: a model that is not allowed to fall in them can not promise less of a server with more memory.

Fewer slots than busy adapters do, as long as the adapters, which then wait their turn, come with enough requests to
fill the batch. How many that takes is told for a server that just starves.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.memory import slot_bytes
from lora_capacity.surrogate.closed import Limit
from lora_capacity.surrogate.questions import FloatArray, IntArray, Questions
from lora_capacity.surrogate.steady import limits, stay_laws
from lora_capacity.twins.steady import StayLaw
from lora_capacity.twins.steady.slots import BURST_MARGIN, burst_width

_SLOTS = (1, 4, 8, 16, 32, 64, 128, 256)
_LOSSES = (0.05, 0.15, 0.3)
_SHORT = 0.1
"""Share of the load that a server that just starves leaves, so that its requests wait that share of the horizon."""

_drain = jax.jit(StayLaw.drain)


@dataclass(frozen=True)
class Feature:
    """What a column of the features holds.

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
    Feature("mean_output_tokens", "mean answer length"),
    Feature("output_spread", "standard deviation of the answer length over its mean", logarithmic=False),
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
    Feature("running_per_turn", "requests that an adapter keeps running that waited its turn for a slot"),
    Feature("slots_for_full_batch", "slots whose adapters, waiting their turn, fill the batch"),
    Feature("slots_for_5_percent", "slots that cost 5 % of the full load"),
    Feature("slots_for_15_percent", "slots that cost 15 % of the full load"),
    Feature("slots_for_30_percent", "slots that cost 30 % of the full load"),
    Feature("kv_share", "requests that the KV cache holds, over those in a full batch", grows_with_memory=True),
    Feature("memory_load_share", "full load that the memory allows, over that of any memory", grows_with_memory=True),
    Feature("slots_that_fit", "slots with which the server starts", grows_with_memory=True),
    Feature("slots_to_spare", "slots beside which the KV cache holds a full batch", grows_with_memory=True),
    Feature(
        "slots_for_memory",
        "slots whose adapters, waiting their turn, fill the batch that memory allows",
        grows_with_memory=True,
    ),
)
NAMES = tuple(feature.name for feature in FEATURES)


@dataclass(frozen=True, eq=False)
class Described:
    """Questions as models see them.

    Attributes:
        values: ``[questions, features]``, in the order of `FEATURES`.
        full_per_s: Requests per second that a full batch completes with one slot and any memory, ``[questions]``.
        most_slots: Slots with which the server starts, ``[questions]``.
    """

    values: FloatArray
    full_per_s: FloatArray
    most_slots: IntArray


def describe(calibration: Calibration, questions: Questions) -> Described:
    """Work out the features of questions.

    Args:
        calibration: Whose servers they are.
        questions: Workloads on servers.
    """
    configs = len(questions)
    slots = np.tile(np.array(_SLOTS), (configs, 1))
    free: Limit = limits(calibration, questions, slots, kv_cache_tokens=np.full(slots.shape, np.inf))
    one = np.ones(configs, np.int64)
    rank = questions.max_lora_rank(np.full(configs, questions.ranks.shape[1]), calibration)
    kv_cache_tokens, _ = questions.plan(calibration, one, rank)
    bound = limits(calibration, questions, slots)
    full, batch, step_s = (
        np.asarray(values[:, 0], np.float64) for values in (free.load_per_s, free.running, free.step_s)
    )
    rates, mean_rate = np.sort(questions.rates_per_s, axis=1), questions.rates_per_s.mean(axis=1)
    stay_s, turn = step_s * questions.mean_output_tokens, rates.shape[1]
    busy = np.maximum(free.busy_adapters[:, 0], 0.1).astype(np.float64)
    most_slots = questions.most_slots(calibration)
    per_slot = slot_bytes(calibration.model, calibration.behaviour, rank) / calibration.model.kv_bytes_per_token
    to_spare = 1.0 + (kv_cache_tokens - batch * questions.kv_tokens_per_request) / per_slot
    lost = np.log(free.load_per_s / free.load_per_s[:, :1])
    costs = [[np.interp(-np.log1p(-share), -row, np.log(_SLOTS)) for share in _LOSSES] for row in lost]
    per_turn = _running_per_turn(questions, full)
    columns = (
        mean_rate,
        rates[:, -1] / mean_rate,
        rates[:, turn // 2] / mean_rate,
        rates[:, 0] / mean_rate,
        rank,
        questions.ranks.mean(axis=1),
        questions.mean_input_tokens,
        questions.mean_output_tokens,
        questions.output_spread,
        questions.base_rate_per_s / full,
        batch,
        full * questions.tokens_per_request,
        stay_s,
        np.maximum(full - questions.base_rate_per_s, 0.01 * full) / mean_rate,
        busy,
        batch / np.maximum(busy, 1.0),
        rates[:, -1] * stay_s,
        rates[:, turn // 2] * stay_s,
        rates[:, 0] * stay_s,
        per_turn,
        _slots_to_fill(per_turn, free),
        *np.exp(np.array(costs)).T,
        np.maximum(bound.kv_share[:, 0], 0.01),
        bound.load_per_s[:, 0] / full,
        np.maximum(most_slots, 0.5),
        np.maximum(to_spare, 0.5),
        _slots_to_fill(per_turn, bound),
    )
    values = np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)
    return Described(values, full, most_slots)


def _running_per_turn(questions: Questions, full_per_s: FloatArray) -> FloatArray:
    """Requests that run of an adapter in a slot: it brings what came while it waited, and leaves when that is done."""
    wait_s = np.minimum(_SHORT * questions.horizon_s, questions.max_pending / full_per_s)
    rates = questions.rates_per_s.T
    backlog = rates * wait_s
    stays = np.asarray(_drain(stay_laws(questions.output_spread), jnp.asarray(backlog, jnp.float32)))
    return np.asarray(rates.sum(axis=0) / (rates * stays / (1.0 + backlog)).sum(axis=0), np.float64)


def _slots_to_fill(per_turn: FloatArray, limit: Limit) -> FloatArray:
    """Slots from which the batch stays full, as the steady twin has it."""
    width = np.asarray(burst_width(jnp.asarray(_SLOTS)), np.float64)
    wanted = np.log(_SLOTS * per_turn[:, np.newaxis]) - width * (BURST_MARGIN + 0.5 * width)
    over = wanted - np.log(np.maximum(limit.running, 1.0))
    return np.exp([np.interp(0.0, row, np.log(_SLOTS)) for row in over])
