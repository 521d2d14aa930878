"""How far off predictions are."""

import numpy as np
from numpy.typing import NDArray

from lora_capacity.scenarios.workload_batch import FloatArray


def macro_f1(told: NDArray[np.bool_], known: NDArray[np.bool_]) -> float:
    """Return the mean of the F1 of both answers."""

    def f1(which: bool) -> float:
        hit = np.sum((told == which) & (known == which))
        return float(2.0 * hit / max(np.sum(told == which) + np.sum(known == which), 1))

    return 0.5 * (f1(True) + f1(False))


def conformal(residual: FloatArray, level: float) -> float:
    """Return the half-width that holds the next residual with at least this chance: split conformal prediction.

    The ``⌈(n + 1) · level⌉``-th smallest of the held-out residuals' sizes.
    """
    sizes = np.sort(np.abs(residual))
    place = int(np.ceil((sizes.size + 1) * level)) - 1
    return float(sizes[min(place, sizes.size - 1)])
