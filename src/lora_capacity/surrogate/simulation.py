"""The steady twin over workload batches, each workload with the distribution of its own output lengths."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.run import simulate
from lora_capacity.scenarios import Results
from lora_capacity.scenarios.workload_batch import IntArray, WorkloadBatch
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import LengthDistribution

_STEP, _WIDEST = 0.05, 2.0
"""Spacing of the relative spreads of output lengths that are tabulated, and the largest: closer changes nothing."""

_MEAN_TOKENS, _LONGEST = 200, 8
"""Mean length at which spreads are tabulated, and the longest over it: only the shape matters, in units of the mean."""


def residence_times(spread: Float[np.ndarray, " workloads"]) -> ResidenceTime:
    """Return residence times of output lengths with a relative spread, leaves ``[nodes, workloads]``.

    Spreads are rounded to 0.05, above 2 to 2; lengths are truncated gamma, as `LengthDistribution.from_moments` has
    them.
    """
    place = np.clip(np.rint(spread / _STEP), 1, _WIDEST / _STEP).astype(int)
    distinct, row = np.unique(place, return_inverse=True)
    known = [_residence_time(each) for each in distinct.tolist()]
    found: ResidenceTime = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1)[:, row.ravel()], *known)
    return found


@functools.cache
def _residence_time(steps: int) -> Any:
    """Residence time of one tabulated spread, leaves ``[nodes]``."""
    std = steps * _STEP * _MEAN_TOKENS
    lengths = LengthDistribution.from_moments(_MEAN_TOKENS, std, 1, _LONGEST * _MEAN_TOKENS)
    return jax.tree.map(np.asarray, ResidenceTime.of_lengths(lengths))


def simulate_workloads(
    calibration: Calibration, workloads: WorkloadBatch, adapters: NDArray[Any], max_loras: IntArray
) -> Results:
    """Run the steady twin over one configuration per workload.

    Args:
        calibration: Whose costs hold.
        workloads: The workloads and servers, ``[configs]``.
        adapters: A as in `WorkloadBatch.scenarios`.
        max_loras: S.

    Returns:
        Predictions with NumPy leaves, ``[configs]``.
    """
    scenarios = workloads.scenarios(calibration, adapters, max_loras)
    return simulate(calibration, scenarios, residence_times(workloads.output_spread))
