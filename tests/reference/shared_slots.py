"""Adapters that share slots, played request by request: a slot goes to whom waits longest, with all that piled up."""

import heapq
import random
from collections import deque
from collections.abc import Sequence


def mean_wait_s(
    rng: random.Random, rates_per_s: Sequence[float], slots: int, stays_s: Sequence[float], horizon_s: float
) -> float:
    """Return the mean wait for a slot of requests with Poisson arrivals, each with a stay of its own in the batch."""
    arrivals = sorted(
        (time_s, adapter) for adapter, rate in enumerate(rates_per_s) for time_s in poisson(rng, rate, horizon_s)
    )
    running = [0] * len(rates_per_s)
    piles: list[list[float]] = [[] for _ in rates_per_s]
    queue: deque[int] = deque()
    leaving: list[tuple[float, int]] = []
    waited_s = 0.0
    for now_s, adapter in arrivals:
        while leaving and leaving[0][0] <= now_s:
            free_s, other = heapq.heappop(leaving)
            running[other] -= 1
            if not running[other] and queue:
                following = queue.popleft()
                waited_s += sum(free_s - since_s for since_s in piles[following])
                for _ in piles[following]:
                    heapq.heappush(leaving, (free_s + rng.choice(stays_s), following))
                running[following] = len(piles[following])
                piles[following] = []
        if running[adapter] or (not piles[adapter] and sum(map(bool, running)) < slots):
            running[adapter] += 1
            heapq.heappush(leaving, (now_s + rng.choice(stays_s), adapter))
        else:
            if not piles[adapter]:
                queue.append(adapter)
            piles[adapter].append(now_s)
    return waited_s / len(arrivals)


def poisson(rng: random.Random, rate_per_s: float, horizon_s: float) -> list[float]:
    """Draw the arrivals of one adapter."""
    times_s, now_s = [], rng.expovariate(rate_per_s)
    while now_s < horizon_s:
        times_s.append(now_s)
        now_s += rng.expovariate(rate_per_s)
    return times_s
