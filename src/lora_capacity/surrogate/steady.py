"""The steady twin over questions, each with a law of its own of the answer lengths."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.run.resources import available_cores
from lora_capacity.scenarios import Results
from lora_capacity.surrogate.closed import Limit, at_limit
from lora_capacity.surrogate.questions import FloatArray, IntArray, Questions
from lora_capacity.twins.steady import StayLaw, simulate_steady
from lora_capacity.workload import LengthDistribution

_CHUNK = 512
_LAW_MEAN_TOKENS, _LAW_STEP, _LAW_WIDEST = 200, 0.05, 2.0
_simulate = jax.jit(simulate_steady)
_at_limit = jax.jit(at_limit)
_laws: dict[int, Any] = {}


def stay_laws(spread: FloatArray) -> StayLaw:
    """Return the laws of stays of answer lengths with a relative spread, leaves ``[nodes, questions]``.

    Spreads are rounded to 0.05, above 2 to 2; lengths are truncated gamma, as `LengthDistribution.from_moments` has
    them.
    """
    place = np.clip(np.rint(spread / _LAW_STEP), 1, _LAW_WIDEST / _LAW_STEP).astype(int)
    distinct, row = np.unique(place, return_inverse=True)
    for each in distinct.tolist():
        if each not in _laws:
            std = each * _LAW_STEP * _LAW_MEAN_TOKENS
            lengths = LengthDistribution.from_moments(_LAW_MEAN_TOKENS, std, 1, 8 * _LAW_MEAN_TOKENS)
            _laws[each] = jax.tree.map(np.asarray, StayLaw.of_lengths(lengths))
    laws: StayLaw = jax.tree.map(
        lambda *leaves: np.stack(leaves, axis=1)[:, row.ravel()], *(_laws[each] for each in distinct.tolist())
    )
    return laws


def simulate_questions(
    calibration: Calibration, questions: Questions, adapters: NDArray[Any], max_loras: IntArray
) -> Results:
    """Run the steady twin over one configuration per question, in chunks of one shape on all cores.

    Args:
        calibration: Whose costs hold.
        questions: The workloads and servers, ``[configs]``.
        adapters: A as in `Questions.lay_out`.
        max_loras: S.

    Returns:
        Predictions with NumPy leaves, ``[configs]``.
    """
    host, laws, configs = (
        questions.lay_out(calibration, adapters, max_loras),
        stay_laws(questions.output_spread),
        len(questions),
    )

    def run(start: int) -> Results:
        rows = np.minimum(np.arange(start, start + _CHUNK), configs - 1)
        chunk = jax.tree.map(lambda values: values[rows], host)
        results: Results = jax.tree.map(
            np.asarray, _simulate(calibration.costs, chunk, jax.tree.map(lambda values: values[:, rows], laws))
        )
        return results

    with ThreadPoolExecutor(available_cores()) as pool:
        parts = list(pool.map(run, range(0, configs, _CHUNK)))
    whole: Results = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:configs], *parts)
    return whole


def limits(
    calibration: Calibration,
    questions: Questions,
    max_loras: IntArray,
    kv_cache_tokens: FloatArray | None = None,
) -> Limit:
    """Return the closed form of each server with each of some numbers of slots, leaves ``[questions, n]``.

    Args:
        calibration: Whose costs hold.
        questions: The workloads and servers.
        max_loras: Numbers of slots, ``[questions, n]``.
        kv_cache_tokens: What the KV cache holds, ``[questions, n]``; by default what the memory plan says.
    """
    configs, slots = max_loras.shape
    rank = questions.max_lora_rank(np.full(configs, questions.ranks.shape[1]), calibration)
    if kv_cache_tokens is None:
        repeated = questions.take(np.repeat(np.arange(configs), slots))
        planned, _ = repeated.plan(calibration, max_loras.ravel(), np.repeat(rank, slots))
        kv_cache_tokens = planned.reshape(max_loras.shape)

    # Rows are made a power of two, so that few shapes are compiled.
    rows = np.minimum(np.arange(1 << (configs - 1).bit_length()), configs - 1)

    def column(values: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(values, np.float32)[rows, np.newaxis]

    names = ("base_rate_per_s", "mean_input_tokens", "mean_output_tokens", "kv_tokens_per_request")
    bounds = ("max_num_seqs", "max_num_batched_tokens", "max_pending")
    found: Limit = jax.tree.map(
        lambda values: np.asarray(values)[:configs],
        _at_limit(
            calibration.costs,
            rates_per_s=np.asarray(questions.rates_per_s[rows].T[..., np.newaxis], np.float32),
            **{name: column(getattr(questions, name)) for name in (*names, *bounds)},
            kv_cache_tokens=kv_cache_tokens[rows].astype(np.float32),
            max_loras=max_loras[rows].astype(np.float32),
            max_lora_rank=column(rank),
        ),
    )
    return found
