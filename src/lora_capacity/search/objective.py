"""Which of many predicted configurations to take: objectives, bounds, and the margin to starvation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from lora_capacity.errors import InputError, check_number, nearest_hint
from lora_capacity.scenarios import STARVED_SHORTFALL

Columns = Mapping[str, NDArray[Any]]
"""Named columns over configurations, as `table` and `assess` return them."""

GOALS = ("throughput", "fewest-slots", "most-adapters")
FLAT = 0.005
"""Share of throughput that is not worth a risk or a slot: differences as small are within any model's error."""

_COMFORT = 0.2
"""Share of the accepted risk below which a configuration goes before those with fewer slots: it costs nothing, of equal
throughput, to be well on the safe side."""

_AXES = ("max_loras", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class Objective:
    """What to look for among the configurations that are not likely to starve.

    Attributes:
        goal: ``throughput``: the highest; ``fewest-slots``: the fewest slots whose throughput is within ``within`` of
            the best; ``most-adapters``: the most adapters.
        within: Share of the best throughput that ``fewest-slots`` may give up, from 0 to below 1.
        max_itl_s: Longest mean inter-token latency allowed, if any, > 0.
        max_ttft_s: Longest mean time to first token allowed, if any, > 0.

    Raises:
        InputError: If the goal is unknown or a number is out of range.
    """

    goal: str = "throughput"
    within: float = 0.01
    max_itl_s: float | None = None
    max_ttft_s: float | None = None

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise InputError("objective", self.goal, ", ".join(GOALS), nearest_hint(str(self.goal), GOALS))
        check_number("within", self.within, minimum=0, maximum=0.99)
        for name in ("max_itl_s", "max_ttft_s"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), minimum=0, exclusive=True)


def judge(
    columns: Columns, objective: Objective, threshold: float = STARVED_SHORTFALL, risk: float = 0.05
) -> NDArray[Any]:
    """Return a verdict on each configuration by itself.

    Args:
        columns: As for `choose`.
        objective: Whose latency bounds hold.
        threshold: Share below the offered load from which throughput counts as starved.
        risk: Highest acceptable probability of starving.

    Returns:
        Labels ``[configs]``: ``oom`` or ``no_kv_cache`` (does not start), ``starved``, ``risky``, ``too_slow`` (beyond
        a latency bound) or ``acceptable``; the first that holds.
    """
    throughput = columns["throughput_tokens_per_s"]
    slow = np.zeros(len(throughput), dtype=bool)
    for name, bound in (("itl_s", objective.max_itl_s), ("ttft_s", objective.max_ttft_s)):
        if bound is not None:
            slow |= ~(columns[name] <= bound)
    verdict = np.where(slow, "too_slow", "acceptable").astype(object)
    verdict[columns["starving_probability"] > risk] = "risky"
    verdict[throughput <= (1.0 - threshold) * columns["offered_tokens_per_s"]] = "starved"
    return np.where(np.isnan(throughput), columns["status"], verdict)


def choose(
    columns: Columns, objective: Objective, threshold: float = STARVED_SHORTFALL, risk: float = 0.05
) -> int | None:
    """Return the index of the configuration to take, None if none is acceptable.

    For each number of slots (and of the other settings) adapters are added up to the last configuration before the
    first that is starved, risky or does not start; what lies beyond is not considered even if it seems acceptable.
    Configurations beyond a latency bound are left out of the rest.

    Throughputs within 0.5 % of the best count as equal. Of equals, those whose chance of starving is below a fifth of
    ``risk`` go first, then the fewest slots, then the highest throughput. With ``fewest-slots`` the share is ``within``
    and slots go first.

    Args:
        columns: Arrays ``[configs]``: ``max_cpu_loras`` (A), ``max_loras`` (S), ``throughput_tokens_per_s``,
            ``offered_tokens_per_s`` and ``starving_probability``, NaN where the server does not start; ``status``
            (labels); ``itl_s`` and ``ttft_s`` if there are bounds on them; optional ``max_num_seqs`` and
            ``max_num_batched_tokens``.
        objective: What to look for.
        threshold: Share below the offered load from which throughput counts as starved.
        risk: Highest acceptable probability of starving.
    """
    verdict = judge(columns, objective, threshold, risk)
    kept = np.flatnonzero((verdict == "acceptable") & _before_the_first_risky(columns, verdict))
    if not kept.size:
        return None
    adapters, slots = columns["max_cpu_loras"], columns["max_loras"]
    throughput = columns["throughput_tokens_per_s"]
    if objective.goal == "most-adapters":
        kept = kept[adapters[kept] == adapters[kept].max()]
    flat = objective.within if objective.goal == "fewest-slots" else FLAT
    kept = kept[near_best(throughput[kept], flat)]
    comfortable = columns["starving_probability"][kept] <= _COMFORT * risk
    uneasy = ~comfortable if objective.goal != "fewest-slots" else np.zeros_like(comfortable)
    return int(kept[np.lexsort((-throughput[kept], slots[kept], uneasy))[0]])


def near_best(values: Float[np.ndarray, "*shape n"], share: float = FLAT) -> Bool[np.ndarray, "*shape n"]:
    """Return which values are within a share of the largest, at least 0, along the last axis."""
    return np.asarray(values >= (1.0 - share) * values.max(axis=-1, keepdims=True, initial=0.0))


def _before_the_first_risky(columns: Columns, verdict: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether all with the same settings and as many or fewer adapters are acceptable, latency bounds apart."""
    adapters = columns["max_cpu_loras"]
    stops = ~np.isin(verdict, ("acceptable", "too_slow"))
    settings = np.stack([columns[name] for name in _AXES if name in columns], axis=1)
    _, group = np.unique(settings, axis=0, return_inverse=True)
    first_stop = np.full(group.max() + 1, np.inf)
    np.minimum.at(first_stop, group.ravel()[stops], adapters[stops])
    kept: NDArray[np.bool_] = adapters < first_stop[group.ravel()]
    return kept
