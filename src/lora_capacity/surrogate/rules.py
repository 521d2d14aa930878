"""Rules: the single tree as people read it, a power law times a factor that a few decisions lead to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lora_capacity.errors import InputError, nearest_hint
from lora_capacity.surrogate.ensemble import ALWAYS_LEFT, Ensemble
from lora_capacity.surrogate.features import Feature
from lora_capacity.surrogate.model import Surrogate
from lora_capacity.surrogate.targets import TARGETS

Tree = Mapping[str, Any]
"""A decision: ``feature``, ``threshold``, and the trees ``below``, where the feature is at most that, and ``above``; or
an end: the ``factor`` that the power law is multiplied with."""


@dataclass(frozen=True)
class Rules:
    """A target's single tree with rounded figures.

    Attributes:
        target: ``adapters``, ``slots``, ``throughput`` or ``starved``.
        law: The power law that the factors multiply: ``constant · Π feature^exponent``.
        tree: The decisions.
        exact_score: Score of the tree as trained, on held-out workloads: SMAPE in percent, of ``starved`` macro-F1.
        rounded_score: The same with rounded figures.
    """

    target: str
    law: str
    tree: Tree
    exact_score: float
    rounded_score: float

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return count_leaves(self.tree)

    def text(self) -> str:
        """Return the rules as indented lines."""
        name = "macro-F1" if self.target == "starved" else "SMAPE %"
        scores = f"{name} on held-out workloads: {self.exact_score:.3g}, {self.rounded_score:.3g} with rounded figures"
        head = [f"{TARGETS[self.target].meaning} = {self.law} · factor", scores, ""]
        return "\n".join(head + _lines(self.tree, 0)) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the rules as a JSON object."""
        head = {"target": self.target, "meaning": TARGETS[self.target].meaning, "law": self.law, "leaves": self.leaves}
        return head | {"exact_score": self.exact_score, "rounded_score": self.rounded_score, "tree": self.tree}


def rules_of(surrogate: Surrogate, target: str) -> Rules:
    """Return the rules of a target.

    Args:
        surrogate: The surrogate.
        target: ``adapters``, ``slots``, ``throughput`` or ``starved``.

    Raises:
        InputError: If there is no such target.
    """
    if target not in TARGETS:
        raise InputError("target", target, ", ".join(TARGETS), nearest_hint(target, TARGETS))
    tree = surrogate.of(target, "tree").rounded()
    features = TARGETS[target].features
    return Rules(
        target=target,
        law=_law(tree, features),
        tree=_grown(tree, features, 0),
        exact_score=surrogate.scores["tree"][TARGETS[target].score],
        rounded_score=surrogate.scores["rounded"][TARGETS[target].score],
    )


def path_of(surrogate: Surrogate, target: str, values: Float[np.ndarray, " features"]) -> list[dict[str, Any]]:
    """Return the decisions that lead to one prediction of the rules.

    Args:
        surrogate: The surrogate.
        target: The target.
        values: Its features of one workload.

    Returns:
        Per decision ``feature``, ``meaning``, ``value``, ``threshold`` and ``above``.
    """
    features = TARGETS[target].features
    return [
        {
            "feature": features[place].name,
            "meaning": features[place].meaning,
            "value": float(values[place]),
            "threshold": threshold,
            "above": above,
        }
        for place, threshold, above in surrogate.of(target, "tree").rounded().path(values)
    ]


def _law(tree: Ensemble, features: tuple[Feature, ...]) -> str:
    exponents = tree.linear / tree.scale
    constant = np.exp(tree.intercept - np.sum(exponents * tree.mean))
    powers = [f"{features[place].name}^{exponents[place]:.2g}" for place in np.flatnonzero(exponents)]
    return " · ".join([f"{constant:.3g}", *powers])


def _grown(tree: Ensemble, features: tuple[Feature, ...], node: int) -> Tree:
    """Return the subtree of a node, without decisions whose branches are alike."""
    nodes = tree.threshold.shape[1]
    if node >= nodes:
        return {"factor": float(np.exp(tree.value[0, node - nodes]))}
    below = _grown(tree, features, 2 * node + 1)
    threshold = float(tree.threshold[0, node])
    if threshold >= ALWAYS_LEFT:
        return below
    above = _grown(tree, features, 2 * node + 2)
    feature = features[int(tree.feature[0, node])].name
    return below if below == above else {"feature": feature, "threshold": threshold, "below": below, "above": above}


def count_leaves(tree: Tree) -> int:
    """Return the number of ends of a tree."""
    return 1 if "factor" in tree else count_leaves(tree["below"]) + count_leaves(tree["above"])


def _lines(tree: Tree, depth: int) -> list[str]:
    indent = "  " * depth
    if "factor" in tree:
        return [f"{indent}factor {tree['factor']:.2g}"]
    found = []
    for sign, branch in (("<=", tree["below"]), ("> ", tree["above"])):
        decision = f"{indent}{tree['feature']} {sign} {tree['threshold']:g}"
        if "factor" in branch:
            found.append(f"{decision}: factor {branch['factor']:.2g}")
        else:
            found += [decision, *_lines(branch, depth + 1)]
    return found
