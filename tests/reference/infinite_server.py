"""An infinite-server queue played request by request: nobody waits, everybody leaves when his own stay is over."""

import math
import random
import statistics
from collections.abc import Sequence


def time_until_empty(rng: random.Random, arrivals_per_s: float, backlog: float, draw_stay_s: Sequence[float]) -> float:
    """Play one busy period that starts with ``1 + Poisson(backlog)`` new requests; return when the last one leaves."""
    present = 1 + draw_poisson(rng, backlog)
    empty_at_s = max(rng.choice(draw_stay_s) for _ in range(present))
    now_s = rng.expovariate(arrivals_per_s) if arrivals_per_s else math.inf
    while now_s < empty_at_s:
        empty_at_s = max(empty_at_s, now_s + rng.choice(draw_stay_s))
        now_s += rng.expovariate(arrivals_per_s)
    return empty_at_s


def draw_poisson(rng: random.Random, mean: float) -> int:
    """Count the arrivals in a time of 1 at this rate."""
    count, time = 0, 0.0
    while mean > 0.0:
        time += rng.expovariate(mean)
        if time > 1.0:
            break
        count += 1
    return count


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
