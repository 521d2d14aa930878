"""The placement that runs now: servers to start from, and what moves away from it."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from lora_capacity.errors import InputError
from lora_capacity.fleet.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.plays import Server


def running(fleet: Fleet, items: Items) -> tuple[list[Server], list[int]]:
    """Return the servers that run now with the items that they keep, and the items that are on none.

    Raises:
        InputError: If a server is of a pool that the fleet does not have.
    """
    pools = [pool.name for pool in fleet.pools]
    left: dict[int, list[int]] = {}
    for item, members in enumerate(items.members):
        for adapter, _ in members:
            left.setdefault(adapter, []).append(item)
    index = {name: adapter for adapter, name in enumerate(fleet.names)}
    servers = []
    for name, pool, adapters in fleet.current or ():
        if pool not in pools:
            raise InputError(f"current: pool of {name}", pool, f"one of {', '.join(pools)}")
        servers.append(Server(pools.index(pool), 0, [], name))
        for adapter in [index[each] for each in adapters if each in index]:
            for item in left.get(adapter, [])[:1]:
                servers[-1].items.append(item)
                for member, _ in items.members[item]:
                    left[member].remove(item)
    waiting = sorted({item for rest in left.values() for item in rest})
    return [server for server in servers if server.items], waiting


def named_after(fleet: Fleet, items: Items, servers: Sequence[Server]) -> None:
    """Name servers after those that run now, so that the most adapters stay where they are."""
    now = list(fleet.current or ())
    pools = [pool.name for pool in fleet.pools]
    shared = np.array(
        [
            [
                len(_names(fleet, items, server) & set(adapters)) if pools[server.pool] == pool else 0
                for _, pool, adapters in now
            ]
            for server in servers
        ]
    ).reshape(len(servers), len(now))
    for row, column in zip(*linear_sum_assignment(-shared), strict=True):
        if shared[row, column]:
            servers[row].name = now[column][0]


def moves(fleet: Fleet, items: Items, servers: Sequence[Server]) -> int:
    """Return how many adapters leave a server that has them now, those that the fleet no longer has left out."""
    placed = {server.name: _names(fleet, items, server) for server in servers if server.name}
    kept = set(fleet.names)
    return sum(len(set(adapters) & kept - placed.get(name, set())) for name, _, adapters in fleet.current or ())


def _names(fleet: Fleet, items: Items, server: Server) -> set[str]:
    return {fleet.names[adapter] for adapter, _ in server.adapters(items)}
