"""What fits onto a server alone, and over how many servers the requests of an adapter have to be spread."""

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InfeasibleError, InputError
from lora_capacity.fleet.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import SLOT_SHARES, Load, Oracle, predicted
from lora_capacity.fleet.plays import Server, load_of
from lora_capacity.fleet.repair import CHANCE

IntArray = NDArray[np.int64]

_MOST_PIECES = 64
"""Servers over which one adapter's requests are spread at most: far above what any adapter of a fleet needs."""


def pieces(fleet: Fleet, oracle: Oracle) -> IntArray:
    """Return over how many servers each adapter's requests have to be spread, ``[adapters]``.

    Raises:
        InputError: If an adapter may not be spread so far.
        InfeasibleError: If an adapter fits onto no server however few of its requests that takes.
    """
    needed = np.zeros(len(fleet.names), np.int64)
    for parts in range(1, _MOST_PIECES + 1):
        left = np.flatnonzero(needed == 0)
        if not left.size:
            break
        fits = _fit_alone(fleet, oracle, left, parts)
        needed[left[fits]] = parts
    for adapter in np.flatnonzero(needed == 0)[:1].tolist():
        raise InfeasibleError(_fits_nowhere(fleet, adapter))
    for adapter in np.flatnonzero((fleet.replicas > 0) & (needed > fleet.replicas))[:1].tolist():
        allowed = (
            f"at least {needed[adapter]}: {fleet.rates_per_s[adapter]:g} requests/s are more than one server takes"
        )
        raise InputError(f"replicas of {fleet.names[adapter]}", int(fleet.replicas[adapter]), allowed)
    for adapter in np.flatnonzero(needed > 1).tolist():
        if fleet.together[adapter]:
            allowed = "adapters that fit onto one server"
            raise InputError(f"together of {fleet.names[adapter]}", fleet.together[adapter], allowed)
    return needed


def check_groups(fleet: Fleet, oracle: Oracle, items: Items) -> None:
    """Refuse a group that is to share a server and fits onto none.

    Raises:
        InfeasibleError: Names the first such group.
    """
    groups = np.flatnonzero(items.adapters > 1).tolist()
    for group in groups:
        fits = [
            oracle.keeps(pool, load_of(fleet, items, [Server(pool, mode, [group])]), mode)[0]
            for pool in range(len(fleet.pools))
            for mode in range(len(SLOT_SHARES))
        ]
        if not any(fits):
            name = fleet.together[items.members[group][0][0]]
            raise InfeasibleError(
                f"together {name}: its {items.adapters[group]} adapters ({items.rate_per_s[group]:.3g} requests/s) fit "
                "onto no server together; split the group, or relax the bounds"
            )


def _fit_alone(fleet: Fleet, oracle: Oracle, adapters: IntArray, parts: int) -> NDArray[np.bool_]:
    """Whether a part of each adapter fits alone onto a server of some pool, ``[adapters]``."""
    rates, ranks = fleet.rates_per_s[adapters] / parts, fleet.ranks[adapters].astype(np.float64)
    kinds, of = np.unique(np.stack([rates, ranks, fleet.cvs[adapters]], axis=1), axis=0, return_inverse=True)
    fits = np.zeros(len(kinds), bool)
    for pool, chosen in enumerate(fleet.pools):
        taken = kinds[:, 1] <= chosen.calibration.behaviour.max_lora_ranks[-1]
        if not taken.any():
            continue
        own = kinds[taken]
        one = np.ones((len(own), 1))
        load = Load(one, own[:, :1], own[:, 1:2], own[:, 0] * own[:, 2] ** 2)
        fits[taken] |= oracle.reached(pool, load, 0, CHANCE) >= 1.0
    return fits[of.reshape(-1)]


def _fits_nowhere(fleet: Fleet, adapter: int) -> str:
    """Say why an adapter fits onto no server, and what would make it."""
    name, rank = fleet.names[adapter], int(fleet.ranks[adapter])
    ranks = max(pool.calibration.behaviour.max_lora_ranks[-1] for pool in fleet.pools)
    what = f"adapter {name} (rank {rank}, {fleet.rates_per_s[adapter]:g} requests/s) fits onto no server of any pool"
    if rank > ranks:
        return f"{what}: the largest max_lora_rank is {ranks}; lower its rank, or add a pool of a newer vLLM"
    one, rate = np.ones((1, 1)), np.array([[fleet.rates_per_s[adapter] / _MOST_PIECES]])
    load = Load(one, rate, np.full((1, 1), float(rank)), rate[:, 0])
    found = predicted(fleet.pools[0], fleet, load, np.array([1]))
    if np.isnan(found["throughput_tokens_per_s"][0]):
        return (
            f"{what}: a server of pool {fleet.pools[0].name} does not start ({found['status'][0]}); raise "
            "gpu_memory_utilization, lower max_model_len, or add a pool with more memory"
        )
    bounds = " ".join(f"{key}:{bound_ms:g}" for key, bound_ms in fleet.traffic.goodput.to_ms().items())
    return (
        f"{what}: even nearly idle, {found['attainment'][0]:.1%} of its requests keep {bounds} ms "
        f"(first tokens after {found['client_ttft_s'][0] * 1e3:.0f} ms, {found['client_tpot_s'][0] * 1e3:.0f} ms a "
        "token); relax the bounds, or add a faster pool"
    )
