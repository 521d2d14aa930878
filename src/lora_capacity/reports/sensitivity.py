"""What small changes would do: each predicted anew, one at a time."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.search.margin import assess
from lora_capacity.search.objective import Columns
from lora_capacity.search.problem import Problem
from lora_capacity.search.recommendation import Candidate
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
        margin: Difference in the load at which the server starves, in times the offered load.
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


def changes(problem: Problem, best: Candidate) -> tuple[Change, ...]:
    """Predict what small changes of the load, the server and the choice would do.

    Args:
        problem: Workload and calibration.
        best: The recommended configuration.

    Returns:
        The changes that are possible, each against the recommended configuration.
    """
    configurations = _configurations(problem, best)
    words = list(configurations)
    columns = {
        name: np.array([{**_settings(best), **configurations[each]}[name] for each in words])
        for name in _settings(best)
    }
    fixed = {name: value for name, value in problem.settings.items() if name not in columns}
    scenarios = build_scenarios(problem.workload, problem.calibration, **columns, **fixed)
    found = assess(
        problem.calibration,
        _with_load_and_memory(problem, scenarios, words),
        problem.workload,
        threshold=problem.threshold,
        risk=problem.risk,
        loads=_LOADS,
    )
    longer = _longer_outputs(problem, best)
    if longer is not None:
        words.append("outputs 10 % longer")
        found = {name: np.concatenate([column, longer[name]]) for name, column in found.items()}
    return _against_the_first(words, found)


def _settings(best: Candidate) -> dict[str, int]:
    return {
        "adapters": best.max_cpu_loras,
        "max_loras": best.max_loras,
        "max_lora_rank": best.max_lora_rank,
        "max_num_seqs": best.max_num_seqs,
        "max_num_batched_tokens": best.max_num_batched_tokens,
    }


_MORE_LOAD, _MORE_MEMORY, _LESS_MEMORY = "one more request per second", "one more GiB of memory", "one GiB less memory"


def _configurations(problem: Problem, best: Candidate) -> dict[str, Mapping[str, int]]:
    """Return the settings that differ, by what is changed; the first is the recommendation itself."""
    found: dict[str, Mapping[str, int]] = {"": {}, _MORE_LOAD: {}, _MORE_MEMORY: {}, _LESS_MEMORY: {}}
    available, rank = problem.workload.adapters.max_count, best.max_lora_rank
    adapters = best.max_cpu_loras
    if (available is None or adapters < available) and problem.workload.adapters.max_rank([adapters + 1])[0] <= rank:
        found["one more adapter"] = {"adapters": adapters + 1}
    if best.max_loras < adapters:
        found["one more slot"] = {"max_loras": best.max_loras + 1}
    if best.max_loras > 1:
        found["one slot fewer"] = {"max_loras": best.max_loras - 1}
    higher = [allowed for allowed in problem.calibration.behaviour.max_lora_ranks if allowed > rank]
    if higher:
        found[f"the next rank, {higher[0]}"] = {"max_lora_rank": higher[0]}
    if 2 * best.max_num_seqs <= best.max_num_batched_tokens:
        found["max_num_seqs doubled"] = {"max_num_seqs": 2 * best.max_num_seqs}
    found["max_num_batched_tokens doubled"] = {"max_num_batched_tokens": 2 * best.max_num_batched_tokens}
    return found


def _with_load_and_memory(problem: Problem, scenarios: Scenarios, words: list[str]) -> Scenarios:
    host: Any = with_classes(scenarios, min(_CLASSES, scenarios.class_count.shape[1]))
    host = host.scaled(np.where(np.array(words) == _MORE_LOAD, 1.0 + 1.0 / host.requests_per_s, 1.0))
    tokens = BYTES_PER_GIB / problem.calibration.model.kv_bytes_per_token
    more = np.select([np.array(words) == _MORE_MEMORY, np.array(words) == _LESS_MEMORY], [tokens, -tokens], 0.0)
    changed: Scenarios = dataclasses.replace(
        host,
        kv_cache_tokens=np.maximum(host.kv_cache_tokens + more, 1.0).astype(host.kv_cache_tokens.dtype),
    )
    return changed


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
