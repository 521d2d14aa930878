"""Training: one tree, a small forest, gradient boosting by scikit-learn, and their form as arrays."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.surrogate.arrays import ALWAYS_LEFT, Ensemble, FloatArray, IntArray

KINDS = ("tree", "forest", "boosting")
MOST_LEAVES = 32
"""Leaves of the single tree: what still fits on a wall."""

_POWERS = 2
_FOREST, _FOREST_LEAVES = 12, 64
_DEPTH, _FOREST_DEPTH = 8, 7
_BOOSTED_DEPTH, _RATE = 4, 0.2
_RIDGE, _LEAF_RIDGE = 10.0, 60.0
_REWEIGHTED, _USUAL, _LEAST = 5, 0.1, 0.03


@dataclass(frozen=True, eq=False)
class Design:
    """What an ensemble is trained on.

    Attributes:
        values: Features, ``[rows, features]``.
        logarithmic: Whether a feature counts by its logarithm, ``[features]``.
        rising: Whether the prediction must not fall in a feature, ``[features]``.
        wanted: What is to be predicted, ``[rows]``.
    """

    values: FloatArray
    logarithmic: NDArray[np.bool_]
    rising: NDArray[np.bool_]
    wanted: FloatArray

    def take(self, rows: IntArray) -> "Design":
        """Return some rows."""
        return Design(self.values[rows], self.logarithmic, self.rising, self.wanted[rows])


def train(kind: str, design: Design, seed: int = 0, boosted_trees: int = 16) -> Ensemble:
    """Train an ensemble.

    ``tree``: a power law of two features, times the factor of one tree of at most 32 leaves. ``forest``: the same with
    the mean of 12 trees. ``boosting``: a quadratic form of all features and small trees for what it leaves. Where the
    prediction must not fall in a feature, the feature takes part in no product, its weight is not negative, and the
    trees are constrained; where it may fall in all, the whole is fitted once more to the least absolute error.

    Args:
        kind: One of `KINDS`.
        design: What to learn.
        seed: Decides the forest's samples.
        boosted_trees: How many trees boosting grows.
    """
    # Answers need no scikit-learn, which takes seconds to load.
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
    from sklearn.tree import DecisionTreeRegressor

    base = _power_law(design) if kind != "boosting" else _quadratic_form(design)
    left = design.wanted - base.beneath(design.values)
    constraint = design.rising.astype(np.int64)
    if kind == "boosting":
        boosted = HistGradientBoostingRegressor(
            max_iter=boosted_trees,
            learning_rate=_RATE,
            max_depth=_BOOSTED_DEPTH,
            max_leaf_nodes=2**_BOOSTED_DEPTH,
            min_samples_leaf=10,
            monotonic_cst=constraint,
            early_stopping=False,
            random_state=seed,
        ).fit(design.values, left)
        # The nodes have no public name; those of a single tree, below, have.
        trees = [_boosted_tree(each.nodes) for (each,) in boosted._predictors]
        found = _with_trees(base, trees, _BOOSTED_DEPTH, float(np.ravel(boosted._baseline_prediction)[0]))
        return found if design.rising.any() else _fitted_anew(found, design)
    shape: dict[str, Any] = {"min_samples_leaf": 8, "monotonic_cst": constraint, "random_state": seed}
    if kind == "tree":
        single = DecisionTreeRegressor(max_leaf_nodes=MOST_LEAVES, max_depth=_DEPTH, **shape)
        return _with_trees(base, [_plain_tree(single.fit(design.values, left).tree_)], _DEPTH)
    forest = RandomForestRegressor(
        _FOREST, max_leaf_nodes=_FOREST_LEAVES, max_depth=_FOREST_DEPTH, max_features=0.6, **shape
    )
    trees = [_plain_tree(each.tree_) for each in forest.fit(design.values, left).estimators_]
    return _with_trees(base, [(walk, lambda node, f=leaf: f(node) / _FOREST) for walk, leaf in trees], _FOREST_DEPTH)  # type: ignore[misc]


Walk = Callable[[int], tuple[int, float, int, int] | None]
"""Returns feature, threshold, left and right child of a node, None of a leaf."""

Tree = tuple[Walk, Callable[[int], float]]


def _plain_tree(tree: Any) -> Tree:
    def walk(node: int) -> tuple[int, float, int, int] | None:
        if tree.children_left[node] < 0:
            return None
        left, right = int(tree.children_left[node]), int(tree.children_right[node])
        return int(tree.feature[node]), float(tree.threshold[node]), left, right

    return walk, lambda node: float(tree.value[node].ravel()[0])


def _boosted_tree(nodes: Any) -> Tree:
    def walk(node: int) -> tuple[int, float, int, int] | None:
        row = nodes[node]
        if row["is_leaf"]:
            return None
        return int(row["feature_idx"]), float(row["num_threshold"]), int(row["left"]), int(row["right"])

    return walk, lambda node: float(nodes[node]["value"])


def _with_trees(base: Ensemble, trees: list[Tree], depth: int, more: float = 0.0) -> Ensemble:
    """Return an ensemble with trees laid out complete."""
    laid_out = [_lay_out(walk, leaf, depth) for walk, leaf in trees]
    feature, threshold, value = (np.array(column) for column in zip(*laid_out, strict=True))
    return Ensemble(
        base.logarithmic,
        base.mean,
        base.scale,
        base.intercept + more,
        base.linear,
        base.quadratic,
        feature.astype(np.int64),
        threshold.astype(np.float64),
        value.astype(np.float64),
    )


def _lay_out(walk: Walk, leaf: Callable[[int], float], depth: int) -> tuple[list[int], list[float], list[float]]:
    feature, threshold, level = [], [], [0]
    for _ in range(depth):
        below = []
        for node in level:
            found = walk(node)
            where, at, left, right = (0, ALWAYS_LEFT, node, node) if found is None else found
            feature.append(where)
            threshold.append(at)
            below += [left, right]
        level = below
    return feature, threshold, [leaf(node) for node in level]


def _standard(design: Design) -> tuple[Ensemble, FloatArray]:
    """An ensemble that predicts nothing yet, and its ``z``."""
    flags, width = design.logarithmic, design.values.shape[1]
    raw = np.where(flags, np.log(np.where(flags, design.values, 1.0)), design.values)
    empty = Ensemble(
        flags,
        raw.mean(axis=0),
        np.maximum(raw.std(axis=0), 1e-6),
        0.0,
        np.zeros(width),
        np.zeros((width, width)),
        np.zeros((0, 0), np.int64),
        np.zeros((0, 0)),
        np.zeros((0, 1)),
    )
    return empty, empty.standardized(design.values)


def _power_law(design: Design) -> Ensemble:
    """Least squares over the two features that tell most; the exponents keep two digits."""
    empty, z = _standard(design)
    candidates = np.flatnonzero(design.logarithmic & ~design.rising).tolist()
    chosen: list[int] = []
    for _ in range(_POWERS):
        left = {j: _left_over(z[:, [*chosen, j]], design.wanted) for j in candidates if j not in chosen}
        chosen.append(min(left, key=lambda j: left[j]))
    weights, *_ = np.linalg.lstsq(np.c_[z[:, chosen], np.ones(len(z))], design.wanted, rcond=None)
    linear = np.zeros(z.shape[1])
    linear[chosen] = np.round(weights[:-1] / empty.scale[chosen], 2) * empty.scale[chosen]
    return _with_base(empty, float(np.mean(design.wanted - z @ linear)), linear, empty.quadratic)


def _left_over(z: FloatArray, wanted: FloatArray) -> float:
    given = np.c_[z, np.ones(len(z))]
    weights, *_ = np.linalg.lstsq(given, wanted, rcond=None)
    return float(np.sum((wanted - given @ weights) ** 2))


def _quadratic_form(design: Design) -> Ensemble:
    """Ridge regression on features and products; weights that must not be negative and come out so are taken out."""
    empty, z = _standard(design)
    width = z.shape[1]
    first, second = np.triu_indices(width)
    free = ~(design.rising[first] | design.rising[second])
    first, second = first[free], second[free]
    given = np.concatenate([z, z[:, first] * z[:, second]], axis=1)
    mean = given.mean(axis=0)
    centred, target = given - mean, design.wanted - design.wanted.mean()
    gram, moment = centred.T @ centred + _RIDGE * np.eye(given.shape[1]), centred.T @ target
    kept = np.ones(given.shape[1], dtype=bool)
    while True:
        weights = np.zeros(given.shape[1])
        weights[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])
        negative = np.flatnonzero(design.rising & (weights[:width] < 0))
        if not negative.size:
            break
        kept[negative] = False
    quadratic = np.zeros((width, width))
    quadratic[first, second] = weights[width:]
    intercept = float(design.wanted.mean() - mean @ weights)
    return _with_base(empty, intercept, weights[:width], quadratic)


def _fitted_anew(found: Ensemble, design: Design) -> Ensemble:
    """Fit the quadratic form and the leaves of all trees together, by least squares with weights for absolute errors.

    A tree of boosting knows only those before it; and of the few workloads whose optimum jumps, squares make too much.
    """
    z, shape = found.standardized(design.values), found.value.shape
    width = z.shape[1]
    first, second = np.triu_indices(width)
    form = np.concatenate([z, z[:, first] * z[:, second]], axis=1)
    mean, middle = form.mean(axis=0), float(np.median(design.wanted))
    reached = found.leaves(design.values)[..., np.newaxis] == np.arange(shape[1])
    given = np.concatenate([form - mean, reached.transpose(1, 0, 2).reshape(len(z), -1)], axis=1)
    ridge = np.diag(np.repeat([_RIDGE, _LEAF_RIDGE], [mean.size, found.value.size]))
    weights, left = np.zeros(given.shape[1]), np.full(len(z), _USUAL)
    for _ in range(_REWEIGHTED):
        weighted = (given * (_USUAL / np.maximum(np.abs(left), _LEAST))[:, np.newaxis]).T
        weights = np.linalg.solve(weighted @ given + ridge, weighted @ (design.wanted - middle))
        left = design.wanted - middle - given @ weights
    quadratic = np.zeros((width, width))
    quadratic[first, second] = weights[width : mean.size]
    return dataclasses.replace(
        found,
        intercept=middle - float(mean @ weights[: mean.size]),
        linear=weights[:width],
        quadratic=quadratic,
        value=weights[mean.size :].reshape(shape),
    )


def _with_base(empty: Ensemble, intercept: float, linear: FloatArray, quadratic: FloatArray) -> Ensemble:
    return Ensemble(
        empty.logarithmic,
        empty.mean,
        empty.scale,
        intercept,
        linear,
        quadratic,
        empty.feature,
        empty.threshold,
        empty.value,
    )
