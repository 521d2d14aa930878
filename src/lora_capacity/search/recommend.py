"""Recommends how many adapters to serve on one GPU, and with how many slots."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InfeasibleError, InputError, check_number, nearest_hint
from lora_capacity.run import TWINS
from lora_capacity.run.steady import Progress
from lora_capacity.scenarios import STARVED_SHORTFALL, extrapolations
from lora_capacity.search.frontier import join, search
from lora_capacity.search.objective import Columns, Objective
from lora_capacity.search.problem import Problem
from lora_capacity.search.recommendation import (
    Candidate,
    MemoryMargin,
    Neighbour,
    Recommendation,
    SecondOpinion,
)
from lora_capacity.search.refine import EventRuns, Point, point_of, refine
from lora_capacity.words import bottleneck, gibibytes
from lora_capacity.workload import Workload

_LOADS = 13
"""Loads at which what is shown is simulated, of the 3 of the search: to tell headroom beyond the margin needed."""

_RUNNERS_UP = 5
"""Runners-up that are shown: as many as a screen holds beside the rest."""

_APART = 1.25
"""Least ratio of slots between runners-up, lest they all be neighbours of the best."""

_LONG_TTFT_S = 10.0
"""Mean time to first token beyond which the answer warns unless it was bounded: nobody waits longer gladly."""

_NEIGHBOURS = {"one more adapter": (1, 0), "one more slot": (0, 1), "one slot fewer": (0, -1)}
"""Changes told beside the recommendation: adapters and slots more or fewer."""


def recommend(
    workload: Workload,
    calibration: Calibration,
    *,
    adapters: Sequence[int] | None = None,
    max_loras: Sequence[int] | None = None,
    max_num_batched_tokens: Sequence[int] | None = None,
    max_num_seqs: Sequence[int] | None = None,
    objective: Objective | None = None,
    settings: Mapping[str, Any] | None = None,
    starvation_threshold: float = STARVED_SHORTFALL,
    risk: float = 0.05,
    engine: str = "steady",
    seed: int = 0,
    seeds: int = 2,
    progress: Progress | None = None,
) -> Recommendation:
    """Recommend how many adapters to serve and how many slots to reserve.

    The steady twin looks everywhere. With the event twin as engine, that one simulates the configurations near the
    best, and decides among them.

    Args:
        workload: Adapters and traffic.
        calibration: Model, GPU and coefficients.
        adapters: Numbers of adapters to consider; all that can make sense if not given.
        max_loras: Numbers of slots to consider; all that can make sense if not given.
        max_num_batched_tokens: Token budgets to consider; vLLM's default if not given.
        max_num_seqs: Batch limits to consider; vLLM's default if not given.
        objective: What to look for; the highest throughput if not given.
        settings: Other server settings by vLLM's names.
        starvation_threshold: Share below the offered load from which throughput counts as starved, above 0.
        risk: Highest acceptable probability of starving, given the calibration's error, above 0, at most 0.5.
        engine: Which twin decides, ``steady`` or ``event``.
        seed: First seed of the event twin's requests, >= 0.
        seeds: How many; with 1 the chance of an hour is not known, and left out of the margin to starvation.
        progress: Called with the combinations of token budget and batch limit done, and their total; then with the
            configurations simulated and their total, for every round of the event twin.

    Returns:
        The recommendation: by the steady twin within one adapter and one slot of the best; by the event twin the best
        of those that it simulated, at most a few percent of adapters from where it begins to starve.

    Raises:
        InputError: If a value is not allowed.
        InfeasibleError: If no configuration is acceptable; says what came closest.
    """
    axes = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
    problem = Problem(
        workload,
        calibration,
        objective or Objective(),
        {name: value for name, value in (settings or {}).items() if value is not None},
        {name: tuple(values) for name, values in axes.items() if values is not None},
        adapters,
        max_loras,
        starvation_threshold,
        risk,
    )
    if engine not in TWINS:
        raise InputError("engine", engine, ", ".join(TWINS), nearest_hint(engine, TWINS))
    first = int(check_number("seed", seed, minimum=0, integer=True))
    count = int(check_number("seeds", seeds, minimum=1, integer=True))
    parts = []
    for done, combination in enumerate(problem.combinations, start=1):
        parts.append(search(problem, combination))
        if progress is not None:
            progress(done, len(problem.combinations))
    columns = join(parts)
    if engine == "event":
        return _refined(problem, columns, EventRuns(problem, first, count, progress))
    chosen = problem.choose(columns)
    if chosen is None:
        raise InfeasibleError(_closest(problem, columns))
    return _recommend(problem, columns, chosen, lambda points: _assess(problem, points))


def _assess(problem: Problem, points: Sequence[Point]) -> Columns:
    """Let the steady twin look at configurations under many loads."""
    adapters, slots, budgets, seqs = np.array(points).T
    return problem.assess(adapters, slots, _LOADS, max_num_batched_tokens=budgets, max_num_seqs=seqs)


def _refined(problem: Problem, steady: Columns, runs: EventRuns) -> Recommendation:
    """Let the event twin choose, and the steady twin give its opinion of that."""
    columns = refine(problem, steady, runs)
    chosen = problem.choose(columns) if columns else None
    if chosen is None:
        raise InfeasibleError(_closest(problem, columns or steady))
    best = point_of(columns, chosen)
    found = _recommend(problem, columns, chosen, runs.assess)
    own = problem.choose(steady)
    taken = best if own is None else point_of(steady, own)
    of_best, of_taken = Candidate.from_columns(_assess(problem, [best, taken]))
    opinion = SecondOpinion(
        of_best=of_best,
        chosen=of_taken,
        chosen_played=Candidate.from_columns(runs.assess([taken]))[0],
        seeds=len(runs.seeds),
        spread=float(runs.assess([best])["spread"][0]),
    )
    return dataclasses.replace(found, engine="event", second_opinion=opinion)


def _recommend(
    problem: Problem, columns: Columns, chosen: int, assess: Callable[[Sequence[Point]], Columns]
) -> Recommendation:
    """Look again at what is shown, and put it in words and numbers."""
    neighbours = _neighbours(problem, columns, chosen)
    rows = [chosen, *_runners_up(problem, columns, chosen)]
    adapters, slots, budget, seqs = point_of(columns, chosen)
    steps = [_NEIGHBOURS[change] for change in neighbours]
    changed = [(adapters + adapter, slots + slot, budget, seqs) for adapter, slot in steps]
    found = assess([*(point_of(columns, row) for row in rows), *changed])
    verdicts, candidates = problem.judge(found), Candidate.from_columns(found)
    best = candidates[0]
    server = problem.server(
        best.max_cpu_loras,
        best.max_loras,
        max_lora_rank=best.max_lora_rank,
        max_num_seqs=best.max_num_seqs,
        max_num_batched_tokens=best.max_num_batched_tokens,
    )
    labels, counts = np.unique(problem.judge(columns).astype(str), return_counts=True)
    return Recommendation(
        calibration=problem.calibration.name,
        model=problem.calibration.model.name,
        objective=problem.objective,
        threshold=problem.threshold,
        risk=problem.risk,
        best=best,
        server=server,
        memory=_memory_margin(problem.calibration, server),
        neighbours=tuple(
            Neighbour(change, candidate, candidate.throughput_tokens_per_s - best.throughput_tokens_per_s, str(verdict))
            for change, candidate, verdict in zip(
                neighbours, candidates[len(rows) :], verdicts[len(rows) :], strict=True
            )
        ),
        runners_up=tuple(candidates[1 : len(rows)]),
        counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        warnings=_warnings(problem, best, server),
    )


def _neighbours(problem: Problem, columns: Columns, chosen: int) -> list[str]:
    """The changes by one that this workload and these settings allow."""
    adapters, slots = int(columns["max_cpu_loras"][chosen]), int(columns["max_loras"][chosen])
    changes = [change for change, (_, slot) in _NEIGHBOURS.items() if slot and 1 <= slots + slot <= adapters]
    available = problem.workload.adapters.max_count
    if available is not None and adapters == available:
        return changes
    rank = problem.settings.get("max_lora_rank")
    fits = rank is None or problem.workload.adapters.max_rank([adapters + 1])[0] <= rank
    return ["one more adapter", *changes] if fits else changes


def _runners_up(problem: Problem, columns: Columns, chosen: int) -> list[int]:
    """The choices if slot counts near those already taken were not to be had; best first."""
    slots = columns["max_loras"]
    combination = np.stack([columns["max_num_batched_tokens"], columns["max_num_seqs"]], axis=1)
    apart = _APART if problem.max_loras is None else 1.0 + 1e-9
    taken, left = [chosen], np.arange(slots.size)
    while len(taken) <= _RUNNERS_UP:
        ratio = slots[left] / slots[taken[-1]]
        near = np.maximum(ratio, 1.0 / ratio) < apart
        left = left[~(near & (combination[left] == combination[taken[-1]]).all(axis=1))]
        found = problem.choose({name: column[left] for name, column in columns.items()}) if left.size else None
        if found is None:
            break
        taken.append(int(left[found]))
    return taken[1:]


def _memory_margin(calibration: Calibration, server: ServerConfig) -> MemoryMargin:
    plan = calibration.plan_memory(server)
    spare_tokens = plan.headroom_no_kv_cache_bytes.item() // calibration.model.kv_bytes_per_token
    return MemoryMargin(plan.kv_cache_tokens.item(), int(spare_tokens), plan.headroom_oom_bytes.item())


def _warnings(problem: Problem, best: Candidate, server: ServerConfig) -> tuple[str, ...]:
    warnings = extrapolations(problem.workload, problem.calibration, server)
    available = problem.workload.adapters.max_count
    if best.max_cpu_loras == available:
        warnings.append(f"all {available} adapters of the workload are served: the server may have room for more")
    if best.ttft_s > _LONG_TTFT_S and problem.objective.max_ttft_s is None:
        warnings.append(
            f"requests wait {best.ttft_s:.0f} s for a first token on average, since throughput alone is highest where "
            "queues are long: bound that time with max_ttft_s (--max-ttft-ms)"
        )
    return tuple(warnings)


def _closest(problem: Problem, columns: Columns) -> str:
    """Say in one line why nothing is acceptable, and what came closest."""
    verdicts = problem.judge(columns)
    started = ~np.isnan(columns["throughput_tokens_per_s"])
    if not started.any():
        return _does_not_start(problem, columns)
    slow = np.flatnonzero(verdicts == "too_slow")
    if slow.size:
        return _too_slow(problem, columns, slow)
    row = int(np.nanargmax(columns["critical_load"]))
    best = {name: column[row] for name, column in columns.items()}
    offered_per_s = best["offered_tokens_per_s"]
    then = f"; bottleneck: {bottleneck(best['limit_beyond'])}" if best["limit_beyond"] else ""
    return (
        f"no configuration keeps up with its load: max_cpu_loras {best['max_cpu_loras']} with max_loras "
        f"{best['max_loras']} comes closest, completes {best['throughput_tokens_per_s'] / offered_per_s:.1%} of the "
        f"{offered_per_s:.0f} tokens/s offered and starves with a chance of {best['starving_probability']:.2g} "
        f"(accepted: {problem.risk:g}){then}"
    )


def _does_not_start(problem: Problem, columns: Columns) -> str:
    row = int(np.lexsort((columns["max_cpu_loras"], columns["max_loras"]))[0])
    names = ("max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    slots, settings = int(columns["max_loras"][row]), {name: int(columns[name][row]) for name in names}
    plan = problem.calibration.plan_memory(problem.server(int(columns["max_cpu_loras"][row]), slots, **settings))
    lacking = gibibytes(-min(plan.headroom_no_kv_cache_bytes.item(), plan.headroom_oom_bytes.item()))
    return (
        f"no configuration starts: max_loras {slots} at max_lora_rank {settings['max_lora_rank']} lacks {lacking} "
        f"({columns['status'][row]}); change gpu_memory_utilization, or lower max_model_len, max_lora_rank or "
        "max_num_batched_tokens"
    )


def _too_slow(problem: Problem, columns: Columns, rows: NDArray[np.int64]) -> str:
    bounds = {"itl_s": problem.objective.max_itl_s, "ttft_s": problem.objective.max_ttft_s}
    excess = [columns[name][rows] / bound for name, bound in bounds.items() if bound is not None]
    row = rows[np.argmin(np.max(excess, axis=0))]
    told = ", ".join(
        f"{name} {columns[name][row]:.3g} (at most {bound:g})" for name, bound in bounds.items() if bound is not None
    )
    return (
        f"no configuration that keeps up is fast enough: max_cpu_loras {columns['max_cpu_loras'][row]} with max_loras "
        f"{columns['max_loras'][row]} comes closest with {told}"
    )
