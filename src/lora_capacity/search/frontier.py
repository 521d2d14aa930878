"""Looks at the configurations to choose from: a grid over adapters and slots that is refined where it matters.

For a number of slots the search finds the frontier: the last number of adapters before the first that is not
acceptable. Every round narrows the brackets around it, for many numbers of slots at once. The slots start as a coarse
geometric grid, refined around the best throughput and around the choice (of near equals, not always the same) until the
slots next to these are known too.

It takes for granted that adding adapters does not make a configuration acceptable again, as the walk over measured
grids does, and that the frontier has one summit over the slots, but for what a coarse step hides.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.search.objective import Columns
from lora_capacity.search.problem import IntArray, Problem

_COARSE, _FINE = 24, 6


def search(problem: Problem, combination: Mapping[str, int]) -> Columns:
    """Return what was predicted of all configurations looked at, the best of them within one adapter and one slot.

    Args:
        problem: What to look for, and where.
        combination: Settings besides adapters and slots.

    Returns:
        The columns of `lora_capacity.search.assess`, ``[configs]``.
    """
    slots = problem.allowed_slots
    known = _Known(problem, combination)
    looked_at = _spread(-1, slots.size, _COARSE)
    new = looked_at
    while new.size:
        _find_frontier(known, slots[new])
        centres = np.searchsorted(slots, _centres(problem, known.columns))
        new = np.unique(np.concatenate([_spread(*gap, _FINE) for gap in _gaps(looked_at, slots.size, centres)]))
        looked_at = np.union1d(looked_at, new)
    return known.columns


class _Known:
    """Configurations predicted so far."""

    def __init__(self, problem: Problem, combination: Mapping[str, int]) -> None:
        self.problem, self._combination = problem, combination
        self._row: dict[tuple[int, int], int] = {}
        self.columns: dict[str, NDArray[Any]] = {}
        self._acceptable = np.zeros(0, dtype=bool)

    def acceptable(self, points: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
        """Whether configurations (adapters, slots) are acceptable; predicts those not known yet."""
        points = list(points)
        unknown = [point for point in dict.fromkeys(points) if point not in self._row]
        if unknown:
            found = self.problem.assess(*np.array(unknown).T, **self._combination)
            self._row |= {point: len(self._row) + i for i, point in enumerate(unknown)}
            self.columns = join([self.columns, found]) if self.columns else dict(found)
            good = self.problem.judge(found) == "acceptable"
            self._acceptable = np.concatenate([self._acceptable, good])
        return self._acceptable[[self._row[point] for point in points]]


def join(parts: Iterable[Columns]) -> dict[str, NDArray[Any]]:
    """Put columns of the same names one below the other."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _find_frontier(known: _Known, slots: IntArray) -> None:
    """Bracket the frontier of every number of slots between neighbouring numbers of adapters."""
    adapters = known.problem.allowed_adapters
    low = np.searchsorted(adapters, slots) - 1
    high = np.full_like(low, adapters.size)
    count = _COARSE
    while (wide := np.flatnonzero(high - low > 1)).size:
        inner = [_spread(low[i], high[i], count) for i in wide]
        good = known.acceptable(
            (int(adapters[a]), int(slots[i])) for i, indices in zip(wide, inner, strict=True) for a in indices
        )
        for i, indices, ok in zip(wide, inner, np.split(good, np.cumsum([len(n) for n in inner])[:-1]), strict=True):
            passed = int(np.argmin(ok)) if not ok.all() else len(ok)
            low[i] = indices[passed - 1] if passed else low[i]
            high[i] = indices[passed] if passed < len(ok) else high[i]
        count = _FINE


def _centres(problem: Problem, columns: Columns) -> IntArray:
    """Numbers of slots to look around: the choice's and the best throughput's, or what is least short of acceptable."""
    chosen = problem.choose(columns)
    throughput = np.where(problem.judge(columns) == "acceptable", columns["throughput_tokens_per_s"], -np.inf)
    if chosen is not None:
        rows = [chosen, int(np.argmax(throughput))]
    elif np.isnan(columns["critical_load"]).all():
        rows = [int(np.argmin(columns["max_loras"]))]
    else:
        rows = [int(np.nanargmax(columns["critical_load"]))]
    centres: IntArray = columns["max_loras"][rows]
    return centres


def _gaps(looked_at: IntArray, size: int, centres: IntArray) -> list[tuple[int, int]]:
    """Pairs of indices looked at with a centre as one of them and nothing between; -1 and ``size`` count too."""
    padded = np.concatenate([[-1], looked_at, [size]])
    place = np.searchsorted(padded, centres)
    return [(int(padded[p + side - 1]), int(padded[p + side])) for p in place for side in (0, 1)]


def _spread(low: int, high: int, count: int) -> IntArray:
    """At most ``count`` indices between two (both exclusive), spaced geometrically, the first and the last included."""
    if high - low < 2:
        return np.zeros(0, dtype=np.int64)
    spread: IntArray = np.unique(np.rint(np.geomspace(low + 2, high, min(count, high - low - 1))).astype(np.int64)) - 1
    return spread
