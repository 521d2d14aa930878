"""Which of many predicted configurations to take: objectives, bounds, and the margin to starvation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

GOALS = ("throughput", "fewest-slots", "most-adapters")


@dataclass(frozen=True)
class Objective:
    """What to look for among the configurations that are not likely to starve.

    Attributes:
        goal: ``throughput``: the highest; ``fewest-slots``: the fewest slots whose throughput is within ``within`` of the
            best; ``most-adapters``: the most adapters.
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


def choose(
    columns: Mapping[str, NDArray[Any]], objective: Objective, threshold: float = 0.1, risk: float = 0.05
) -> int | None:
    """Return the index of the configuration to take, None if there is none.

    Args:
        columns: Arrays ``[configs]``: ``max_cpu_loras`` (A), ``max_loras`` (S), ``throughput_tokens_per_s``,
            ``offered_tokens_per_s``, ``starving_probability``, ``itl_s``, ``ttft_s``, ``status`` (codes); optional
            ``max_num_seqs``, ``max_num_batched_tokens``.
        objective: What to look for.
        threshold: Share below the offered load from which throughput counts as starved.
        risk: Highest acceptable probability of starving.
    """
    raise NotImplementedError
