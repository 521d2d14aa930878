"""The surroundings of a recommendation: a grid over adapters and slots, and the line of the chosen slots through it."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from lora_capacity.run import simulate
from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import Results, Scenarios, build_scenarios
from lora_capacity.search import Candidate
from lora_capacity.search.margin import capacity_error
from lora_capacity.search.objective import Columns
from lora_capacity.search.problem import Problem

Z_90 = 1.6448536269514722
"""Standard deviations of a normal law within which 90 % lie."""

_BEYOND = 1.8
"""How far the grid reaches, in times the recommended adapters: past where servers with any slots starve."""

_DEAD_ROWS = 3
"""Rows of servers that do not start: enough to see the edge and to hold its name."""

_FINER = ("critical_load", "starving_probability")
"""Columns that a recommendation tells from more loads than its surroundings are looked at with."""

_LATENCIES = ("itl_s", "ttft_s")


@dataclass(frozen=True)
class PlanGrid:
    """Predictions over a grid of adapters and slots, around a recommendation that is on it.

    Attributes:
        adapters: Numbers of adapters, ascending, ``[columns]``.
        slots: Numbers of slots, ascending, ``[rows]``.
        best: Column and row of the recommendation.
        values: Columns of `assess`, ``[rows, columns]``; more slots than adapters have the verdict ``impossible``.
        verdict: Labels of `judge`, or ``impossible``, ``[rows, columns]``.
        bottleneck: Label of its `Bottleneck`, or the verdict where it does not start, ``[rows, columns]``.
    """

    adapters: Int[np.ndarray, " columns"]
    slots: Int[np.ndarray, " rows"]
    best: tuple[int, int]
    values: Columns
    verdict: NDArray[Any]
    bottleneck: NDArray[Any]

    @classmethod
    def around(cls, problem: Problem, best: Candidate, columns: int, rows: int) -> Self:
        """Predict a grid of about so many columns and rows around the recommended configuration.

        It reaches from one adapter to well beyond the recommended number, and from one slot to where the server does
        not start any more.
        """
        adapters = _adapters(problem, best.max_cpu_loras, columns)
        slots = _slots(problem, int(adapters[-1]), best, rows)
        across, up = np.meshgrid(adapters, slots)
        possible = up <= across
        found = problem.assess(across[possible], up[possible])
        verdict = np.full(across.shape, "impossible", dtype=object)
        verdict[possible] = problem.judge(found)
        bound = verdict.copy()
        starts = np.array([bool(label) for label in found["limit"]])
        bound[possible] = np.where(starts, found["limit"], verdict[possible])
        place = (int(np.searchsorted(adapters, best.max_cpu_loras)), int(np.searchsorted(slots, best.max_loras)))
        values = _spread(found, possible)
        for name in _FINER:
            values[name][place[1], place[0]] = getattr(best, name)
        return cls(adapters, slots, place, values, verdict, bound)


@dataclass(frozen=True)
class Curve:
    """Predictions against the number of adapters at the recommended number of slots, with 90 % intervals.

    The true server is taken to be faster or slower by a factor, lognormal with the calibration's error. One that is
    slower by a factor under some load is the predicted one under that many times the load, looked at for as much
    shorter, in slow motion: throughput is lower and latencies are higher by the factor.

    Attributes:
        adapters: Numbers of adapters, ascending, ``[points]``.
        values: Columns of `assess`, ``[points]``.
        low: Lower ends of the intervals of ``throughput_tokens_per_s``, ``itl_s`` and ``ttft_s``, each ``[points]``.
        high: Upper ends.
        verdict: Labels of `judge`, ``[points]``.
    """

    adapters: Int[np.ndarray, " points"]
    values: Columns
    low: Columns
    high: Columns
    verdict: NDArray[Any]

    @classmethod
    def through(cls, problem: Problem, best: Candidate, most_adapters: int, points: int) -> Self:
        """Predict at most so many points of the line, the recommended configuration among them."""
        adapters = _stepped(best.max_cpu_loras, best.max_loras, max(most_adapters, best.max_cpu_loras), points)
        found = problem.assess(adapters, best.max_loras)
        faster, slower = (_paced(problem, adapters, best.max_loras, found, sign * Z_90) for sign in (-1.0, 1.0))
        # The prediction lies within, even where a quantity does not move one way with the server's speed.
        every = {name: np.stack([found[name], faster[name], slower[name]]) for name in faster}
        low = {name: np.fmin.reduce(each) for name, each in every.items()}
        high = {name: np.fmax.reduce(each) for name, each in every.items()}
        verdict = problem.judge(found)
        at = adapters == best.max_cpu_loras
        finer = {name: np.where(at, getattr(best, name), found[name]) for name in _FINER}
        return cls(adapters, {**found, **finer}, low, high, verdict)


def _paced(
    problem: Problem, adapters: Int[np.ndarray, " points"], slots: int, found: Columns, deviations: float
) -> dict[str, Float[np.ndarray, " points"]]:
    """Predict servers that are slower by so many standard deviations of the capacity's error."""
    scenarios = build_scenarios(problem.workload, problem.calibration, adapters, slots, **problem.settings)
    error = np.hypot(capacity_error(problem.calibration, scenarios), found["extrapolation_error"])
    factor = np.exp(deviations * error)
    results = run_at(problem, scenarios, factor, factor)
    return {
        "throughput_tokens_per_s": np.asarray(results.throughput_tokens_per_s, np.float64) / factor,
        **{name: np.asarray(getattr(results, name), np.float64) * factor for name in _LATENCIES},
    }


def run_at(
    problem: Problem,
    scenarios: Scenarios,
    load: Float[np.ndarray, " configs"],
    shorter: Float[np.ndarray, " configs"] | float = 1.0,
    classes: int = 16,
) -> Results:
    """Predict configurations under multiples of their load.

    Args:
        problem: Whose calibration and output lengths hold.
        scenarios: The configurations, ``[configs]``.
        load: Factors of all request rates.
        shorter: Factors by which the horizon is shorter.
        classes: Adapters of more different rates and ranks than this are merged, see `with_classes`.
    """
    few = min(classes, scenarios.class_count.shape[1])
    return simulate(problem.calibration, with_classes(scenarios, few).scaled(load, shorter), problem.workload)


def _adapters(problem: Problem, best: int, count: int) -> Int[np.ndarray, " columns"]:
    available = problem.workload.adapters.max_count
    reach = max(round(_BEYOND * best), best + 4)
    return _stepped(best, 1, reach if available is None else min(reach, available), count)


def _stepped(best: int, first: int, last: int, count: int) -> Int[np.ndarray, " numbers"]:
    """Return at most ``count`` + 1 numbers in equal steps from ``first`` to ``last``, ``best`` among them."""
    step = max(1, -(-(last - first) // count))
    return np.arange(best - (best - first) // step * step, last + 1, step)


def _slots(problem: Problem, most: int, best: Candidate, count: int) -> Int[np.ndarray, " rows"]:
    """Return about so many numbers of slots in equal ratios, a few of which do not start if any does not."""
    slots = np.unique(np.rint(np.geomspace(1, most, 2 * count)).astype(np.int64))
    alive = np.flatnonzero(problem.assess(np.full(slots.size, most), slots, loads=2)["limit"] != "")
    slots = slots[: (int(alive[-1]) + 1 if alive.size else 0) + 2 * _DEAD_ROWS]
    last = max(int(slots[-1]), best.max_loras)
    rows = np.unique(np.rint(np.geomspace(1, last, count)).astype(np.int64))
    near = int(np.argmin(np.abs(np.log(rows / best.max_loras))))
    if rows[near] not in (1, last):
        rows[near] = best.max_loras
    return np.unique(np.append(rows, best.max_loras))


def _spread(found: Columns, possible: Bool[np.ndarray, "rows columns"]) -> dict[str, NDArray[Any]]:
    """Lay columns over the possible configurations out on the grid, NaN or empty elsewhere."""
    grids = {}
    for name, column in found.items():
        textual = column.dtype == object
        kind = object if textual else np.float64
        grids[name] = np.full(possible.shape, "" if textual else np.nan, dtype=kind)
        grids[name][possible] = column
    return grids
