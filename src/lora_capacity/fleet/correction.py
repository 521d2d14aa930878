"""How far the steady twin is off for the servers of a fleet, as the event twin plays some of them."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lora_capacity.fleet.assign import Tags, assign
from lora_capacity.fleet.columns import Columns
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import Oracle
from lora_capacity.fleet.plays import Plays, Server, load_of

FloatArray = NDArray[np.float64]

_LOADS = np.array([0.88, 0.94, 0.99, 1.04, 1.1, 1.17])
"""Times the load at which servers are played: the twins differ by up to a fifth where every adapter has a slot."""

_STEADY_LOADS = np.linspace(0.8, 1.4, 31)
"""Times the load at which the steady twin is asked for the same: steps of 2 %."""

_PLAYED = 5
"""Servers that are played: they differ less than the shares of slots do, of which each has one at least."""

_LEAST = 0.88
"""Share of what the steady twin promises below which a share of slots is not used at all."""

_SEED = 1_000_003
"""Seed of these plays, which are for no answer: far from the seeds that answers are played with."""


def learn(
    oracle: Oracle, items: Items, tags: Tags, plays: Plays, columns: Columns, use: FloatArray
) -> Iterator[tuple[int, int]]:
    """Correct the steady twin by plays of the servers that would be used most.

    Args:
        oracle: Whose corrections are set.
        items: What is placed.
        tags: What may not stand together.
        plays: What plays the servers.
        columns: The servers found.
        use: How many of each the linear program uses, ``[columns]``.

    Yields:
        Pools and shares of slots, by index, of which the correction has changed.
    """
    servers = _most_used(items, tags, columns, use)
    if not servers:
        return
    capacity = _capacity(plays.reached(servers, oracle.fleet.headroom * _LOADS, [_SEED])[..., 0], _LOADS)
    promised = _capacity(_steady(oracle, items, servers), _STEADY_LOADS)
    ratio = promised / capacity
    for pool, mode in sorted({(server.pool, server.mode) for server in servers}):
        own = np.array([(server.pool, server.mode) == (pool, mode) for server in servers])
        off = float(np.quantile(ratio[own], 0.7))
        if mode and off > 1.0 / _LEAST:
            oracle.correction[pool, mode] = np.inf
        else:
            oracle.correction[pool, mode] *= off
        yield pool, mode


def _most_used(items: Items, tags: Tags, columns: Columns, use: FloatArray) -> list[Server]:
    """Return servers with items of their own: the most used of each share of slots, then the most used of all."""
    order = np.argsort(-use, kind="stable")
    order = order[use[order] > 1e-6]
    kinds = [(int(columns.found.pool[row]), int(columns.found.mode[row])) for row in order]
    first = [row for place, row in enumerate(order.tolist()) if kinds[place] not in kinds[:place]]
    chosen = (first + [row for row in order.tolist() if row not in first])[: max(_PLAYED, len(first))]
    servers = []
    for row in chosen:
        once = np.zeros(use.size, np.int64)
        once[row] = 1
        servers += assign(items, tags, columns.found, once)[0]
    return servers


def _steady(oracle: Oracle, items: Items, servers: list[Server]) -> FloatArray:
    """Return what the steady twin says that servers reach under its loads, ``[servers, loads]``."""
    load, reached = load_of(oracle.fleet, items, servers), []
    for row, server in enumerate(servers):
        own = load.take(np.full(_STEADY_LOADS.size, row))
        reached.append(oracle.reached(server.pool, own, server.mode, _STEADY_LOADS))
    return np.array(reached)


def _capacity(reached: FloatArray, loads: FloatArray) -> FloatArray:
    """Return the load between the last that holds and the first that fails, ``[servers]``."""
    fails = reached < 1.0
    first = np.where(fails.any(axis=1), np.argmax(fails, axis=1), loads.size)
    ends = np.concatenate([[loads[0] ** 2 / loads[1]], loads, [loads[-1] ** 2 / loads[-2]]])
    return np.asarray(np.sqrt(ends[first] * ends[first + 1]))
