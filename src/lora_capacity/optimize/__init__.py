"""The best numbers of adapters and slots on one GPU."""

from lora_capacity.optimize.choice import GOALS, Objective, choose
from lora_capacity.optimize.recommendation import Candidate, MemoryMargin, Neighbour, Recommendation
from lora_capacity.optimize.search import optimize

__all__ = [
    "GOALS",
    "Candidate",
    "MemoryMargin",
    "Neighbour",
    "Objective",
    "Recommendation",
    "choose",
    "optimize",
]
