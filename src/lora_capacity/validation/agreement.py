"""Whether what was predicted of one configuration is what was measured there."""

import math
from dataclasses import dataclass

from lora_capacity.errors import check_number
from lora_capacity.validation.outcomes import Outcome


@dataclass(frozen=True)
class Agreement:
    """How far a prediction is off, and whether that is little enough.

    A time to first token is not judged: it holds the time of the server's front end, which no twin knows, and in an
    overloaded server it is as long as the run.

    Attributes:
        predicted: What was predicted.
        measured: What was measured.
        throughput_tolerance: Largest relative error of the throughput that still agrees, > 0.
        itl_tolerance: The same of the inter-token latency.

    Raises:
        InputError: If a tolerance is not positive.
    """

    predicted: Outcome
    measured: Outcome
    throughput_tolerance: float = 0.1
    itl_tolerance: float = 0.2

    def __post_init__(self) -> None:
        check_number("throughput_tolerance", self.throughput_tolerance, minimum=0, exclusive=True)
        check_number("itl_tolerance", self.itl_tolerance, minimum=0, exclusive=True)

    @property
    def errors(self) -> dict[str, float]:
        """Predicted over measured less one, of ``throughput``, ``itl`` and ``ttft``; NaN where either is unknown."""
        pairs = {
            "throughput": (self.predicted.throughput_tokens_per_s, self.measured.throughput_tokens_per_s),
            "itl": (self.predicted.itl_s, self.measured.itl_s),
            "ttft": (self.predicted.ttft_s, self.measured.ttft_s),
        }
        return {name: p / m - 1.0 if m > 0 else math.nan for name, (p, m) in pairs.items()}

    @property
    def agrees(self) -> bool:
        """Whether both start, or neither does, and the errors of throughput and inter-token latency are tolerable.

        A latency that either does not know is not judged; a throughput that is unknown does not agree.
        """
        if not (self.predicted.starts and self.measured.starts):
            return self.predicted.starts == self.measured.starts
        errors = self.errors
        fast_enough = math.isnan(errors["itl"]) or abs(errors["itl"]) <= self.itl_tolerance
        return abs(errors["throughput"]) <= self.throughput_tolerance and fast_enough
