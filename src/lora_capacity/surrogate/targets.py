"""Targets of the models: what they predict, and the labels that they learn it from.

Everything is predicted as a logarithm. ``adapters``: the load that the best server sustains over the full load
(`features.Described.full_per_s`); the adapters are as many as send no more. ``slots``: the best number of slots.
``throughput``: that of the best server over the full load. ``starved``: the load that a given number of slots sustains
over the full load; a server of A adapters starves when they send more.
"""

import numpy as np
from jaxtyping import Float, Int

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


def adapters_of(workloads: WorkloadBatch, load_per_s: Float[np.ndarray, " workloads"]) -> Int[np.ndarray, " workloads"]:
    """Return the adapters that send no more than a load, at least 1."""
    return np.maximum(workloads.adapters_at(load_per_s), 1)
