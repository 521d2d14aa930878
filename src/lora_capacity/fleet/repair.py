"""Servers made to hold when they are played: what fails gives items up, and others or new servers take them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InfeasibleError
from lora_capacity.fleet.assign import Tags
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import SLOT_SHARES, Load, Oracle
from lora_capacity.fleet.plays import Plays, Server, load_of

FloatArray = NDArray[np.float64]

CHANCE = 1.02
"""Times the load at which a server is played: an hour's requests and their lengths differ by about a percent from one
seed to the next, and a server has to hold with those that nobody has seen."""

_SHED = 0.04
"""Share of its load that a server which fails gives up, twice as much each time that it fails again."""

_HOPEFUL = 0.94
"""Times the load at which the steady twin is asked where a server is to be closed: what it is off by from one server to
the next, so that the event twin decides."""

_LOOKED_AT, _TRIED = 64, 8
"""Servers, the least loaded first, that are asked whether they take an item; and numbers of items tried at once."""

_GRID = np.geomspace(0.9, 3.0, 32)
"""Times the load at which a server's headroom is looked for: steps of 4 %."""

_MOVES, _EVEN = 12, 1.05
"""Rounds of moves that even headrooms out, at most, and the ratio between the most and the least that is even."""

_ROUNDS = 8
"""Rounds of play and repair: by then a server has given up all that it has."""


@dataclass
class Workshop:
    """Changes servers until they hold.

    Attributes:
        oracle: What the steady twin says, for what goes where.
        items: What is placed.
        tags: What may not stand together.
        plays: What the event twin says, which decides.
        most: Servers of each pool at most, ``[pools]``.
        seeds: Seeds that a server has to hold with.
    """

    oracle: Oracle
    items: Items
    tags: Tags
    plays: Plays
    most: FloatArray
    seeds: Sequence[int]

    def hold(self, servers: Sequence[Server]) -> list[bool]:
        """Return whether servers hold with every seed, at the headroom and what chance asks for beside it."""
        if not servers:
            return []
        reached = self.plays.reached(servers, [self.oracle.fleet.headroom * CHANCE], self.seeds)
        return [bool(each.min() >= 1.0) for each in reached]

    def load(self, servers: Sequence[Server]) -> Load:
        """Return what servers are asked for."""
        return load_of(self.oracle.fleet, self.items, servers)

    def reached(self, servers: Sequence[Server], more: float = 1.0) -> FloatArray:
        """Return what the steady twin says that servers reach of what they need at times their load, ``[servers]``."""
        reached = np.zeros(len(servers))
        for pool, mode in {(server.pool, server.mode) for server in servers}:
            rows = [row for row, each in enumerate(servers) if (each.pool, each.mode) == (pool, mode)]
            reached[rows] = self.oracle.reached(pool, self.load([servers[row] for row in rows]), mode, more)
        return reached

    def insert(
        self,
        servers: list[Server],
        waiting: list[int],
        *,
        fresh: bool,
        more: float = 1.0,
        limits: FloatArray | None = None,
    ) -> tuple[set[int], list[int]]:
        """Put items onto servers that still keep their bounds with them, the largest first, each where most is left.

        Args:
            servers: The servers; changed, and new ones appended.
            waiting: The items.
            fresh: Whether new servers may be opened.
            more: Times the load at which the steady twin is asked; below 1 where plays decide anyway.
            limits: Servers of each pool at most; those of the workshop if not given.

        Returns:
            Indices of the servers changed, and the items that found no place.
        """
        changed: set[int] = set()
        queue, left = sorted(waiting, key=lambda each: -self.items.rate_per_s[each]), list[int]()
        while queue:
            place = self._place(servers, queue[0], more)
            if place is None and fresh:
                place = self._open(servers, queue[0], self.most if limits is None else limits)
            if place is None:
                left.append(queue.pop(0))
                continue
            taken = self._take(servers[place], queue, more)
            servers[place].items += queue[:taken]
            del queue[:taken]
            changed.add(place)
        return changed, left

    def _place(self, servers: Sequence[Server], item: int, more: float) -> int | None:
        """Return the server with the least load that takes an item, if any does."""
        load = [self.items.rate_per_s[server.items].sum() for server in servers]
        order = np.argsort(load, kind="stable").tolist()
        rows = [row for row in order if not self.tags.clash(item, servers[row].items)][:_LOOKED_AT]
        if not rows:
            return None
        tried = [Server(servers[row].pool, servers[row].mode, [*servers[row].items, item]) for row in rows]
        fits = np.flatnonzero(self.reached(tried, more) >= 1.0)
        return rows[int(fits[0])] if fits.size else None

    def _take(self, server: Server, queue: list[int], more: float) -> int:
        """Return how many of the first items of a queue a server takes, of which the first is known to fit."""
        low, high = 1, 1
        while high < len(queue) and not self.tags.clash(queue[high], server.items + queue[:high]):
            high += 1
        high += 1
        while high - low > 1:
            points = np.unique(np.linspace(low, high, _TRIED + 2).astype(np.int64)[1:-1])
            points = points[(points > low) & (points < high)]
            tried = [Server(server.pool, server.mode, server.items + queue[:point]) for point in points.tolist()]
            fits = self.reached(tried, more) >= 1.0
            ends = [low, *points.tolist(), high]
            first = int(np.argmin(fits)) if not fits.all() else fits.size
            low, high = ends[first], ends[first + 1]
        return low

    def _open(self, servers: list[Server], item: int, limits: FloatArray) -> int | None:
        """Open a server for an item, of the cheapest pool that has one left and holds it."""
        for pool in np.argsort([_price(each) for each in self.oracle.fleet.pools], kind="stable").tolist():
            if sum(server.pool == pool for server in servers) >= limits[pool]:
                continue
            opened = Server(pool, 0, [item])
            if self.reached([opened])[0] >= 1.0:
                servers.append(Server(pool, 0, []))
                return len(servers) - 1
        return None

    def repair(self, servers: list[Server]) -> list[int]:
        """Change servers until all hold.

        Args:
            servers: The servers; changed.

        Returns:
            The items that found no place.

        Raises:
            InfeasibleError: If an item alone on a server does not hold.
        """
        unsure, times, waiting = set(range(len(servers))), dict[int, int](), list[int]()
        for _ in range(_ROUNDS * 2):
            rows = sorted(row for row in unsure if servers[row].items)
            failing = [
                row for row, holds in zip(rows, self.hold([servers[row] for row in rows]), strict=True) if not holds
            ]
            for row in failing:
                times[row] = times.get(row, 0) + 1
                waiting += self._shed(servers[row], times[row])
            changed, waiting = self._insert_beside(servers, waiting, failing)
            unsure = set(failing) | changed
            if not unsure:
                break
        else:
            waiting += self._give_up(servers, unsure)
        servers[:] = [server for server in servers if server.items]
        return waiting

    def _insert_beside(
        self, servers: list[Server], waiting: list[int], failing: list[int]
    ) -> tuple[set[int], list[int]]:
        """Put items onto servers other than those that fail, as hopefully as need be, or onto new ones."""
        others = [row for row in range(len(servers)) if row not in failing]
        kept = [servers[row] for row in others]
        changed: set[int] = set()
        for more in (1.0, _HOPEFUL):
            placed, waiting = self.insert(kept, waiting, fresh=False, more=more)
            changed |= {others[row] for row in placed}
        opened: list[Server] = []
        if waiting:
            limits = self.most - np.bincount([server.pool for server in servers], minlength=self.most.size)
            _, waiting = self.insert(opened, waiting, fresh=True, limits=limits)
        servers += opened
        return changed | set(range(len(servers) - len(opened), len(servers))), waiting

    def _shed(self, server: Server, times: int) -> list[int]:
        """Take items off a server that fails; with few slots, give it a slot for every adapter first."""
        if server.mode:
            server.mode = 0
            if self.reached([server])[0] >= 1.0:
                return []
        share = min(_SHED * 2.0 ** (times - 1), 1.0)
        if len(server.items) == 1:
            adapter = self.oracle.fleet.names[self.items.members[server.items[0]][0][0]]
            raise InfeasibleError(
                f"adapter {adapter} does not keep its bounds on a server of its own when played; relax the bounds, "
                "or let it have more replicas"
            )
        wanted = share * self.items.rate_per_s[server.items].sum()
        order = sorted(server.items, key=lambda each: self.items.rate_per_s[each])
        shed: list[int] = []
        while len(order) > 1 and self.items.rate_per_s[shed].sum() < wanted:
            # The largest that is not more than what is still wanted, else the smallest.
            missing = wanted - self.items.rate_per_s[shed].sum()
            fitting = [each for each in order if self.items.rate_per_s[each] <= missing]
            shed.append(fitting[-1] if fitting else order[0])
            order.remove(shed[-1])
        server.items = order
        return shed

    def _give_up(self, servers: list[Server], unsure: set[int]) -> list[int]:
        given = [item for row in unsure for item in servers[row].items]
        for row in unsure:
            servers[row].items = []
        return given

    def close(self, servers: list[Server], attempts: int) -> list[Server]:
        """Return the servers with as many closed as others can take over, the least loaded first.

        Args:
            servers: Servers that hold.
            attempts: How many are closed at most.
        """
        while attempts > 0 and len(servers) > 1:
            load = self._rates(servers)
            room = load * (self.headroom(servers) / _HOPEFUL - 1.0)
            row = int(np.argmin(load))
            fewer = self._without(servers, row) if room.sum() - room[row] >= load[row] else None
            if fewer is None:
                break
            servers, attempts = fewer, attempts - 1
        return servers

    def _without(self, servers: list[Server], row: int) -> list[Server] | None:
        others = [server.copy() for place, server in enumerate(servers) if place != row]
        changed, left = self.insert(others, servers[row].items, fresh=False, more=_HOPEFUL)
        if left or not all(self.hold([others[place] for place in sorted(changed)])):
            return None
        return others

    def _rates(self, servers: Sequence[Server]) -> FloatArray:
        return np.array([self.items.rate_per_s[server.items].sum() for server in servers])

    def headroom(self, servers: Sequence[Server]) -> FloatArray:
        """Return up to how many times its load each server keeps its bounds, by the steady twin, ``[servers]``."""
        found = np.zeros(len(servers))
        for pool, mode in {(server.pool, server.mode) for server in servers}:
            rows = [row for row, each in enumerate(servers) if (each.pool, each.mode) == (pool, mode)]
            load = self.load([servers[row] for row in rows]).take(np.repeat(np.arange(len(rows)), _GRID.size))
            keeps = self.oracle.reached(pool, load, mode, np.tile(_GRID, len(rows))).reshape(len(rows), -1) >= 1.0
            first = np.where(keeps.all(axis=1), _GRID.size, np.argmin(keeps, axis=1))
            found[rows] = np.concatenate([_GRID[:1] / _GRID[1:2] * _GRID[:1], _GRID])[first]
        return found

    def widen(self, servers: list[Server]) -> None:
        """Give each server the slots per adapter with which it has the most headroom."""
        tried = [[replace(server, mode=mode) for server in servers] for mode in range(len(SLOT_SHARES))]
        best = np.argmax([self.headroom(each) for each in tried], axis=0) if servers else []
        for server, mode in zip(servers, best, strict=True):
            server.mode = int(mode)

    def balance(self, servers: list[Server]) -> None:
        """Move items from the servers with the least headroom to those with the most, for as long as that helps."""
        headroom = self.headroom(servers)
        for _ in range(_MOVES):
            order = np.argsort(headroom, kind="stable").tolist()
            pairs = []
            for low, high in zip(order[: len(order) // 2], order[::-1], strict=False):
                uneven = headroom[high] >= _EVEN * headroom[low]
                moved = self._moved(servers[low], servers[high], headroom[low], headroom[high]) if uneven else []
                if moved:
                    pairs.append((low, high, moved))
            found = self.headroom([server for *_, moved in pairs for server in moved]).reshape(-1, 2)
            better = [place for place, (low, _, _) in enumerate(pairs) if found[place].min() > headroom[low]]
            for place in better:
                low, high, (servers[low], servers[high]) = pairs[place]
                headroom[[low, high]] = found[place]
            if not better:
                break

    def _moved(self, giver: Server, taker: Server, low: float, high: float) -> list[Server]:
        """Return two servers after what evens their headroom out has moved, none if nothing can.

        With capacities of headroom times load, ``x = (C₂ L₁ - C₁ L₂) / (C₁ + C₂)`` makes the headrooms equal. What
        moves needs no larger rank than the taker has.
        """
        given, taken = self._rates([giver, taker])
        wanted = given * taken * (high - low) / (low * given + high * taken)
        rank = self.items.rank[taker.items].max()
        items = [each for each in giver.items if self.items.rank[each] <= rank]
        moved: list[int] = []
        for item in sorted(items, key=lambda each: -self.items.rate_per_s[each]):
            if self.items.rate_per_s[item] <= wanted and not self.tags.clash(item, taker.items + moved):
                moved.append(item)
                wanted -= self.items.rate_per_s[item]
        kept = [each for each in giver.items if each not in set(moved)]
        if not moved or not kept:
            return []
        return [replace(giver, items=kept), replace(taker, items=[*taker.items, *moved])]

    def dealt(self, count: int) -> list[Server] | None:
        """Return so many servers of the only pool, items dealt in turn by rank and rate, if they hold when played."""
        order = np.lexsort((self.items.rate_per_s, self.items.rank))
        servers = [Server(0, 0, []) for _ in range(count)]
        for place, item in enumerate(order.tolist()):
            fitting = [each for each in servers if not self.tags.clash(item, each.items)]
            if not fitting:
                return None
            (servers[place % count] if servers[place % count] in fitting else fitting[0]).items.append(item)
        if not all(server.items for server in servers):
            return None
        self.balance(servers)
        first = self.plays.reached(servers, [self.oracle.fleet.headroom * CHANCE], self.seeds[:1])
        return servers if first.min() >= 1.0 and all(self.hold(servers)) else None


def _price(pool: object) -> float:
    price = getattr(pool, "price_per_hour", None)
    return float("inf") if price is None else float(price)
