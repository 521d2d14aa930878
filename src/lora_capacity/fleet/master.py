"""The covering problem: the cheapest servers, of those found, that hold all items, and a bound below it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from lora_capacity.fleet.columns import Found

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_UNCOVERED = 1e3
"""Price of leaving an item out, in servers: above what any server with one item costs, so that it is done only where
nothing else is possible."""

_NEXT_TO_NOTHING = 1e-3
"""Price of a server, in what leaving out the item of the least worth costs, where servers are there anyway: of equal
placements the one with fewer servers is taken."""

_MILP_S = 4.0
"""Seconds after which the best whole numbers found are taken; what they cost is compared with the bound anyway."""


class Relaxed(NamedTuple):
    """Solution of the linear program.

    Attributes:
        cost: What it costs.
        value: What an item of each class adds to it, ``[classes]``.
        limit_value: What one server more of each pool would save, ``[pools]``.
        use: Servers of each column, ``[columns]``.
    """

    cost: float
    value: FloatArray
    limit_value: FloatArray
    use: FloatArray


class Question(NamedTuple):
    """What is covered, and at what prices.

    Attributes:
        demand: Items of each class, ``[classes]``.
        price: Cost of a server of each pool, ``[pools]``.
        most: Servers of each pool at most; infinite where there are as many as needed, ``[pools]``.
        worth: Price of leaving an item of each class out, ``[classes]``.
    """

    demand: IntArray
    price: FloatArray
    most: FloatArray
    worth: FloatArray

    @classmethod
    def covering_all(cls, demand: IntArray, price: FloatArray, most: FloatArray) -> "Question":
        """Return the question in which everything has to be held."""
        worth = np.full(demand.shape, _UNCOVERED * max(float(price.max()), 1.0))
        return cls(demand, price, most, worth)

    @classmethod
    def covering_most(cls, demand: IntArray, worth: FloatArray, most: FloatArray) -> "Question":
        """Return the question in which as much as possible is held; servers cost next to nothing."""
        return cls(demand, np.full(most.shape, _NEXT_TO_NOTHING * float(worth.min())), most, worth)


def relax(question: Question, found: Found) -> Relaxed:
    """Solve for fractions of servers."""
    matrix, upper = _rows(question, found)
    cost = _costs(question, found)
    solved = optimize.linprog(cost, A_ub=matrix, b_ub=upper, method="highs")
    classes = question.demand.size
    dual = np.zeros(len(upper)) if solved.ineqlin is None else -solved.ineqlin.marginals
    return Relaxed(float(solved.fun), dual[:classes], dual[classes:], solved.x[: found.pool.size])


def whole(question: Question, found: Found) -> tuple[IntArray, IntArray]:
    """Return whole numbers of servers of each column, ``[columns]``, and the items left out, ``[classes]``."""
    matrix, upper = _rows(question, found)
    cost = _costs(question, found)
    solved = optimize.milp(
        cost,
        constraints=optimize.LinearConstraint(matrix, -np.inf, upper),
        integrality=np.ones(cost.size),
        options={"time_limit": _MILP_S, "mip_rel_gap": 1e-4},
    )
    columns = found.pool.size
    if solved.x is None:
        return _rounded(question, found)
    return np.rint(solved.x[:columns]).astype(np.int64), np.rint(solved.x[columns:]).astype(np.int64)


def _rounded(question: Question, found: Found) -> tuple[IntArray, IntArray]:
    """Round the relaxed solution up, as far as pools allow."""
    use = np.ceil(relax(question, found).use - 1e-9).astype(np.int64)
    for pool, most in enumerate(question.most):
        own = np.flatnonzero(found.pool == pool)
        over = np.cumsum(use[own]) - most
        use[own] = np.maximum(use[own] - np.maximum(over, 0), 0).astype(np.int64)
    return use, np.maximum(question.demand - use @ found.counts, 0)


def _rows(question: Question, found: Found) -> tuple[sparse.csr_matrix, FloatArray]:
    """Return the inequalities over servers of each column and items left out of each class."""
    classes, pools = question.demand.size, question.price.size
    held = sparse.hstack([-sparse.csr_matrix(found.counts.T.astype(float)), -sparse.identity(classes)])
    owner = sparse.csr_matrix((np.arange(pools)[:, np.newaxis] == found.pool).astype(float))
    limited = np.isfinite(question.most)
    per_pool = sparse.hstack([owner, sparse.csr_matrix((pools, classes))])
    upper = np.where(limited, question.most, 1e9)
    return sparse.csr_matrix(sparse.vstack([held, per_pool])), np.concatenate([-question.demand.astype(float), upper])


def _costs(question: Question, found: Found) -> FloatArray:
    return np.concatenate([question.price[found.pool], question.worth])
