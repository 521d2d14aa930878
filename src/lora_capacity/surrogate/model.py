"""Surrogate of one calibration and its file: arrays with their provenance and scores."""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lora_capacity.errors import InputError, check_keys, nearest_hint
from lora_capacity.scenarios.workload_batch import FloatArray
from lora_capacity.surrogate.documents import read_document, signed, verified, write_document
from lora_capacity.surrogate.ensemble import Ensemble, listed
from lora_capacity.surrogate.features import NAMES
from lora_capacity.surrogate.targets import TARGETS, features_of
from lora_capacity.surrogate.trees import KINDS

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Chances with which intervals hold."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Regression models that answer for one calibration in the place of its twins.

    Attributes:
        calibration: Name of the calibration.
        calibration_digest: Digest of its content: for another of the same name the surrogate is void.
        ensembles: By target (``adapters``, ``slots``, ``throughput``, ``starved``) and kind (``tree``, ``boosting``).
        best: The kind that cross-validation found best, by target.
        widths: Half-widths of intervals of the logarithm, by target and kind, for each of `LEVELS`.
        lowest: Smallest value of each feature among the workloads trained on, ``[features]``.
        highest: Largest value, ``[features]``.
        scores: On held-out workloads, by kind; ``rounded``: the tree with rounded figures; ``best``: each target's
            best, with the share of labels within the intervals.
        importance: By target, how much worse the best kind scores when a feature is shuffled.
        about: Label space, numbers of workloads, seed, version.
    """

    calibration: str
    calibration_digest: str
    ensembles: Mapping[str, Mapping[str, Ensemble]]
    best: Mapping[str, str]
    widths: Mapping[str, Mapping[str, list[float]]]
    lowest: FloatArray
    highest: FloatArray
    scores: Mapping[str, Any]
    importance: Mapping[str, Mapping[str, float]]
    about: Mapping[str, Any]

    def of(self, target: str, kind: str = "best") -> Ensemble:
        """Return a target's ensemble of a kind."""
        return self.ensembles[target][self.best[target] if kind == "best" else kind]

    def width(self, target: str, level: float, kind: str = "best") -> float:
        """Return the half-width of an interval of the logarithm; one of `LEVELS`."""
        return float(self.widths[target][self.best[target] if kind == "best" else kind][LEVELS.index(level)])

    def to_json(self) -> dict[str, Any]:
        """Return the content of a surrogate's file."""
        return signed(
            {
                "calibration": self.calibration,
                "calibration_digest": self.calibration_digest,
                "features": list(NAMES),
                "lowest": listed(self.lowest, digits=9),
                "highest": listed(self.highest, digits=9),
                "best": dict(self.best),
                "widths": {target: dict(kinds) for target, kinds in self.widths.items()},
                "scores": dict(self.scores),
                "importance": {target: dict(each) for target, each in self.importance.items()},
                "about": dict(self.about),
                "ensembles": {
                    target: {kind: each.to_json() for kind, each in kinds.items()}
                    for target, kinds in self.ensembles.items()
                },
            }
        )

    @classmethod
    def from_json(cls, content: object, source: str = "surrogate") -> Self:
        """Rebuild what `to_json` wrote; ensembles of kinds that are no longer trained are kept.

        Raises:
            InputError: If it is no surrogate of this schema, was changed since it was written, or does not hold
                together.
        """
        whole = verified(content, source, "ensembles", "a surrogate")
        if whole.pop("features") != list(NAMES):
            raise InputError(f"{source}: features", "others", "those of this version", "train again")
        check_keys(source, whole, [entry.name for entry in dataclasses.fields(cls)])
        ensembles = {target: _ensembles(whole["ensembles"], target, source) for target in TARGETS}
        bounds = {name: np.array(whole[name], np.float64) for name in ("lowest", "highest")}
        return cls(**whole | bounds | {"ensembles": ensembles})

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a surrogate.

        Raises:
            InputError: If the file cannot be read, or as `from_json`.
        """
        return cls.from_json(read_document(path, "a file written by `lora-capacity train`"), str(path))

    def write(self, path: str | Path) -> None:
        """Write the surrogate's file."""
        write_document(path, self.to_json())


def _ensembles(content: Mapping[str, Any], target: str, source: str) -> dict[str, Ensemble]:
    """Read a target's ensembles, by kind."""
    found = {}
    for kind in (*KINDS, *sorted(content.get(target, {}).keys() - KINDS)):
        where = f"{source}: ensembles.{target}.{kind}"
        if kind not in content.get(target, {}):
            raise InputError(where, "missing", "a surrogate has it")
        found[kind] = Ensemble.from_json(content[target][kind], where)
        if found[kind].mean.size != len(features_of(target)):
            raise InputError(where, f"{found[kind].mean.size} features", f"{len(features_of(target))}")
    return found


def load_surrogate(name: str | Path) -> Surrogate:
    """Return a bundled surrogate, by the name of its calibration, or the one in a file.

    Args:
        name: Name of a bundled calibration, or path of a file written by ``lora-capacity train``.

    Raises:
        InputError: If there is no such surrogate, or its file cannot be used.
    """
    bundled = importlib.resources.files(__package__) / "bundled"
    names = sorted(each.name.removesuffix(".json") for each in bundled.iterdir()) if bundled.is_dir() else []
    if str(name) in names:
        return Surrogate.from_json(json.loads((bundled / f"{name}.json").read_text(encoding="utf-8")), str(name))
    if Path(name).suffix == ".json":
        return Surrogate.from_file(name)
    raise InputError("surrogate", str(name), f"{', '.join(names)}, or a .json file", nearest_hint(str(name), names))
