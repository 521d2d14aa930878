"""Training of one tree and of gradient boosting by scikit-learn, and their form as arrays."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lora_capacity.scenarios.workload_batch import FloatArray, IntArray
from lora_capacity.surrogate.ensemble import ALWAYS_LEFT, Ensemble

KINDS = ("tree", "boosting")
"""Kinds of ensembles; a forest was worse than boosting at every target (docs/data/surrogate_benchmark.json)."""

MOST_LEAVES = 32
"""Leaves of the single tree: what still fits on a wall."""

_DEPTH, _LEAST_LEAF = 8, 8
"""Deepest path of the single tree, and fewest workloads of a leaf."""

_BOOSTED_DEPTH, _BOOSTED_LEAF, _RATE = 4, 10, 0.2
"""Depth of boosting's trees, fewest rows of a leaf, and share of what a tree finds that counts."""

_BOOSTED_ROWS = 4096
"""Most rows that a tree of boosting is grown on, drawn anew for each: fitting sorts them, and more tell the same."""

_POWERS = 2
"""Features of the power law: what people can keep in mind."""

_RIDGE, _LEAF_RIDGE = 10.0, 60.0
"""Squared weights of a standardized feature, and of a leaf, that count like a squared error of 1."""

_REWEIGHTED, _USUAL, _LEAST = 5, 0.1, 0.03
"""Rounds of least squares towards absolute errors; the error of weight 1, and the one below which weights stay."""

_LEAST_SCALE = 1e-6
"""Floor under the standard deviation of a feature that does not vary."""


@dataclass(frozen=True, eq=False)
class Design:
    """Training data of an ensemble.

    Attributes:
        values: Features.
        logarithmic: Whether a feature counts by its logarithm.
        rising: Whether the prediction must not fall in a feature.
        wanted: What is to be predicted.
    """

    values: Float[np.ndarray, "rows features"]
    logarithmic: Bool[np.ndarray, " features"]
    rising: Bool[np.ndarray, " features"]
    wanted: Float[np.ndarray, " rows"]

    def take(self, rows: IntArray) -> "Design":
        """Return some rows."""
        return Design(self.values[rows], self.logarithmic, self.rising, self.wanted[rows])


def train(kind: str, design: Design, seed: int = 0, boosted_trees: int = 16) -> Ensemble:
    """Train an ensemble.

    ``tree``: a power law of two features, times the factor of one tree of at most 32 leaves. ``boosting``: a quadratic
    form of all features and small trees for what it leaves. Where the prediction must not fall in a feature, the
    feature takes part in no product, its weight is not negative, and the trees are constrained; where it may fall in
    all, the whole is fitted once more to the least absolute error.

    Args:
        kind: One of `KINDS`.
        design: What to learn.
        seed: Decides the rows that boosting's trees are grown on.
        boosted_trees: How many trees boosting grows.
    """
    # Answers need no scikit-learn, which takes seconds to load.
    from sklearn.tree import DecisionTreeRegressor

    constraint = design.rising.astype(np.int64)
    if kind == "tree":
        base = _power_law(design)
        shape = {"max_leaf_nodes": MOST_LEAVES, "max_depth": _DEPTH, "min_samples_leaf": _LEAST_LEAF}
        single = DecisionTreeRegressor(**shape, monotonic_cst=constraint, random_state=seed)
        left = design.wanted - base.beneath(design.values)
        return _with_trees(base, [single.fit(design.values, left).tree_], _DEPTH)
    base = _quadratic_form(design)
    left = design.wanted - base.beneath(design.values)
    mean, rng, trees = float(left.mean()), np.random.default_rng(seed), []
    left -= mean
    for _ in range(boosted_trees):
        small = DecisionTreeRegressor(
            max_depth=_BOOSTED_DEPTH, min_samples_leaf=_BOOSTED_LEAF, monotonic_cst=constraint, random_state=seed
        )
        rows = rng.permutation(left.size)[:_BOOSTED_ROWS]
        left -= _RATE * small.fit(design.values[rows], left[rows]).predict(design.values)
        trees.append(small.tree_)
    found = _with_trees(dataclasses.replace(base, intercept=base.intercept + mean), trees, _BOOSTED_DEPTH, _RATE)
    return found if design.rising.any() else _fitted_anew(found, design)


def _with_trees(base: Ensemble, trees: list[Any], depth: int, scale: float = 1.0) -> Ensemble:
    """Return an ensemble with scikit-learn's trees stored complete, their leaves scaled."""
    feature, threshold, value = zip(*(_complete(tree, depth) for tree in trees), strict=True)
    return dataclasses.replace(
        base,
        feature=np.array(feature, np.int64),
        threshold=np.array(threshold, np.float64),
        value=scale * np.array(value, np.float64),
    )


def _complete(tree: Any, depth: int) -> tuple[list[int], list[float], list[float]]:
    """Return features and thresholds of a tree's nodes, level by level, and values of its leaves."""
    feature, threshold, level = [], [], [0]
    for _ in range(depth):
        below = []
        for node in level:
            left, right = int(tree.children_left[node]), int(tree.children_right[node])
            ends = left < 0
            feature.append(0 if ends else int(tree.feature[node]))
            threshold.append(ALWAYS_LEFT if ends else float(tree.threshold[node]))
            below += [node, node] if ends else [left, right]
        level = below
    return feature, threshold, [float(tree.value[node].ravel()[0]) for node in level]


def _standard(design: Design) -> tuple[Ensemble, FloatArray]:
    """An ensemble that predicts nothing yet, and its ``z``."""
    flags, width = design.logarithmic, design.values.shape[1]
    raw = np.where(flags, np.log(np.where(flags, design.values, 1.0)), design.values)
    empty = Ensemble(
        flags,
        raw.mean(axis=0),
        np.maximum(raw.std(axis=0), _LEAST_SCALE),
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
        left = {j: _least_squares(z[:, [*chosen, j]], design.wanted)[1] for j in candidates if j not in chosen}
        chosen.append(min(left, key=left.__getitem__))
    weights, _ = _least_squares(z[:, chosen], design.wanted)
    linear = np.zeros(z.shape[1])
    linear[chosen] = np.round(weights[:-1] / empty.scale[chosen], 2) * empty.scale[chosen]
    return dataclasses.replace(empty, intercept=float(np.mean(design.wanted - z @ linear)), linear=linear)


def _least_squares(
    z: Float[np.ndarray, "rows some"], wanted: Float[np.ndarray, " rows"]
) -> tuple[Float[np.ndarray, " some+1"], float]:
    """Weights, the constant's last, and the sum of squares that they leave."""
    given = np.c_[z, np.ones(len(z))]
    weights, *_ = np.linalg.lstsq(given, wanted, rcond=None)
    return weights, float(np.sum((wanted - given @ weights) ** 2))


def _quadratic_form(design: Design) -> Ensemble:
    """Ridge regression on features and products; weights that must not be negative and come out so are taken out."""
    empty, z = _standard(design)
    width = z.shape[1]
    given, products = _form(z, ~design.rising)
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
    quadratic[products] = weights[width:]
    intercept = float(design.wanted.mean() - mean @ weights)
    return dataclasses.replace(empty, intercept=intercept, linear=weights[:width], quadratic=quadratic)


def _form(
    z: Float[np.ndarray, "rows features"], free: Bool[np.ndarray, " features"]
) -> tuple[Float[np.ndarray, "rows terms"], tuple[IntArray, IntArray]]:
    """Features, and products of those that are free, as columns; and where the products stand among the weights."""
    first, second = np.triu_indices(z.shape[1])
    both = free[first] & free[second]
    first, second = first[both], second[both]
    return np.concatenate([z, z[:, first] * z[:, second]], axis=1), (first, second)


def _fitted_anew(found: Ensemble, design: Design) -> Ensemble:
    """Fit the quadratic form and the leaves of all trees together, by least squares with weights for absolute errors.

    A tree of boosting knows only those before it; and of the few workloads whose optimum jumps, squares make too much.
    """
    z, shape = found.standardized(design.values), found.value.shape
    width = z.shape[1]
    form, products = _form(z, ~design.rising)
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
    quadratic[products] = weights[width : mean.size]
    return dataclasses.replace(
        found,
        intercept=middle - float(mean @ weights[: mean.size]),
        linear=weights[:width],
        quadratic=quadratic,
        value=weights[mean.size :].reshape(shape),
    )
