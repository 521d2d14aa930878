"""Predicted quantities as maps and curves show them: name, unit and scale."""

import math
from dataclasses import dataclass

from lora_capacity.units import MS_PER_S
from lora_capacity.words import duration, percent, shown


@dataclass(frozen=True)
class Quantity:
    """One column of predictions on an axis or in colour.

    Attributes:
        key: Name of its column.
        name: What it is called.
        unit: Unit of the axis or legend.
        scale: Factor from the column to the axis.
        log: Whether equal ratios are equally far apart.
        most: Largest value of the colours, None for the largest there is.
        beside: Column drawn beside the curve, if any, and what that is called.
    """

    key: str
    name: str
    unit: str
    scale: float = 1.0
    log: bool = False
    most: float | None = None
    beside: tuple[str, str] | None = None

    def tell(self, value: float) -> str:
        """Return a value of the column in words."""
        if self.unit == "%":
            return percent(value)
        if self.unit in ("ms", "s"):
            return duration(value)
        return f"{shown(value)} {self.unit}" if not math.isnan(value) else shown(value)


THROUGHPUT = Quantity(
    "throughput_tokens_per_s", "Throughput", "tokens/s", beside=("offered_tokens_per_s", "offered load")
)
SERVICE = Quantity("service", "Share served", "%", scale=100.0, most=1.0)
ITL = Quantity("itl_s", "Inter-token latency", "ms", scale=MS_PER_S)
TTFT = Quantity("ttft_s", "Time to first token", "s", log=True)
STARVING = Quantity("starving_probability", "Chance of starving", "%", scale=100.0, most=1.0)
KV_USAGE = Quantity("kv_usage", "KV cache in use", "%", scale=100.0, most=1.0)

MAPPED = (THROUGHPUT, SERVICE, ITL, TTFT, STARVING, KV_USAGE)
"""What a reader can choose as the colour of the map."""

CURVES = (THROUGHPUT, ITL, TTFT, STARVING)
"""What is drawn against the number of adapters."""
