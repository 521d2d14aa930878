"""Arrays that the parts of a workload hold: their types, and copies that cannot be written to."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.schema import Number
from lora_capacity.units import S_PER_HOUR

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]

MAX_TOKENS = 10**6
"""Longest prompt or output: above what served models accept, and small enough to tabulate every length up to it."""


RATE = Number(minimum=0, maximum=1e6, exclusive=True)
"""Requests per second of one adapter: a million is far beyond any server, and their sum stays a number."""

HORIZON = Number(minimum=0.1, maximum=30 * 24 * S_PER_HOUR)
"""Time looked at, seconds: some engine steps at least, and no longer than the event twin's clock is exact."""


def read_only(values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """Return a copy of ``values`` that cannot be written to."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array
