"""What a report tells: a recommendation with its surroundings, before anything is drawn."""

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
        rank: Their rank, mean.
        service: Share of their requests that is completed.
        service_beyond: The same at the load at which the server fails.
    """

    adapters: int
    rate_per_s: float
    rank: float
    service: float
    service_beyond: float


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
        changes: What small changes would do.
    """

    workload: Workload
    calibration: Calibration
    found: Recommendation
    grid: PlanGrid
    curve: Curve
    load: LoadCurve
    classes: tuple[ClassService, ...]
    changes: tuple[Change, ...]
