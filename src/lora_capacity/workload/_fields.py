"""Arrays that the parts of a workload hold: their types, and copies that cannot be written to."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]

MAX_TOKENS = 10**6
"""Longest prompt or output: above what served models accept, and small enough to tabulate every length up to it."""


def read_only(values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """Return a copy of ``values`` that cannot be written to."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
