"""Models learnt from the twins: labels by the thousand, trees and rules trained on them, a differentiable surrogate."""

from lora_capacity.surrogate.closed_form import SurrogateInputs
from lora_capacity.surrogate.dataset import Dataset, label
from lora_capacity.surrogate.features import FEATURES, describe, with_slots
from lora_capacity.surrogate.model import Surrogate, load_surrogate
from lora_capacity.surrogate.neural import NeuralOutputs, NeuralSurrogate, train_neural
from lora_capacity.surrogate.predict import Answer, predict_workload
from lora_capacity.surrogate.rules import Rules, path_of, rules_of
from lora_capacity.surrogate.space import Space
from lora_capacity.surrogate.training import train_surrogate

__all__ = [
    "FEATURES",
    "Answer",
    "Dataset",
    "NeuralOutputs",
    "NeuralSurrogate",
    "Rules",
    "Space",
    "Surrogate",
    "SurrogateInputs",
    "describe",
    "label",
    "load_surrogate",
    "path_of",
    "predict_workload",
    "rules_of",
    "train_neural",
    "train_surrogate",
    "with_slots",
]
