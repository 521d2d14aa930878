"""Traffic over time: rates that are constant within windows which follow each other over the horizon."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lora_capacity.errors import InputError
from lora_capacity.tables import Column, Frame
from lora_capacity.workload._fields import RATE, FloatArray, read_only
from lora_capacity.workload.arrivals import MAX_CV, MIN_CV, Arrivals
from lora_capacity.workload.columns import Texts, read_columns

MAX_WINDOWS = 10_000
"""Most windows: ten minutes each make ten weeks; the steady twin solves every one of them."""

_RATE_COLUMNS = {
    ("adapter", "tenant", "client_id"): Column("text"),
    ("t_s",): Column(minimum=0),
    ("rate_per_s",): Column(minimum=0, maximum=RATE.maximum),
    ("cv",): Column(required=False, blank=True, minimum=0),
}


@dataclass(frozen=True, eq=False)
class Windows:
    """How rates change, relative to their means over the horizon.

    Attributes:
        edges_s: Where windows begin, the first at 0, and where the last ends, seconds, float64 ``[windows + 1]``.
        factor: Rate of each adapter in each window over its mean rate, float64 ``[windows, adapters]``; with one
            column, of all adapters. Its mean over the horizon is 1.
        base_factor: The same of the requests to the base model, float64 ``[windows]``.
        cv: Coefficient of variation of the gaps between an adapter's requests within each window, NaN where it is that
            of the workload's arrivals, float64 ``[windows, adapters]``; None: everywhere.

    Raises:
        InputError: If there are too many windows.
    """

    edges_s: FloatArray
    factor: FloatArray
    base_factor: FloatArray
    cv: FloatArray | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.factor) <= MAX_WINDOWS:
            raise InputError("windows", len(self.factor), f"1 to {MAX_WINDOWS}")
        for name in ("edges_s", "factor", "base_factor", "cv"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    def __len__(self) -> int:
        return len(self.factor)

    @classmethod
    def from_profile(cls, multipliers: ArrayLike, horizon_s: float) -> tuple[Self, float]:
        """Return windows in which all rates are multiplied alike, and the mean multiplier.

        Args:
            multipliers: Factors of all rates in equal parts of the horizon, >= 0, not all 0, ``[windows]``.
            horizon_s: Length of the horizon in seconds.
        """
        factor = np.asarray(multipliers, np.float64)
        mean = float(factor.mean())
        edges_s = np.linspace(0.0, horizon_s, factor.size + 1)
        return cls(edges_s, factor[:, np.newaxis] / mean, factor / mean), mean

    @property
    def lengths_s(self) -> Float[np.ndarray, " windows"]:
        """Length of each window in seconds."""
        return np.diff(self.edges_s)

    def factors(self, adapters: int) -> Float[np.ndarray, "windows {adapters}"]:
        """Return the factors of the first adapters."""
        if self.factor.shape[1] == 1:
            return np.broadcast_to(self.factor, (len(self), adapters))
        return self.factor[:, :adapters]

    def gaps_cv(self, rates_per_s: Float[np.ndarray, " adapters"], otherwise: float) -> Float[np.ndarray, " windows"]:
        """Return the coefficient of variation of the gaps in each window, over adapters.

        Variances of the counts of independent adapters add up: it is the root of the mean of its square, weighted by
        rate.

        Args:
            rates_per_s: Mean rates of the first adapters.
            otherwise: What holds where windows do not tell.
        """
        if self.cv is None:
            return np.full(len(self), otherwise)
        count = rates_per_s.size
        cv = np.where(np.isnan(self.cv[:, :count]), otherwise, self.cv[:, :count])
        weight = rates_per_s * self.factors(count)
        total = weight.sum(axis=1)
        squared = (weight * cv**2).sum(axis=1) / np.where(total > 0, total, 1.0)
        return np.where(total > 0, np.sqrt(squared), otherwise)

    def stretched(self, by: float) -> Self:
        """Return the same windows, each so many times as long."""
        return replace(self, edges_s=self.edges_s * by)

    def sample(
        self, rng: np.random.Generator, adapter: int | None, rate_per_s: float, arrivals: Arrivals
    ) -> Float[np.ndarray, " arrivals"]:
        """Draw the arrivals of one adapter.

        One stationary process is drawn and its time passes faster where the rate is higher, so that gaps have the same
        variation everywhere; where windows have a cv of their own, every window has a stationary process of its own.

        Args:
            rng: Source of randomness; advanced.
            adapter: Index of the adapter, None for the base model.
            rate_per_s: Its mean rate over the horizon, > 0.
            arrivals: The process where windows do not tell.

        Returns:
            Arrival times in seconds, ascending, float64 ``[arrivals]``.
        """
        factor = self.base_factor if adapter is None else self.factor[:, min(adapter, self.factor.shape[1] - 1)]
        if self.cv is None or adapter is None:
            passed_s = np.concatenate([[0.0], np.cumsum(factor * self.lengths_s)])
            drawn_s = arrivals.sample(rng, rate_per_s, float(passed_s[-1]))
            return np.asarray(np.interp(drawn_s, passed_s, self.edges_s))
        parts = [np.zeros(0)]
        for window in np.flatnonzero(factor > 0):
            cv = self.cv[window, adapter]
            process = arrivals if np.isnan(cv) else Arrivals("gamma", float(cv))
            start_s, length_s = float(self.edges_s[window]), float(self.lengths_s[window])
            parts.append(start_s + process.sample(rng, rate_per_s * float(factor[window]), length_s))
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class AdapterRates:
    """Rates of adapters over time.

    Attributes:
        names: Their names, ``[adapters]``.
        mean_per_s: Their mean rates over the horizon, > 0, float64 ``[adapters]``.
        windows: How they change.
        assumptions: What is taken for granted, one sentence each.
    """

    names: list[str]
    mean_per_s: FloatArray
    windows: Windows
    assumptions: tuple[str, ...]


def read_rates(path: Path | Frame, order: list[str] | None, horizon_s: float | None) -> AdapterRates:
    """Read a table of rates over time.

    Its columns are ``adapter`` (or ``tenant``, ``client_id``), ``t_s``, ``rate_per_s`` and, if known, ``cv``. A rate
    holds from its time, of which the earliest of the table is 0, until the adapter's next row; before its first
    row an adapter has no requests. The last window is as long as the one before it.

    Args:
        path: The table: CSV, JSON lines, Parquet, or in memory.
        order: Names of all adapters in order of importance; None: by falling mean rate, equal ones by name.
        horizon_s: Time looked at, in seconds; None: until the last window's end.

    Raises:
        InputError: If the table cannot be read, has two rows of an adapter and time, has other adapters than ``order``,
            has one time only and there is no horizon, or no adapter has requests.
    """
    found = read_columns(path, _RATE_COLUMNS)
    whose, (time_s, rate), cv = next(iter(found.values())), (found["t_s",], found["rate_per_s",]), found.get(("cv",))
    times_s, window = np.unique(time_s - time_s.min(), return_inverse=True)
    end_s = horizon_s
    if end_s is None:
        if times_s.size == 1:
            raise InputError("horizon_s", None, "a number of seconds", f"{path} has one time only")
        end_s = float(2.0 * times_s[-1] - times_s[-2])
    kept = times_s < end_s
    edges_s = np.append(times_s[kept], end_s)
    shape = (times_s.size, len(whose.names))
    rates, cvs = (
        _held(path, whose, window, shape, column) for column in (rate, np.full_like(rate, np.nan) if cv is None else cv)
    )
    rates, cvs = np.nan_to_num(rates[kept]), cvs[kept]
    mean = np.diff(edges_s) @ rates / end_s
    names = _ordered(path, whose.names, mean, order)
    if not names:
        raise InputError(f"{path}, rate_per_s", 0, f"an adapter with requests in the first {end_s:,.0f} s")
    place = np.array([whose.names.index(name) for name in names])
    rates, cvs, mean = rates[:, place], cvs[:, place], mean[place]
    assumptions = []
    if len(names) < len(whose.names):
        idle = len(whose.names) - len(names)
        assumptions.append(f"{idle} of {len(whose.names)} adapters have no requests in {end_s:,.0f} s and are ignored.")
    wild = (cvs > MAX_CV) & (rates > 0)
    if wild.any():
        assumptions.append(f"cv is capped at {MAX_CV:g} in {int(wild.sum())} windows of adapters.")
    # A cv of 0 stands where too few requests came to tell one.
    told = None if cv is None else np.where(cvs > 0, np.clip(cvs, MIN_CV, MAX_CV), np.nan)
    windows = Windows(edges_s, rates / mean, np.ones(len(rates)), told)
    return AdapterRates(names, mean, windows, tuple(assumptions))


def _held(
    path: Path | Frame, whose: Texts, window: np.ndarray, shape: tuple[int, int], values: FloatArray
) -> FloatArray:
    """Return values by window and adapter, each held until the adapter's next row, NaN before its first."""
    last = np.full(shape, -1)
    last[window, whose.index] = window
    if np.count_nonzero(last >= 0) < window.size:
        place = window * shape[1] + whose.index
        _, first = np.unique(place, return_index=True)
        row = int(np.setdiff1d(np.arange(place.size), first)[0])
        raise InputError(f"{path} row {row + 1}, t_s", whose.names[whose.index[row]], "every time of an adapter once")
    table = np.full(shape, np.nan)
    table[window, whose.index] = values
    since = np.maximum.accumulate(last, axis=0)
    held = np.take_along_axis(table, np.maximum(since, 0), axis=0)
    return np.where(since >= 0, held, np.nan)


def _ordered(path: Path | Frame, names: list[str], mean: FloatArray, order: list[str] | None) -> list[str]:
    """Return the names of adapters that have requests, in the order given or by falling rate."""
    rate = dict(zip(names, mean.tolist(), strict=True))
    if order is None:
        return sorted((name for name in names if rate[name] > 0), key=lambda name: (-rate[name], name))
    for name in names:
        if name not in order:
            raise InputError(f"{path}, adapter", name, "a name of adapters.list")
    return [name for name in order if rate.get(name, 0.0) > 0]
