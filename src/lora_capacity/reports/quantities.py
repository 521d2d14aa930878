"""Predicted quantities as maps and curves show them: name, unit and scale."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lora_capacity.reports.colours import STEPS
from lora_capacity.search import Recommendation
from lora_capacity.units import MS_PER_S
from lora_capacity.words import duration, percent, shown

_SHORTEST_S = 1e-3
"""Least value on a logarithmic axis or map: shorter times to first token are told apart by nobody."""


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
        beside: Columns drawn beside the curve, and what they are called.
    """

    key: str
    name: str
    unit: str
    scale: float = 1.0
    log: bool = False
    most: float | None = None
    beside: tuple[tuple[str, str], ...] = ()

    def tell(self, value: float) -> str:
        """Return a value of the column in words."""
        if self.unit == "%":
            return percent(value)
        if self.unit in ("ms", "s"):
            return duration(value)
        return f"{shown(value)} {self.unit}" if not math.isnan(value) else shown(value)

    def on_axis(self, column: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Return a column in units of the axis."""
        values = np.asarray(column, np.float64) * self.scale
        return np.maximum(values, _SHORTEST_S) if self.log else values

    def span(self, values: Float[np.ndarray, "*shape"]) -> tuple[float, float]:
        """Return the values of the lowest and the highest colour, of a column."""
        finite = values[np.isfinite(values)]
        if self.most is not None or not finite.size:
            return 0.0, self.most or 1.0
        if self.log:
            return float(max(finite.min(), _SHORTEST_S)), float(max(finite.max(), 2.0 * _SHORTEST_S))
        return 0.0, float(finite.max())

    def codes(self, values: Float[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Return the colour of every value of a column, 0 to 31, -1 where there is no number."""
        low, high = self.span(values)
        if self.log:
            values, low, high = np.log(np.maximum(values, 1e-12)), math.log(low), math.log(high)
        share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
        index = np.floor(np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * STEPS).clip(max=STEPS - 1)
        return np.where(np.isnan(values), -1, index.astype(np.int64))


THROUGHPUT = Quantity(
    "throughput_tokens_per_s", "Throughput", "tokens/s", beside=(("offered_tokens_per_s", "offered load"),)
)
SERVICE = Quantity("service", "Share served", "%", scale=100.0, most=1.0)
ITL = Quantity("itl_s", "Inter-token latency", "ms", scale=MS_PER_S)
TTFT = Quantity("ttft_s", "Time to first token", "s", log=True)
STARVING = Quantity("starving_probability", "P(overload)", "%", scale=100.0, most=1.0)
ATTAINMENT = Quantity("attainment", "Within bounds", "%", scale=100.0, most=1.0)
KV_USAGE = Quantity("kv_usage", "KV cache in use", "%", scale=100.0, most=1.0)

GOODPUT = Quantity("goodput_per_s", "Goodput", "requests/s", beside=(("requests_per_s", "arriving"),))
TTFT_TAIL = Quantity("ttft_p95_s", "Time to first token, p95", "s", log=True, beside=(("ttft_p50_s", "p50"),))
TTFT_HALF = Quantity("ttft_p50_s", "Time to first token, p50", "s", log=True)
WAIT = Quantity("wait_s", "Wait for admission, mean", "s", log=True)
SLOT_WAIT = Quantity("slot_wait_s", "Wait for a slot, mean", "s", log=True)

MAPPED = (THROUGHPUT, SERVICE, ATTAINMENT, ITL, TTFT, STARVING, KV_USAGE)
"""What a reader can choose as the colour of the map."""

CURVES = (THROUGHPUT, ITL, TTFT, STARVING)
"""What is drawn against the number of adapters."""

LOADED = (GOODPUT, ATTAINMENT, TTFT_TAIL, ITL, WAIT, SLOT_WAIT)
"""What is drawn against the load."""


@dataclass(frozen=True)
class Bound:
    """What a quantity should keep.

    Attributes:
        value: In units of its column.
        words: What it is called beside its line.
        least: Whether the quantity should be at least this, rather than at most.
    """

    value: float
    words: str
    least: bool = False

    def kept(self, column: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Return where a column keeps it; not where it has no number."""
        return np.asarray(column >= self.value if self.least else column <= self.value)


def bound_of(quantity: Quantity, found: Recommendation) -> Bound | None:
    """Return what a recommendation had to keep in a quantity, None if nothing."""
    if quantity is STARVING:
        return Bound(found.risk, f"allowed: {percent(found.risk)}")
    if found.objective.goal == "throughput":
        return Bound(1.0 - found.threshold, "starved below", least=True) if quantity is SERVICE else None
    asked = found.goodput
    if quantity is ATTAINMENT:
        return Bound(asked.attainment, f"asked: {percent(asked.attainment)}", least=True)
    key, bound_s = {TTFT: ("TTFT", asked.ttft_s), TTFT_TAIL: ("TTFT", asked.ttft_s), ITL: ("TPOT", asked.tpot_s)}.get(
        quantity, ("", math.inf)
    )
    return Bound(bound_s, f"bound on {key}: {duration(bound_s)}") if math.isfinite(bound_s) else None
