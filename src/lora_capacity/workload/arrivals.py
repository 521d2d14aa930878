"""When requests arrive: renewal processes with gamma-distributed gaps, of which Poisson is one."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lora_capacity.errors import InputError, check_number, nearest_hint

PROCESSES = ("poisson", "gamma", "trace")
MIN_CV, MAX_CV = 1e-3, 100.0
"""Range of cv in which gamma-distributed gaps can be sampled in double precision."""


@dataclass(frozen=True)
class Arrivals:
    """The arrival process of each adapter.

    Attributes:
        process: ``poisson``; ``gamma``: gaps are gamma-distributed; or ``trace``: the recorded arrivals themselves.
        cv: Coefficient of variation (standard deviation over mean) of the gaps: 1 for Poisson, above it bursty; for a
            trace as recorded.

    Raises:
        InputError: If the process is unknown, or its cv is out of range.
    """

    process: str = "poisson"
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            hint = nearest_hint(str(self.process), PROCESSES)
            raise InputError("arrivals.process", self.process, ", ".join(PROCESSES), hint)
        if self.process == "poisson" and self.cv != 1.0:
            raise InputError("arrivals.cv", self.cv, "1 for poisson", "write process: gamma to choose a cv")
        if self.process == "gamma":
            object.__setattr__(self, "cv", check_number("arrivals.cv", self.cv, minimum=MIN_CV, maximum=MAX_CV))

    def sample(self, rng: np.random.Generator, rate_per_s: float, horizon_s: float) -> Float[np.ndarray, " arrivals"]:
        """Draw the arrivals of one adapter, stationary from time 0 on.

        Gaps are gamma-distributed with shape k = 1/cv² and mean 1/rate. Time 0 falls into a gap in proportion to its
        length (shape k + 1) and at a uniform point of it, so the time to the first arrival is U · Gamma(k + 1), which
        for k = 1 is exponential again.

        Args:
            rng: Source of randomness; advanced.
            rate_per_s: Mean arrivals per second, > 0.
            horizon_s: Where to stop, in seconds.

        Returns:
            Arrival times in seconds, ascending, in [0, horizon), float64 ``[arrivals]``. A longer horizon with a
            generator in the same state only adds arrivals.

        Raises:
            InputError: If the arrivals are those of a trace, which are not drawn.

        Source: D. R. Cox, Renewal Theory, 1962, section 5 (forward recurrence time of an equilibrium renewal process).
        """
        if self.process == "trace":
            raise InputError("arrivals.process", self.process, "poisson or gamma", "a trace has its own arrivals")
        shape = self.cv**-2
        scale_s = 1.0 / (rate_per_s * shape)
        first_s = rng.random() * rng.gamma(shape + 1.0, scale_s)
        expected = rate_per_s * horizon_s
        # Four standard deviations more than are expected, and some where few are: hardly ever is a second chunk needed.
        chunk = math.ceil(expected + 4.0 * self.cv * math.sqrt(expected)) + 8
        parts = [np.array([first_s])]
        while parts[-1][-1] < horizon_s:
            parts.append(parts[-1][-1] + np.cumsum(rng.gamma(shape, scale_s, chunk)))
        arrival_s = np.concatenate(parts)
        return arrival_s[: np.searchsorted(arrival_s, horizon_s)]
