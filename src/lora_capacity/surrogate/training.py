"""Training of a surrogate: ensembles of every kind for every target, chosen and scored on held-out workloads."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError
from lora_capacity.measurements import smape
from lora_capacity.run.checkpoint import package_version
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray
from lora_capacity.surrogate.dataset import Dataset
from lora_capacity.surrogate.documents import calibration_digest
from lora_capacity.surrogate.ensemble import Ensemble
from lora_capacity.surrogate.features import NAMES, Described, describe, with_slots
from lora_capacity.surrogate.model import LEVELS, Surrogate
from lora_capacity.surrogate.targets import OPTIMUM, TARGETS, adapters_of, wanted
from lora_capacity.surrogate.trees import KINDS, Design, train

FEWEST_LABELS = 30
"""Fewest feasible workloads: 5 are held out, and each fold of the others has 5."""

_FOLDS = 5
"""Parts of the cross-validation: the usual compromise of bias and time."""

_HELD_OUT, _LEAST_HELD_OUT = 0.15, 5
"""Share of the workloads that is held out for the scores, and fewest of them."""

_SLOTS_PER_LABEL = 12
"""Numbers of slots that each workload tells of starving, of about 30 known: more cost time and tell much the same."""


def train_surrogate(
    calibration: Calibration, labels: Dataset, *, seed: int = 0, progress: Progress | None = None
) -> Surrogate:
    """Train a surrogate.

    Of the workloads 15 % are held out for the scores. On the others, cross-validation over workloads chooses the kind
    for each target, and its residuals give the intervals.

    Args:
        calibration: The labels' own.
        labels: At least 30 of feasible workloads.
        seed: Decides which workloads are held out; equal seeds give equal files.
        progress: Called with the ensembles trained and their total.

    Raises:
        InputError: If the labels are of another calibration, or too few.
    """
    if labels.about.get("calibration_digest") != calibration_digest(calibration):
        raise InputError(
            "labels", labels.about.get("calibration"), f"labels of {calibration.name} as it is", "label again"
        )
    feasible = np.flatnonzero(labels.optima.max_loras > 0)
    if feasible.size < FEWEST_LABELS:
        raise InputError("labels", f"{feasible.size} feasible workloads", f"at least {FEWEST_LABELS}", "label more")
    labels = labels.take(feasible)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, kept = map(np.sort, np.split(order, [max(int(_HELD_OUT * len(labels)), _LEAST_HELD_OUT)]))
    described = describe(calibration, labels.workloads)
    known, seen = labels.take(kept), described.take(kept)
    done = itertools.count(1)

    def tell() -> None:
        if progress is not None:
            progress(next(done), len(TARGETS) * len(KINDS) * (_FOLDS + 1))

    ensembles, residuals = _trained(known, seen, seed, tell)
    errors = {
        target: {kind: float(np.mean(np.abs(each))) for kind, each in kinds.items()}
        for target, kinds in residuals.items()
    }
    best = {target: min(each, key=each.__getitem__) for target, each in errors.items()}
    widths = {
        target: {kind: [conformal(each, level) for level in LEVELS] for kind, each in kinds.items()}
        for target, kinds in residuals.items()
    }
    scores, importance = _scored(ensembles, best, widths, labels.take(test), described.take(test), seed)
    about = {name: labels.about.get(name) for name in ("space", "workloads", "seed", "played", "plays")}
    return Surrogate(
        calibration=calibration.name,
        calibration_digest=calibration_digest(calibration),
        lowest=seen.values.min(axis=0),
        highest=seen.values.max(axis=0),
        best=best,
        widths=widths,
        scores=scores,
        importance=importance,
        about=about | {"version": package_version(), "trained_on": kept.size, "held_back": test.size},
        ensembles=ensembles,
    )


def _trained(labels: Dataset, described: Described, seed: int, tell: Callable[[], None]) -> tuple[Any, Any]:
    """Ensembles by target and kind; and of each the residuals of rows that it had no part in, in cross-validation."""
    ensembles: dict[str, dict[str, Ensemble]] = {target: {} for target in TARGETS}
    residuals: dict[str, dict[str, FloatArray]] = {target: {} for target in TARGETS}
    folds = np.random.default_rng(seed + 1).permutation(len(labels)) % _FOLDS
    for target, asked in TARGETS.items():
        design, workload = _design(target, labels, described, seed)
        for kind in KINDS:
            residual = residuals[target][kind] = np.zeros(design.wanted.size)
            for fold in range(_FOLDS):
                held = folds[workload] == fold
                found = train(kind, design.take(np.flatnonzero(~held)), seed, asked.boosted_trees)
                residual[held] = design.wanted[held] - found.predict(design.values[held])
                tell()
            ensembles[target][kind] = train(kind, design, seed, asked.boosted_trees)
            tell()
    return ensembles, residuals


def _design(target: str, labels: Dataset, described: Described, seed: int) -> tuple[Design, IntArray]:
    """What a target's ensembles learn from, and which workload each row is of."""
    asked, rows = TARGETS[target], np.arange(len(labels))
    logarithmic = np.array([each.logarithmic for each in asked.features])
    rising = np.array([each.grows_with_memory and asked.rises_with_memory for each in asked.features])
    if target != "starved":
        return Design(described.values, logarithmic, rising, wanted(target, labels, described)), rows
    known = labels.surfaces.slots
    place = np.sort(np.random.default_rng(seed).random(known.shape).argsort(axis=1)[:, :_SLOTS_PER_LABEL], axis=1)
    slots = np.take_along_axis(known, place, axis=1)
    load = labels.log_sustained(slots) - np.log(described.full_per_s)[:, None]
    sound = ~np.isnan(load)
    values = with_slots(described.values, slots)[sound]
    return Design(values, logarithmic, rising, load[sound]), np.broadcast_to(rows[:, None], slots.shape)[sound]


def _scored(
    ensembles: Mapping[str, Mapping[str, Ensemble]],
    best: Mapping[str, str],
    widths: Mapping[str, Mapping[str, list[float]]],
    labels: Dataset,
    described: Described,
    seed: int,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Scores and importance, as `Surrogate` has them, by held-out labels."""
    kinds = {kind: {target: ensembles[target][kind] for target in TARGETS} for kind in KINDS}
    kinds["rounded"] = {target: each.rounded() for target, each in kinds["tree"].items()}
    kinds["best"] = {target: ensembles[target][best[target]] for target in TARGETS}
    scores: dict[str, Any] = {kind: score(each, labels, described) for kind, each in kinds.items()}
    without = {name: score(kinds["best"], labels, described, i, seed) for i, name in enumerate(NAMES)}
    coverage, importance = {}, {}
    for target, asked in TARGETS.items():
        name = asked.score
        sign = -1.0 if target == "starved" else 1.0
        lost = {feature: sign * (shuffled[name] - scores["best"][name]) for feature, shuffled in without.items()}
        importance[target] = {each: lost[each] for each in sorted(lost, key=lambda each: -lost[each]) if lost[each] > 0}
    for target in OPTIMUM:
        off = np.abs(wanted(target, labels, described) - kinds["best"][target].predict(described.values))
        within = zip(LEVELS, widths[target][best[target]], strict=True)
        coverage[target] = {f"{level:g}": float(np.mean(off <= width)) for level, width in within}
    scores["best"]["coverage"] = coverage
    return scores, importance


def score(
    ensembles: Mapping[str, Ensemble],
    labels: Dataset,
    described: Described,
    shuffled: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score ensembles on labels.

    Args:
        ensembles: One of each target, by target.
        labels: Labels of feasible workloads that they were not trained on.
        described: Their features.
        shuffled: Feature whose values are shuffled among the workloads, to see what is lost without it.
        seed: Decides the order.

    Returns:
        SMAPE in percent (``adapters_smape``, ``slots_smape``, ``throughput_smape``), and ``starved_macro_f1`` over the
        configurations of the surfaces.
    """
    optima, workloads, values = labels.optima, labels.workloads, described.values.copy()
    if shuffled is not None:
        values[:, shuffled] = np.random.default_rng(seed).permutation(values[:, shuffled])
    found = {target: np.exp(ensembles[target].predict(values)) for target in OPTIMUM}
    full = described.full_per_s
    slots = np.clip(np.rint(found["slots"]), 1, described.most_slots)
    throughput = full * found["throughput"] * workloads.tokens_per_request
    workload, slots_given, load, starved = _surface(labels, described)
    given = with_slots(values[workload], slots_given[:, np.newaxis])[:, 0]
    told = load > np.exp(ensembles["starved"].predict(given))
    return {
        "adapters_smape": smape(adapters_of(workloads, full * found["adapters"]), optima.max_cpu_loras),
        "slots_smape": smape(slots, optima.max_loras),
        "throughput_smape": smape(throughput, optima.throughput_tokens_per_s),
        "starved_macro_f1": macro_f1(told, starved),
    }


def _surface(labels: Dataset, described: Described) -> tuple[IntArray, IntArray, FloatArray, NDArray[np.bool_]]:
    """Configurations of the surfaces that start and have no more slots than adapters, ``[configs]`` each.

    Returns:
        Row of the workload, S, load offered over the full load, and whether it is starved.
    """
    around = labels.surfaces
    sustained = np.exp(labels.log_sustained(around.grid_slots))
    workload, adapters, slots = np.nonzero(~np.isnan(around.grid_throughput))
    offered = labels.workloads.offered_per_s(around.grid_adapters)[workload, adapters]
    # With as many slots as adapters or more a server is never seen to begin starving: it does from the start.
    starved = ~(offered <= sustained[workload, slots])
    return workload, around.grid_slots[workload, slots], offered / described.full_per_s[workload], starved


def macro_f1(told: Bool[np.ndarray, " rows"], known: Bool[np.ndarray, " rows"]) -> float:
    """Return the mean of the F1 of both answers."""

    def f1(which: bool) -> float:
        hit = np.sum((told == which) & (known == which))
        return float(2.0 * hit / max(np.sum(told == which) + np.sum(known == which), 1))

    return 0.5 * (f1(True) + f1(False))


def conformal(residual: Float[np.ndarray, " rows"], level: float) -> float:
    """Return the half-width that holds the next residual with at least this chance: split conformal prediction.

    The ``⌈(n + 1) · level⌉``-th smallest of the held-out residuals' sizes.
    """
    sizes = np.sort(np.abs(residual))
    place = int(np.ceil((sizes.size + 1) * level)) - 1
    return float(sizes[min(place, sizes.size - 1)])
