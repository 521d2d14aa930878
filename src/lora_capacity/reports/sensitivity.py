"""What small changes would do: each predicted anew, one at a time."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search import Candidate
from lora_capacity.search.margin import assess
from lora_capacity.search.objective import Columns
from lora_capacity.search.problem import Problem
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.workload import LengthDistribution

LONGER = 1.1
"""Factor by which outputs are made longer."""

_LOADS = 13
"""Loads at which each changed server is tried, as many as for the recommendation that it is compared with."""

_CLASSES = 16
"""Adapters of more rates and ranks are merged, as in the search."""


@dataclass(frozen=True)
class Change:
    """One change and what it would do; NaN where the server would not start.

    Attributes:
        words: What is changed.
        margin: Difference in the load at which the server fails, in times the offered load.
        itl_s: Difference in the mean inter-token latency.
        ttft_s: Difference in the mean time to first token.
        throughput_tokens_per_s: Difference in throughput.
        status: `Status` label of the changed server.
    """

    words: str
    margin: float
    itl_s: float
    ttft_s: float
    throughput_tokens_per_s: float
    status: str


@dataclass(frozen=True)
class _Tried:
    """What to change of the recommended configuration.

    Attributes:
        words: What is changed.
        settings: Settings that differ, by vLLM's names, and the number of adapters.
        requests_per_s: How much more load.
        memory_bytes: How much more memory for the KV cache.
    """

    words: str
    settings: dict[str, int] = field(default_factory=dict)
    requests_per_s: float = 0.0
    memory_bytes: float = 0.0


def changes(problem: Problem, best: Candidate) -> tuple[Change, ...]:
    """Predict what small changes of the load, the server and the choice would do.

    Args:
        problem: Workload and calibration.
        best: The recommended configuration.

    Returns:
        The changes that are possible, each against the recommended configuration.
    """
    tried, settings = _tried(problem, best), _settings(best)
    words = [each.words for each in tried]
    columns = {name: np.array([(settings | each.settings)[name] for each in tried]) for name in settings}
    fixed = {name: value for name, value in problem.settings.items() if name not in columns}
    scenarios = build_scenarios(problem.workload, problem.calibration, **columns, **fixed)
    host: Any = with_classes(scenarios, min(_CLASSES, scenarios.class_count.shape[1]))
    host = host.scaled(1.0 + np.array([each.requests_per_s for each in tried]) / host.requests_per_s)
    more = np.array([each.memory_bytes for each in tried]) / problem.calibration.model.kv_bytes_per_token
    kv_cache_tokens = np.maximum(host.kv_cache_tokens + more, 1.0).astype(host.kv_cache_tokens.dtype)
    found = assess(
        problem.calibration,
        host.replace(kv_cache_tokens=kv_cache_tokens),
        problem.workload,
        needed=problem.needed,
        risk=problem.risk,
        loads=_LOADS,
    )
    longer = _longer_outputs(problem, best)
    if longer is not None:
        words.append("outputs 10 % longer")
        found = {name: np.concatenate([column, longer[name]]) for name, column in found.items()}
    return _against_the_first(words, found)


def _settings(best: Candidate) -> dict[str, int]:
    names = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    return {"adapters": best.max_cpu_loras} | {name: getattr(best, name) for name in names}


def _tried(problem: Problem, best: Candidate) -> list[_Tried]:
    """Return what is changed; the first is the recommendation itself."""
    found = [
        _Tried(""),
        _Tried("one more request per second", requests_per_s=1.0),
        _Tried("one more GiB of memory", memory_bytes=BYTES_PER_GIB),
        _Tried("one GiB less memory", memory_bytes=-BYTES_PER_GIB),
    ]
    known, rank, adapters, slots = problem.workload.adapters, best.max_lora_rank, best.max_cpu_loras, best.max_loras
    if (known.max_count is None or adapters < known.max_count) and known.max_rank([adapters + 1])[0] <= rank:
        found.append(_Tried("one more adapter", {"adapters": adapters + 1}))
    if slots < adapters:
        found.append(_Tried("one more slot", {"max_loras": slots + 1}))
    if slots > 1:
        found.append(_Tried("one slot fewer", {"max_loras": slots - 1}))
    higher = [allowed for allowed in problem.calibration.behaviour.max_lora_ranks if allowed > rank]
    if higher:
        found.append(_Tried(f"the next rank, {higher[0]}", {"max_lora_rank": higher[0]}))
    if 2 * best.max_num_seqs <= best.max_num_batched_tokens:
        found.append(_Tried("max_num_seqs doubled", {"max_num_seqs": 2 * best.max_num_seqs}))
    doubled = {"max_num_batched_tokens": 2 * best.max_num_batched_tokens}
    found.append(_Tried("max_num_batched_tokens doubled", doubled))
    return found


def _longer_outputs(problem: Problem, best: Candidate) -> Columns | None:
    """Predict the recommended server with longer outputs, unless recorded requests or its longest one forbid it."""
    workload = problem.workload
    lengths = workload.output_tokens
    longer = LengthDistribution.from_histogram(np.rint(lengths.tokens * LONGER), lengths.probability)
    limit = problem.settings.get("max_model_len") or problem.calibration.model.max_position_embeddings
    if workload.trace is not None or workload.input_tokens.max + longer.max > limit:
        return None
    settings = _settings(best)
    changed = dataclasses.replace(problem, workload=dataclasses.replace(workload, output_tokens=longer))
    return changed.assess([settings.pop("adapters")], settings.pop("max_loras"), _LOADS, **settings)


def _against_the_first(words: list[str], found: Columns) -> tuple[Change, ...]:
    names = ("itl_s", "ttft_s", "throughput_tokens_per_s")
    differences = {name: found[name].astype(np.float64) - float(found[name][0]) for name in names}
    return tuple(
        Change(
            words=words[i],
            margin=float(found["critical_load"][i] - found["critical_load"][0]),
            **{name: float(column[i]) for name, column in differences.items()},
            status=str(found["status"][i]),
        )
        for i in range(1, len(words))
    )
