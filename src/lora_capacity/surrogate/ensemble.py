"""Trees as parallel arrays, with a power law or a quadratic form beneath them: predicted by NumPy alone, fast.

A tree is stored complete, level by level: node ``i`` has the children ``2i + 1`` (value at most the threshold) and
``2i + 2``; where it ends early both children are alike. So a leaf's number is its path in binary.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt16
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_keys
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray

ALWAYS_LEFT = 3e38
"""Threshold of a node that does not decide anything: just below the largest float32, in which nodes compare."""

REACH = 3.0
"""Standard deviations from the mean to which a feature counts beneath the trees: beyond, a quadratic form runs wild."""

_CHUNK = 1024
"""Rows predicted at a time: what the nodes answer of them stays in a core's cache."""

_FEW_ROWS = 16
"""Rows up to which trees are walked node by node, instead of all decisions made at once: fewer steps, each dearer."""

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
        found = np.full(len(values), self.intercept)
        if self.linear.any() or self.quadratic.any():
            z = self.standardized(values)
            found += z @ self.linear + ((z @ self.quadratic) * z).sum(axis=1)
        return found

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
        if len(values) > _FEW_ROWS:
            return self._nodes.leaves(np.ascontiguousarray(single))
        threshold, tree = self.threshold.astype(np.float32), np.arange(len(self.threshold))[:, np.newaxis]
        node, row = np.zeros((len(tree), len(values)), np.int64), np.arange(len(values))
        for _ in range(self.depth):
            node = 2 * node + 1 + (single[self.feature[tree, node], row] > threshold[tree, node])
        return np.asarray(node - threshold.shape[1], np.uint16)

    @cached_property
    def _nodes(self) -> "_Nodes":
        return _Nodes(self.feature, self.threshold)

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
        return {entry.name: listed(getattr(self, entry.name), digits=9) for entry in fields(self)}

    @classmethod
    def from_json(cls, content: object, source: str) -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: If a field is missing or unknown, or arrays do not go together.
        """
        names = [entry.name for entry in fields(cls)]
        if not isinstance(content, Mapping):
            raise InputError(source, type(content).__name__, "a JSON object")
        check_keys(source, content, names)
        kinds = {"logarithmic": np.bool_, "feature": np.int64}
        try:
            arrays: dict[str, Any] = {name: np.array(content[name], kinds.get(name, np.float64)) for name in names}
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(source, str(error), "arrays of numbers") from None
        found = cls(**arrays | {"intercept": float(arrays["intercept"])})
        width, trees = found.mean.size, len(found.value)
        sound = (
            found.linear.shape == found.scale.shape == found.logarithmic.shape == (width,)
            and found.quadratic.shape == (width, width)
            and found.feature.shape == found.threshold.shape == (trees, 2**found.depth - 1)
            and found.value.shape == (trees, 2**found.depth)
            and found.depth <= _MOST_DEPTH
            and (not found.feature.size or 0 <= found.feature.min() <= found.feature.max() < width)
        )
        if not sound:
            raise InputError(source, "arrays of other shapes", "those of one ensemble")
        return found


def rounded(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return numbers with two significant digits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.abs(values))) - _DIGITS + 1)
        return np.asarray(np.where(values == 0, 0.0, np.rint(values / unit) * unit))


def listed(values: Any, digits: int) -> Any:
    """Return an array, or a number, as JSON has it; what is not whole keeps some significant digits."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        array = np.vectorize(lambda number: float(f"{number:.{digits}g}"), otypes=[float])(array)
    return array.tolist()


class _Nodes:
    """The decisions of all trees, feature by feature, so that all about a feature are made at once."""

    def __init__(self, feature: Int[np.ndarray, "trees nodes"], threshold: Float[np.ndarray, "trees nodes"]) -> None:
        """Sort them by feature."""
        self.trees, self.nodes = feature.shape
        flat, limits = feature.T.ravel(), threshold.T.ravel().astype(np.float32)
        order = np.argsort(flat, kind="stable")
        self._place = np.argsort(order)
        edges = np.flatnonzero(np.diff(flat[order], prepend=-1, append=-1))
        self._parts = [
            (int(flat[order[start]]), slice(start, end), limits[order[start:end], np.newaxis])
            for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]

    def leaves(self, columns: Float[np.ndarray, "features rows"]) -> UInt16[np.ndarray, "trees rows"]:
        """Number of the leaf of each tree and row, bit by bit, each from the node that the bits before lead to."""
        rows = columns.shape[1]
        sorted_above: Bool[np.ndarray, "decisions rows"] = np.empty((self.trees * self.nodes, rows), np.bool_)
        for feature, part, threshold in self._parts:
            np.greater(columns[feature], threshold, out=sorted_above[part])
        above = sorted_above[self._place].reshape(self.nodes, self.trees, rows)
        bits: list[NDArray[np.bool_]] = []
        leaf = np.zeros((self.trees, rows), np.uint16)
        for level in range((self.nodes + 1).bit_length() - 1):
            answers = above[2**level - 1 : 2 ** (level + 1) - 1]
            for bit in bits:  # each halves what is left of the level
                left, right = np.split(answers, 2)
                answers = left ^ (bit & (left ^ right))
            bits.append(answers[0])
            leaf <<= 1
            leaf |= answers[0]
        return leaf
