"""Which servers keep their bounds, by the steady twin, thousands at once."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.fleet.fleet import Fleet, Pool
from lora_capacity.run import simulate
from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import Scenarios, lay_out
from lora_capacity.search import Needed
from lora_capacity.search.margin import judged_columns
from lora_capacity.workload import AdapterClasses

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SLOT_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Slots per adapter that are looked at. Below a quarter the chance that more adapters want to run than there are slots
leaves room for nothing but adapters that are hardly ever asked for."""

_SPARE = 3.0
"""Standard deviations of the adapters that want to run at once by which slots must exceed their mean, where there are
fewer slots than adapters: vLLM lets requests whose adapter has no slot wait without ageing, and those that have one
keep it while they are busy, so that a server which runs out of slots for long does not recover by itself."""

_MOST_CLASSES = 16
"""Classes that the steady twin tells apart, see `with_classes`."""

_AT_ONCE = 8192
"""Servers laid out at once; arrays of them and their classes then take some tens of megabytes."""


@dataclass(frozen=True, eq=False)
class Load:
    """What servers are asked for, ``[servers, …]``.

    Attributes:
        count: Adapters by class, ``[servers, classes]``.
        rate_per_s: Requests per second of an adapter of the class, ``[classes]`` or as ``count``.
        rank: Rank of the class, ``[classes]`` or as ``count``.
        burst: Sum of rate times squared coefficient of variation of the gaps, ``[servers]``.
    """

    count: FloatArray
    rate_per_s: FloatArray
    rank: FloatArray
    burst: FloatArray

    @property
    def adapters(self) -> IntArray:
        """Adapters of each server, ``[servers]``."""
        return np.asarray(np.rint(self.count.sum(axis=1)), np.int64)

    @property
    def total_per_s(self) -> FloatArray:
        """Requests per second of each server, ``[servers]``."""
        return np.asarray((self.count * self.rate_per_s).sum(axis=1))

    @property
    def largest_rank(self) -> FloatArray:
        """Largest rank on each server, ``[servers]``."""
        return np.asarray(np.where(self.count > 0, np.broadcast_to(self.rank, self.count.shape), 0).max(axis=1))

    def take(self, rows: slice | IntArray) -> "Load":
        """Return some of the servers."""
        own = self.rate_per_s.ndim > 1
        rate, rank = (self.rate_per_s[rows], self.rank[rows]) if own else (self.rate_per_s, self.rank)
        return Load(self.count[rows], rate, rank, self.burst[rows])


def scenarios_of(fleet: Fleet, pool: Pool, load: Load, max_loras: NDArray[Any]) -> Scenarios:
    """Lay out servers of a pool.

    Args:
        fleet: Whose traffic it is.
        pool: The kind of server.
        load: What each is asked for.
        max_loras: Slots of each, from 1 to its adapters, ``[servers]``.
    """
    ranks = load.largest_rank
    allowed = {rank: pool.calibration.smallest_max_lora_rank(int(rank)) for rank in np.unique(ranks)}
    return lay_out(
        fleet.traffic,
        pool.calibration,
        AdapterClasses(load.rate_per_s, load.rank, load.count),  # type: ignore[arg-type]  # counts may be means
        arrival_cv=np.sqrt(load.burst / load.total_per_s),
        adapters=load.adapters,
        max_loras=max_loras,
        max_lora_rank=np.array([allowed[rank] for rank in ranks]),
        **pool.settings,
    )


def slots_of(adapters: IntArray, share: ArrayLike) -> IntArray:
    """Return the slots of servers that have so many per adapter, at least 1."""
    return np.asarray(np.maximum(np.ceil(np.asarray(share) * adapters - 1e-9), 1), np.int64)


@dataclass
class Oracle:
    """Tells whether servers keep their bounds at the fleet's headroom.

    Attributes:
        fleet: The fleet.
        needed: What a server needs so as not to fail.
        correction: Times the load at which the steady twin is asked of a pool's servers with a share of slots: above 1
            where the event twin fails earlier than it, below 1 where later; infinite where it is not to be trusted.
    """

    fleet: Fleet
    needed: Needed = field(init=False)
    correction: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.needed = Needed.within(self.fleet.traffic.goodput)
        self.correction = np.ones((len(self.fleet.pools), len(SLOT_SHARES)))

    def keeps(self, pool: int, load: Load, mode: IntArray | int) -> Bool[np.ndarray, " servers"]:
        """Whether each server keeps its bounds at the headroom, corrected by what was played.

        Args:
            pool: Index of the pool.
            load: What each server is asked for; none without adapters.
            mode: Index of the slots per adapter in `SLOT_SHARES`, one or ``[servers]``.
        """
        return self.reached(pool, load, mode) >= 1.0

    def reached(self, pool: int, load: Load, mode: IntArray | int, more: FloatArray | float = 1.0) -> FloatArray:
        """Return how much of what is needed is reached, 0 where a server does not start, ``[servers]``.

        Args:
            pool: As of `keeps`, as the next two.
            load: See there.
            mode: See there.
            more: Further times the load, one or ``[servers]``.
        """
        count = len(load.count)
        modes = np.broadcast_to(mode, (count,))
        factor = self.correction[pool, modes] * self.fleet.headroom * more
        reached, asked = np.zeros(count), np.flatnonzero(np.isfinite(factor))
        share = np.array(SLOT_SHARES)[modes]
        for start in range(0, asked.size, _AT_ONCE):
            rows = asked[start : start + _AT_ONCE]
            reached[rows] = self._reached(self.fleet.pools[pool], load.take(rows), share[rows], factor[rows])
        return reached

    def _reached(self, pool: Pool, load: Load, share: FloatArray, factor: FloatArray) -> FloatArray:
        slots = slots_of(load.adapters, share)
        scenarios = scenarios_of(self.fleet, pool, load, slots).scaled(factor)
        merged = with_classes(scenarios, min(_MOST_CLASSES, load.count.shape[1]))
        columns = judged_columns(merged, simulate(pool.calibration, merged, self.fleet.traffic))
        reached = np.nan_to_num(self.needed.reached(columns))
        host: Any = scenarios
        longest = self.fleet.traffic.input_tokens.max + self.fleet.traffic.output_tokens.max
        reached = np.where(host.kv_cache_tokens < longest, 0.0, reached)
        # By Little's law a request stays so long, and an adapter wants a slot while it has one.
        stay_s = columns["mean_running"] / np.maximum(host.requests_per_s, 1e-9)
        wants = -np.expm1(-host.class_rate_per_s * stay_s[:, np.newaxis])
        mean, variance = ((host.class_count * each).sum(axis=1) for each in (wants, wants * (1.0 - wants)))
        enough = (slots >= load.adapters) | (slots >= mean + _SPARE * np.sqrt(variance))
        return np.where(enough, reached, 0.0)


def predicted(pool: Pool, fleet: Fleet, load: Load, max_loras: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return what the steady twin says of servers at their own load: the columns of a simulation, ``[servers]``."""
    calibration: Calibration = pool.calibration
    scenarios = with_classes(scenarios_of(fleet, pool, load, max_loras), min(_MOST_CLASSES, load.count.shape[1]))
    return judged_columns(scenarios, simulate(calibration, scenarios, fleet.traffic))
