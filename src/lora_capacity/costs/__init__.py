"""What a step and an adapter load cost: terms that add, with named coefficients."""

from lora_capacity.costs.coefficients import Coefficient, Prior, PriorBasis
from lora_capacity.costs.experts import ExpertRouting
from lora_capacity.costs.front_end import FrontEndCosts
from lora_capacity.costs.kernels import LoraKernels
from lora_capacity.costs.step import (
    COEFFICIENTS,
    Costs,
    LoadCosts,
    StepCosts,
    StepTerms,
    bare_step_time_s,
    experts_time_s,
    launched_grids,
    step_terms,
    step_time_s,
)

__all__ = [
    "COEFFICIENTS",
    "Coefficient",
    "Costs",
    "ExpertRouting",
    "FrontEndCosts",
    "LoadCosts",
    "LoraKernels",
    "Prior",
    "PriorBasis",
    "StepCosts",
    "StepTerms",
    "bare_step_time_s",
    "experts_time_s",
    "launched_grids",
    "step_terms",
    "step_time_s",
]
