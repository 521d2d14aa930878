"""The best numbers of adapters and slots on one GPU."""

from lora_capacity.search.candidate import Candidate, MemoryMargin, Neighbour
from lora_capacity.search.margin import assess, load_headroom, starving_probability
from lora_capacity.search.objective import GOALS, Needed, Objective, choose, judge
from lora_capacity.search.recommend import recommend
from lora_capacity.search.recommendation import Recommendation

__all__ = [
    "GOALS",
    "Candidate",
    "MemoryMargin",
    "Needed",
    "Neighbour",
    "Objective",
    "Recommendation",
    "assess",
    "choose",
    "judge",
    "load_headroom",
    "recommend",
    "starving_probability",
]
