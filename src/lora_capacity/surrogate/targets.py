"""Targets of the models: what they predict, and the labels that they learn it from.

Everything is predicted as a logarithm. ``adapters``: the load that the best server sustains over the full load
(`features.Described.full_per_s`); the adapters are as many as send no more. ``slots``: the best number of slots.
``throughput``: that of the best server over the full load. ``starved``: the load that a given number of slots sustains
over the full load; a server of A adapters starves when they send more.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.surrogate.dataset import Dataset
from lora_capacity.surrogate.features import FEATURES, SLOT_FEATURES, Described, Feature


@dataclass(frozen=True)
class Target:
    """What models predict the logarithm of.

    Attributes:
        meaning: In words.
        score: Name of its score on held-out workloads: a SMAPE in percent, of ``starved`` the macro-averaged F1.
        boosted_trees: Trees that boosting grows.
        rises_with_memory: Whether it must not fall in the features that grow with memory.
        features: What its models see.
    """

    meaning: str
    score: str
    boosted_trees: int
    rises_with_memory: bool = True
    features: tuple[Feature, ...] = FEATURES


TARGETS = {
    "adapters": Target("load sustained, over the full load (adapters are as many as send it)", "adapters_smape", 14),
    "slots": Target("slots", "slots_smape", 24, rises_with_memory=False),
    "throughput": Target("throughput, over the full load", "throughput_smape", 14),
    "starved": Target(
        "load sustained with the slots given, over the full load (what sends more starves)",
        "starved_macro_f1",
        120,
        features=FEATURES + SLOT_FEATURES,
    ),
}
"""By name; of the first three as few trees of boosting as a prediction in microseconds allows."""

OPTIMUM = ("adapters", "slots", "throughput")
"""Targets that tell the optimum of a workload."""


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
