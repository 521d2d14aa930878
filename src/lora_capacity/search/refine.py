"""The event twin's say: which of the configurations that the steady twin finds near the best is the best.

The steady twin looks at thousands of configurations; the event twin plays a few dozen. It starts from the frontiers of
some numbers of slots, the last numbers of adapters that the steady twin would accept by the calibration's error alone,
and narrows each down to where its own lies.

A configuration is played at the offered load and at a higher one, farther off than the margin that it needs, with
requests of several seeds. What the seeds differ by, the chance of an hour, takes the place of what the steady twin
allows for the swings of few slots.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from lora_capacity.run import play_workload
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import Bottleneck, Results, build_scenarios, table
from lora_capacity.search.margin import capacity_error, critical_load, load_factors, starving_probability
from lora_capacity.search.objective import FLAT, Columns
from lora_capacity.search.problem import IntArray, Problem

POINT = ("max_cpu_loras", "max_loras", "max_num_batched_tokens", "max_num_seqs")
"""Columns that tell a configuration from the others."""

Point = tuple[int, int, int, int]

NEAR = 0.03
"""Share of the best throughput within which the steady twin's order is not trusted."""

_SLOTS, _ROUNDS, _LOADS = 4, 2, 2
_AROUND = (0.9, 0.96, 1.0)
_FARTHER = 1.5


class Played:
    """Configurations played so far, each at several loads and with several seeds."""

    def __init__(self, problem: Problem, seed: int, seeds: int, progress: Progress | None) -> None:
        self.problem, self.seeds, self.columns = problem, range(seed, seed + seeds), dict[str, NDArray[Any]]()
        self._progress, self._row = progress, dict[Point, int]()
        self._settled: Any = None
        self._raw: dict[str, NDArray[Any]] = {}

    def assess(self, points: Iterable[Point]) -> Columns:
        """Return what `lora_capacity.search.assess` does, of configurations played now or before."""
        points = list(points)
        new = [point for point in dict.fromkeys(points) if point not in self._row]
        if new:
            found = self._play(new)
            self._row |= {point: len(self._row) + i for i, point in enumerate(new)}
            old = self._raw or {name: column[:0] for name, column in found.items()}
            self._raw = {name: np.concatenate([old[name], column]) for name, column in found.items()}
            self.columns = self._judged()
        rows = [self._row[point] for point in points]
        return {name: column[rows] for name, column in self.columns.items()}

    def _play(self, points: list[Point]) -> dict[str, NDArray[Any]]:
        """Return columns of configurations, services ``[configs, loads, seeds]`` and limits ``[configs, loads]``."""
        problem, seeds = self.problem, np.array(self.seeds)
        adapters, max_loras, budget, seqs = np.array(points).T
        settings = {**problem.settings, "max_num_batched_tokens": budget, "max_num_seqs": seqs}
        scenarios = build_scenarios(problem.workload, problem.calibration, adapters, max_loras, **settings)
        error = _FARTHER * capacity_error(problem.calibration, scenarios)
        factors = load_factors(error, problem.risk, _LOADS)
        shape = (len(points), _LOADS, len(seeds))
        results = play_workload(
            problem.calibration,
            jax.tree.map(lambda values: np.repeat(np.asarray(values), _LOADS * len(seeds), axis=0), scenarios),
            problem.workload,
            seed=np.broadcast_to(seeds, shape).ravel(),
            load=np.broadcast_to(factors[..., np.newaxis], shape).ravel(),
            progress=self._progress,
        )
        played = dataclasses.replace(results, events=None)
        every: Any = jax.tree.map(lambda values: values.reshape(*shape, *values.shape[1:]), played)
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
        critical = critical_load(service, factors, self.problem.threshold)
        spread = _spread(services, columns)
        starved = service <= 1.0 - self.problem.threshold
        first = limits[np.arange(len(limits)), np.argmax(starved, axis=1)]
        beyond = [Bottleneck(code).label if some else "" for code, some in zip(first, starved.any(axis=1), strict=True)]
        error = np.hypot(self.problem.calibration.capacity_error, spread)
        return columns | {
            "critical_load": critical,
            "starving_probability": starving_probability(critical, error),
            "limit_beyond": np.array(beyond, dtype=object),
            "spread": spread,
        }


def _spread(services: NDArray[Any], columns: Columns) -> NDArray[np.float64]:
    """Standard deviation over seeds of the logarithm of the throughput, pooled over configurations of equal slots."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.log(services).var(axis=2, ddof=1 if services.shape[2] > 1 else 0).mean(axis=1)
    _, group = np.unique(np.stack([columns[name] for name in POINT[1:]]), axis=1, return_inverse=True)
    known = ~np.isnan(variance)
    total = np.bincount(group.ravel()[known], variance[known], group.max() + 1)
    count = np.bincount(group.ravel()[known], minlength=group.max() + 1)
    return np.asarray(np.sqrt(total / np.maximum(count, 1))[group.ravel()])


def settle(problem: Problem, steady: Columns, played: Played) -> Columns:
    """Return what the event twin says of the configurations near the best by the steady twin.

    Args:
        problem: What to look for, and where.
        steady: Configurations and what the steady twin says of them, as `search` returns.
        played: What plays them.

    Returns:
        Columns as of `lora_capacity.search.assess`; none if the steady twin finds nothing acceptable.
    """
    frontiers = _frontiers(problem, steady)
    if not frontiers:
        return {}
    allowed = problem.allowed_adapters
    places = [(np.searchsorted(allowed, _around(allowed, frontier)), frontier) for frontier in frontiers]
    played.assess(_point(allowed, place, frontier) for tried, frontier in places for place in np.unique(tried).tolist())
    for _ in range(_ROUNDS):
        new = [point for frontier in _best(played, frontiers) for point in _between(played, frontier)]
        if not new:
            break
        played.assess(new)
    return played.columns


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
    near = last[throughput[last] >= (1.0 - share) * throughput[last].max(initial=0.0)]
    near = near[np.argsort(steady["max_loras"][near], kind="stable")]
    kept = near[np.unique(np.rint(np.linspace(0, near.size - 1, _SLOTS)).astype(int))] if near.size else near
    chosen = problem.choose(steady)
    rows = dict.fromkeys([*kept.tolist(), *([] if chosen is None else [chosen])])
    by_slots = {tuple(int(steady[name][row]) for name in POINT[1:]): row for row in rows}
    return [_row_point(steady, row) for row in by_slots.values()]


def _row_point(columns: Columns, row: int) -> Point:
    adapters, slots, budget, seqs = (int(columns[name][row]) for name in POINT)
    return adapters, slots, budget, seqs


def _around(allowed: IntArray, frontier: Point) -> IntArray:
    """Numbers of adapters about the frontier, as many as there are allowed ones."""
    wanted = np.rint(np.multiply(_AROUND, frontier[0])).astype(np.int64)
    return np.clip(wanted, max(frontier[1], int(allowed[0])), int(allowed[-1]))


def _point(allowed: IntArray, place: int, frontier: Point) -> Point:
    return int(allowed[min(place, allowed.size - 1)]), *frontier[1:]


def _best(played: Played, frontiers: list[Point]) -> list[Point]:
    """The frontiers worth narrowing down: those that could beat what is best so far."""
    columns, problem = played.columns, played.problem
    throughput = np.where(problem.judge(columns) == "acceptable", columns["throughput_tokens_per_s"], 0.0)
    best = throughput.max(initial=0.0)

    def could_reach(frontier: Point) -> float:
        own = np.logical_and.reduce([columns[name] == frontier[i] for i, name in enumerate(POINT) if i])
        return float(np.nanmax(np.where(own, columns["throughput_tokens_per_s"], 0.0), initial=0.0))

    return [frontier for frontier in frontiers if could_reach(frontier) >= (1.0 - FLAT) * best]


def _between(played: Played, frontier: Point) -> list[Point]:
    """Numbers of adapters between the last acceptable and the first that is not, or beyond all that were played."""
    columns, allowed = played.columns, played.problem.allowed_adapters
    own = np.logical_and.reduce([columns[name] == frontier[i] for i, name in enumerate(POINT) if i])
    adapters = columns["max_cpu_loras"][own]
    good = np.isin(played.problem.judge(columns)[own], ("acceptable", "too_slow"))
    first_bad = int(adapters[~good].min(initial=np.iinfo(np.int64).max))
    last_good = int(adapters[good & (adapters < first_bad)].max(initial=0))
    low = int(np.searchsorted(allowed, last_good, side="right")) if last_good else -1
    high = int(np.searchsorted(allowed, first_bad))
    if not last_good:  # none so few is acceptable
        below = int(np.searchsorted(allowed, max(int(_AROUND[0] * first_bad), frontier[1])))
        return [] if below >= high else [_point(allowed, below, frontier)]
    if high >= allowed.size and last_good < allowed[-1]:
        return [_point(allowed, int(np.searchsorted(allowed, int(last_good / _AROUND[1]) + 1)), frontier)]
    inside = np.unique(np.linspace(low, high - 1, 4).astype(int)[1:3]) if high - low > 2 else np.arange(low, high)
    return [_point(allowed, place, frontier) for place in inside.tolist() if low <= place < high]
