"""Refinement by the event twin: which of the configurations that the steady twin finds near the best is the best.

The steady twin looks at thousands of configurations; the event twin simulates a few dozen. It starts from the frontiers
of some numbers of slots, the last numbers of adapters that the steady twin would accept by the calibration's error
alone, and narrows each down to where its own lies.

A configuration is simulated at the offered load and at a higher one, farther off than the margin that it needs, with
requests of several seeds. What the seeds differ by, the chance of an hour, takes the place of what the steady twin
allows for the swings of few slots.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.run import simulate
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Results, build_scenarios, table
from lora_capacity.search.frontier import Bracket
from lora_capacity.search.margin import (
    capacity_error,
    load_factors,
    load_headroom,
    starved_first_by,
    starving_probability,
)
from lora_capacity.search.objective import FLAT, Columns, near_best
from lora_capacity.search.problem import IntArray, Problem

POINT = ("max_cpu_loras", "max_loras", "max_num_batched_tokens", "max_num_seqs")
"""Columns that tell a configuration from the others."""

Point = tuple[int, int, int, int]

NEAR = 0.03
"""Share of the best throughput within which the steady twin's order is not trusted."""

_SLOTS = 4
"""Numbers of slots whose frontiers are refined, evenly from those near the best: a few dozen simulations in all."""

_ROUNDS = 2
"""Rounds after the first; each narrows a bracket of adapters, 4 % wide then, to a third."""

_LOADS = 2
"""Loads at which a configuration is simulated: the offered one, and one beyond the margin that it needs."""

_AROUND = (0.9, 0.96, 1.0)
"""Adapters of the first round over the steady twin's frontier: the event twin serves up to 14 % less near capacity
(see `lora_capacity.search.margin.SWING_ERROR`), rarely more."""

_INNER = 2
"""Adapters tried within a bracket in a round."""

_FARTHER = 1.5
"""Errors of the capacity that the higher load lies off, over the margin needed: the headroom lies between the loads."""


class EventRuns:
    """Configurations that the event twin has simulated so far, each at several loads and with several seeds."""

    def __init__(self, problem: Problem, seed: int, seeds: int, progress: Progress | None) -> None:
        self.problem, self.seeds, self.columns = problem, range(seed, seed + seeds), dict[str, NDArray[Any]]()
        self._progress, self._row = progress, dict[Point, int]()
        self._raw: dict[str, NDArray[Any]] = {}

    def assess(self, points: Iterable[Point]) -> Columns:
        """Return what `lora_capacity.search.assess` does, of configurations simulated now or before."""
        points = list(points)
        new = [point for point in dict.fromkeys(points) if point not in self._row]
        if new:
            found = self._simulate(new)
            self._row |= {point: len(self._row) + i for i, point in enumerate(new)}
            old = self._raw or {name: column[:0] for name, column in found.items()}
            self._raw = {name: np.concatenate([old[name], column]) for name, column in found.items()}
            self.columns = self._judged()
        rows = [self._row[point] for point in points]
        return {name: column[rows] for name, column in self.columns.items()}

    def _simulate(self, points: list[Point]) -> dict[str, NDArray[Any]]:
        """Return columns of configurations, services ``[configs, loads, seeds]`` and limits ``[configs, loads]``."""
        problem, seeds = self.problem, np.array(self.seeds)
        adapters, max_loras, budget, seqs = np.array(points).T
        settings = {**problem.settings, "max_num_batched_tokens": budget, "max_num_seqs": seqs}
        scenarios = build_scenarios(problem.workload, problem.calibration, adapters, max_loras, **settings)
        error = _FARTHER * capacity_error(problem.calibration, scenarios)
        factors = load_factors(error, problem.risk, _LOADS)
        shape = (len(points), _LOADS, len(seeds))
        found = simulate(
            problem.calibration,
            scenarios.take(np.repeat(np.arange(len(points)), _LOADS * len(seeds))),
            problem.workload,
            engine="event",
            seed=np.broadcast_to(seeds, shape).ravel(),
            load=np.broadcast_to(factors[..., np.newaxis], shape).ravel(),
            progress=self._progress,
        )
        whole = dataclasses.replace(found, events=None)
        every: Any = jax.tree.map(lambda values: values.reshape(*shape, *values.shape[1:]), whole)
        at_offered: Any = jax.tree.map(lambda values: values[:, 0], every)
        means: Results = jax.tree.map(lambda values: values.mean(axis=1, dtype=values.dtype), at_offered)
        means = dataclasses.replace(means, status=at_offered.status.max(axis=1), limit=at_offered.limit[:, 0])
        return table(scenarios, means, problem.threshold) | {
            "service_by_load": every.service,
            "limit_by_load": every.limit[..., 0],
            "factors": factors,
        }

    def _judged(self) -> dict[str, NDArray[Any]]:
        """Add the margin to starvation, whose error is the calibration's and the spread over seeds."""
        columns = dict(self._raw)
        services, limits, factors = (columns.pop(name) for name in ("service_by_load", "limit_by_load", "factors"))
        service = services.mean(axis=2)
        critical = load_headroom(service, factors, self.problem.threshold)
        spread = _spread(services, columns)
        error = np.hypot(self.problem.calibration.capacity_error, spread)
        return columns | {
            "critical_load": critical,
            "starving_probability": starving_probability(critical, error),
            "limit_beyond": starved_first_by(service, limits, self.problem.threshold),
            "spread": spread,
        }


def _spread(services: Float[np.ndarray, "configs loads seeds"], columns: Columns) -> Float[np.ndarray, " configs"]:
    """Standard deviation over seeds of the logarithm of the throughput, pooled over configurations of equal slots."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.log(services).var(axis=2, ddof=1 if services.shape[2] > 1 else 0).mean(axis=1)
    _, group = np.unique(np.stack([columns[name] for name in POINT[1:]]), axis=1, return_inverse=True)
    known = ~np.isnan(variance)
    total = np.bincount(group.ravel()[known], variance[known], group.max() + 1)
    count = np.bincount(group.ravel()[known], minlength=group.max() + 1)
    return np.asarray(np.sqrt(total / np.maximum(count, 1))[group.ravel()])


def refine(problem: Problem, steady: Columns, runs: EventRuns) -> Columns:
    """Return what the event twin says of the configurations near the best by the steady twin.

    Args:
        problem: What to look for, and where.
        steady: Configurations and what the steady twin says of them, as `search` returns.
        runs: What simulates them.

    Returns:
        Columns as of `lora_capacity.search.assess`; none if the steady twin finds nothing acceptable.
    """
    frontiers = _frontiers(problem, steady)
    if not frontiers:
        return {}
    runs.assess(point for frontier in frontiers for point in _around(problem.allowed_adapters, frontier))
    for _ in range(_ROUNDS):
        new = [point for frontier in _promising(runs, frontiers) for point in _between(runs, frontier)]
        if not new:
            break
        runs.assess(new)
    return runs.columns


def _frontiers(problem: Problem, steady: Columns) -> list[Point]:
    """The steady twin's frontiers of some numbers of slots, of those with about the best throughput."""
    chance = starving_probability(steady["critical_load"], problem.calibration.capacity_error)
    verdict = problem.judge({**steady, "starving_probability": chance})
    good = np.flatnonzero(verdict == "acceptable")
    order = good[np.lexsort((-steady["max_cpu_loras"][good], *(steady[name][good] for name in POINT[1:])))]
    slots = np.stack([steady[name][order] for name in POINT[1:]])
    _, first = np.unique(slots, axis=1, return_index=True)
    last = order[np.sort(first)]
    share = NEAR + (problem.objective.within if problem.objective.goal == "fewest-slots" else FLAT)
    throughput = steady["throughput_tokens_per_s"]
    near = last[near_best(throughput[last], share)]
    near = near[np.argsort(steady["max_loras"][near], kind="stable")]
    kept = near[np.unique(np.rint(np.linspace(0, near.size - 1, _SLOTS)).astype(int))] if near.size else near
    chosen = problem.choose(steady)
    rows = dict.fromkeys([*kept.tolist(), *([] if chosen is None else [chosen])])
    by_slots = {tuple(int(steady[name][row]) for name in POINT[1:]): row for row in rows}
    return [point_of(steady, row) for row in by_slots.values()]


def point_of(columns: Columns, row: int) -> Point:
    """Return the configuration of a row."""
    adapters, slots, budget, seqs = (int(columns[name][row]) for name in POINT)
    return adapters, slots, budget, seqs


def _around(allowed: IntArray, frontier: Point) -> list[Point]:
    """Allowed numbers of adapters about the frontier."""
    wanted = np.rint(np.multiply(_AROUND, frontier[0])).astype(np.int64)
    places = np.searchsorted(allowed, np.clip(wanted, max(frontier[1], int(allowed[0])), int(allowed[-1])))
    return [_point(allowed, place, frontier) for place in np.unique(places).tolist()]


def _point(allowed: IntArray, place: int, frontier: Point) -> Point:
    """The frontier with another number of adapters, the last allowed one where the place is beyond."""
    return int(allowed[min(place, allowed.size - 1)]), *frontier[1:]


def _own(columns: Columns, frontier: Point) -> NDArray[np.bool_]:
    """Which configurations have the frontier's slots and settings."""
    return np.asarray(np.logical_and.reduce([columns[name] == frontier[i] for i, name in enumerate(POINT) if i]))


def _promising(runs: EventRuns, frontiers: list[Point]) -> list[Point]:
    """The frontiers worth narrowing down: those that could beat what is best so far."""
    throughput = runs.columns["throughput_tokens_per_s"]
    acceptable = runs.problem.judge(runs.columns) == "acceptable"
    best = np.where(acceptable, throughput, 0.0).max(initial=0.0)

    def could_reach(frontier: Point) -> float:
        return float(np.nanmax(np.where(_own(runs.columns, frontier), throughput, 0.0), initial=0.0))

    return [frontier for frontier in frontiers if could_reach(frontier) >= (1.0 - FLAT) * best]


def _between(runs: EventRuns, frontier: Point) -> list[Point]:
    """Adapters between the last acceptable and the first that is not, or beyond all that were simulated."""
    allowed, own = runs.problem.allowed_adapters, _own(runs.columns, frontier)
    adapters, order = np.unique(runs.columns["max_cpu_loras"][own], return_index=True)
    verdicts = runs.problem.judge(runs.columns)[own][order]
    fails = ~np.isin(verdicts, ("acceptable", "too_slow"))  # what is too slow does not end the walk
    tried = np.searchsorted(allowed, adapters).astype(np.float64)
    bracket = Bracket.between(np.array(-1), np.array(allowed.size)).narrowed(tried, fails.astype(np.float64))
    low, high = int(bracket.low), int(bracket.high)
    if low < 0:  # none so few is acceptable
        below = int(np.searchsorted(allowed, max(int(_AROUND[0] * allowed[high]), frontier[1])))
        return [] if below >= high else [_point(allowed, below, frontier)]
    if high >= allowed.size and low < allowed.size - 1:
        beyond = int(allowed[low] / _AROUND[1]) + 1
        return [_point(allowed, int(np.searchsorted(allowed, beyond)), frontier)]
    places = np.arange(low + 1, high)
    if places.size > _INNER:
        places = np.unique(np.linspace(low + 1, high - 1, _INNER + 2).astype(int)[1:-1])
    return [_point(allowed, place, frontier) for place in places.tolist()]
