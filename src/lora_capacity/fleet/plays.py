"""Servers played by the event twin, each with its own adapters and their own requests."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.fleet.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import SLOT_SHARES, Load, scenarios_of, slots_of
from lora_capacity.run.batches import Observation
from lora_capacity.run.drawn import Drawn
from lora_capacity.run.events import Source, run_events
from lora_capacity.run.requests import pack_first
from lora_capacity.run.tasks import Remembered
from lora_capacity.scenarios import Scenarios
from lora_capacity.search import Needed
from lora_capacity.search.margin import judged_columns
from lora_capacity.workload import Arrivals, Requests

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_STREAMS = 4096
"""Streams of requests kept: those of a few servers, which are played again under other loads."""


@dataclass
class Server:
    """A server in the making.

    Attributes:
        pool: Index of its pool.
        mode: Index of its slots per adapter in `SLOT_SHARES`.
        items: Its items, by index.
        name: Name of the server that runs now, if it is one.
    """

    pool: int
    mode: int
    items: list[int]
    name: str = ""

    def copy(self) -> "Server":
        """Return a server that can be changed without changing this one."""
        return replace(self, items=list(self.items))

    def adapters(self, items: Items) -> list[tuple[int, float]]:
        """Return its adapters, by index, and the share of each that is its own."""
        return [member for item in self.items for member in items.members[item]]

    def slots(self, items: Items) -> int:
        """Return its slots."""
        return int(slots_of(items.adapters[self.items].sum(keepdims=True), SLOT_SHARES[self.mode])[0])


def load_of(fleet: Fleet, items: Items, servers: Sequence[Server]) -> Load:
    """Return what servers are asked for, adapters of equal rank as a class of their mean rate, ``[servers, ranks]``."""
    ranks = np.unique(fleet.ranks)
    count, rate = np.zeros((len(servers), ranks.size)), np.zeros((len(servers), ranks.size))
    for row, server in enumerate(servers):
        for adapter, share in server.adapters(items):
            place = np.searchsorted(ranks, fleet.ranks[adapter])
            count[row, place] += 1
            rate[row, place] += share * fleet.rates_per_s[adapter]
    burst = np.array([items.burst[server.items].sum() for server in servers])
    # A class without adapters needs a rate too, which nothing is made of.
    mean = np.where(count > 0, rate / np.maximum(count, 1), fleet.rates_per_s.mean())
    return Load(count, mean, np.broadcast_to(ranks.astype(np.float64), count.shape), burst)


@dataclass
class Plays:
    """Plays servers of a fleet.

    Attributes:
        fleet: The fleet.
        items: What is placed.
        played: How many servers were played, over all loads and seeds.
    """

    fleet: Fleet
    items: Items
    played: int = 0

    def __post_init__(self) -> None:
        self._stream = Remembered(self._draw_stream, _STREAMS)

    def reached(self, servers: Sequence[Server], loads: ArrayLike, seeds: Sequence[int]) -> FloatArray:
        """Return how much of what is needed servers reach, ``[servers, loads, seeds]``: below 1 where one fails."""
        needed = Needed.within(self.fleet.traffic.goodput)
        columns = self.columns(servers, loads, seeds)
        reached = needed.reached(columns)
        # Adapters that are hardly ever asked for may send nothing in an hour: a server that starts then misses nothing.
        idle = np.isnan(reached) & ~np.isnan(columns["throughput_tokens_per_s"])
        return np.nan_to_num(np.where(idle, 1.0, reached))

    def columns(self, servers: Sequence[Server], loads: ArrayLike, seeds: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Play servers under loads with seeds.

        Args:
            servers: The servers, each with an item at least.
            loads: Times their load.
            seeds: Seeds of the requests; an adapter's are the same wherever it is placed.

        Returns:
            The columns of a simulation, ``[servers, loads, seeds]``.
        """
        factors = np.asarray(loads, np.float64).tolist()
        shape = (len(servers), len(factors), len(seeds))
        parts: dict[str, NDArray[Any]] = {}
        for pool in sorted({server.pool for server in servers}):
            rows = [row for row, server in enumerate(servers) if server.pool == pool]
            found = self._columns(pool, [servers[row] for row in rows], factors, seeds)
            for name, column in found.items():
                whole = parts.setdefault(name, np.zeros(shape, column.dtype))
                whole[rows] = column.reshape(len(rows), *shape[1:])
        self.played += int(np.prod(shape))
        return parts

    def _columns(
        self, pool: int, servers: Sequence[Server], loads: Sequence[float], seeds: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        each = [(server, load, seed) for server in servers for load in loads for seed in seeds]
        load = load_of(self.fleet, self.items, servers)
        own = np.repeat(np.arange(len(servers)), len(loads) * len(seeds))
        max_loras = np.array([server.slots(self.items) for server in servers])
        plain = scenarios_of(self.fleet, self.fleet.pools[pool], load, max_loras).take(own)
        scenarios = plain.scaled(np.array([factor for _, factor, _ in each]))
        source = Source.drawing(functools.partial(self._draw, each), None, self.fleet.traffic.output_tokens)
        calibration = self.fleet.pools[pool].calibration
        results = run_events(calibration, scenarios, source, Observation(), None, None)
        return judged_columns(scenarios, results)

    def _draw(
        self,
        played: Sequence[tuple[Server, float, int]],
        part: Scenarios,
        indices: Sequence[int],
        most: NDArray[np.int64],
    ) -> Drawn:
        """Return the requests of some servers played, each under its load and with its seed."""
        ranks, own = np.unique(self.fleet.ranks), [played[i] for i in indices]
        served = [[adapter for adapter, _ in server.adapters(self.items)] for server, _, _ in own]
        classes = [np.searchsorted(ranks, self.fleet.ranks[adapters]) for adapters in served]
        requests = [self._requests(*each) for each in own]
        return pack_first(part, requests, classes, most.tolist(), seed=0, indices=[seed for _, _, seed in own])

    def _requests(self, server: Server, load: float, seed: int) -> Requests:
        """Return the requests of a server's adapters, in order of arrival."""
        streams = [self._stream(adapter, share, load, seed) for adapter, share in server.adapters(self.items)]
        arrival_s, inputs, outputs = (np.concatenate(column) for column in zip(*streams, strict=True))
        adapter = np.repeat(np.arange(len(streams)), [len(stream[0]) for stream in streams])
        order = np.argsort(arrival_s, kind="stable")
        return Requests(arrival_s[order], adapter[order].astype(np.int32), inputs[order], outputs[order])

    def _draw_stream(self, adapter: int, share: float, load: float, seed: int) -> tuple[NDArray[Any], ...]:
        """Draw the requests of one adapter, those of a share of it being a renewal process of its own."""
        traffic = self.fleet.traffic
        arrivals = replace(traffic.arrivals, process="gamma", cv=float(self.fleet.cvs[adapter]))
        if self.fleet.cvs[adapter] == 1.0:
            arrivals = Arrivals()
        generator = np.random.default_rng([seed, adapter])
        rate_per_s = share * float(self.fleet.rates_per_s[adapter])
        arrival_s = arrivals.sample(generator, rate_per_s, traffic.horizon_s * load) / load
        return (
            arrival_s,
            traffic.input_tokens.sample(generator, arrival_s.size),
            traffic.output_tokens.sample(generator, arrival_s.size),
        )
