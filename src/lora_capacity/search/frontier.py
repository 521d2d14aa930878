"""Search for frontiers: the last number of adapters before the first that is not acceptable, for many slots at once.

A frontier is found by brackets that every round narrows, for many problems at once: in the steady twin's search for the
best, and for the labels' sustained loads. It takes for granted that adding adapters does not make a configuration
acceptable again, as the walk over measured grids does. Several combinations of batch limits are searched at once too: a
call of the twin costs as much for a few configurations as for a hundred.

`search` looks at configurations on a grid over adapters and slots. The slots start as a coarse geometric grid, refined
around the best value of the objective and around the choice (of near equals, not always the same) until the slots next
to these are known too: the frontier has one summit over the slots, but for what a coarse step hides.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from lora_capacity.run.steady import Progress
from lora_capacity.search.objective import FLAT, Columns
from lora_capacity.search.problem import IntArray, Problem

_COARSE, _FINE = 24, 6
"""Points of the first round and of the later ones: 24 leave gaps of a third over three decades, 6 a seventh of a gap.
More cost predictions that the next round would not ask for; fewer, more rounds, each with an overhead of its own."""


_NEVER = 1e9
"""What puts the headroom of a choice that is not acceptable below every goodput and throughput."""


class Bracket(NamedTuple):
    """Where the first point that fails lies, for many problems: above ``low``, at most at ``high``.

    Attributes:
        low: Last point known to be acceptable; one below all points to begin with.
        high: First point known to fail; one above all points to begin with.
        excess_low: By how much the low end fails, at most 0; minus infinity where it was not tried.
        excess_high: By how much the high end fails; infinite where it was not tried.
    """

    low: Float[np.ndarray, "*problems"]
    high: Float[np.ndarray, "*problems"]
    excess_low: Float[np.ndarray, "*problems"]
    excess_high: Float[np.ndarray, "*problems"]

    @classmethod
    def between(cls, low: NDArray[Any], high: NDArray[Any]) -> "Bracket":
        """Return brackets whose ends were not tried."""
        infinite = np.full(low.shape, np.inf)
        return cls(low.astype(np.float64), high.astype(np.float64), -infinite, infinite)

    def narrowed(
        self, tried: Float[np.ndarray, "*problems tried"], excess: Float[np.ndarray, "*problems tried"]
    ) -> "Bracket":
        """Return the brackets around the first tried point that fails.

        Args:
            tried: Points within the bracket, ascending; NaN, behind the others, where a problem has fewer.
            excess: By how much each fails; not above 0, or NaN: acceptable.
        """
        fails = excess > 0
        first = np.where(fails.any(axis=-1), fails.argmax(axis=-1), (~np.isnan(tried)).sum(axis=-1))

        def ends(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
            padded = np.concatenate([low[..., np.newaxis], values, high[..., np.newaxis]], axis=-1)
            last = np.take_along_axis(padded, first[..., np.newaxis], axis=-1)[..., 0]
            after = np.take_along_axis(values, np.minimum(first, values.shape[-1] - 1)[..., np.newaxis], axis=-1)
            return last, np.where(fails.any(axis=-1), after[..., 0], high)

        low, high = ends(tried, self.low, self.high)
        return Bracket(low, high, *ends(excess, self.excess_low, self.excess_high))


def spread(bracket: Bracket, count: int) -> Float[np.ndarray, "problems tried"]:
    """Return at most ``count`` whole numbers within each bracket, spaced geometrically, first and last included.

    Rows with fewer are filled up with NaN; no columns are left where every bracket is closed.
    """
    rows = [_spread(int(low), int(high), count) for low, high in zip(bracket.low, bracket.high, strict=True)]
    found = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def _spread(low: int, high: int, count: int) -> IntArray:
    if high - low < 2:
        return np.zeros(0, dtype=np.int64)
    # Counted from 1 at ``low + 1``, so that indices, which may be 0, can be spaced geometrically.
    spaced: IntArray = np.unique(np.rint(np.geomspace(low + 2, high, min(count, high - low - 1))).astype(np.int64)) - 1
    return spaced


def search(
    problem: Problem,
    combinations: Sequence[Mapping[str, int]],
    near: int | None = None,
    progress: Progress | None = None,
) -> list[Columns]:
    """Return what was predicted of all configurations looked at, the best of them within one adapter and one slot.

    Args:
        problem: What to look for, and where.
        combinations: Settings besides adapters and slots, each searched for itself.
        near: Number of slots to begin with, within a factor of two; None for a grid over all.
        progress: Called after every round with the combinations done and their total.

    Returns:
        For each combination the columns of `lora_capacity.search.assess`, ``[configs]``.
    """
    slots = problem.allowed_slots
    known = _Known(problem, combinations)
    begin = _spread(-1, slots.size, _COARSE)
    if near is not None:
        first, last = np.searchsorted(slots, [near // 2, 2 * near])
        begin = first + _spread(-1, int(last - first), _FINE)
    looked_at = [begin] * len(combinations)
    new = dict.fromkeys(range(len(combinations)), begin)
    while new:
        known.find_frontiers([(each, count) for each, indices in new.items() for count in slots[indices].tolist()])
        for each in list(new):
            centres = np.searchsorted(slots, _centres(problem, known.columns(each)))
            gaps = _gaps(looked_at[each], slots.size, centres)
            new[each] = np.unique(np.concatenate([_spread(*gap, _FINE) for gap in gaps]))
            looked_at[each] = np.union1d(looked_at[each], new[each])
        new = {each: indices for each, indices in new.items() if indices.size}
        if progress is not None:
            progress(len(combinations) - len(new), len(combinations))
    return [known.columns(each) for each in range(len(combinations))]


def search_all(problem: Problem, progress: Progress | None = None) -> Columns:
    """Return what was predicted of all configurations looked at, with every combination of batch limits worth it.

    A batch limit that is given takes the values given. One that is not goes from vLLM's default up and down by factors
    of two, for as long as the best gets better by more than what counts as equal: it has one summit, since more room in
    a batch costs memory and latency.
    """
    parts, done, best, near = list[Columns](), list[Mapping[str, int]](), (-np.inf, 0), None
    new: Sequence[Mapping[str, int]] = problem.combinations

    def count(finished: int, _: int) -> None:
        if progress is not None:
            progress(len(done) + finished, len(done) + len(new))

    while new:
        parts += search(problem, new, near, count)
        done += new
        better = _best(problem, parts)
        if better[0] <= max(best[0], (1.0 + FLAT) * best[0]):
            break
        best, near = better, int(_centres(problem, parts[better[1]])[0])
        new = [each for each in problem.steps_from(done[best[1]]) if each not in done]
    return join(parts)


def _best(problem: Problem, parts: list[Columns]) -> tuple[float, int]:
    """Return the value of the choice of all parts, or of what comes closest to one, and its part."""

    def value(columns: Columns) -> float:
        chosen = problem.choose(columns)
        if chosen is not None:
            return float(columns[problem.objective.column][chosen])
        critical = np.nan_to_num(columns["critical_load"])
        return float(critical.max()) - _NEVER

    values = [value(columns) for columns in parts]
    return max(values), int(np.argmax(values))


class _Known:
    """Configurations predicted so far: of each combination, by adapters and slots."""

    def __init__(self, problem: Problem, combinations: Sequence[Mapping[str, int]]) -> None:
        self.problem = problem
        self._settings = {name: np.array([each[name] for each in combinations]) for name in combinations[0]}
        self._row: dict[tuple[int, int, int], int] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._combination = np.zeros(0, dtype=np.int64)
        self._fails = np.zeros(0, dtype=bool)

    def columns(self, combination: int) -> Columns:
        """What was predicted with a combination."""
        return {name: column[self._combination == combination] for name, column in self._columns.items()}

    def find_frontiers(self, problems: Sequence[tuple[int, int]]) -> None:
        """Predict until the frontier of each pair of combination and slots lies between neighbouring adapters."""
        adapters = self.problem.allowed_adapters
        combination, slots = np.array(problems).T
        bracket = Bracket.between(np.searchsorted(adapters, slots) - 1, np.full(slots.shape, adapters.size))
        count = _COARSE
        while (tried := spread(bracket, count)).size:
            row, column = np.nonzero(~np.isnan(tried))
            excess = np.full(tried.shape, np.nan)
            counts = adapters[tried[row, column].astype(np.int64)]
            excess[row, column] = self._failing(np.stack([combination[row], counts, slots[row]], axis=1))
            bracket = bracket.narrowed(tried, excess)
            count = _FINE

    def _failing(self, points: Int[np.ndarray, "points 3"]) -> Bool[np.ndarray, " points"]:
        """Whether configurations (combination, adapters, slots) are not acceptable; predicts those not known yet."""
        asked: list[tuple[int, int, int]] = [tuple(point) for point in points.tolist()]
        unknown = [point for point in dict.fromkeys(asked) if point not in self._row]
        if unknown:
            combination, adapters, slots = np.array(unknown).T
            settings = {name: values[combination] for name, values in self._settings.items()}
            found = self.problem.assess(adapters, slots, **settings)
            self._row |= {point: len(self._row) + i for i, point in enumerate(unknown)}
            self._columns = join([self._columns, found]) if self._columns else dict(found)
            self._combination = np.concatenate([self._combination, combination])
            self._fails = np.concatenate([self._fails, self.problem.judge(found) != "acceptable"])
        return self._fails[[self._row[point] for point in asked]]


def join(parts: Iterable[Columns]) -> dict[str, NDArray[Any]]:
    """Put columns of the same names one below the other."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _centres(problem: Problem, columns: Columns) -> IntArray:
    """Numbers of slots to look around: the choice's and the best value's, or what is least short of acceptable."""
    chosen = problem.choose(columns)
    value = np.where(problem.judge(columns) == "acceptable", columns[problem.objective.column], -np.inf)
    if chosen is not None:
        rows = [chosen, int(np.argmax(value))]
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
