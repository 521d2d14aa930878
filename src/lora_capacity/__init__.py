"""How many LoRA adapters one vLLM server can serve, and with how many slots: predicted, not tried out.

First the nouns: a `Workload` of adapters and traffic; a server, with its `ModelShape`, `Gpu` and `ServerConfig`; a
`Calibration` of what its steps cost. Then one verb over what `build_scenarios` lays out: `simulate`. Then its uses:
`recommend` the best configuration, `build_report` of it, and `predict_runs` with `score_runs` to compare with what was
measured. What goes deeper is imported from the package of its concern: `lora_capacity.surrogate`, `.validation`, ….

Names are loaded as they are first used, so that ``import lora_capacity`` itself costs nothing.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration, bundled_names, load_calibration
    from lora_capacity.engines import ServerConfig
    from lora_capacity.errors import InfeasibleError, InputError, LoraCapacityError
    from lora_capacity.fitting import fit_calibration
    from lora_capacity.fleet import Fleet, place
    from lora_capacity.hardware import Gpu
    from lora_capacity.measurements import Runs, read_runs
    from lora_capacity.memory import plan_memory
    from lora_capacity.models import ModelShape
    from lora_capacity.reports import build_report
    from lora_capacity.run import simulate
    from lora_capacity.scenarios import Results, Scenarios, build_scenarios
    from lora_capacity.search import Objective, Recommendation, recommend
    from lora_capacity.status import Status
    from lora_capacity.surrogate import load_surrogate, predict_workload
    from lora_capacity.validation import predict_runs, score_runs
    from lora_capacity.workload import Workload, load_workload

__all__ = [
    "Calibration",
    "Fleet",
    "Gpu",
    "InfeasibleError",
    "InputError",
    "LoraCapacityError",
    "ModelShape",
    "Objective",
    "Recommendation",
    "Results",
    "Runs",
    "Scenarios",
    "ServerConfig",
    "Status",
    "Workload",
    "build_report",
    "build_scenarios",
    "bundled_names",
    "fit_calibration",
    "load_calibration",
    "load_surrogate",
    "load_workload",
    "place",
    "plan_memory",
    "predict_runs",
    "predict_workload",
    "read_runs",
    "recommend",
    "score_runs",
    "simulate",
]

_HOMES = {
    "calibration": ("Calibration", "bundled_names", "load_calibration"),
    "engines": ("ServerConfig",),
    "errors": ("InfeasibleError", "InputError", "LoraCapacityError"),
    "fitting": ("fit_calibration",),
    "fleet": ("Fleet", "place"),
    "hardware": ("Gpu",),
    "measurements": ("Runs", "read_runs"),
    "memory": ("plan_memory",),
    "models": ("ModelShape",),
    "reports": ("build_report",),
    "run": ("simulate",),
    "scenarios": ("Results", "Scenarios", "build_scenarios"),
    "search": ("Objective", "Recommendation", "recommend"),
    "status": ("Status",),
    "surrogate": ("load_surrogate", "predict_workload"),
    "validation": ("predict_runs", "score_runs"),
    "workload": ("Workload", "load_workload"),
}

_RENAMED = {
    "Answer": "surrogate.Answer",
    "EventResults": "scenarios.Results",
    "FitReport": "fitting.FitReport",
    "Labels": "surrogate.Dataset",
    "Limit": "scenarios.Bottleneck",
    "MemoryPlan": "memory.MemoryPlan",
    "Predictions": "validation.Predictions",
    "Report": "reports.Report",
    "Rules": "surrogate.Rules",
    "SchedulerRules": "engines.SchedulerRules",
    "Smooth": "surrogate.NeuralSurrogate",
    "SmoothInputs": "surrogate.SurrogateInputs",
    "SmoothOutputs": "surrogate.NeuralOutputs",
    "Space": "surrogate.Space",
    "StayLaw": "twins.steady.ResidenceTime",
    "Surrogate": "surrogate.Surrogate",
    "VllmBehaviour": "engines.VllmBehaviour",
    "compare_twins": "validation.twins.compare_twins",
    "grid": "run.steady.grid",
    "make_labels": "surrogate.label",
    "rules_of": "surrogate.rules_of",
    "summarise_comparison": "validation.twins.summarise_comparison",
    "train_smooth": "surrogate.train_neural",
    "train_surrogate": "surrogate.train_surrogate",
}
"""Public names of the release before, by where they are now; they are importable from here for one release more."""

_GONE = dict.fromkeys(("play", "play_workload"), 'simulate(..., engine="event")')
"""Public names of the release before that no other name stands for, by what does the same."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        now = f"{__name__}.{_RENAMED[name]}"
        warnings.warn(
            f"{__name__}.{name} will be gone in the next release; use {now}", DeprecationWarning, stacklevel=2
        )
        module, _, attribute = now.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value  # found without this function from now on
            return value
    instead = f": use {_GONE[name]}" if name in _GONE else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")


def __dir__() -> list[str]:
    return list(__all__)
