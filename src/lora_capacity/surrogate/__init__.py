"""Models that people can read: labels by the thousand from the twins, trees and rules trained on them, and answers."""

from lora_capacity.surrogate.labels import Labels, make_labels
from lora_capacity.surrogate.questions import Questions
from lora_capacity.surrogate.space import Space

__all__ = ["Labels", "Questions", "Space", "make_labels"]
