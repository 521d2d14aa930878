"""What a prefix cache saves a server on average: tokens that need not be computed, and blocks that are held once.

A prompt finds its adapter's prefix if the adapter's last request before it still runs, or has left so recently that
its blocks have not been taken since: free blocks are taken in the order in which they were freed, so a block is kept
for as long as it takes to go through all free ones. Requests of an adapter are taken to be Poisson, and where adapters
wait for slots, those of one come together: as many at a time as adapters are active, at correspondingly higher rates.

What it leaves out: that hits move a prefix to the end of that order, blocks of preempted requests, that prompts shorter
than the prefix hold only a part of it, and bursts.

Source: ``free_blocks`` and ``get_new_blocks`` in ``vllm/v1/core/block_pool.py``, vLLM 0.8.5 to 0.33.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.scenarios.results import Results

FloatArray = NDArray[np.float64]

ROUNDS = 8
"""How often what is saved is worked out anew from what the server then does: it changes by under 0.1 % afterwards."""


_BISECTIONS = 20
"""Halvings of the logarithm of how much requests come together: it is then known to 0.001 %."""

_MOST_TOGETHER = 1e4
"""Times that an adapter's rate can be higher while it is active: above the adapters per slot of any server."""


class Saved(NamedTuple):
    """What a cache saves, ``[configs]``.

    Attributes:
        prompt_tokens: Tokens of a prompt that are found.
        kv_tokens: Tokens of a running request that others hold as well, so that they take no room of their own.
    """

    prompt_tokens: Float[np.ndarray, " configs"]
    kv_tokens: Float[np.ndarray, " configs"]

    def halfway(self, other: "Saved") -> "Saved":
        """Return the mean of both, to go on from without swinging."""
        return Saved(*(0.5 * (old + new) for old, new in zip(self, other, strict=True)))


def saved_by_prefixes(scenarios: Any, results: Results, saved: Saved) -> Saved:
    """Return what shared prefixes save a server that does what `results` say.

    Args:
        scenarios: The configurations, with NumPy leaves.
        results: What they do with what was thought to be saved.
        saved: What that was.
    """
    completed = np.asarray(results.completed_per_s, float)
    running = np.asarray(results.mean_running, float)
    stay_s = np.asarray(results.itl_s, float) * scenarios.mean_output_tokens
    used = running * (scenarios.kv_tokens_per_request - saved.kv_tokens)
    taken = scenarios.mean_input_tokens + scenarios.mean_output_tokens + 0.5 * scenarios.block_size
    taken_per_s = np.maximum(completed * (taken - saved.prompt_tokens), 1e-9)
    kept_s = stay_s + np.maximum(scenarios.kv_cache_tokens - used, 0.0) / taken_per_s
    served = np.nan_to_num(np.asarray(results.class_service, float))
    base = np.minimum(completed / np.maximum(scenarios.requests_per_s, 1e-9), 1.0) * scenarios.base_rate_per_s
    rate = np.column_stack([scenarios.class_rate_per_s * served, base])
    count = np.column_stack([scenarios.class_count, np.ones_like(base)])
    shared = np.column_stack([scenarios.class_shared_tokens, scenarios.base_shared_tokens])
    requests = rate * scenarios.horizon_s[:, np.newaxis]
    after_first = 1.0 + np.expm1(-requests) / np.maximum(requests, 1e-9)
    running_each = rate * stay_s[:, np.newaxis]
    together = np.ones_like(rate)
    together[:, :-1] = _together(count[:, :-1], running_each[:, :-1], np.asarray(results.active_adapters, float))
    # While an adapter is active, so many of its requests run at a time; the others find what is kept of it.
    others = -np.expm1(-together * running_each) / together
    missed = np.exp(-together * running_each - rate * (kept_s - stay_s)[:, np.newaxis])
    found = (1.0 - missed) * np.maximum(after_first, 0.0)
    twice = running_each - others
    total = np.maximum((count * rate).sum(axis=1), 1e-9)
    return Saved(
        np.nan_to_num((count * rate * found * shared).sum(axis=1) / total),
        np.nan_to_num((count * twice * shared).sum(axis=1) / np.maximum(running, 1e-9)),
    )


def _together(count: FloatArray, running: FloatArray, active: FloatArray) -> FloatArray:
    """Return how many times higher rates are while adapters are active, for as many to be active as there are.

    With ``f`` times the rate a ``1/f`` of the adapters has its turn at a time, each active for ``1 − e^{−f·running}``
    of it: ``Σ count · (1 − e^{−f·running}) / f`` falls with ``f``, and is bisected to `active`.

    Args:
        count: Adapters of each class, ``[configs, classes]``.
        running: Running requests of each, on average, ``[configs, classes]``.
        active: Adapters that have requests running, ``[configs]``.

    Returns:
        ``[configs, 1]``, 1 where they are independent.
    """
    low, high = np.zeros((len(active), 1)), np.full((len(active), 1), np.log(_MOST_TOGETHER))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        factor = np.exp(middle)
        more = (count * -np.expm1(-factor * running) / factor).sum(axis=1, keepdims=True) > active[:, np.newaxis]
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    factors: FloatArray = np.exp(low)
    return factors


def nothing_saved(scenarios: Any) -> Saved:
    """Return that nothing is saved."""
    none: FloatArray = np.zeros(np.shape(scenarios.horizon_s))
    return Saved(none, none)
