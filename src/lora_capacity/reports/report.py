"""A recommendation with its surroundings, ready to be drawn and told."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_capacity.calibration import Calibration, CalibrationLike, load_calibration
from lora_capacity.errors import check_type
from lora_capacity.memory import PARTS
from lora_capacity.reports.data import AdapterService, ClassService, MemoryShare, ReportData
from lora_capacity.reports.figures import all_figures
from lora_capacity.reports.load_curve import LoadCurve
from lora_capacity.reports.page import page
from lora_capacity.reports.plan_grid import Curve, PlanGrid, run_at
from lora_capacity.reports.sensitivity import changes
from lora_capacity.run.steady import Progress, check_progress, with_classes
from lora_capacity.scenarios import Scenarios, build_scenarios
from lora_capacity.search import Recommendation
from lora_capacity.search.problem import Problem
from lora_capacity.workload import WorkloadLike, load_workload
from lora_capacity.workload.adapters import AdapterList

_COLUMNS, _ROWS, _POINTS = 46, 34, 120
"""Cells of the map, as fine as a pointer on a desk tells apart, and points of the curves, one every few pixels."""

_CLASSES = 12
"""Most rows of the figure of who is served; adapters of more rates and ranks are merged."""


class Report(ReportData):
    """A recommendation with its surroundings, ready to be drawn and told."""

    def figures(self) -> dict[str, str]:
        """Return every figure as an SVG document that stands alone, in light colours, by name."""
        return all_figures(self)

    def html(self, *, title: str = "LoRA capacity report", note: str = "") -> str:
        """Return the report as one HTML document without references to anything outside it.

        Args:
            title: Its heading.
            note: Where and when it was made, shown below the heading.
        """
        return page(self, title, note)


def build_report(
    workload: WorkloadLike,
    calibration: CalibrationLike,
    found: Recommendation,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Predict the surroundings of a recommendation by the steady twin, and by the event twin if this decided.

    Args:
        workload: What was asked for, as `load_workload` takes it.
        calibration: Model, GPU and coefficients, or their name or file.
        found: What `recommend` answered for them.
        settings: Server settings that it was given, by vLLM's names.
        progress: Called with the parts done and their total.

    Returns:
        The report.
    """
    check_progress(progress)
    problem = _problem_of(workload, calibration, found, settings)
    best, parts = found.best, 5

    def done(part: int) -> None:
        if progress is not None:
            progress(part, parts)

    grid = PlanGrid.around(problem, best, _COLUMNS, _ROWS)
    done(1)
    curve = Curve.through(problem, best, int(grid.adapters[-1]), _POINTS)
    done(2)
    load = LoadCurve.of(problem, found)
    done(3)
    classes = _classes(problem, found)
    done(4)
    report = Report(
        problem.workload,
        problem.calibration,
        found,
        grid,
        curve,
        load,
        classes,
        _adapters(problem, best.max_cpu_loras, load, classes),
        _memory(problem.calibration, found),
        changes(problem, best),
    )
    done(5)
    return report


def survey(
    workload: WorkloadLike,
    calibration: CalibrationLike,
    found: Recommendation,
    *,
    settings: Mapping[str, Any] | None = None,
    columns: int = 30,
    rows: int = 12,
) -> PlanGrid:
    """Predict a grid of configurations around a recommendation.

    Args:
        workload: What was asked for, as `load_workload` takes it.
        calibration: Model, GPU and coefficients, or their name or file.
        found: What `recommend` answered for them.
        settings: Server settings that it was given, by vLLM's names.
        columns: About how many numbers of adapters.
        rows: About how many numbers of slots.
    """
    return PlanGrid.around(_problem_of(workload, calibration, found, settings), found.best, columns, rows)


def _problem_of(
    workload: WorkloadLike, calibration: CalibrationLike, found: Recommendation, settings: Mapping[str, Any] | None
) -> Problem:
    """Return the question whose answer a recommendation is, with its batch limits and free adapters and slots."""
    check_type("found", found, Recommendation, "a recommendation")
    check_type("settings", settings, (Mapping, type(None)), "a mapping of settings by vLLM's names")
    asked, known = load_workload(workload), load_calibration(calibration)
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    batch = {name: getattr(found.server, name) for name in ("max_num_seqs", "max_num_batched_tokens")}
    return Problem(asked, known, found.objective, given | batch, {}, None, None, found.threshold, found.risk)


def _classes(problem: Problem, found: Recommendation) -> tuple[ClassService, ...]:
    best = found.best
    scenarios = build_scenarios(
        problem.workload, problem.calibration, [best.max_cpu_loras] * 2, best.max_loras, **problem.settings
    )
    load = np.array([1.0, max(best.critical_load, 1.0)])
    merged: Any = with_classes(scenarios, min(_CLASSES, scenarios.class_count.shape[1]))
    service = run_at(problem, scenarios, load, classes=_CLASSES).class_service
    count, rate = (np.asarray(values)[0] for values in (merged.class_count, merged.class_rate_per_s))
    ranks = _ranks(scenarios, count.size)
    return tuple(
        ClassService(round(float(count[i])), float(rate[i]), ranks[i], float(service[0, i]), float(service[1, i]))
        for i in sorted(np.flatnonzero(count > 0).tolist(), key=lambda i: (-rate[i], ranks[i]))
    )


def _ranks(scenarios: Scenarios, classes: int) -> list[tuple[tuple[int, int], ...]]:
    """Return ranks of the adapters of every merged class, ascending, and how many have each."""
    host: Any = scenarios
    every = np.unique(np.asarray(host.class_rank)[np.asarray(host.class_count) > 0])
    counts = []
    for rank in every:
        # The mean of a flag is the share that has it.
        flagged: Any = with_classes(host.replace(class_rank=(host.class_rank == rank).astype(float)), classes)
        counts.append(np.rint(flagged.class_count * flagged.class_rank)[0].astype(int).tolist())
    return [
        tuple((int(rank), count) for rank, count in zip(every, column, strict=True) if count)
        for column in zip(*counts, strict=True)
    ]


def _adapters(
    problem: Problem, count: int, load: LoadCurve, classes: Sequence[ClassService]
) -> tuple[AdapterService, ...]:
    """Return every adapter as the event twin counts them; if it was not asked, as the nearest class is served."""
    known = problem.workload.adapters
    rates, ranks = known.deal(count)
    names = known.names if isinstance(known, AdapterList) else [str(i) for i in range(count)]
    if load.arrived is None or load.completed is None or load.longest_wait_s is None:
        apart = np.abs(np.log(rates)[:, np.newaxis] - np.log([each.rate_per_s for each in classes]))
        others = [[int(rank) not in dict(each.ranks) for each in classes] for rank in ranks]
        service = np.array([each.service for each in classes])[np.argmin(apart + 1e-6 * np.array(others), axis=1)]
        waits_s = np.full(count, np.nan)
    else:
        service = np.where(load.arrived > 0, load.completed / np.maximum(load.arrived, 1), np.nan)
        waits_s = load.longest_wait_s
    worst = np.lexsort((np.arange(count), -np.nan_to_num(waits_s), np.nan_to_num(service, nan=2.0)))
    return tuple(
        AdapterService(names[i], float(rates[i]), int(ranks[i]), float(service[i]), float(waits_s[i]))
        for i in worst.tolist()
    )


def _memory(calibration: Calibration, found: Recommendation) -> MemoryShare:
    plan, behaviour = calibration.plan_memory(found.server), calibration.behaviour
    parts = {words: float(getattr(plan, name)[0]) for name, words in PARTS.items()}
    graphs = parts.pop(PARTS["cuda_graph_bytes"]) if not behaviour.counts_cuda_graphs else None
    limit = sum(parts.values())
    if graphs is not None:
        parts[f"{PARTS['cuda_graph_bytes']} (not counted)"] = graphs
    total = float(calibration.gpu.memory_bytes)
    deployment = calibration.deployment
    gpus = deployment.tensor_parallel_size * deployment.pipeline_parallel_size
    return MemoryShare(gpus, total, limit, parts)
