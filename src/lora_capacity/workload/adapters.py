"""Adapters by request rate and rank, in the order in which they are taken on as the number A of adapters grows."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from lora_capacity.errors import InputError, check_number
from lora_capacity.schema import Number, check_numbers
from lora_capacity.workload._fields import MAX_TOKENS, RATE, FloatArray, IntArray, read_only

MAX_ADAPTERS = 10**6
"""Most adapters that a mix is assigned to; a guard for memory, far above what one server can serve."""

MAX_RANK = 2**16
"""Largest rank taken for one; no layer of a served model is as wide."""

IDLE_PER_S = 1e-9
"""Rate of an adapter without requests for a time, one in thirty years: rates are above 0."""

RANK = Number(minimum=1, maximum=MAX_RANK)
SHARED = Number(minimum=0, maximum=MAX_TOKENS)
"""What a rank and a number of shared tokens must be."""


@dataclass(frozen=True, eq=False)
class AdapterClasses:
    """Adapters that behave alike, counted: every distinct pair of rate and rank is a class.

    Attributes:
        rate_per_s: Request rate of each adapter of a class, float64 ``[classes]``; ascending.
        rank: Rank of each adapter of a class, int64 ``[classes]``; ascending where rates are equal.
        count: Number of adapters of each class per configuration, int64 ``[configs, classes]``.
    """

    rate_per_s: FloatArray
    rank: IntArray
    count: IntArray


class Adapters(abc.ABC):
    """The adapters that may be served; a server of A adapters serves the first A."""

    @property
    @abc.abstractmethod
    def max_count(self) -> int | None:
        """The largest possible number of adapters, None where there is no such bound."""

    @abc.abstractmethod
    def deal(self, count: int) -> tuple[Float[np.ndarray, " adapters"], Int[np.ndarray, " adapters"]]:
        """Return rates and ranks of the first ``count`` adapters.

        Args:
            count: A, from 0 to ``max_count``.

        Returns:
            Request rates per second, float64 ``[count]``, and ranks, int64 ``[count]``.

        Raises:
            InputError: If there are not so many adapters.
        """

    @abc.abstractmethod
    def times(self, factors: FloatArray) -> Self:
        """Return the same adapters with other rates.

        Args:
            factors: One for all, or one for each, ``[adapters]``; a rate of 0 becomes one that does not count.
        """

    def check_count(self, count: object) -> int:
        """Return a number of adapters A that can be served.

        Raises:
            InputError: If it is no whole number from 1 to the number of adapters.
        """
        most = MAX_ADAPTERS if self.max_count is None else self.max_count
        try:
            return int(check_number("adapters", count, minimum=1, maximum=most, integer=True))
        except InputError as error:
            why = "" if self.max_count is None else f" (the adapter list has {most})"
            raise InputError("adapters", error.value, f"1 to {most}{why}") from None

    def classes(self, counts: ArrayLike) -> AdapterClasses:
        """Count the adapters of every class among the first A, for many A at once.

        Args:
            counts: Numbers of adapters A, whole, ``[configs]``.

        Returns:
            The classes that occur among the first max(A) adapters, with their counts per configuration.

        Raises:
            InputError: If a number of adapters cannot be served.
        """
        counts = self._check_counts(counts)
        rates, ranks = self.deal(int(counts.max()))
        pairs, group = np.unique(np.stack([rates, ranks.astype(np.float64)], axis=1), axis=0, return_inverse=True)
        # Numbered class by class, the adapters of a class that come before the A-th are found by one bisection.
        start = np.arange(len(pairs)) * rates.size
        numbered = np.sort(start[group.reshape(-1)] + np.arange(rates.size))
        before = np.searchsorted(numbered, start + counts[:, np.newaxis]) - np.searchsorted(numbered, start)
        return AdapterClasses(
            read_only(pairs[:, 0], np.float64), read_only(pairs[:, 1], np.int64), read_only(before, np.int64)
        )

    def max_rank(self, counts: ArrayLike) -> Int[np.ndarray, " configs"]:
        """Return the largest rank among the first A adapters, for many A at once.

        Args:
            counts: Numbers of adapters A, whole, ``[configs]``.

        Returns:
            int64 ``[configs]``: the least ``max_lora_rank`` that serves them all.

        Raises:
            InputError: If a number of adapters cannot be served.
        """
        counts = self._check_counts(counts)
        _, ranks = self.deal(int(counts.max()))
        largest: IntArray = np.maximum.accumulate(ranks)[counts - 1]
        return largest

    def _check_counts(self, counts: ArrayLike) -> Int[np.ndarray, " configs"]:
        distinct, place = np.unique(np.asarray(counts).reshape(-1), return_inverse=True)
        if not distinct.size:
            raise InputError("adapters", "none", "at least one number of adapters")
        return np.array([self.check_count(count) for count in distinct.tolist()])[place]


@dataclass(frozen=True, eq=False)
class AdapterMix(Adapters):
    """Rates and ranks assigned round-robin: adapter i has ``rates_per_s[i % rates]``, ``ranks[i % ranks]``; A is free.

    Attributes:
        rates_per_s: Request rates per second, > 0, float64 ``[rates]``.
        ranks: Ranks, whole numbers from 1 to 65536, int64 ``[ranks]``.

    Raises:
        InputError: If a list is empty or holds something else.
    """

    rates_per_s: FloatArray
    ranks: IntArray

    def __post_init__(self) -> None:
        rates = check_numbers("adapters.mix.rates_per_s", self.rates_per_s, RATE)
        ranks = check_numbers("adapters.mix.ranks", self.ranks, RANK, whole=True)
        object.__setattr__(self, "rates_per_s", read_only(rates, np.float64))
        object.__setattr__(self, "ranks", read_only(ranks, np.int64))

    def times(self, factors: FloatArray) -> Self:
        """Return the same adapters with so many times their rates; all alike."""
        return replace(self, rates_per_s=np.maximum(self.rates_per_s * factors, IDLE_PER_S))

    @property
    def max_count(self) -> None:
        """None: a mix goes round as often as needed."""
        return None

    def deal(self, count: int) -> tuple[Float[np.ndarray, " adapters"], Int[np.ndarray, " adapters"]]:
        """Return rates per second, float64 ``[count]``, and ranks, int64 ``[count]``, of the first adapters."""
        index = np.arange(self.check_count(count) if count else 0)
        return self.rates_per_s[index % self.rates_per_s.size], self.ranks[index % self.ranks.size]


@dataclass(frozen=True, eq=False)
class AdapterList(Adapters):
    """Given adapters in order of importance.

    Attributes:
        names: Their names, all different, ``[adapters]``.
        rates_per_s: Request rates per second, > 0, float64 ``[adapters]``.
        ranks: Ranks, whole numbers from 1 to 65536, int64 ``[adapters]``.
        shared_prefix_tokens: Tokens with which the prompts of each adapter begin alike, int64 ``[adapters]``; None:
            those of the workload.

    Raises:
        InputError: If there are none, two have one name, or a rate or rank is not such a number.
    """

    names: Sequence[str]
    rates_per_s: FloatArray
    ranks: IntArray
    shared_prefix_tokens: IntArray | None = None

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        rates = check_numbers("adapters.list.rate_per_s", self.rates_per_s, RATE)
        ranks = check_numbers("adapters.list.rank", self.ranks, RANK, whole=True)
        if not len(names) == rates.size == ranks.size:
            raise InputError(
                "adapters.list", f"{len(names)} names", f"as many as rates ({rates.size}) and ranks ({ranks.size})"
            )
        check_distinct("adapters.list", names)
        if self.shared_prefix_tokens is not None:
            shared = check_numbers("adapters.list.shared_prefix_tokens", self.shared_prefix_tokens, SHARED, whole=True)
            if shared.size != len(names):
                raise InputError("adapters.list.shared_prefix_tokens", f"{shared.size} numbers", f"{len(names)}")
            object.__setattr__(self, "shared_prefix_tokens", read_only(shared, np.int64))
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "rates_per_s", read_only(rates, np.float64))
        object.__setattr__(self, "ranks", read_only(ranks, np.int64))

    def times(self, factors: FloatArray) -> Self:
        """Return the same adapters with so many times their rates, all alike or each by itself."""
        return replace(self, rates_per_s=np.maximum(self.rates_per_s * factors, IDLE_PER_S))

    @property
    def max_count(self) -> int:
        """The number of adapters in the list."""
        return len(self.names)

    def deal(self, count: int) -> tuple[Float[np.ndarray, " adapters"], Int[np.ndarray, " adapters"]]:
        """Return rates per second, float64 ``[count]``, and ranks, int64 ``[count]``, of the first adapters."""
        count = self.check_count(count) if count else 0
        return self.rates_per_s[:count], self.ranks[:count]


def check_distinct(field: str, names: Sequence[str]) -> None:
    """Refuse a name that occurs twice.

    Raises:
        InputError: Names the first repeated one.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(field, name, "every adapter once")
        seen.add(name)
