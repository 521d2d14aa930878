"""Which of many predicted configurations to take: what they have to keep, objectives, and the margin to failing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from lora_capacity.errors import check_choice, check_number, check_type
from lora_capacity.scenarios import STARVED_SHORTFALL
from lora_capacity.workload import Goodput

Columns = Mapping[str, NDArray[Any]]
"""Named columns over configurations, as `table` and `assess` return them."""

GOALS = ("goodput", "throughput", "fewest-slots", "most-adapters")
FLAT = 0.005
"""Share of goodput or throughput that is not worth a risk or a slot: smaller differences are within a model's error."""

KEPT_UP = 0.99
"""Share of the arriving requests that a server which keeps up has served, or is serving, at the end: a growing queue
leaves more behind within the hour, chance alone less."""

_COMFORT = 0.2
"""Share of the accepted risk below which a configuration goes before those with fewer slots: it costs nothing, of equal
throughput, to be well on the safe side."""

_AXES = ("max_loras", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class Needed:
    """Shares that a configuration has to reach so as not to fail.

    Attributes:
        service: Throughput over the offered load; with an attainment, requests served or in service over those that
            arrive.
        attainment: Arriving requests that keep their bounds; 0 where only the service counts: one that falls short of
            it is then called starved.
    """

    service: float = 1.0 - STARVED_SHORTFALL
    attainment: float = 0.0

    @classmethod
    def within(cls, goodput: Goodput) -> "Needed":
        """Return what a server needs that keeps up and keeps bounds."""
        return cls(KEPT_UP, goodput.attainment)

    def reached(self, columns: Columns) -> NDArray[np.float64]:
        """Return how much of it is reached, any shape: below 1 where a configuration fails, NaN if it does not start.

        Args:
            columns: ``service``; with an attainment, ``served`` and ``attainment``.
        """
        if not self.attainment:
            return np.asarray(columns["service"], np.float64) / self.service
        shares = (columns["served"] / self.service, columns["attainment"] / self.attainment)
        return np.asarray(np.minimum(*shares), np.float64)


@dataclass(frozen=True)
class Objective:
    """What to look for among the configurations that are not likely to fail.

    Attributes:
        goal: ``goodput``: most requests per second within the workload's latency bounds, of servers that keep up;
            ``fewest-slots``: of these the fewest slots whose goodput is within ``within`` of the best;
            ``most-adapters``: of these the most adapters; ``throughput``: the most tokens per second of servers that
            do not starve, however long requests wait, as in arXiv 2508.08343.
        within: Share of the best goodput that ``fewest-slots`` may give up, from 0 to below 1.

    Raises:
        InputError: If the goal is unknown or a number is out of range.
    """

    goal: str = "goodput"
    within: float = 0.01

    def __post_init__(self) -> None:
        check_choice("objective", self.goal, GOALS)
        check_number("within", self.within, minimum=0, maximum=0.99)

    @classmethod
    def of(cls, objective: "Objective | str | None") -> "Objective":
        """Return the objective that is asked for, or whose goal is; None: the highest goodput.

        Raises:
            InputError: If it is neither, or the goal is unknown.
        """
        if objective is None or isinstance(objective, str):
            return cls() if objective is None else cls(objective)
        return check_type("objective", objective, cls, f"an Objective, or one of {', '.join(GOALS)}")

    @property
    def column(self) -> str:
        """Name of what is to be highest."""
        return "throughput_tokens_per_s" if self.goal == "throughput" else "goodput_per_s"


def judge(columns: Columns, needed: Needed, risk: float = 0.05) -> NDArray[Any]:
    """Return a verdict on each configuration by itself.

    Args:
        columns: As for `choose`.
        needed: What does not fail.
        risk: Highest acceptable probability of failing.

    Returns:
        Labels ``[configs]``: ``oom`` or ``no_kv_cache`` (does not start), ``starved`` or ``falls_behind`` (serves too
        little), ``misses_bounds``, ``risky`` or ``acceptable``; the first that holds.
    """
    throughput = columns["throughput_tokens_per_s"]
    verdict = np.where(columns["starving_probability"] > risk, "risky", "acceptable").astype(object)
    if needed.attainment:
        verdict[columns["attainment"] < needed.attainment] = "misses_bounds"
        verdict[columns["served"] < needed.service] = "falls_behind"
    else:
        verdict[throughput <= needed.service * columns["offered_tokens_per_s"]] = "starved"
    return np.where(np.isnan(throughput), columns["status"], verdict)


def choose(columns: Columns, objective: Objective, needed: Needed, risk: float = 0.05) -> int | None:
    """Return the index of the configuration to take, None if none is acceptable.

    For each number of slots (and of the other settings) adapters are added up to the last configuration before the
    first that fails, is likely to or does not start; what lies beyond is not considered even if it seems acceptable.

    Goodputs (with ``throughput``: throughputs) within 0.5 % of the best count as equal. Of equals, those whose chance
    of failing is below a fifth of ``risk`` go first, then the fewest slots, then the highest. With ``fewest-slots`` the
    share is ``within`` and slots go first.

    Args:
        columns: Arrays ``[configs]``: ``max_cpu_loras`` (A), ``max_loras`` (S), ``throughput_tokens_per_s``,
            ``offered_tokens_per_s`` and ``starving_probability``, NaN where the server does not start; ``status``
            (labels); what ``needed`` and the objective name (``goodput_per_s``, ``attainment``, ``served``); optional
            ``max_num_seqs`` and ``max_num_batched_tokens``.
        objective: What to look for.
        needed: What does not fail.
        risk: Highest acceptable probability of failing.
    """
    verdict = judge(columns, needed, risk)
    kept = np.flatnonzero(_before_the_first_that_fails(columns, verdict))
    if not kept.size:
        return None
    adapters, slots, value = columns["max_cpu_loras"], columns["max_loras"], columns[objective.column]
    if objective.goal == "most-adapters":
        kept = kept[adapters[kept] == adapters[kept].max()]
    flat = objective.within if objective.goal == "fewest-slots" else FLAT
    kept = kept[near_best(value[kept], flat)]
    comfortable = columns["starving_probability"][kept] <= _COMFORT * risk
    uneasy = ~comfortable if objective.goal != "fewest-slots" else np.zeros_like(comfortable)
    return int(kept[np.lexsort((-value[kept], slots[kept], uneasy))[0]])


def near_best(values: Float[np.ndarray, "*shape n"], share: float = FLAT) -> Bool[np.ndarray, "*shape n"]:
    """Return which values are within a share of the largest, at least 0, along the last axis."""
    return np.asarray(values >= (1.0 - share) * values.max(axis=-1, keepdims=True, initial=0.0))


def _before_the_first_that_fails(columns: Columns, verdict: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a configuration is acceptable, with all of the same settings and fewer adapters."""
    adapters, stops = columns["max_cpu_loras"], verdict != "acceptable"
    settings = np.stack([columns[name] for name in _AXES if name in columns], axis=1)
    _, group = np.unique(settings, axis=0, return_inverse=True)
    first_stop = np.full(group.max() + 1, np.inf)
    np.minimum.at(first_stop, group.ravel()[stops], adapters[stops])
    kept: NDArray[np.bool_] = adapters < first_stop[group.ravel()]
    return kept
