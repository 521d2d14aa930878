"""Trees as parallel arrays, with a power law or a quadratic form beneath them: predicted by NumPy alone, fast.

A tree is laid out complete, level by level: node ``i`` has the children ``2i + 1`` (value at most the threshold) and
``2i + 2``; where it ends early both children are alike. So a leaf's number is its path in binary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_keys

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ALWAYS_LEFT = 3e38
"""Threshold of a node that does not decide anything."""

REACH = 3.0
"""Standard deviations from the mean to which a feature counts beneath the trees: beyond, a quadratic form runs wild."""

_CHUNK = 1024
_MOST_DEPTH = 10


@dataclass(frozen=True, eq=False)
class Ensemble:
    """What predicts one number: ``intercept + z·linear + z·quadratic·z + Σ trees``.

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
        """Questions from the root of a tree to a leaf."""
        return int(self.value.shape[1]).bit_length() - 1

    def standardized(self, values: FloatArray) -> FloatArray:
        """Return ``z`` of features ``[…, features]``."""
        raw = values.copy()
        np.log(values, out=raw, where=self.logarithmic)
        return np.asarray(np.minimum(np.maximum((raw - self.mean) / self.scale, -REACH), REACH))

    def beneath(self, values: FloatArray) -> FloatArray:
        """Return what is predicted without the trees, ``[rows]``."""
        found = np.full(len(values), self.intercept)
        if self.linear.any() or self.quadratic.any():
            z = self.standardized(values)
            found += z @ self.linear + ((z @ self.quadratic) * z).sum(axis=1)
        return found

    def predict(self, values: FloatArray) -> FloatArray:
        """Return the prediction for features ``[rows, features]``, ``[rows]``."""
        parts = [self._predict(values[start : start + _CHUNK]) for start in range(0, len(values), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _predict(self, values: FloatArray) -> FloatArray:
        return self.beneath(values) + _summed(self.value, self.leaves(values))

    def leaves(self, values: FloatArray) -> NDArray[np.uint16]:
        """Return the number of the leaf that features ``[rows, features]`` lead to, ``[trees, rows]``."""
        return _Nodes(self.feature, self.threshold).leaves(_columns(values))

    def path(self, values: FloatArray, tree: int = 0) -> list[tuple[int, float, bool]]:
        """Return the questions that features, ``[features]``, are asked: feature, threshold, whether above."""
        found, node = [], 0
        while node < self.threshold.shape[1]:
            feature, threshold = int(self.feature[tree, node]), float(self.threshold[tree, node])
            above = bool(values[feature] > threshold)
            if threshold < ALWAYS_LEFT:
                found.append((feature, threshold, above))
            node = 2 * node + 1 + above
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the arrays as JSON lists; numbers keep nine digits."""
        content: dict[str, Any] = {}
        for entry in fields(self):
            value = np.asarray(getattr(self, entry.name))
            if value.dtype.kind == "f":
                value = np.vectorize(lambda number: float(f"{number:.9g}"), otypes=[float])(value)
            content[entry.name] = value.tolist()
        return content

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


def _columns(values: FloatArray) -> NDArray[np.float32]:
    """Return features as trees compare them, ``[features, rows]``."""
    return np.ascontiguousarray(values.T, np.float32)


class _Nodes:
    """The questions of trees, feature by feature, so that all about a feature are answered in one stroke."""

    def __init__(self, feature: IntArray, threshold: FloatArray) -> None:
        """Sort them: features and thresholds, ``[trees, nodes]``."""
        self.trees, self.nodes = feature.shape
        flat, limits = feature.T.ravel(), threshold.T.ravel().astype(np.float32)
        order = np.argsort(flat, kind="stable")
        self._place = np.argsort(order)
        edges = np.flatnonzero(np.diff(flat[order], prepend=-1, append=-1))
        self._parts = [
            (int(flat[order[start]]), slice(start, end), limits[order[start:end], np.newaxis])
            for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        ]

    def leaves(self, columns: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Number of the leaf of each tree and row, ``[trees, rows]``, for features ``[features, rows]``.

        Bit by bit, each from the node that the bits before lead to.
        """
        rows = columns.shape[1]
        sorted_above = np.empty((self.trees * self.nodes, rows), np.bool_)
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


def _summed(value: FloatArray, leaves: NDArray[np.uint16]) -> FloatArray:
    """Sum of the leaves' values over trees, ``[rows]``."""
    found = np.zeros(leaves.shape[1])
    for tree, leaf in zip(value, leaves, strict=True):
        found += tree.take(leaf)
    return found


class Stack:
    """Several ensembles over the same features at once, as fast as NumPy can."""

    def __init__(self, ensembles: Sequence[Ensemble]) -> None:
        """Lay their arrays side by side; they must share mean, scale and depth."""
        first = ensembles[0]
        self._ensembles = tuple(ensembles)
        self._logarithmic = np.flatnonzero(first.logarithmic)
        self._mean, self._inverse = first.mean, 1.0 / first.scale
        self._intercept = np.array([each.intercept for each in ensembles])
        self._linear = np.stack([each.linear for each in ensembles], axis=1)
        self._quadratic = np.stack([each.quadratic.ravel() for each in ensembles], axis=1)
        feature = np.concatenate([each.feature for each in ensembles])
        threshold = np.concatenate([each.threshold for each in ensembles])
        self._nodes = _Nodes(feature, threshold)
        self._feature, self._threshold = feature.ravel(), threshold.ravel().astype(np.float32)
        trees, nodes = feature.shape
        self._levels = range(first.depth - 1)
        self._first_node = np.arange(trees) * nodes
        self._value = np.concatenate([each.value for each in ensembles]).ravel()
        self._first_leaf = np.arange(trees) * (nodes + 1) - nodes
        self._starts = np.cumsum([0, *(len(each.value) for each in ensembles[:-1])])

    def predict_many(self, values: FloatArray) -> FloatArray:
        """Return every ensemble's prediction for features ``[rows, features]``, ``[rows, ensembles]``."""
        found = np.empty((len(values), self._intercept.size))
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            z = self._ensembles[0].standardized(chunk)
            leaves = np.split(self._nodes.leaves(_columns(chunk)), self._starts[1:])
            for place, (each, own) in enumerate(zip(self._ensembles, leaves, strict=True)):
                beneath = z @ each.linear + np.einsum("ij,ij->i", z @ each.quadratic, z) + each.intercept
                found[start : start + _CHUNK, place] = beneath + _summed(each.value, own)
        return found

    def predict(self, values: FloatArray) -> FloatArray:
        """Return every ensemble's prediction for one row of features, ``[ensembles]``."""
        raw = values.copy()
        raw[self._logarithmic] = np.log(values[self._logarithmic])
        z = np.minimum(np.maximum((raw - self._mean) * self._inverse, -REACH), REACH)
        found = self._intercept + z.dot(self._linear) + np.multiply.outer(z, z).ravel().dot(self._quadratic)
        above = (values.astype(np.float32).take(self._feature) > self._threshold).view(np.int8)
        node = above.take(self._first_node) + 1
        for _ in self._levels:
            node = 2 * node + 1 + above.take(self._first_node + node)
        leaves = self._value.take(self._first_leaf + node)
        return np.asarray(found + np.add.reduceat(leaves, self._starts))
