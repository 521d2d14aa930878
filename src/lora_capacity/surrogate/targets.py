"""Targets of the models: what they predict, and the labels that they learn it from.

Everything is predicted as a logarithm. ``adapters``: the load that the best server sustains over the full load
(`features.Described.full_per_s`); the adapters are as many as send no more. ``slots``: the best number of slots.
``throughput``: that of the best server over the full load. ``starved``: the load that a given number of slots sustains
over the full load; a server of A adapters starves when they send more.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.surrogate.dataset import Dataset
from lora_capacity.surrogate.features import FEATURES, SLOT_FEATURES, Described, Feature

TARGETS = ("adapters", "slots", "throughput", "starved")

OPTIMUM = TARGETS[:3]
"""Targets that tell the optimum of a workload."""

SCORES = {target: f"{target}_smape" for target in OPTIMUM} | {"starved": "starved_macro_f1"}
"""Name of each target's score."""


def features_of(target: str) -> tuple[Feature, ...]:
    """Return the features that a target's models see."""
    return FEATURES + SLOT_FEATURES if target == "starved" else FEATURES


def wanted(target: str, labels: Dataset, described: Described) -> Float[np.ndarray, " workloads"]:
    """Return what a target's models should predict of the optima of feasible workloads."""
    optima = labels.optima
    if target == "slots":
        return np.asarray(np.log(optima.max_loras))
    if target == "throughput":
        full_tokens_per_s = described.full_per_s * labels.workloads.tokens_per_request
        return np.asarray(np.log(optima.throughput_tokens_per_s / full_tokens_per_s))
    return np.asarray(np.log(optima.sustained_per_s / described.full_per_s))


@dataclass(frozen=True, eq=False)
class Surface:
    """Configurations of the surfaces that can be judged.

    Attributes:
        workload: Row of the workload.
        slots: S.
        load: Load offered over the full load.
        starved: Whether it is starved.
    """

    workload: Int[np.ndarray, " configs"]
    slots: Int[np.ndarray, " configs"]
    load: Float[np.ndarray, " configs"]
    starved: Bool[np.ndarray, " configs"]


def surface_of(labels: Dataset, described: Described) -> Surface:
    """Return the configurations of the surfaces: those that start and have no more slots than adapters."""
    around = labels.surfaces
    sustained = np.exp(labels.log_sustained(around.grid_slots))
    load = labels.workloads.offered_per_s(around.grid_adapters)
    workload, adapters, slots = np.nonzero(~np.isnan(around.grid_throughput))
    offered = load[workload, adapters]
    # With as many slots as adapters or more a server is never seen to begin starving: it does from the start.
    starved = ~(offered <= sustained[workload, slots])
    return Surface(workload, around.grid_slots[workload, slots], offered / described.full_per_s[workload], starved)


def adapters_of(workloads: WorkloadBatch, load_per_s: Float[np.ndarray, " workloads"]) -> Int[np.ndarray, " workloads"]:
    """Return the adapters that send no more than a load, at least 1."""
    return np.maximum(workloads.adapters_at(load_per_s), 1)
