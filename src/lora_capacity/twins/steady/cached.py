"""What a prefix cache saves a server on average: tokens that need not be computed, and blocks that are held once.

A prompt finds its adapter's prefix if the adapter's last request before it still runs, or has left so recently that
its blocks have not been taken since: free blocks are taken in the order in which they were freed, so a block is kept
for as long as it takes to go through all free ones. Requests of an adapter are taken to be Poisson.

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
    found = -np.expm1(-rate * kept_s[:, np.newaxis]) * np.maximum(after_first, 0.0)
    together = rate * stay_s[:, np.newaxis]
    twice = np.maximum(together + np.expm1(-together), 0.0)
    total = np.maximum((count * rate).sum(axis=1), 1e-9)
    return Saved(
        np.nan_to_num((count * rate * found * shared).sum(axis=1) / total),
        np.nan_to_num((count * twice * shared).sum(axis=1) / np.maximum(running, 1e-9)),
    )


def nothing_saved(scenarios: Any) -> Saved:
    """Return that nothing is saved."""
    none: FloatArray = np.zeros(np.shape(scenarios.horizon_s))
    return Saved(none, none)
