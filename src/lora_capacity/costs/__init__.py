"""What a step and an adapter load cost, as equations with named coefficients."""

from lora_capacity.costs.kernels import LoraKernels
from lora_capacity.costs.step import Costs, LoadCosts, StepCosts, step_time_s

__all__ = ["Costs", "LoadCosts", "LoraKernels", "StepCosts", "step_time_s"]
