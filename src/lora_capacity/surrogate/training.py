"""Training of a surrogate: ensembles of every kind for every target, chosen and scored on held-out workloads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError
from lora_capacity.measurements import smape
from lora_capacity.run.checkpoint import package_version
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios.workload_batch import IntArray
from lora_capacity.surrogate.dataset import Dataset
from lora_capacity.surrogate.documents import calibration_digest
from lora_capacity.surrogate.ensemble import Ensemble
from lora_capacity.surrogate.features import Described, describe, with_slots
from lora_capacity.surrogate.model import LEVELS, Surrogate
from lora_capacity.surrogate.targets import OPTIMUM, SCORES, TARGETS, adapters_of, features_of, surface_of, wanted
from lora_capacity.surrogate.trees import KINDS, Design, train

FEWEST_LABELS = 30
"""Fewest feasible workloads: 5 are held out, and each fold of the others has 5."""

_FOLDS = 5
"""Parts of the cross-validation: the usual compromise of bias and time."""

_HELD_OUT, _LEAST_HELD_OUT = 0.15, 5
"""Share of the workloads that is held out for the scores, and fewest of them."""

_SLOTS_PER_LABEL = 12
"""Numbers of slots that each workload tells of starving, of about 30 known: more cost time and tell much the same."""

_BOOSTED = {"adapters": 14, "slots": 24, "throughput": 14, "starved": 120}
"""Trees that boosting grows: of the first three as few as a prediction in microseconds allows."""


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
    test, kept = np.split(order, [max(int(_HELD_OUT * len(labels)), _LEAST_HELD_OUT)])
    return _Training(calibration, labels, np.sort(kept), np.sort(test), seed, progress).run()


class _Training:
    """One training."""

    def __init__(
        self,
        calibration: Calibration,
        labels: Dataset,
        kept: IntArray,
        test: IntArray,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.calibration, self.labels, self.kept, self.test, self.seed = calibration, labels, kept, test, seed
        self.described = describe(calibration, labels.workloads)
        self.held_out, self.seen = labels.take(test), self.described.take(test)
        self._progress, self._trained = progress, 0

    def run(self) -> Surrogate:
        """Train, choose and score."""
        ensembles: dict[str, dict[str, Ensemble]] = {target: {} for target in TARGETS}
        best: dict[str, str] = {}
        widths: dict[str, dict[str, list[float]]] = {target: {} for target in TARGETS}
        for target in TARGETS:
            design, group = self._design(target)
            errors = {}
            for kind in KINDS:
                residual = self._cross_validated(kind, target, design, group)
                errors[kind] = float(np.mean(np.abs(residual)))
                widths[target][kind] = [conformal(residual, level) for level in LEVELS]
                ensembles[target][kind] = train(kind, design, self.seed, _BOOSTED[target])
                self._tell()
            best[target] = min(errors, key=lambda kind: errors[kind])
        scores = {kind: self._score({target: ensembles[target][kind] for target in TARGETS}) for kind in KINDS}
        simple = {target: ensembles[target]["tree"].rounded() for target in TARGETS}
        chosen = {target: ensembles[target][best[target]] for target in TARGETS}
        about = {name: self.labels.about.get(name) for name in ("space", "workloads", "seed", "played", "plays")}
        return Surrogate(
            calibration=self.calibration.name,
            calibration_digest=calibration_digest(self.calibration),
            ensembles=ensembles,
            best=best,
            widths=widths,
            lowest=self.described.values[self.kept].min(axis=0),
            highest=self.described.values[self.kept].max(axis=0),
            scores=scores
            | {"rounded": self._score(simple), "best": self._score(chosen) | self._coverage(chosen, best, widths)},
            importance=self._importance(chosen),
            about=about | {"version": package_version(), "trained_on": self.kept.size, "held_back": self.test.size},
        )

    def _design(self, target: str) -> tuple[Design, IntArray]:
        """What a target's ensembles learn from, and which workload each row is of."""
        features = features_of(target)
        logarithmic = np.array([each.logarithmic for each in features])
        rising = np.array([each.grows_with_memory and target != "slots" for each in features])
        if target != "starved":
            every = Design(self.described.values, logarithmic, rising, wanted(target, self.labels, self.described))
            return every.take(self.kept), self.kept
        rng = np.random.default_rng(self.seed)
        known = self.labels.surfaces.slots[self.kept]
        place = np.sort(rng.random(known.shape).argsort(axis=1)[:, :_SLOTS_PER_LABEL], axis=1)
        slots = np.take_along_axis(known, place, axis=1)
        load = self.labels.take(self.kept).log_sustained(slots) - np.log(self.described.full_per_s[self.kept])[:, None]
        sound = ~np.isnan(load)
        values = with_slots(self.described.values[self.kept], slots)[sound]
        return Design(values, logarithmic, rising, load[sound]), np.broadcast_to(self.kept[:, None], slots.shape)[sound]

    def _cross_validated(self, kind: str, target: str, design: Design, group: IntArray) -> Float[np.ndarray, " rows"]:
        """Known less predicted, every workload predicted by ensembles that it had no part in."""
        _, place = np.unique(group, return_inverse=True)
        fold = np.random.default_rng(self.seed + 1).permutation(place.max() + 1)[place] % _FOLDS
        residual = np.zeros(design.wanted.size)
        for each in range(_FOLDS):
            held = fold == each
            found = train(kind, design.take(np.flatnonzero(~held)), self.seed, _BOOSTED[target])
            residual[held] = design.wanted[held] - found.predict(design.values[held])
            self._tell()
        return residual

    def _tell(self) -> None:
        self._trained += 1
        if self._progress is not None:
            self._progress(self._trained, len(TARGETS) * len(KINDS) * (_FOLDS + 1))

    def _score(self, ensembles: Mapping[str, Ensemble], shuffled: int | None = None) -> dict[str, float]:
        return score(ensembles, self.held_out, self.seen, shuffled, self.seed)

    def _importance(self, ensembles: dict[str, Ensemble]) -> dict[str, dict[str, float]]:
        """How much worse each target's score becomes when a feature is shuffled, features that matter only."""
        whole = self._score(ensembles)
        without = {each.name: self._score(ensembles, place) for place, each in enumerate(features_of("adapters"))}
        found = {}
        for target in TARGETS:
            name = SCORES[target]
            sign = -1.0 if target == "starved" else 1.0
            lost = {feature: sign * (score[name] - whole[name]) for feature, score in without.items()}
            found[target] = {
                feature: lost[feature] for feature in sorted(lost, key=lambda each: -lost[each]) if lost[feature] > 0
            }
        return found

    def _coverage(
        self, ensembles: dict[str, Ensemble], best: dict[str, str], widths: dict[str, dict[str, list[float]]]
    ) -> dict[str, Any]:
        """Share of the held-out labels that lie within the intervals, by target and level."""
        covered = {}
        for target in OPTIMUM:
            off = np.abs(wanted(target, self.held_out, self.seen) - ensembles[target].predict(self.seen.values))
            covered[target] = {
                f"{level:g}": float(np.mean(off <= width))
                for level, width in zip(LEVELS, widths[target][best[target]], strict=True)
            }
        return {"coverage": covered}


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
    surface = surface_of(labels, described)
    given = with_slots(values[surface.workload], surface.slots[:, np.newaxis])[:, 0]
    told = surface.load > np.exp(ensembles["starved"].predict(given))
    return {
        "adapters_smape": smape(adapters_of(workloads, full * found["adapters"]), optima.max_cpu_loras),
        "slots_smape": smape(slots, optima.max_loras),
        "throughput_smape": smape(throughput, optima.throughput_tokens_per_s),
        "starved_macro_f1": macro_f1(told, surface.starved),
    }


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
