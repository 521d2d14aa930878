"""Figures that people remember in the place of those that a training found."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lora_capacity.surrogate.arrays import ALWAYS_LEFT, Ensemble

_DIGITS = 2


def sensible(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers with two significant digits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.abs(values))) - _DIGITS + 1)
        return np.asarray(np.where(values == 0, 0.0, np.rint(values / unit) * unit))


def rounded(tree: Ensemble) -> Ensemble:
    """Return a tree whose thresholds and factors have two significant digits."""
    decides = tree.threshold < ALWAYS_LEFT
    threshold = np.where(decides, sensible(np.where(decides, tree.threshold, 1.0)), tree.threshold)
    return dataclasses.replace(tree, threshold=threshold, value=np.log(sensible(np.exp(tree.value))))
