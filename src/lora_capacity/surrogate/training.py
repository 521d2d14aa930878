"""From labels to a surrogate: ensembles of every kind for every target, chosen and scored on held-back workloads."""

from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration
from lora_capacity.errors import InputError
from lora_capacity.measurements import smape
from lora_capacity.run.checkpoint import package_version
from lora_capacity.run.steady import Progress
from lora_capacity.surrogate.arrays import Ensemble, FloatArray, IntArray
from lora_capacity.surrogate.dataset import Labels, digest
from lora_capacity.surrogate.features import Described, describe
from lora_capacity.surrogate.model import LEVELS, Surrogate
from lora_capacity.surrogate.rounding import rounded
from lora_capacity.surrogate.scores import conformal, macro_f1
from lora_capacity.surrogate.targets import (
    TARGETS,
    adapters_of,
    features_of,
    surface_of,
    sustained_by_slots,
    wanted,
    with_slots,
)
from lora_capacity.surrogate.trees import KINDS, Design, train

FEWEST_LABELS = 30
_FOLDS = 5
_HELD_BACK = 0.15
_SLOTS_PER_LABEL = 12

_BOOSTED = {"adapters": 14, "slots": 24, "throughput": 14, "starved": 120}
"""Trees that boosting grows: of the first three as few as a prediction in microseconds allows."""


def train_surrogate(
    calibration: Calibration, labels: Labels, *, seed: int = 0, progress: Progress | None = None
) -> Surrogate:
    """Train a surrogate.

    Of the workloads 15 % are held back for the scores. On the others, cross-validation over workloads chooses the kind
    for each target, and its residuals give the intervals.

    Args:
        calibration: The labels' own.
        labels: At least 30 of feasible workloads.
        seed: Decides which workloads are held back; equal seeds give equal files.
        progress: Called with the ensembles trained and their total.

    Raises:
        InputError: If the labels are of another calibration, or too few.
    """
    if labels.about.get("calibration_digest") != digest(calibration.to_json()):
        raise InputError(
            "labels", labels.about.get("calibration"), f"labels of {calibration.name} as it is", "label again"
        )
    feasible = np.flatnonzero(labels.optima.max_loras > 0)
    if feasible.size < FEWEST_LABELS:
        raise InputError("labels", f"{feasible.size} feasible workloads", f"at least {FEWEST_LABELS}", "label more")
    labels = labels.take(feasible)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, kept = np.split(order, [max(int(_HELD_BACK * len(labels)), 5)])
    return _Training(calibration, labels, np.sort(kept), np.sort(test), seed, progress).run()


class _Training:
    """One training."""

    def __init__(
        self,
        calibration: Calibration,
        labels: Labels,
        kept: IntArray,
        test: IntArray,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.calibration, self.labels, self.kept, self.test, self.seed = calibration, labels, kept, test, seed
        self.described = describe(calibration, labels.questions)
        self.surface = surface_of(labels, self.described)
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
        scores = {kind: self.score({target: ensembles[target][kind] for target in TARGETS}) for kind in KINDS}
        simple = {target: rounded(ensembles[target]["tree"]) for target in TARGETS}
        chosen = {target: ensembles[target][best[target]] for target in TARGETS}
        about = {name: self.labels.about.get(name) for name in ("space", "workloads", "seed", "played", "plays")}
        return Surrogate(
            calibration=self.calibration.name,
            calibration_digest=digest(self.calibration.to_json()),
            ensembles=ensembles,
            best=best,
            widths=widths,
            lowest=self.described.values[self.kept].min(axis=0),
            highest=self.described.values[self.kept].max(axis=0),
            scores=scores
            | {"rounded": self.score(simple), "best": self.score(chosen) | self._coverage(chosen, best, widths)},
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
        load = (
            sustained_by_slots(self.labels.take(self.kept), slots)
            - np.log(self.described.full_per_s[self.kept])[:, None]
        )
        sound = ~np.isnan(load)
        values = with_slots(self.described.values[self.kept], slots)[sound]
        return Design(values, logarithmic, rising, load[sound]), np.broadcast_to(self.kept[:, None], slots.shape)[sound]

    def _cross_validated(self, kind: str, target: str, design: Design, group: IntArray) -> FloatArray:
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

    def score(self, ensembles: dict[str, Ensemble], shuffled: int | None = None) -> dict[str, float]:
        """Score ensembles, one per target, on the held-back workloads.

        Args:
            ensembles: By target.
            shuffled: Feature whose values are dealt to other workloads, to see what is lost without it.
        """
        rows, optima, questions = self.test, self.labels.optima, self.labels.questions.take(self.test)
        values = self.described.values[rows].copy()
        if shuffled is not None:
            values[:, shuffled] = np.random.default_rng(self.seed).permutation(values[:, shuffled])
        found = {target: ensembles[target].predict(values) for target in TARGETS[:3]}
        full = self.described.full_per_s[rows]
        slots = np.clip(np.rint(np.exp(found["slots"])), 1, self.described.most_slots[rows])
        at = np.flatnonzero(np.isin(self.surface.question, rows))
        question = np.searchsorted(rows, self.surface.question[at])
        given = with_slots(values[question], self.surface.slots[at, None])[:, 0]
        told = self.surface.load[at] > np.exp(ensembles["starved"].predict(given))
        return {
            "adapters_smape": smape(
                adapters_of(questions, full * np.exp(found["adapters"])), optima.max_cpu_loras[rows]
            ),
            "slots_smape": smape(slots, optima.max_loras[rows]),
            "throughput_smape": smape(
                full * np.exp(found["throughput"]) * questions.tokens_per_request, optima.throughput_tokens_per_s[rows]
            ),
            "starved_macro_f1": macro_f1(told, self.surface.starved[at]),
        }

    def _importance(self, ensembles: dict[str, Ensemble]) -> dict[str, dict[str, float]]:
        """How much worse each target's score becomes when a feature is shuffled, features that matter only."""
        whole = self.score(ensembles)
        without = {each.name: self.score(ensembles, place) for place, each in enumerate(features_of("adapters"))}
        found = {}
        for target in TARGETS:
            name = next(each for each in whole if each.startswith(target))
            sign = -1.0 if name.endswith("f1") else 1.0
            lost = {feature: sign * (score[name] - whole[name]) for feature, score in without.items()}
            found[target] = {
                feature: lost[feature] for feature in sorted(lost, key=lambda each: -lost[each]) if lost[feature] > 0
            }
        return found

    def _coverage(
        self, ensembles: dict[str, Ensemble], best: dict[str, str], widths: dict[str, dict[str, list[float]]]
    ) -> dict[str, Any]:
        """Share of the held-back labels that lie within the intervals, by target and level."""
        held = self.labels.take(self.test)
        seen = Described(
            self.described.values[self.test], self.described.full_per_s[self.test], self.described.most_slots[self.test]
        )
        covered = {}
        for target in TARGETS[:3]:
            off = np.abs(wanted(target, held, seen) - ensembles[target].predict(seen.values))
            covered[target] = {
                f"{level:g}": float(np.mean(off <= width))
                for level, width in zip(LEVELS, widths[target][best[target]], strict=True)
            }
        return {"coverage": covered}
