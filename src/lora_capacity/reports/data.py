"""What a report tells: a recommendation with its surroundings, before anything is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_capacity.calibration import Calibration
from lora_capacity.reports.load_curve import LoadCurve
from lora_capacity.reports.plan_grid import Curve, PlanGrid
from lora_capacity.reports.sensitivity import Change
from lora_capacity.search import Recommendation
from lora_capacity.workload import Workload


@dataclass(frozen=True)
class ClassService:
    """Adapters of one rate and rank, or of rates close by, and the service that they get.

    Attributes:
        adapters: How many there are.
        rate_per_s: Requests per second of one of them, mean.
        ranks: Their ranks, ascending, and how many have each.
        service: Share of their requests that is completed.
        service_beyond: The same at the load at which the server fails.
    """

    adapters: int
    rate_per_s: float
    ranks: tuple[tuple[int, int], ...]
    service: float
    service_beyond: float


@dataclass(frozen=True)
class AdapterService:
    """One adapter, and the service that it gets.

    Attributes:
        name: Its name; that of a mix is its number, from 0.
        rate_per_s: Its requests per second.
        rank: Its rank.
        service: Share of its requests that is completed by the end of the horizon; NaN if none came.
        longest_wait_s: Longest that one of them has waited for its admission; NaN if the answer was not played.
    """

    name: str
    rate_per_s: float
    rank: int
    service: float
    longest_wait_s: float


@dataclass(frozen=True)
class MemoryShare:
    """Where the memory of a GPU of the recommended server goes.

    Attributes:
        gpus: How many GPUs the server has.
        total_bytes: Memory of one.
        limit_bytes: What vLLM is told to use of it.
        parts: Bytes by purpose; what is not counted in the limit comes last.
    """

    gpus: int
    total_bytes: float
    limit_bytes: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class ReportData:
    """A recommendation with its surroundings.

    Attributes:
        workload: What was asked for.
        calibration: Model, GPU and coefficients.
        found: The recommendation.
        grid: Configurations around it.
        curve: The configurations with as many slots, with intervals.
        load: The recommended server under less and more load.
        classes: Service of adapters of each rate and rank, busiest first.
        adapters: Every adapter, the worst served first.
        memory: Where the memory of a GPU goes.
        changes: What small changes would do.
    """

    workload: Workload
    calibration: Calibration
    found: Recommendation
    grid: PlanGrid
    curve: Curve
    load: LoadCurve
    classes: tuple[ClassService, ...]
    adapters: tuple[AdapterService, ...]
    memory: MemoryShare
    changes: tuple[Change, ...]
