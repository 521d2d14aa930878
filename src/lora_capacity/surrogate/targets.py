"""What models predict, and what they see of it.

Everything is predicted as a logarithm. ``adapters``: the load that the best server sustains over the full load
(`features.Described.full_per_s`); the adapters are as many as send no more. ``slots``: the best number of slots.
``throughput``: that of the best server over the full load. ``starved``: the load that a given number of slots sustains
over the full load; a server of A adapters starves when they send more.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.surrogate.dataset import Labels
from lora_capacity.surrogate.features import FEATURES, NAMES, Described, Feature
from lora_capacity.surrogate.questions import FloatArray, IntArray, Questions

TARGETS = ("adapters", "slots", "throughput", "starved")

SLOT_FEATURES = (
    Feature("slots", "slots given"),
    Feature("busy_adapters_per_slot", "busy adapters at full load over the slots given"),
    Feature("slots_over_15_percent", "slots given over those that cost 15 % of the full load"),
    Feature(
        "spare_per_slot", "slots beside which the KV cache holds a full batch, over those given", grows_with_memory=True
    ),
)


def features_of(target: str) -> tuple[Feature, ...]:
    """Return the features that a target's models see."""
    return FEATURES + SLOT_FEATURES if target == "starved" else FEATURES


def with_slots(values: FloatArray, slots: IntArray) -> FloatArray:
    """Return features of some numbers of slots per question.

    Args:
        values: Features of the questions, ``[questions, features]``.
        slots: ``[questions, n]``.

    Returns:
        ``[questions, n, features + 4]``.
    """
    given = np.maximum(slots, 1).astype(np.float64)
    busy, dear, spare = (
        values[:, NAMES.index(name), np.newaxis] for name in ("busy_adapters", "slots_for_15_percent", "slots_to_spare")
    )
    more = np.stack([given, busy / given, given / dear, spare / given], axis=-1)
    shape = (*given.shape, values.shape[1])
    return np.concatenate([np.broadcast_to(values[:, np.newaxis], shape), more], axis=-1)


def wanted(target: str, labels: Labels, described: Described) -> FloatArray:
    """Return what a target's models should say of the optima of feasible labels, ``[labels]``."""
    optima = labels.optima
    if target == "slots":
        return np.log(optima.max_loras)
    if target == "throughput":
        return np.log(optima.throughput_tokens_per_s / (described.full_per_s * labels.questions.tokens_per_request))
    return np.log(optima.sustained_per_s / described.full_per_s)


@dataclass(frozen=True, eq=False)
class Surface:
    """Configurations of the surfaces that can be judged; arrays ``[configs]``.

    Attributes:
        question: Index of the label.
        slots: S.
        load: Load offered over the full load.
        starved: Whether it is starved.
    """

    question: IntArray
    slots: IntArray
    load: FloatArray
    starved: NDArray[np.bool_]


def surface_of(labels: Labels, described: Described) -> Surface:
    """Return the configurations of the surfaces: those that start and have no more slots than adapters."""
    around = labels.surfaces
    sustained = np.exp(sustained_by_slots(labels, around.grid_slots))
    load = labels.questions.offered_per_s(around.grid_adapters)
    sound = ~np.isnan(around.grid_throughput)
    question, adapters, slots = np.nonzero(sound)
    offered = load[question, adapters]
    # With as many slots as adapters or more a server is never seen to begin starving: it does from the start.
    starved = ~(offered <= sustained[question, slots])
    return Surface(question, around.grid_slots[question, slots], offered / described.full_per_s[question], starved)


def sustained_by_slots(labels: Labels, slots: IntArray) -> FloatArray:
    """Return the logarithm of the load that some of the known numbers of slots sustain, corrected, ``[labels, n]``."""
    around = labels.surfaces
    place = np.stack([np.searchsorted(known, each) for known, each in zip(around.slots, slots, strict=True)])
    place = np.minimum(place, around.slots.shape[1] - 1)
    known = np.log(around.sustained_by_slots) + labels.correction
    return np.take_along_axis(known, place, axis=1)


def adapters_of(questions: Questions, load_per_s: ArrayLike) -> IntArray:
    """Return the adapters that send no more than a load, at least 1, ``[questions]``."""
    return np.maximum(questions.adapters_at(np.asarray(load_per_s)), 1)
