"""Answers that are played: the event twin settles which of the configurations that the steady twin proposes to take.

The steady twin looks at thousands of configurations; the event twin runs a few dozen. Of each number of slots that is
proposed it looks for the most adapters that hold, from where the steady twin puts them: two plays under the load of the
margin tell. From the best of these it walks on with seeds that the search has not seen, at the offered load and at the
margin's, to the most adapters that are acceptable. What the seeds differ by, the chance of an hour, counts as an error
of the capacity beside the calibration's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.run import simulate
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Results, build_scenarios
from lora_capacity.search.margin import (
    judged_columns,
    limit_beyond,
    load_factors,
    load_headroom,
    starving_probability,
)
from lora_capacity.search.objective import FLAT, Columns
from lora_capacity.search.problem import Problem

POINT = ("max_cpu_loras", "max_loras", "max_num_batched_tokens", "max_num_seqs")
"""Columns that tell a configuration from the others."""

Point = tuple[int, int, int, int]

PROPOSALS, APART = 6, 1.25
"""Numbers of slots that are looked at, and the least ratio between them: a few dozen plays in all."""

_STEP, _CLOSE = 0.05, 0.01
"""Share of adapters by which a walk goes up or down from where it starts, twice as far each time; and within which of
the first that fails it ends: an hour's chance hides smaller differences. Slots are bisected down to the former."""

_SCREENED = 2
"""Seeds with which proposals are compared: two tell apart what differs by more than the walk's end."""

_FINALISTS = 3
"""Numbers of slots for which the walk is done with the answer's seeds; one, unless these refuse most of it."""

_FARTHER = 1.5
"""How far beyond the load of the margin an answer is played, in its logarithm, so that the headroom lies between."""

_LEAST_HEADROOM = 1e-3
"""Floor under the headroom of one play: where no request keeps its bounds it is 0, which has no logarithm."""


class Plays:
    """What the event twin plays of a problem.

    Attributes:
        problem: Whose configurations these are.
        steady: Configurations and what the steady twin says of them, those that are played among them or beside them.
        seeds: Seeds of the answer; the search for it takes those after them.
    """

    def __init__(self, problem: Problem, steady: Columns, seed: int, seeds: int, progress: Progress | None) -> None:
        self.problem, self.steady, self.seeds, self._progress = problem, steady, range(seed, seed + seeds), progress

    def _play(
        self, points: Sequence[Point], loads: NDArray[np.float64], seeds: Sequence[int]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
        """Return columns and codes of the bottlenecks under loads ``[points, loads]``, ``[points, loads, seeds]``."""
        columns, results = play(self.problem, points, loads, seeds, self._progress)
        return columns, np.asarray(results.limit).reshape(*loads.shape, len(seeds))

    def hold(self, points: Sequence[Point]) -> list[bool]:
        """Return whether configurations do not fail at the load of the margin, in a few plays each."""
        margins = np.array([[self._margin(point)] for point in points])
        columns, _ = self._play(points, margins, range(self.seeds.stop, self.seeds.stop + _SCREENED))
        holds: list[bool] = (self.problem.needed.reached(columns).mean(axis=(1, 2)) >= 1.0).tolist()
        return holds

    def _margin(self, point: Point) -> float:
        """The load at which a configuration must not fail for what is known of its capacity to be within the risk."""
        error = np.array([np.hypot(self.problem.calibration.capacity_error, self._beyond(point))])
        return float(load_factors(error, self.problem.risk, 2)[0, 1])

    def _beyond(self, point: Point) -> float:
        """What extrapolating adds to the error: the steady twin's, of the nearest adapters and slots."""
        ratios = [self.steady[name] / value for name, value in zip(POINT, point, strict=True)]
        apart = np.abs(np.log(ratios[0])) + np.abs(np.log(ratios[1]))
        same = (ratios[2] == 1.0) & (ratios[3] == 1.0)
        return float(self.steady["extrapolation_error"][np.argmin(np.where(same, apart, np.inf))])

    def assess(self, point: Point) -> Columns:
        """Return what `lora_capacity.search.assess` does of one configuration, with all seeds.

        Figures are means over the seeds at the offered load. ``spread`` is the standard deviation over seeds of the
        logarithm of the load at which it fails, ``error`` that with the calibration's, wherever it lies.
        """
        margin, beyond = self._margin(point), self._beyond(point)
        factors = np.array([1.0, margin, margin**_FARTHER])
        played, limits = self._play([point], factors[np.newaxis], self.seeds)
        reached = self.problem.needed.reached(played)[0]
        log_headroom = np.log(np.maximum(load_headroom(reached.T, factors), _LEAST_HEADROOM))
        spread = log_headroom.std(ddof=1) if log_headroom.size > 1 else 0.0
        critical = np.exp([log_headroom.mean()])
        error = float(np.hypot(np.hypot(self.problem.calibration.capacity_error, beyond), spread))
        return {name: _mean(column[:, 0]) for name, column in played.items()} | {
            "critical_load": critical,
            "starving_probability": starving_probability(critical, error),
            "limit_beyond": limit_beyond(reached.mean(axis=1)[np.newaxis], limits[..., 0]),
            "extrapolation_error": np.array([beyond]),
            "spread": np.array([spread]),
            "error": np.array([error]),
        }


def play(
    problem: Problem,
    points: Sequence[Point],
    loads: NDArray[np.float64],
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> tuple[dict[str, NDArray[Any]], Results]:
    """Let the event twin run configurations under some loads with some seeds.

    Args:
        problem: Whose configurations these are.
        points: Adapters, slots and batch limits of each.
        loads: Times the offered load, ``[points, loads]``.
        seeds: Seeds of the requests.
        progress: Called with the plays done and their total.

    Returns:
        Columns of `judged_columns`, ``[points, loads, seeds]``; and the results in this order, ``[plays]``.
    """
    shape = (*loads.shape, len(seeds))
    adapters, max_loras, budget, seqs = np.array(points).T
    settings = {**problem.settings, "max_num_batched_tokens": budget, "max_num_seqs": seqs}
    scenarios = build_scenarios(problem.workload, problem.calibration, adapters, max_loras, **settings)
    each = scenarios.take(np.repeat(np.arange(len(points)), loads.shape[1] * len(seeds)))
    load = np.broadcast_to(loads[..., np.newaxis], shape).ravel()
    results = simulate(
        problem.calibration,
        each,
        problem.workload,
        engine="event",
        seed=np.broadcast_to(np.array(seeds), shape).ravel(),
        load=load,
        progress=progress,
    )
    columns = judged_columns(each.scaled(load), results)
    return {name: column.reshape(shape) for name, column in columns.items()}, results


def _mean(column: NDArray[Any]) -> NDArray[Any]:
    """Return the mean over seeds; of settings and labels, which do not differ or hardly, the first."""
    return column.mean(axis=-1) if column.dtype.kind == "f" else column[..., 0]


def settle(problem: Problem, plays: Plays) -> tuple[Columns | None, list[Columns]]:
    """Return what the plays say of the best configuration that they find acceptable, and of those that they refuse.

    Args:
        problem: What to look for, and where.
        plays: What plays them.

    Returns:
        Columns as of `Plays.assess`, of one configuration each.
    """
    screened = _screen(problem, [_Frontier(problem, each) for each in proposals(problem, plays.steady)], plays)
    if problem.objective.goal == "fewest-slots":
        screened = [*_fewer_slots(problem, screened, plays), *screened]
    best: Columns | None = None
    refused: list[Columns] = []
    for start in screened[:_FINALISTS]:
        if best is not None and not _better(problem, start, point_of(best, 0)):
            break
        frontier = _Frontier(problem, start)
        while (point := frontier.next()) is not None:
            found = plays.assess(point)
            acceptable = problem.judge(found)[0] == "acceptable"
            frontier.narrow(point, acceptable)
            if not acceptable:
                refused.append(found)
            elif best is None or _better(problem, point, point_of(best, 0)):
                best = found
    return best, refused


def _screen(problem: Problem, frontiers: "list[_Frontier]", plays: Plays) -> list[Point]:
    """Return the most adapters that hold of every number of slots that could be the best, the best first.

    Where none hold, the fewest that were tried: with the answer's seeds they may.
    """
    every = list(frontiers)
    while tried := [(each, point) for each in frontiers if (point := each.next()) is not None]:
        for (frontier, point), holds in zip(tried, plays.hold([point for _, point in tried]), strict=True):
            frontier.narrow(point, holds)
        held = [each.held for each in every if each.held is not None]
        frontiers = [each for each in frontiers if all(_near(problem, each.most, point) for point in held)]
    held = [each.held for each in every if each.held is not None]
    order = []
    while held:
        near = [point for point in held if all(_near(problem, point, other) for other in held)]
        order.append(min(near, key=lambda point: (point[1], -point[0])))
        held.remove(order[-1])
    return order or [each.most for each in every]


def _fewer_slots(problem: Problem, screened: list[Point], plays: Plays) -> list[Point]:
    """Return a configuration with fewer slots than the best screened that holds too, if any, by bisection.

    Its adapters are the fewest that may be given up for slots; the numbers of slots screened lie far apart.
    """
    chosen, adapters = screened[0], problem.allowed_adapters
    least = max(_asked_per_s(problem, point) for point in screened) * (1.0 - problem.objective.within)
    enough = adapters[np.cumsum(problem.workload.adapters.deal(int(adapters[-1]))[0])[adapters - 1] >= least]
    low, found = max((point[1] for point in screened if point[1] < chosen[1]), default=1), chosen
    while found[1] > (1.0 + _STEP) * low:
        between = problem.allowed_slots[(problem.allowed_slots > low) & (problem.allowed_slots < found[1])]
        if not between.size:
            break
        slots = int(between[np.argmin(np.abs(np.log(between**2 / (low * found[1]))))])
        point = (int(enough[enough >= slots][0]), slots, *chosen[2:])
        if plays.hold([point])[0]:
            found = point
        else:
            low = slots
    return [] if found == chosen else [found]


def _asked_per_s(problem: Problem, point: Point) -> float:
    """Return the requests per second that a configuration's adapters get."""
    return float(problem.workload.adapters.deal(point[0])[0].sum())


def _near(problem: Problem, point: Point, other: Point) -> bool:
    """Whether a configuration is asked for at least about as much as another."""
    flat = problem.objective.within if problem.objective.goal == "fewest-slots" else FLAT
    return _asked_per_s(problem, point) >= (1.0 - flat) * _asked_per_s(problem, other)


def _better(problem: Problem, point: Point, other: Point) -> bool:
    """Whether a configuration is to be taken rather than another: asked for more, or about as much with fewer slots."""
    near = _near(problem, point, other), _near(problem, other, point)
    if all(near) and point[1] != other[1]:
        return point[1] < other[1]
    return _asked_per_s(problem, point) > _asked_per_s(problem, other)


def choices(
    problem: Problem, steady: Columns, count: int, *, after: Point | None = None, apart: float, by_limits: bool
) -> list[Point]:
    """Return the steady twin's choices if slots near those already taken were not to be had, best first.

    Args:
        problem: What to look for.
        steady: Configurations and what the steady twin says of them.
        count: How many, at most.
        after: A configuration taken before them.
        apart: Least ratio between numbers of slots.
        by_limits: Whether slots may be near those of a choice with other batch limits.
    """
    taken, left = [] if after is None else [after], np.arange(steady["max_loras"].size)
    for _ in range(count):
        if taken:
            left = left[~_near_slots(steady, left, taken[-1], apart, by_limits=by_limits)]
        row = problem.choose({name: column[left] for name, column in steady.items()}) if left.size else None
        if row is None:
            break
        taken.append(point_of(steady, int(left[row])))
    return taken if after is None else taken[1:]


def _near_slots(
    columns: Columns, rows: NDArray[np.int64], point: Point, apart: float, *, by_limits: bool
) -> NDArray[np.bool_]:
    """Whether rows have about as many slots as a configuration, and its batch limits too if these are told apart."""
    _, slots, *limits = point
    ratio = columns["max_loras"][rows] / slots
    near = np.maximum(ratio, 1.0 / ratio) < apart
    if by_limits:
        near &= np.all([columns[name][rows] == limit for name, limit in zip(POINT[2:], limits, strict=True)], axis=0)
    return np.asarray(near)


def proposals(problem: Problem, steady: Columns) -> list[Point]:
    """Return what the steady twin proposes to play; where it finds nothing acceptable, what comes closest."""
    found = choices(problem, steady, PROPOSALS, apart=APART, by_limits=False)
    if not found and not np.isnan(steady["critical_load"]).all():
        found = [point_of(steady, int(np.nanargmax(steady["critical_load"])))]
    return found


def point_of(columns: Columns, row: int) -> Point:
    """Return the configuration of a row."""
    adapters, slots, budget, seqs = (int(columns[name][row]) for name in POINT)
    return adapters, slots, budget, seqs


class _Frontier:
    """The most adapters that hold, of one number of slots, between the last known to hold and the first that fails.

    Fewer adapters than that have as many slots as they are.
    """

    def __init__(self, problem: Problem, point: Point) -> None:
        allowed = problem.allowed_adapters
        self._allowed, self._slots, self._rest = allowed, problem.allowed_slots, point[1:]
        self._start = int(np.searchsorted(allowed, point[0]))
        self._least = int(np.searchsorted(allowed, self._slots[0]))
        self._low, self._high, self._step = self._least - 1, allowed.size, _STEP

    @property
    def held(self) -> Point | None:
        """The most adapters known to hold, if any."""
        return None if self._low < self._least else self._at(self._low)

    @property
    def most(self) -> Point:
        """The most adapters that could hold."""
        return self._at(max(self._high - 1, self._least))

    def _at(self, place: int) -> Point:
        adapters, (slots, budget, seqs) = int(self._allowed[place]), self._rest
        fitting = self._slots[self._slots <= min(slots, adapters)]
        return adapters, int(fitting[-1]), budget, seqs

    def next(self) -> Point | None:
        """Return what to play next: the proposal, steps away from it, then the middle; None where it is settled."""
        low, high = self._low, self._high
        if high - low < 2:
            return None
        if low < self._least and high == self._allowed.size:
            return self._at(self._start)
        if low < self._least or high == self._allowed.size:
            from_count = self._allowed[high if low < self._least else low]
            wanted = from_count * (1.0 - self._step if low < self._least else 1.0 + self._step)
            self._step *= 2.0
            return self._at(int(np.clip(np.searchsorted(self._allowed, wanted), low + 1, high - 1)))
        if self._allowed[high] <= (1.0 + _CLOSE) * self._allowed[low]:
            return None
        return self._at((low + high) // 2)

    def narrow(self, point: Point, holds: bool) -> None:
        """Take in whether a configuration holds."""
        place = int(np.searchsorted(self._allowed, point[0]))
        if holds:
            self._low = max(self._low, place)
        else:
            self._high = min(self._high, place)
