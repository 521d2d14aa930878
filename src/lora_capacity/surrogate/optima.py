"""Optima of many workloads at once by the steady twin: a grid for all of them, then refined around the best.

For a number of slots, the *sustained load* is the one at which the server starves: its throughput is 10 % below it.
The slots of the optimum are the fewest that sustain within 0.5 % of the most that any number of slots does: a choice
among near equals that does not jump from one workload to the next alike. Its adapters are then as many as send no more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from lora_capacity.calibration import Calibration
from lora_capacity.scenarios import STARVED_SHORTFALL
from lora_capacity.scenarios.workload_batch import FloatArray, IntArray, WorkloadBatch, column_like
from lora_capacity.search.frontier import Bracket
from lora_capacity.search.objective import near_best
from lora_capacity.surrogate.closed_form import full_batches
from lora_capacity.surrogate.simulation import simulate_workloads

GRID = 20
"""Numbers of adapters, and of slots, of the surface around an optimum."""

NEEDED = 1.0 - STARVED_SHORTFALL
"""Share of the offered load that a server must complete so as not to starve."""

_LEAST, _MOST = 0.12, 1.25
"""Loads of the grid over that of a full batch with one slot: from well below what anyone runs to where all starve."""

_ROUNDS, _INNER = 2, 7
"""Rounds that narrow a bracket of adapters, and numbers tried in each: 64-fold, to below a percent."""

_MORE_SLOTS = 8
"""Numbers of slots looked at around the best, besides the grid's."""

_BEYOND_BEST = 3
"""Places of the grid beyond the best up to which slots are looked at: what the event twin makes the best lies there."""

_NEAR = 1.06
"""Factor either way within which the frontier of slots between known ones is looked for."""

_FEW = 0.3
"""Least share of the lower end that a bracket begins at."""


@dataclass(frozen=True, eq=False)
class Surfaces:
    """What the steady twin says around the optima; arrays ``[workloads, …]``.

    Attributes:
        most_slots: Most slots with which the server starts, 0 if it does with none, ``[workloads]``.
        grid_adapters: Numbers of adapters of the surface, ascending, ``[workloads, 20]``.
        grid_slots: Numbers of slots of the surface, ascending, ``[workloads, 20]``.
        grid_throughput: Tokens per second, ``[workloads, adapters, slots]``; NaN where there would be more slots than
            adapters.
        slots: Numbers of slots whose sustained load is known, ascending, may repeat, ``[workloads, known]``.
        sustained_by_slots: Requests per second at which the server starves with them; NaN where it never has as many
            adapters.
    """

    most_slots: IntArray
    grid_adapters: IntArray
    grid_slots: IntArray
    grid_throughput: FloatArray
    slots: IntArray
    sustained_by_slots: FloatArray


@dataclass(frozen=True, eq=False)
class Optima:
    """The optimum of each question, ``[workloads]``.

    Attributes:
        max_cpu_loras: Adapters, A; 0 where none is feasible.
        max_loras: Slots, S; 0 where none is feasible.
        throughput_tokens_per_s: Tokens per second of completed requests there; NaN where none is feasible.
        sustained_per_s: Requests per second at which the server with S slots starves; NaN where none is feasible.
    """

    max_cpu_loras: IntArray
    max_loras: IntArray
    throughput_tokens_per_s: FloatArray
    sustained_per_s: FloatArray


def survey(calibration: Calibration, workloads: WorkloadBatch) -> Surfaces:
    """Predict a grid of configurations of each question, and find the loads at which they starve.

    Args:
        calibration: Whose costs hold.
        workloads: Workloads on servers.
    """
    known = _Frontiers(calibration, workloads)
    adapters, slots = known.grid()
    throughput = known.throughput(adapters[:, :, np.newaxis], slots[:, np.newaxis])
    known.narrow(slots, *known.brackets(adapters, throughput))
    known.look_around()
    return Surfaces(known.most_slots, adapters, slots, throughput, known.slots, known.sustained)


def choose(
    calibration: Calibration,
    workloads: WorkloadBatch,
    surfaces: Surfaces,
    correction: FloatArray | None = None,
) -> Optima:
    """Take the optimum of each question.

    Args:
        calibration: Whose costs hold.
        workloads: Workloads on servers.
        surfaces: What `survey` found of them.
        correction: Logarithm of what a server really sustains over what the steady twin says, in the shape of
            ``surfaces.slots``; none: 0.
    """
    factor = np.exp(np.zeros(surfaces.slots.shape) if correction is None else correction)
    best = [
        _fewest_near_best(slots, sustained, how_much)
        for slots, sustained, how_much in zip(surfaces.slots, surfaces.sustained_by_slots, factor, strict=True)
    ]
    slots, sustained, scale = (np.array(column) for column in zip(*best, strict=True))
    feasible = np.isfinite(sustained)
    adapters = np.where(feasible, workloads.adapters_at(np.nan_to_num(sustained)), 0)
    feasible &= adapters > 0
    slots = np.minimum(slots, adapters)
    throughput = np.full(len(workloads), np.nan)
    rows = np.flatnonzero(feasible)
    if rows.size:
        results = simulate_workloads(calibration, workloads.take(rows), adapters[rows], slots[rows])
        offered = workloads.offered_per_s(adapters)[rows] * workloads.tokens_per_request[rows]
        throughput[rows] = np.clip(results.throughput_tokens_per_s * scale[rows], NEEDED * offered, offered)
    return Optima(
        np.where(feasible, adapters, 0),
        np.where(feasible, slots, 0),
        throughput,
        np.where(feasible, sustained, np.nan),
    )


def _fewest_near_best(
    slots: Int[np.ndarray, " known"], sustained: Float[np.ndarray, " known"], factor: Float[np.ndarray, " known"]
) -> tuple[int, float, float]:
    """Fewest slots that sustain nearly as much as any, their load, and the correction there."""
    known = np.flatnonzero(~np.isnan(sustained))
    if not known.size:
        return 0, float("nan"), 1.0
    distinct, first = np.unique(slots[known], return_index=True)
    every = np.arange(distinct[0], distinct[-1] + 1)
    logs = np.log(np.stack([factor, sustained]))[:, known[first]]
    if distinct.size > 1:
        logs = PchipInterpolator(np.log(distinct), logs, axis=1)(np.log(every))
    scale, load = np.exp(logs[0]), np.exp(logs.sum(axis=0))
    place = int(near_best(load).argmax())
    return int(every[place]), float(load[place]), float(scale[place])


class _Frontiers:
    """Sustained loads by numbers of slots, as far as they are known."""

    def __init__(self, calibration: Calibration, workloads: WorkloadBatch) -> None:
        self.calibration, self.workloads = calibration, workloads
        self.most_slots = workloads.most_slots(calibration)
        self.mean_rate = workloads.rates_per_s.mean(axis=1)
        one = np.ones((len(workloads), 1), np.int64)
        self.reach_per_s = full_batches(calibration, workloads, one).load_per_s[:, 0].astype(np.float64)
        self.slots, self.sustained = np.zeros((len(workloads), 0), np.int64), np.zeros((len(workloads), 0))

    def grid(self) -> tuple[IntArray, IntArray]:
        """Numbers of adapters and of slots of the surface, ``[workloads, 20]`` each, ascending."""
        loads = self.reach_per_s[:, np.newaxis] * np.geomspace(_LEAST, _MOST, GRID)
        adapters = np.maximum(self.workloads.adapters_at(loads), 1)
        top = np.maximum(np.minimum(self.most_slots, adapters[:, -1]), 1)
        return adapters, np.rint(np.geomspace(np.ones_like(top), top, GRID, axis=1)).astype(np.int64)

    def throughput(self, adapters: NDArray[Any], slots: IntArray) -> FloatArray:
        """Tokens per second, in the common shape of both; NaN where slots outnumber adapters or do not fit."""
        adapters, slots = np.broadcast_arrays(adapters, slots)
        rows = np.broadcast_to(column_like(np.arange(len(self.workloads)), slots), slots.shape)
        sound = (slots <= adapters) & (slots <= column_like(self.most_slots, slots))
        found = np.full(slots.shape, np.nan)
        if sound.any():
            asked = self.workloads.take(rows[sound])
            results = simulate_workloads(self.calibration, asked, adapters[sound], slots[sound])
            found[sound] = results.throughput_tokens_per_s
        return found

    def _load(self, adapters: FloatArray) -> FloatArray:
        """Requests per second of fractional adapters, ``[workloads, …]``."""
        rate, base = (column_like(each, adapters) for each in (self.mean_rate, self.workloads.base_rate_per_s))
        return np.asarray(adapters * rate + base)

    def _short(self, adapters: FloatArray, slots: IntArray) -> FloatArray:
        """By how much throughput falls short of what is needed, as a share of the load; negative where it does not."""
        completed = self.throughput(adapters, slots) / column_like(self.workloads.tokens_per_request, adapters)
        return np.asarray(NEEDED - completed / self._load(adapters))

    def brackets(self, adapters: IntArray, throughput: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Adapters of the grid between which each number of slots begins to starve, ``[workloads, slots]`` each."""
        load = self.workloads.offered_per_s(adapters) * self.workloads.tokens_per_request[:, np.newaxis]
        starved = throughput < NEEDED * load[..., np.newaxis]
        first = np.where(starved.any(axis=1), starved.argmax(axis=1), GRID - 1)
        high = np.take_along_axis(adapters, first, axis=1).astype(np.float64)
        low = np.where(first > 0, np.take_along_axis(adapters, np.maximum(first - 1, 0), axis=1), 0.5)
        # Of few adapters the order of the round matters, which fractions leave out.
        size = self.workloads.rates_per_s.shape[1]
        return np.maximum(low - size, _FEW * low), high + size

    def narrow(self, slots: IntArray, low: FloatArray, high: FloatArray) -> None:
        """Find the sustained load with some numbers of slots, from brackets of adapters, ``[workloads, n]`` each."""
        bracket = Bracket.between(low, high)
        for _ in range(_ROUNDS):
            inner = np.exp(np.linspace(np.log(bracket.low), np.log(bracket.high), _INNER + 2, axis=-1))
            tried = inner[..., 1:-1] if np.isfinite(bracket.excess_high).all() else inner
            short = self._short(tried, slots[..., np.newaxis])
            bracket = bracket.narrowed(tried, short)
        low, high, short_low, short_high = bracket
        with np.errstate(invalid="ignore"):
            share = np.clip(-short_low / (short_high - short_low), 0.0, 1.0)
        adapters = low + share * (high - low)
        sustained = np.where(adapters >= slots, self._load(adapters), np.nan)
        self.slots = np.concatenate([self.slots, slots], axis=1)
        self.sustained = np.concatenate([self.sustained, sustained], axis=1)
        order = np.argsort(self.slots, axis=1, kind="stable")
        self.slots = np.take_along_axis(self.slots, order, axis=1)
        self.sustained = np.take_along_axis(self.sustained, order, axis=1)

    def look_around(self) -> None:
        """Look at more numbers of slots: between the last that sustains too little and what comes after the best."""
        load = np.where(np.isnan(self.sustained), -1.0, self.sustained)
        best, first = load.argmax(axis=1), near_best(load).argmax(axis=1)
        last = self.slots.shape[1] - 1
        row = np.arange(len(self.workloads))
        low, high = self.slots[row, np.maximum(first - 1, 0)], self.slots[row, np.minimum(best + _BEYOND_BEST, last)]
        slots = np.rint(np.geomspace(low, high, _MORE_SLOTS + 2, axis=1)).astype(np.int64)[:, 1:-1]
        guess = np.stack([_between(*each) for each in zip(slots, self.slots, self.sustained, strict=True)])
        adapters = (guess - self.workloads.base_rate_per_s[:, np.newaxis]) / self.mean_rate[:, np.newaxis]
        self.narrow(slots, adapters / _NEAR, adapters * _NEAR)


def _between(
    at: Int[np.ndarray, " wanted"], slots: Int[np.ndarray, " known"], sustained: Float[np.ndarray, " known"]
) -> Float[np.ndarray, " wanted"]:
    """Sustained loads between known ones; NaN where none is known."""
    known = ~np.isnan(sustained)
    return np.interp(at, slots[known], sustained[known]) if known.any() else np.full(at.shape, np.nan)
