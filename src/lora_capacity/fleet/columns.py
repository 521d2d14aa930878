"""Servers that could be, as columns of a covering problem: filled along orders of classes as far as bounds are kept."""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import SLOT_SHARES, Load, Oracle

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TRIED = 7
"""Points of a path that are tried at once: each round narrows it eightfold, for seven evaluations."""

_TOPPED_UP = 1
"""Times that a server is filled on with the classes after the one that no longer fits."""

_PROMISING, _ALL_AGAIN = 0.93, 4
"""Share of the best worth from which on a share of slots is looked at in the next round; all are after so many."""

_TINY = 1e-12
"""Least worth of a server, where nothing is worth anything."""

_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the load, beside the number of adapters, in what an item is taken to cost a server: which of them is short
differs between servers, and each weight fills in another order."""

_PLAIN = (0.7, 0.6, 0.8)
"""Shares of the load, beside the number of adapters, in the values that are priced first: bounds that they give are
within a fifth of the best, which the linear program's own values reach only after many rounds."""

_NEAR = np.array([0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3])
"""Times the load of the server filled in the same way in the round before, at which the next is tried first."""

_WINDOWS = (1, 2, 4, 8)
"""Into how many ranges of rates the items are cut, each range overlapping the next by half, for the first servers."""

_PORTIONS = 48
"""Portions of a range that are tried, geometric over three decades: steps of 15 %."""

_MOST_ENUMERATED = 60_000
"""Servers, over pools and shares of slots, up to which all are looked at: the steady twin does in some ten seconds."""


class Found(NamedTuple):
    """Servers that keep their bounds.

    Attributes:
        pool: Index of the pool, ``[columns]``.
        mode: Index of the slots per adapter, ``[columns]``.
        counts: Items of each class, ``[columns, classes]``.
    """

    pool: IntArray
    mode: IntArray
    counts: IntArray


@dataclass
class Columns:
    """Finds servers that keep their bounds, and keeps those found.

    Attributes:
        oracle: What tells.
        items: What is placed.
        found: Those found so far, each once.
        exact: Whether they are all that there are.
        centre: Values of an item of each class that gave the best bound so far; None before the first.
    """

    oracle: Oracle
    items: Items
    found: Found = field(init=False)
    exact: bool = False
    centre: FloatArray | None = None

    def __post_init__(self) -> None:
        self._means = self.items.class_means()
        self._modes = [(pool, mode) for pool in range(len(self.oracle.fleet.pools)) for mode in range(len(SLOT_SHARES))]
        self._reach: dict[tuple[int, tuple[int, ...]], FloatArray] = {}
        self._promise, self._priced = np.ones((len(self.oracle.fleet.pools), len(SLOT_SHARES))), 0
        self._caps = np.unique(self._means["rank"])
        empty = np.zeros(0, np.int64)
        self.found = Found(empty, empty, np.zeros((0, self.items.count.size), np.int64))

    def load(self, counts: NDArray[np.number]) -> Load:
        """Return what servers of so many items are asked for, ``[servers, classes]``."""
        means = self._means
        return Load(
            np.asarray(counts * means["adapters"], np.float64),
            means["rate_per_s"] / means["adapters"],
            means["rank"],
            np.asarray(counts @ means["burst"], np.float64),
        )

    def drop(self, pool: int, mode: int) -> None:
        """Forget the servers of a pool with a share of slots, as another correction holds for them."""
        kept = (self.found.pool != pool) | (self.found.mode != mode)
        self.found = Found(*(values[kept] for values in self.found))
        self.exact = False

    def enumerate(self) -> bool:
        """Look at all servers if there are few enough; whether there are."""
        limits = self.items.count
        total = float(np.prod(limits + 1.0)) * len(self._modes)
        if total > _MOST_ENUMERATED:
            return False
        every = np.array(list(itertools.product(*(range(limit + 1) for limit in limits))))[1:]
        for pool, mode in self._modes:
            kept = every[self.oracle.keeps(pool, self.load(every), mode)]
            largest = _largest(kept)
            self._add(pool, np.full(len(largest), mode), largest)
        self.exact = True
        return True

    def plain_values(self) -> list[FloatArray]:
        """Return values of an item of each class that go with its load and its adapters alone, ``[classes]`` each."""
        shares = [self._means[name] / (self._means[name] @ self.items.count) for name in ("rate_per_s", "adapters")]
        return [weight * shares[0] + (1.0 - weight) * shares[1] for weight in _PLAIN]

    def price(self, value: FloatArray) -> None:
        """Look for servers whose items are worth most, for every pool, share of slots and largest rank.

        Args:
            value: What an item of each class is worth, ``[classes]``.
        """
        worth = np.concatenate([self._worth(value, float(cap)) for cap in self._caps])
        self._priced += 1
        for pool, promise in enumerate(self._promise):
            promising = (promise >= _PROMISING * promise.max()) | (self._priced % _ALL_AGAIN == 1)
            modes = np.flatnonzero(np.isfinite(self.oracle.correction[pool]) & promising)
            counts = self._fill(pool, np.repeat(modes, len(worth)), np.tile(worth, (modes.size, 1)))
            best = (counts @ value).reshape(modes.size, -1).max(axis=1, initial=0.0)
            promise[modes] = best / max(best.max(initial=0.0), _TINY)
            self._add(pool, np.repeat(modes, len(worth)), counts)

    def _worth(self, value: FloatArray, cap: float) -> FloatArray:
        """Return what classes up to a rank are worth for what they load a server with, ``[weights, classes]``."""
        means = self._means
        allowed = (means["rank"] <= cap) & (value > 0)
        rate = means["rate_per_s"] / means["rate_per_s"].sum()
        number = means["adapters"] / means["adapters"].sum()
        weight = np.array(_WEIGHTS)[:, np.newaxis]
        return np.where(allowed, value / (weight * rate + (1.0 - weight) * number), 0.0)

    def spread(self) -> None:
        """Add servers that hold a share of everything up to each rank, and servers of one class alone."""
        singles = np.identity(self.items.count.size)
        portions = np.geomspace(1e-3, 1.0, _PORTIONS)[:, np.newaxis]
        windows = np.array(self._windows())
        mixed = np.rint(portions * windows[:, np.newaxis]).astype(np.int64).reshape(-1, self.items.count.size)
        filled = np.flatnonzero(mixed.sum(axis=1))
        for pool in range(len(self.oracle.fleet.pools)):
            whole = np.zeros(len(singles), np.int64)
            self._add(pool, whole, self._fill(pool, whole, singles))
            for mode in range(len(SLOT_SHARES)):
                keeps = np.zeros(len(mixed), bool)
                keeps[filled] = self.oracle.keeps(pool, self.load(mixed[filled]), mode)
                most = [
                    place * _PORTIONS + np.flatnonzero(each)[-1:]
                    for place, each in enumerate(keeps.reshape(-1, _PORTIONS))
                ]
                rows = np.concatenate(most).astype(np.int64)
                self._add(pool, np.full(rows.size, mode), mixed[rows])

    def _windows(self) -> list[IntArray]:
        """Return all items of ranges of rates, up to each rank: what servers of about alike adapters are a part of."""
        order = np.argsort(np.argsort(self._means["rate_per_s"], kind="stable"))
        size, windows = order.size, []
        for cap in self._caps:
            for parts in _WINDOWS:
                for first in np.arange(2 * parts - 1) / (2 * parts):
                    inside = (order >= first * size) & (order < (first + 1.0 / parts) * size)
                    windows.append(np.where(inside & (self._means["rank"] <= cap), self.items.count, 0))
        return windows

    def _fill(self, pool: int, modes: IntArray, worth: FloatArray) -> IntArray:
        """Return the items of servers filled with what is worth most first, as far as they keep their bounds.

        Args:
            pool: Index of the pool.
            modes: Index of the slots per adapter of each server, ``[paths]``.
            worth: What a class is worth, 0 where it is left out, ``[paths, classes]``.
        """
        counts = np.zeros(worth.shape, np.int64)
        orders = np.argsort(-worth, axis=1, kind="stable")
        room = np.where(np.take_along_axis(worth, orders, axis=1) > 0, self.items.count[orders], 0)
        guess: FloatArray | None = self._reach.get((pool, tuple(modes)))
        for _ in range(1 + _TOPPED_UP):
            path = _Path(orders, room)
            low = self._advance(pool, modes, path, counts, guess)
            counts, room, guess = counts + path.taken(low), path.beyond(low), None
            if not room.any():
                break
        self._reach[pool, tuple(modes)] = counts @ self._means["rate_per_s"]
        return counts

    def _advance(
        self, pool: int, modes: IntArray, path: "_Path", counts: IntArray, guess: FloatArray | None
    ) -> IntArray:
        """Return how many items more each server takes along its path until one more would not fit, ``[paths]``."""
        low, high = np.zeros(len(modes), np.int64), path.length + 1
        first = None if guess is None else path.places_of(guess, self._means["rate_per_s"])
        while (open_ := np.flatnonzero(high - low > 1)).size:
            points = _between(low[open_], high[open_])
            if first is not None:
                points = np.sort(np.clip(first[open_], low[open_, np.newaxis] + 1, high[open_, np.newaxis] - 1), axis=1)
                first = None
            tried = path.taken(points, open_) + counts[open_, np.newaxis]
            load = self.load(tried.reshape(-1, counts.shape[1]))
            fits = self.oracle.keeps(pool, load, np.repeat(modes[open_], points.shape[1])).reshape(points.shape)
            fails = np.where(fits.all(axis=1), points.shape[1], np.argmin(fits, axis=1))
            padded = np.concatenate([low[open_, np.newaxis], points, high[open_, np.newaxis]], axis=1)
            rows = np.arange(open_.size)
            low[open_], high[open_] = padded[rows, fails], padded[rows, fails + 1]
        return low

    def _add(self, pool: int, modes: IntArray, counts: IntArray) -> None:
        filled = counts.sum(axis=1) > 0
        joined = np.concatenate([self.found.counts, counts[filled]])
        pools = np.concatenate([self.found.pool, np.full(filled.sum(), pool)])
        modes = np.concatenate([self.found.mode, modes[filled]])
        _, first = np.unique(np.column_stack([pools, modes, joined]), axis=0, return_index=True)
        first.sort()
        self.found = Found(pools[first], modes[first], joined[first])


class _Path:
    """Items in the order in which servers are filled with them.

    Args:
        orders: Classes in order, ``[paths, classes]``.
        room: Items of each that may still be taken, in the same order, ``[paths, classes]``.
    """

    def __init__(self, orders: IntArray, room: IntArray) -> None:
        self._orders, self._room, self._before = orders, room, np.cumsum(room, axis=1) - room
        self.length: IntArray = room.sum(axis=1)

    def taken(self, points: IntArray, rows: IntArray | None = None) -> IntArray:
        """Return the items of each class up to points, ``[…, classes]``, of some paths if not of all."""
        rows = np.arange(len(self._orders)) if rows is None else rows
        orders, room, before = (values[rows] for values in (self._orders, self._room, self._before))
        if points.ndim > 1:
            orders, room, before = (values[:, np.newaxis] for values in (orders, room, before))
        along = np.clip(points[..., np.newaxis] - before, 0, room)
        found = np.zeros_like(along)
        np.put_along_axis(found, np.broadcast_to(orders, along.shape), along, axis=-1)
        return np.asarray(found)

    def beyond(self, points: IntArray) -> IntArray:
        """Return the room of the classes behind the one at which each path stops, ``[paths, classes]``."""
        stops = (self._before + self._room > points[:, np.newaxis]) & (self._room > 0)
        last = np.where(stops.any(axis=1), np.argmax(stops, axis=1), self._room.shape[1])
        return np.asarray(np.where(np.arange(self._room.shape[1]) > last[:, np.newaxis], self._room, 0))

    def places_of(self, guess: FloatArray, rate_per_s: FloatArray) -> IntArray:
        """Return points at which the requests per second are about as guessed, ``[paths, tried]``."""
        rates = rate_per_s[self._orders]
        found = np.zeros((len(guess), _NEAR.size), np.int64)
        for row, expected in enumerate(guess):
            ends = np.concatenate([[0.0], np.cumsum(self._room[row] * rates[row])])
            items = np.concatenate([[0], np.cumsum(self._room[row])])
            found[row] = np.rint(np.interp(expected * _NEAR, ends, items)).astype(np.int64)
        return found


def _between(low: IntArray, high: IntArray) -> IntArray:
    """Return points between two, ascending, ``[paths, tried]``; geometric where these are far apart."""
    steps = np.arange(1, _TRIED + 1) / (_TRIED + 1)
    low, high = low[:, np.newaxis], high[:, np.newaxis]
    # A server holds few of the items that there may be.
    geometric = (low + 1) * (high / (low + 1)) ** steps - 1
    spaced = np.where(high > 4 * (low + 1), geometric, low + (high - low) * steps)
    return np.asarray(np.clip(np.rint(spaced), low + 1, high - 1), np.int64)


def _largest(counts: IntArray) -> IntArray:
    """Return the servers of which no other holds as many of everything."""
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    kept: list[IntArray] = []
    for row in counts[order]:
        if not kept or not np.all(np.array(kept) >= row, axis=1).any():
            kept.append(row)
    return np.array(kept, np.int64).reshape(len(kept), counts.shape[1])
