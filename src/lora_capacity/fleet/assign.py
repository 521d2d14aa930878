"""From servers as counts of classes to servers with items, about equally loaded, and apart what must be apart."""

import numpy as np
from numpy.typing import NDArray

from lora_capacity.fleet.columns import Found
from lora_capacity.fleet.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.plays import Server

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Tags:
    """What may stand on a server only once: pieces of one adapter, and adapters of a group that is kept apart."""

    def __init__(self, fleet: Fleet, items: Items) -> None:
        def tags(item: int) -> frozenset[str]:
            members = [adapter for adapter, _ in items.members[item]]
            own = {f"adapter {adapter}" for adapter, share in items.members[item] if share < 1.0}
            return frozenset(own | {f"apart {fleet.apart[adapter]}" for adapter in members if fleet.apart[adapter]})

        self._of = [tags(item) for item in range(len(items))]

    def clash(self, item: int, others: list[int]) -> bool:
        """Whether an item may not stand beside others."""
        own = self._of[item]
        return bool(own) and any(own & self._of[other] for other in others)


def assign(items: Items, tags: Tags, found: Found, use: IntArray) -> tuple[list[Server], list[int]]:
    """Put items onto servers.

    Of each class the items with the highest rates go first, each to the server whose places of this class have the most
    load left on average: servers of equal counts get about equal loads.

    Args:
        items: What is placed.
        tags: What may not stand together.
        found: Servers as counts of classes.
        use: How many of each column.

    Returns:
        The servers, those that stay empty left out; and the items that found no place.
    """
    rows = np.repeat(np.arange(use.size), use)
    servers = [Server(int(found.pool[row]), int(found.mode[row]), []) for row in rows]
    quota = found.counts[rows].copy()
    _trim(quota, items)
    left = []
    for group in range(items.count.size):
        mean = items.rate_per_s[items.of == group].mean()
        owed = quota[:, group] * mean
        members = np.flatnonzero(items.of == group)
        for item in members[np.argsort(-items.rate_per_s[members], kind="stable")].tolist():
            places = np.where(quota[:, group] > 0, owed / np.maximum(quota[:, group], 1), -np.inf)
            for server in np.argsort(-places, kind="stable").tolist():
                if not np.isfinite(places[server]):
                    left.append(item)
                    break
                if not tags.clash(item, servers[server].items):
                    servers[server].items.append(item)
                    quota[server, group] -= 1
                    owed[server] -= items.rate_per_s[item]
                    break
            else:
                left.append(item)
    return [server for server in servers if server.items], left


def _trim(quota: IntArray, items: Items) -> None:
    """Take places off that are more than there are items, from the servers with the most load."""
    mean = items.class_means()["rate_per_s"]
    for group, count in enumerate(items.count.tolist()):
        for _ in range(int(quota[:, group].sum()) - count):
            load = np.where(quota[:, group] > 0, quota @ mean, -np.inf)
            quota[int(np.argmax(load)), group] -= 1
