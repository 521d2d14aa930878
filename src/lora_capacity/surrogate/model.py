"""Surrogate of one calibration and its file: arrays with their provenance and scores."""

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from lora_capacity.errors import InputError, check_number, check_path, nearest_hint
from lora_capacity.scenarios.workload_batch import FloatArray
from lora_capacity.schema import JsonModel, Number, Numbers, validated
from lora_capacity.surrogate.documents import LearntFile, listed
from lora_capacity.surrogate.ensemble import Ensemble
from lora_capacity.surrogate.features import NAMES
from lora_capacity.surrogate.targets import TARGETS
from lora_capacity.surrogate.trees import KINDS

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Chances with which intervals hold."""


@dataclass(frozen=True, eq=False)
class Surrogate(LearntFile):
    """Regression models that answer for one calibration in the place of its twins.

    Attributes:
        calibration: Name of the calibration.
        calibration_digest: Digest of its content: for another of the same name the surrogate is void.
        lowest: Smallest value of each feature among the workloads trained on, ``[features]``.
        highest: Largest value, ``[features]``.
        best: The kind that cross-validation found best, by target.
        widths: Half-widths of intervals of the logarithm, by target and kind, for each of `LEVELS`.
        scores: On held-out workloads, by kind; ``rounded``: the tree with rounded figures; ``best``: each target's
            best, with the share of labels within the intervals.
        importance: By target, how much worse the best kind scores when a feature is shuffled.
        about: Label space, numbers of workloads, seed, version.
        ensembles: By target (``adapters``, ``slots``, ``throughput``, ``starved``) and kind (``tree``, ``boosting``).
    """

    kind = "surrogate"
    key = "ensembles"
    command = "train"

    calibration: str
    calibration_digest: str
    lowest: FloatArray
    highest: FloatArray
    best: Mapping[str, str]
    widths: Mapping[str, Mapping[str, list[float]]]
    scores: Mapping[str, Any]
    importance: Mapping[str, Mapping[str, float]]
    about: Mapping[str, Any]
    ensembles: Mapping[str, Mapping[str, Ensemble]]

    def of(self, target: str, kind: str = "best") -> Ensemble:
        """Return a target's ensemble of a kind."""
        return self.ensembles[target][self.best[target] if kind == "best" else kind]

    def width(self, target: str, level: float, kind: str = "best") -> float:
        """Return the half-width of an interval of the logarithm; one of `LEVELS`."""
        return float(self.widths[target][self.best[target] if kind == "best" else kind][LEVELS.index(level)])

    def content(self) -> dict[str, Any]:
        """Return what stands in the file besides version and digest."""
        head = {"calibration": self.calibration, "calibration_digest": self.calibration_digest, "features": list(NAMES)}
        return (
            head
            | vars(self)
            | {
                "lowest": listed(self.lowest, digits=9),
                "highest": listed(self.highest, digits=9),
                "ensembles": {
                    target: {kind: each.to_json() for kind, each in kinds.items()}
                    for target, kinds in self.ensembles.items()
                },
            }
        )

    @classmethod
    def from_content(cls, content: dict[str, Any], source: str) -> Self:
        """Rebuild what `content` returned; ensembles of kinds that are no longer trained are kept.

        Raises:
            InputError: If it does not hold together, or its features are not those of this version.
        """
        if content.pop("features", None) != list(NAMES):
            raise InputError(f"{source}: features", "others", "those of this version", "train again")
        given = validated(_SurrogateFile, content, f"{source}:")
        ensembles = {target: _ensembles(given.ensembles, target, source) for target in TARGETS}
        for target, kinds in ensembles.items():
            _check_beside(given, target, kinds, source)
        if not given.lowest.shape == given.highest.shape == (len(NAMES),):
            raise InputError(f"{source}: lowest", f"{given.lowest.size} numbers", f"{len(NAMES)}, one a feature")
        widths = {
            target: {kind: each.tolist() for kind, each in kinds.items()} for target, kinds in given.widths.items()
        }
        return cls(**dict(given) | {"ensembles": ensembles, "widths": widths})


class _SurrogateFile(JsonModel):
    """What stands in the file of a surrogate besides version, digest and the names of features."""

    calibration: str
    calibration_digest: str
    lowest: Annotated[FloatArray, Numbers(Number())]
    highest: Annotated[FloatArray, Numbers(Number())]
    best: dict[str, str]
    widths: dict[str, dict[str, Annotated[FloatArray, Numbers(Number(minimum=0))]]]
    scores: dict[str, dict[str, Any]]
    importance: dict[str, dict[str, Annotated[float, Number()]]]
    about: dict[str, Any]
    ensembles: dict[str, dict[str, Any]]


def _check_beside(given: _SurrogateFile, target: str, kinds: Mapping[str, Ensemble], source: str) -> None:
    """Refuse a file that does not tell of a target which kind is best, how wide intervals are, and how it scores."""
    if given.best.get(target) not in kinds:
        raise InputError(f"{source}: best.{target}", given.best.get(target), ", ".join(kinds))
    for kind in kinds:
        width = given.widths.get(target, {}).get(kind)
        if width is None or width.size != len(LEVELS):
            raise InputError(f"{source}: widths.{target}.{kind}", "others", f"{len(LEVELS)} numbers >= 0")
    for row in ("tree", "rounded"):
        score = given.scores.get(row, {}).get(TARGETS[target].score)
        check_number(f"{source}: scores.{row}.{TARGETS[target].score}", score)
    if target not in given.importance:
        raise InputError(f"{source}: importance.{target}", None, "a number for each feature")


def _ensembles(content: Mapping[str, Any], target: str, source: str) -> dict[str, Ensemble]:
    """Read a target's ensembles, by kind."""
    found, given = {}, content.get(target, {})
    for kind in dict.fromkeys((*KINDS, *given)):
        where = f"{source}: ensembles.{target}.{kind}"
        if kind not in given:
            raise InputError(where, None, "a surrogate has it")
        found[kind] = Ensemble.from_json(given[kind], where)
        if found[kind].mean.size != len(TARGETS[target].features):
            raise InputError(where, f"{found[kind].mean.size} features", f"{len(TARGETS[target].features)}")
    return found


def load_surrogate(name: str | Path) -> Surrogate:
    """Return a bundled surrogate, by the name of its calibration, or the one in a file.

    Args:
        name: Name of a bundled calibration, or path of a file written by ``lora-capacity train``.

    Raises:
        InputError: If there is no such surrogate, or its file cannot be used.
    """
    check_path("name", name)
    bundled = importlib.resources.files(__package__) / "bundled"
    names = sorted(each.name.removesuffix(".json") for each in bundled.iterdir()) if bundled.is_dir() else []
    if str(name) in names:
        return Surrogate.from_json(json.loads((bundled / f"{name}.json").read_text(encoding="utf-8")), str(name))
    if Path(name).suffix == ".json":
        return Surrogate.from_file(name)
    raise InputError("surrogate", str(name), f"{', '.join(names)}, or a .json file", nearest_hint(str(name), names))
