"""Recommends how many adapters to serve on one GPU, with how many slots and which batch limits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from lora_capacity.calibration import Calibration, CalibrationLike, Served, load_calibration
from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InfeasibleError, check_choice, check_number, check_type
from lora_capacity.hardware import Processor
from lora_capacity.models import ModelShape
from lora_capacity.run import TWINS
from lora_capacity.run.steady import Progress, check_progress
from lora_capacity.scenarios import STARVED_SHORTFALL, extrapolations
from lora_capacity.schema import whole_numbers
from lora_capacity.search.candidate import Candidate, MemoryMargin, Neighbour, OverTime, Played
from lora_capacity.search.frontier import join, search_all
from lora_capacity.search.objective import Columns, Objective
from lora_capacity.search.play import APART, Plays, Point, choices, point_of, settle
from lora_capacity.search.problem import Problem
from lora_capacity.search.recommendation import Recommendation
from lora_capacity.words import bottleneck, duration, gibibytes, percent, shown
from lora_capacity.workload import Goodput, WorkloadLike, load_workload

_LOADS = 13
"""Loads at which what is shown is simulated, of the 3 of the search: to tell headroom beyond the margin needed."""

_RUNNERS_UP = 5
"""Runners-up that are shown: as many as a screen holds beside the rest."""

_NEIGHBOURS = {"one more adapter": (1, 0), "one more slot": (0, 1), "one slot fewer": (0, -1)}
"""Changes told beside the recommendation: adapters and slots more or fewer."""


def recommend(
    workload: WorkloadLike,
    calibration: CalibrationLike | None = None,
    *,
    model: ModelShape | str | None = None,
    gpu: Processor | str | None = None,
    goodput: Mapping[str, float] | Goodput | None = None,
    attainment: float | None = None,
    adapters: int | Iterable[int] | None = None,
    max_loras: int | Iterable[int] | None = None,
    max_num_batched_tokens: int | Iterable[int] | None = None,
    max_num_seqs: int | Iterable[int] | None = None,
    objective: Objective | str | None = None,
    settings: Mapping[str, Any] | None = None,
    starvation_threshold: float = STARVED_SHORTFALL,
    risk: float = 0.05,
    engine: str = "event",
    seed: int = 0,
    seeds: int = 4,
    progress: Progress | None = None,
    **served: Unpack[Served],
) -> Recommendation:
    """Recommend how many adapters to serve, how many slots to reserve and which batch limits to set.

    The steady twin looks everywhere and proposes. The event twin plays what it proposes, walks to the nearest that
    holds, and settles the answer with seeds that the search has not seen. Of traffic over time the peak window is
    planned for, as if it lasted (`Workload.at_peak`).

    Args:
        workload: Adapters and traffic, as `load_workload` takes them: a workload, a file, its content, requests.
        calibration: Model, GPU and coefficients, or their name or file; without it ``model`` and ``gpu`` say for what
            one is derived.
        model: Layer shapes, or a model's folder or name.
        gpu: A GPU, or its name.
        goodput: Latency bounds in milliseconds in place of the workload's, by vLLM's keys ``ttft``, ``tpot``, ``e2el``.
        attainment: Share of the requests that should keep them, in place of the workload's.
        adapters: Numbers of adapters to consider, one or several; all that can make sense if not given.
        max_loras: Numbers of slots to consider, one or several; all that can make sense if not given.
        max_num_batched_tokens: Token budgets to consider; if not given, powers of two up from and down from vLLM's
            default for as long as that pays.
        max_num_seqs: Batch limits to consider; if not given, likewise.
        objective: What to look for, or its goal; the highest goodput if not given.
        settings: Other server settings by vLLM's names.
        starvation_threshold: Share below the offered load from which throughput counts as starved, above 0; for the
            objective ``throughput``.
        risk: Highest acceptable probability of failing, given the calibration's error and, of what is played, the
            chance of an hour; above 0, at most 0.5.
        engine: Which twin decides: ``event``, or ``steady`` for an answer at once, of which nothing is played.
        seed: First seed of the requests that the answer is played with, >= 0.
        seeds: How many; with 1 the chance of an hour is not known, and left out of the margin.
        progress: Called with the combinations of token budget and batch limit done, and their total if it is known;
            then with the configurations played and their total, for every round of the event twin.
        **served: How the model is served, as `load_calibration` takes it.

    Returns:
        The recommendation: by the steady twin within one adapter and one slot of the best; played, at most a few
        percent of adapters from where it begins to fail.

    Raises:
        InputError: If a value is not allowed.
        InfeasibleError: If no configuration is acceptable; says what came closest.
    """
    asked = load_workload(workload, goodput=goodput, attainment=attainment)
    check_type("settings", settings, (Mapping, type(None)), "a mapping of settings by vLLM's names")
    if model is not None and "target_modules" in (settings or {}):
        served.setdefault("target_modules", (settings or {})["target_modules"])
    known = load_calibration(calibration, model=model, gpu=gpu, **served)
    axes = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
    problem = Problem(
        asked.at_peak(),
        known,
        Objective.of(objective),
        {name: value for name, value in (settings or {}).items() if value is not None},
        {name: whole_numbers(name, values) for name, values in axes.items() if values is not None},
        None if adapters is None else whole_numbers("adapters", adapters),
        None if max_loras is None else whole_numbers("max_loras", max_loras),
        starvation_threshold,
        risk,
    )
    check_choice("engine", engine, TWINS)
    check_progress(progress)
    first = int(check_number("seed", seed, minimum=0, integer=True))
    count = int(check_number("seeds", seeds, minimum=1, integer=True))
    columns = search_all(problem, progress)
    played: Played | None = None
    if engine == "event":
        plays = Plays(problem, columns, first, count, progress)
        settled, refused = settle(problem, plays)
        if settled is None:
            raise InfeasibleError(_closest(problem, join(refused) if refused else columns))
        best = point_of(settled, 0)
        played = Played(tuple(plays.seeds), Candidate.from_columns(settled)[0], settled["error"].item(), len(refused))
    else:
        chosen = problem.choose(columns)
        if chosen is None:
            raise InfeasibleError(_closest(problem, columns))
        best = point_of(columns, chosen)
    found = _recommend(problem, columns, best, played)
    return found if asked.over_time is None else replace(found, over_time=OverTime.of(asked, found.told))


def _assess(problem: Problem, points: Sequence[Point]) -> Columns:
    """Let the steady twin look at configurations under many loads."""
    adapters, slots, budgets, seqs = np.array(points).T
    return problem.assess(adapters, slots, _LOADS, max_num_batched_tokens=budgets, max_num_seqs=seqs)


def _recommend(problem: Problem, columns: Columns, point: Point, played: Played | None) -> Recommendation:
    """Look again at what is shown, and put it in words and numbers."""
    neighbours = _neighbours(problem, point)
    adapters, slots, budget, seqs = point
    apart = APART if problem.max_loras is None else 1.0 + 1e-9
    others = choices(problem, columns, _RUNNERS_UP, after=point, apart=apart, by_limits=True)
    steps = [_NEIGHBOURS[change] for change in neighbours]
    changed = [(adapters + adapter, slots + slot, budget, seqs) for adapter, slot in steps]
    found = _assess(problem, [point, *others, *changed])
    verdicts, candidates, shown = problem.judge(found), Candidate.from_columns(found), 1 + len(others)
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
        goodput=problem.workload.goodput,
        threshold=problem.threshold,
        risk=problem.risk,
        best=best,
        served_as=problem.calibration.model.served_as,
        server=server,
        memory=_memory_margin(problem.calibration, server),
        neighbours=tuple(
            Neighbour(change, candidate, candidate.throughput_tokens_per_s - best.throughput_tokens_per_s, str(verdict))
            for change, candidate, verdict in zip(neighbours, candidates[shown:], verdicts[shown:], strict=True)
        ),
        runners_up=tuple(candidates[1:shown]),
        counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        warnings=_warnings(problem, best if played is None else played.mean, server),
        played=played,
    )


def _neighbours(problem: Problem, point: Point) -> list[str]:
    """The changes by one that this workload and these settings allow."""
    adapters, slots, *_ = point
    changes = [change for change, (_, slot) in _NEIGHBOURS.items() if slot and 1 <= slots + slot <= adapters]
    available = problem.workload.adapters.max_count
    if available is not None and adapters == available:
        return changes
    rank = problem.settings.get("max_lora_rank")
    fits = rank is None or problem.workload.adapters.max_rank([adapters + 1])[0] <= rank
    return ["one more adapter", *changes] if fits else changes


def _memory_margin(calibration: Calibration, server: ServerConfig) -> MemoryMargin:
    plan = calibration.plan_memory(server)
    spare_tokens = plan.headroom_no_kv_cache_bytes.item() // calibration.model.kv_bytes_per_token
    return MemoryMargin(plan.kv_cache_tokens.item(), int(spare_tokens), plan.headroom_oom_bytes.item())


def _warnings(problem: Problem, best: Candidate, server: ServerConfig) -> tuple[str, ...]:
    warnings = [*problem.workload.assumptions, *extrapolations(problem.workload, problem.calibration, server)]
    if best.extrapolation_error:
        within = problem.calibration.capacity_error
        wider = float(np.hypot(within, best.extrapolation_error))
        warnings.append(
            f"outside the calibrated range the error of the capacity is {percent(wider)} in place of {percent(within)} "
            "(standard deviations); the headroom allows for it"
        )
    available = problem.workload.adapters.max_count
    if best.max_cpu_loras == available:
        warnings.append(f"all {available} adapters of the workload are served; the server may have room for more")
    if problem.objective.goal == "throughput":
        warnings.append(
            f"this server is overloaded, for the highest throughput: mean TTFT {duration(best.ttft_s)}; use "
            "--objective goodput to keep latency bounds"
        )
    return tuple(warnings)


def _closest(problem: Problem, columns: Columns) -> str:
    """Say in one line why nothing is acceptable, what came closest, and what to relax."""
    if np.isnan(columns["throughput_tokens_per_s"]).all():
        return _does_not_start(problem, columns)
    row = int(np.nanargmax(columns["critical_load"]))
    best = {name: column[row] for name, column in columns.items()}
    where = f"closest: max_cpu_loras {best['max_cpu_loras']}, max_loras {best['max_loras']}"
    then = f"; bottleneck: {bottleneck(best['limit_beyond'])}"
    if best["limit_beyond"] in ("", "none"):
        waiting, step = best["mean_waiting"], duration(best["step_time_s"])
        then = f"; bottleneck: none ({shown(float(waiting))} requests waiting on average, step time {step})"
    chance = f"P(overload) {percent(best['starving_probability'])} ({percent(problem.risk)} allowed)"
    served = f"serves {percent(best['service'])} of {shown(best['offered_tokens_per_s'])} tokens/s offered"
    if problem.objective.goal == "throughput":
        return f"no configuration keeps up: {where}, {served}, {chance}{then}"
    goodput = problem.workload.goodput
    bounds = " ".join(f"{key}:{bound_ms:g}" for key, bound_ms in goodput.to_ms().items())
    return (
        f"no configuration keeps up within bounds: {where}, {served}, "
        f"{percent(best['attainment'])} of the requests within {bounds} ms ({percent(goodput.attainment)} asked), mean "
        f"TTFT {duration(best['ttft_s'])}, mean TPOT {duration(best['tpot_s'])}, "
        f"{chance}{then}; relax --goodput, --attainment or --risk"
    )


def _does_not_start(problem: Problem, columns: Columns) -> str:
    """Say what the smallest server lacks, and which setting makes it start."""
    row = int(np.lexsort((columns["max_cpu_loras"], columns["max_loras"]))[0])
    names = ("max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    adapters, settings = int(columns["max_cpu_loras"][row]), {name: int(columns[name][row]) for name in names}
    server = problem.server(adapters, int(columns["max_loras"][row]), **settings)
    plan = problem.calibration.plan_memory(server)
    lacking = gibibytes(-plan.headroom_bytes.item())
    smallest = f"max_loras {server.max_loras} at max_lora_rank {server.max_lora_rank}"
    what = f"no configuration starts: {smallest} lacks {lacking} ({columns['status'][row]})"
    found = problem.calibration.remedies(server, _changeable(problem, server))
    starting = [f"{each.flag} {each.value:g}" for each in found if each.starts]
    if starting:
        return f"{what}; it starts with {' or '.join(starting)}"
    most = ", ".join(f"{each.flag} {each.value:g} makes room for {gibibytes(each.room_bytes)}" for each in found)
    return f"{what}; no single setting is enough: {most}" if most else what


def _changeable(problem: Problem, server: ServerConfig) -> dict[str, Any]:
    """Settings with which the same adapters are served; step times are known for all modules and CUDA graphs only."""
    names = ("max_loras", "max_lora_rank", "gpu_memory_utilization", "max_model_len", "max_num_batched_tokens")
    needed = int(problem.workload.adapters.max_rank([server.max_cpu_loras])[0])
    ranks = [rank for rank in problem.calibration.behaviour.max_lora_ranks if rank >= needed]
    return {name: getattr(server, name) for name in (*names, "max_num_seqs")} | {"max_lora_ranks": ranks}
