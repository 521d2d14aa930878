"""What is placed: adapters, pieces of those that outgrow a server, and groups that stay together; and their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.fleet.fleet import Fleet

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MOST_CLASSES = 24
"""Different items that are told apart as they are; more are put into classes of about equal rates."""

_BIN_RATIO = 2.0
"""Ratio between the rates of neighbouring classes: a class's members are within about 40 % of its mean, and a server
holds several, whose differences cancel."""


@dataclass(frozen=True, eq=False)
class Items:
    """What is placed as one, each on one server.

    Attributes:
        members: Adapters of each item, by index, and the share of their requests that is its own.
        adapters: Number of adapters of each, ``[items]``.
        rate_per_s: Requests per second of each, ``[items]``.
        rank: Largest rank of each, ``[items]``.
        burst: Rate times the squared coefficient of variation of the gaps, summed over the members, ``[items]``.
        of: Class of each, ``[items]``.
        count: Items of each class, ``[classes]``.
    """

    members: Sequence[Sequence[tuple[int, float]]]
    adapters: IntArray
    rate_per_s: FloatArray
    rank: IntArray
    burst: FloatArray
    of: IntArray
    count: IntArray

    @classmethod
    def of_fleet(cls, fleet: Fleet, pieces: IntArray) -> "Items":
        """Return the items of a fleet.

        Args:
            fleet: Its adapters.
            pieces: Servers that share each adapter's requests equally, ``[adapters]``.
        """
        groups: dict[str, list[tuple[int, float]]] = {}
        members: list[Sequence[tuple[int, float]]] = []
        for index, count in enumerate(pieces.tolist()):
            if fleet.together[index]:
                groups.setdefault(fleet.together[index], []).append((index, 1.0))
            else:
                members += [[(index, 1.0 / count)]] * count
        members += groups.values()
        rates = np.array([sum(share * fleet.rates_per_s[i] for i, share in each) for each in members])
        burst = [sum(share * fleet.rates_per_s[i] * fleet.cvs[i] ** 2 for i, share in each) for each in members]
        rank = np.array([max(fleet.ranks[i] for i, _ in each) for each in members])
        adapters = np.array([len(each) for each in members])
        of = _classes(rates, rank, adapters)
        return cls(members, adapters, rates, rank, np.array(burst), of, np.bincount(of))

    def __len__(self) -> int:
        return len(self.members)

    def class_means(self) -> dict[str, FloatArray]:
        """Return what a member of each class is like on average, ``[classes]`` by name; of ranks the largest."""
        total = self.count.astype(np.float64)
        means: dict[str, Any] = {
            name: np.bincount(self.of, getattr(self, name)) / total for name in ("adapters", "rate_per_s", "burst")
        }
        rank = np.zeros(total.size)
        np.maximum.at(rank, self.of, self.rank)
        return means | {"rank": rank}


def _classes(rates: FloatArray, rank: IntArray, adapters: IntArray) -> IntArray:
    """Return the class of each item: equal ones, or, where there are many, ranks and sizes with about equal rates."""
    exact = np.stack([rates, rank, adapters], axis=1)
    distinct, of = np.unique(exact, axis=0, return_inverse=True)
    if len(distinct) <= _MOST_CLASSES:
        return of.reshape(-1)
    near = np.floor(np.log(rates) / np.log(_BIN_RATIO))
    return np.unique(np.stack([near, rank, adapters], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
