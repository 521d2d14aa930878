"""Models that people can read: labels by the thousand from the twins, trees and rules trained on them, and answers."""

from lora_capacity.surrogate.dataset import Labels, make_labels
from lora_capacity.surrogate.features import FEATURES, describe
from lora_capacity.surrogate.model import Surrogate, load_surrogate
from lora_capacity.surrogate.neural import Smooth, SmoothInputs, SmoothOutputs, train_smooth
from lora_capacity.surrogate.predict import Answer, predict_workload
from lora_capacity.surrogate.questions import Questions
from lora_capacity.surrogate.rules import Branch, Leaf, Rules, path_of, rules_of
from lora_capacity.surrogate.space import Space
from lora_capacity.surrogate.targets import with_slots
from lora_capacity.surrogate.training import train_surrogate

__all__ = [
    "FEATURES",
    "Answer",
    "Branch",
    "Labels",
    "Leaf",
    "Questions",
    "Rules",
    "Smooth",
    "SmoothInputs",
    "SmoothOutputs",
    "Space",
    "Surrogate",
    "describe",
    "load_surrogate",
    "make_labels",
    "path_of",
    "predict_workload",
    "rules_of",
    "train_smooth",
    "train_surrogate",
    "with_slots",
]
