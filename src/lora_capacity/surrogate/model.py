"""A surrogate and its file: JSON of arrays with where it comes from, how good it is, and a digest of it all."""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from lora_capacity.errors import InputError, check_keys, nearest_hint
from lora_capacity.surrogate.arrays import Ensemble, FloatArray, Stack
from lora_capacity.surrogate.dataset import digest
from lora_capacity.surrogate.features import NAMES
from lora_capacity.surrogate.targets import TARGETS, features_of
from lora_capacity.surrogate.trees import KINDS

SCHEMA_VERSION = 1
LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Chances with which intervals hold."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What answers in microseconds for one calibration, in the place of its twins.

    Attributes:
        calibration: Name of the calibration.
        calibration_digest: Digest of its content: for another of the same name the surrogate is void.
        ensembles: By target (``adapters``, ``slots``, ``throughput``, ``starved``) and kind (``tree``, ``forest``,
            ``boosting``).
        best: The kind that cross-validation found best, by target.
        widths: Half-widths of intervals of the logarithm, by target and kind, for each of `LEVELS`.
        lowest: Smallest value of each feature among the workloads trained on, ``[features]``.
        highest: Largest value, ``[features]``.
        scores: On held-back workloads, by kind; ``rounded``: the tree with rounded figures; ``best``: each target's
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

    @cached_property
    def stack(self) -> Stack:
        """The boosted ensembles of adapters, slots and throughput, for answers in microseconds."""
        return Stack([self.ensembles[target]["boosting"] for target in TARGETS[:3]])

    def to_json(self) -> dict[str, Any]:
        """Return the content of a surrogate's file."""
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "calibration": self.calibration,
            "calibration_digest": self.calibration_digest,
            "features": list(NAMES),
            "lowest": [float(f"{value:.9g}") for value in self.lowest],
            "highest": [float(f"{value:.9g}") for value in self.highest],
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
        return content | {"digest": digest(content)}

    @classmethod
    def from_json(cls, content: object, source: str = "surrogate") -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: If it is no surrogate of this schema, was changed since it was written, or does not hold
                together.
        """
        if not isinstance(content, Mapping):
            raise InputError(source, type(content).__name__, "a JSON object")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION or "ensembles" not in content:
            remedy = "update lora-capacity" if isinstance(version, int) and version > SCHEMA_VERSION else "train again"
            raise InputError(f"{source}: schema_version", version, f"{SCHEMA_VERSION}, of a surrogate", remedy)
        whole = {name: value for name, value in content.items() if name != "digest"}
        if content.get("digest") != digest(whole):
            raise InputError(
                f"{source}: digest", content.get("digest"), "that of its content", "it was changed: train again"
            )
        if whole.pop("features") != list(NAMES):
            raise InputError(f"{source}: features", "others", "those of this version", "train again")
        whole.pop("schema_version")
        check_keys(source, whole, [entry.name for entry in dataclasses.fields(cls)])
        ensembles = {target: {kind: _ensemble(whole, target, kind, source) for kind in KINDS} for target in TARGETS}
        bounds = {name: np.array(whole[name], np.float64) for name in ("lowest", "highest")}
        return cls(**whole | bounds | {"ensembles": ensembles})

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a surrogate.

        Raises:
            InputError: If the file cannot be read, or as `from_json`.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                str(path), error.strerror or "unreadable", "a file written by `lora-capacity train`"
            ) from None
        except ValueError as error:
            raise InputError(str(path), f"no JSON: {error}", "a file written by `lora-capacity train`") from None
        return cls.from_json(content, str(path))

    def write(self, path: str | Path) -> None:
        """Write the surrogate's file."""
        Path(path).write_text(json.dumps(self.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")


def _ensemble(content: Mapping[str, Any], target: str, kind: str, source: str) -> Ensemble:
    where = f"{source}: ensembles.{target}.{kind}"
    try:
        found = Ensemble.from_json(content["ensembles"][target][kind], where)
    except KeyError:
        raise InputError(where, "missing", "a surrogate has it") from None
    if found.mean.size != len(features_of(target)):
        raise InputError(where, f"{found.mean.size} features", f"{len(features_of(target))}")
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
        content = json.loads((bundled / f"{name}.json").read_text(encoding="utf-8"))
        return Surrogate.from_json(content, str(name))
    if Path(name).suffix == ".json":
        return Surrogate.from_file(name)
    raise InputError("surrogate", str(name), f"{', '.join(names)}, or a .json file", nearest_hint(str(name), names))
