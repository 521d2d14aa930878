"""Trees as parallel arrays, with a power law or a quadratic form beneath them: predicted by NumPy alone, fast.

A tree is stored complete, level by level: node ``i`` has the children ``2i + 1`` (value at most the threshold) and
``2i + 2``; where it ends early both children are alike. So a leaf's number is its path in binary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from jaxtyping import Float, UInt16
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_keys
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray
from lora_capacity.surrogate.documents import listed

ALWAYS_LEFT = 3e38
"""Threshold of a node that does not decide anything: just below the largest float32, in which nodes compare."""

REACH = 3.0
"""Standard deviations from the mean to which a feature counts beneath the trees: beyond, a quadratic form runs wild."""

_CHUNK = 1024
"""Rows predicted at a time: what the nodes answer of them stays in a core's cache."""

_MOST_DEPTH = 10
"""Deepest tree read from a file; a complete tree of this depth has 1,024 leaves."""

_DIGITS = 2
"""Significant digits of rounded figures: what people remember."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Regression of one number: ``intercept + z·linear + z·quadratic·z + Σ trees``.

    ``z`` are the features, by their logarithm where so marked, standardized and kept within `REACH`.

    Attributes:
        logarithmic: Whether a feature counts by its logarithm, bool ``[features]``.
        mean: Mean of each, ``[features]``.
        scale: Standard deviation of each, ``[features]``.
        intercept: What is predicted at the means, trees apart.
        linear: Weights, ``[features]``.
        quadratic: Weights of products, upper triangle, ``[features, features]``.
        feature: Which feature a node looks at, ``[trees, nodes]``.
        threshold: What it compares with, ``[trees, nodes]``.
        value: What leaves add, ``[trees, nodes + 1]``.
    """

    logarithmic: NDArray[np.bool_]
    mean: FloatArray
    scale: FloatArray
    intercept: float
    linear: FloatArray
    quadratic: FloatArray
    feature: IntArray
    threshold: FloatArray
    value: FloatArray

    @property
    def depth(self) -> int:
        """Decisions from the root of a tree to a leaf."""
        return int(self.value.shape[1]).bit_length() - 1

    def standardized(self, values: Float[np.ndarray, "*rows features"]) -> Float[np.ndarray, "*rows features"]:
        """Return ``z`` of features."""
        raw = values.copy()
        np.log(values, out=raw, where=self.logarithmic)
        return np.asarray(np.minimum(np.maximum((raw - self.mean) / self.scale, -REACH), REACH))

    def beneath(self, values: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, " rows"]:
        """Return what is predicted without the trees."""
        z = self.standardized(values)
        return np.asarray(self.intercept + (z @ self.linear + ((z @ self.quadratic) * z).sum(axis=1)))

    def predict(self, values: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, " rows"]:
        """Return the prediction for features."""
        found = np.zeros(len(values))
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            trees = np.zeros(len(chunk))
            for value, leaf in zip(self.value, self.leaves(chunk), strict=True):
                trees += value.take(leaf)
            found[start : start + _CHUNK] = self.beneath(chunk) + trees
        return found

    def leaves(self, values: Float[np.ndarray, "rows features"]) -> UInt16[np.ndarray, "trees rows"]:
        """Return the number of the leaf that features lead to in each tree."""
        single = values.T.astype(np.float32)  # decisions are those of single precision, as in training
        threshold, row = self.threshold.astype(np.float32), np.arange(len(values))
        root = np.arange(len(threshold))[:, np.newaxis] * threshold.shape[1]
        node = np.zeros((len(threshold), len(values)), np.int64)
        for _ in range(self.depth):
            place = root + node
            reached = single.ravel().take(self.feature.ravel().take(place) * len(values) + row)
            node = 2 * node + 1 + (reached > threshold.ravel().take(place))
        return np.asarray(node - threshold.shape[1], np.uint16)

    def path(self, values: Float[np.ndarray, " features"]) -> list[tuple[int, float, bool]]:
        """Return the decisions on the way of features through the first tree: feature, threshold, whether above."""
        found, node = [], 0
        while node < self.threshold.shape[1]:
            feature, threshold = int(self.feature[0, node]), float(self.threshold[0, node])
            above = bool(values[feature] > threshold)
            if threshold < ALWAYS_LEFT:
                found.append((feature, threshold, above))
            node = 2 * node + 1 + above
        return found

    def rounded(self) -> Self:
        """Return the same with thresholds, and factors of the leaves, of two significant digits."""
        decides = self.threshold < ALWAYS_LEFT
        threshold = np.where(decides, rounded(np.where(decides, self.threshold, 1.0)), self.threshold)
        return dataclasses.replace(self, threshold=threshold, value=np.log(rounded(np.exp(self.value))))

    def to_json(self) -> dict[str, Any]:
        """Return the arrays as JSON lists; numbers keep nine digits."""
        return {name: listed(values, digits=9) for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, content: object, source: str) -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: If a field is missing or unknown, or arrays do not go together.
        """
        if not isinstance(content, Mapping):
            raise InputError(source, type(content).__name__, "a JSON object")
        names = [entry.name for entry in fields(cls)]
        check_keys(source, content, names)
        kinds = {"logarithmic": np.bool_, "feature": np.int64}
        try:
            arrays: dict[str, Any] = {name: np.array(content[name], kinds.get(name, np.float64)) for name in names}
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise InputError(source, str(error), "arrays of numbers") from None
        if arrays["intercept"].ndim:
            raise InputError(f"{source}.intercept", "an array", "a number")
        found = cls(**arrays | {"intercept": float(arrays["intercept"])})
        width, trees = found.mean.size, found.value.shape[:1]
        sound = (
            found.value.ndim == 2
            and found.linear.shape == found.scale.shape == found.logarithmic.shape == (width,)
            and found.quadratic.shape == (width, width)
            and found.feature.shape == found.threshold.shape == (*trees, 2**found.depth - 1)
            and found.value.shape == (*trees, 2**found.depth)
            and found.depth <= _MOST_DEPTH
            and (not found.feature.size or 0 <= found.feature.min() <= found.feature.max() < width)
        )
        if not sound:
            raise InputError(source, "arrays of other shapes", "those of one ensemble")
        for name, values in arrays.items():
            if not np.all(np.isfinite(values)) or np.any(np.abs(values) > ALWAYS_LEFT):
                raise InputError(f"{source}.{name}", "other values", f"finite numbers up to {ALWAYS_LEFT:g} in size")
        if np.any(found.scale <= 0):
            raise InputError(f"{source}.scale", float(found.scale.min()), "numbers > 0")
        return found


def rounded(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return numbers with two significant digits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.abs(values))) - _DIGITS + 1)
        return np.asarray(np.where(values == 0, 0.0, np.rint(values / unit) * unit))
