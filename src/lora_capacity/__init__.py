"""How many LoRA adapters one vLLM server can serve, and with how many slots: predicted, not tried out.

First the nouns: a `Workload` of adapters and traffic; a server, with its `ModelShape`, `Gpu` and `ServerConfig`; a
`Calibration` of what its steps cost. Then two verbs over what `build_scenarios` lays out: `simulate`, from averages,
and `play`, every step. Then their uses: `recommend` the best configuration, `build_report` of it, and `predict_runs`
with `score_runs` to compare with what was measured.

Names are loaded as they are first used, so that ``import lora_capacity`` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration, bundled_names, load_calibration
    from lora_capacity.engines import SchedulerRules, ServerConfig, VllmBehaviour
    from lora_capacity.errors import InfeasibleError, InputError, LoraCapacityError
    from lora_capacity.fitting import FitReport, fit_calibration
    from lora_capacity.hardware import Gpu
    from lora_capacity.measurements import Runs, read_runs
    from lora_capacity.memory import MemoryPlan, plan_memory
    from lora_capacity.models import ModelShape
    from lora_capacity.reports import Report, build_report
    from lora_capacity.run import play, play_workload
    from lora_capacity.run.steady import grid, simulate
    from lora_capacity.scenarios import Limit, Results, Scenarios, build_scenarios
    from lora_capacity.search import Objective, Recommendation
    from lora_capacity.search import optimize as recommend
    from lora_capacity.status import Status
    from lora_capacity.surrogate import (
        Answer,
        Labels,
        Rules,
        Smooth,
        SmoothInputs,
        SmoothOutputs,
        Space,
        Surrogate,
        load_surrogate,
        make_labels,
        predict_workload,
        rules_of,
        train_smooth,
        train_surrogate,
    )
    from lora_capacity.twins.events import EventResults
    from lora_capacity.twins.steady import StayLaw
    from lora_capacity.validation import Predictions, predict_runs, score_runs
    from lora_capacity.validation.twins import compare_twins, summarise_comparison
    from lora_capacity.workload import Workload

__all__ = [
    "Answer",
    "Calibration",
    "EventResults",
    "FitReport",
    "Gpu",
    "InfeasibleError",
    "InputError",
    "Labels",
    "Limit",
    "LoraCapacityError",
    "MemoryPlan",
    "ModelShape",
    "Objective",
    "Predictions",
    "Recommendation",
    "Report",
    "Results",
    "Rules",
    "Runs",
    "Scenarios",
    "SchedulerRules",
    "ServerConfig",
    "Smooth",
    "SmoothInputs",
    "SmoothOutputs",
    "Space",
    "Status",
    "StayLaw",
    "Surrogate",
    "VllmBehaviour",
    "Workload",
    "build_report",
    "build_scenarios",
    "bundled_names",
    "compare_twins",
    "fit_calibration",
    "grid",
    "load_calibration",
    "load_surrogate",
    "make_labels",
    "plan_memory",
    "play",
    "play_workload",
    "predict_runs",
    "predict_workload",
    "read_runs",
    "recommend",
    "rules_of",
    "score_runs",
    "simulate",
    "summarise_comparison",
    "train_smooth",
    "train_surrogate",
]

_HOMES = {
    "calibration": ("Calibration", "bundled_names", "load_calibration"),
    "engines": ("SchedulerRules", "ServerConfig", "VllmBehaviour"),
    "errors": ("InfeasibleError", "InputError", "LoraCapacityError"),
    "fitting": ("FitReport", "fit_calibration"),
    "hardware": ("Gpu",),
    "measurements": ("Runs", "read_runs"),
    "memory": ("MemoryPlan", "plan_memory"),
    "models": ("ModelShape",),
    "reports": ("Report", "build_report"),
    "run": ("play", "play_workload"),
    "run.steady": ("grid", "simulate"),
    "scenarios": ("Limit", "Results", "Scenarios", "build_scenarios"),
    "search": ("Objective", "Recommendation", "recommend"),
    "status": ("Status",),
    "surrogate": (
        *("Answer", "Labels", "Rules", "Smooth", "SmoothInputs", "SmoothOutputs", "Space", "Surrogate"),
        *("load_surrogate", "make_labels", "predict_workload", "rules_of", "train_smooth", "train_surrogate"),
    ),
    "twins.events": ("EventResults",),
    "twins.steady": ("StayLaw",),
    "validation": ("Predictions", "predict_runs", "score_runs"),
    "validation.twins": ("compare_twins", "summarise_comparison"),
    "workload": ("Workload",),
}

# A package's attribute of the name of its subpackage is that subpackage.
_OWN_NAMES = {"recommend": "optimize"}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), _OWN_NAMES.get(name, name))
            globals()[name] = value  # found without this function from now on
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
