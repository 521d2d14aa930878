"""Predictions against the number of adapters at the recommended number of slots, with 90 % intervals."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from lora_capacity.reports import svg
from lora_capacity.reports.plan_grid import Curve
from lora_capacity.reports.quantities import STARVING, Quantity
from lora_capacity.words import shown, spoken

WIDTH, HEIGHT = 420.0, 260.0
"""Size of a panel in CSS pixels, two of which stand side by side on the page."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, WIDTH - 12.0, 30.0, HEIGHT - 44.0
"""Edges of the axes: room for numbers to the left, the title above, numbers and title of the axis below."""


@dataclass(frozen=True)
class Panel:
    """One quantity against the number of adapters.

    Attributes:
        curve: The predictions.
        quantity: What to draw.
        best: Recommended number of adapters.
    """

    curve: Curve
    quantity: Quantity
    best: int

    @cached_property
    def across(self) -> svg.Scale:
        """Places of numbers of adapters."""
        return svg.Scale(float(self.curve.adapters[0]), float(self.curve.adapters[-1]), _LEFT, _RIGHT)

    @cached_property
    def up(self) -> svg.Scale:
        """Places of values: room for all that is drawn, from 0 unless logarithmic."""
        every = np.concatenate([self.values, *self.interval, *self.beside])
        finite = every[np.isfinite(every)] if np.isfinite(every).any() else np.array([0.0, 1.0])
        if self.quantity.log:
            low, high = float(finite.min()), float(finite.max())
            return svg.Scale(low / 1.2, max(high, low * 10.0) * 1.2, _BOTTOM, _TOP, log=True)
        return svg.Scale(0.0, max(float(finite.max()) * 1.06, 1e-9), _BOTTOM, _TOP)

    @cached_property
    def xs(self) -> list[float]:
        """Places of the numbers of adapters predicted."""
        return [self.across(float(count)) for count in self.curve.adapters]

    @cached_property
    def values(self) -> Float[np.ndarray, " points"]:
        """Predictions in units of the axis."""
        return self.quantity.on_axis(self.curve.values[self.quantity.key])

    @cached_property
    def interval(self) -> list[Float[np.ndarray, " points"]]:
        """Lower and upper ends in units of the axis, none of a quantity without an interval."""
        key = self.quantity.key
        return [self.quantity.on_axis(end[key]) for end in (self.curve.low, self.curve.high) if key in end]

    @cached_property
    def beside(self) -> list[Float[np.ndarray, " points"]]:
        """What is drawn beside the predictions, if anything, in units of the axis."""
        return [self.quantity.on_axis(self.curve.values[column]) for column, _ in self.quantity.beside]

    def _heights(self, values: Float[np.ndarray, " points"]) -> list[float]:
        return [self.up(float(value)) if np.isfinite(value) else float("nan") for value in values]

    def places(self) -> list[list[float]]:
        """Return x and y of the points, for what follows a pointer; y is -1 where nothing is drawn."""
        points = zip(self.xs, self._heights(self.values), strict=True)
        return [[round(x, 1), round(y, 1) if np.isfinite(y) else -1.0] for x, y in points]

    def draw(self, slots: int, risk: float) -> str:
        """Return the drawing.

        Args:
            slots: Number of slots, for the description.
            risk: Accepted chance of failing, drawn where that is shown.
        """
        name = f"{self.quantity.name} against the number of adapters, with {slots} slots"
        parts = (
            self._failing(),
            svg.axis_y(self.up, _LEFT, 5, _RIGHT),
            svg.axis_x(self.across, _BOTTOM, "adapters A", 6),
            self._band(),
            self._beside(),
            self._accepted(risk) if self.quantity is STARVING else "",
            svg.line(zip(self.xs, self._heights(self.values), strict=True), class_="curve"),
            self._mark(),
            svg.text(f"{self.quantity.name}, {self.quantity.unit}", 0.0, 13.0, class_="axis strong"),
            svg.element("g", svg.path("hair", ""), svg.element("circle", r=3.5, class_="dot"), class_="hover"),
        )
        told = {"class_": "fig panel", "data_key": self.quantity.key}
        return svg.drawing(WIDTH, HEIGHT, name, self._describe(), *parts, **told)

    def _failing(self) -> str:
        """Return a wash over the numbers of adapters that fail."""
        fails = ("starved", "falls_behind", "misses_bounds")
        failing, xs = np.flatnonzero(np.isin(self.curve.verdict.astype(str), fails)), self.xs
        words = spoken(str(self.curve.verdict[failing[-1]])) if failing.size else ""
        if not failing.size:
            return ""
        first, last = int(failing[0]), int(failing[-1])
        left = 0.5 * (xs[first - 1] + xs[first]) if first else xs[0]
        wash = svg.rect("wash", left, _TOP, xs[last] - left, _BOTTOM - _TOP)
        if xs[last] - left <= svg.width_of(words) + 10.0:
            return wash
        return wash + svg.text(words, xs[last] - 6.0, 0.4 * _TOP + 0.6 * _BOTTOM, class_="note", text_anchor="end")

    def _band(self) -> str:
        if not self.interval:
            return ""
        known = np.flatnonzero(np.isfinite(self.interval).all(axis=0))
        low, high = (self._heights(end[known]) for end in self.interval)
        return svg.band("band", [self.xs[i] for i in known], low, high)

    def _beside(self) -> str:
        drawn, middle = "", len(self.xs) // 2
        for (_, words), values in zip(self.quantity.beside, self.beside, strict=True):
            ys = self._heights(values)
            label = svg.text(words, self.xs[middle] - 6.0, ys[middle] - 6.0, class_="note", text_anchor="end")
            drawn += svg.line(zip(self.xs, ys, strict=True), class_="beside") + label
        return drawn

    def _accepted(self, risk: float) -> str:
        y = self.up(risk * self.quantity.scale)
        told = svg.text(f"allowed: {shown(risk * 100)} %", _LEFT + 6.0, y - 6.0, class_="note")
        return svg.line([(_LEFT, y), (_RIGHT, y)], class_="beside") + told

    @property
    def _row(self) -> int:
        return int(np.searchsorted(self.curve.adapters, self.best))

    def _mark(self) -> str:
        x, y = self.across(float(self.best)), self.up(float(self.values[self._row]))
        return svg.element(
            "g", svg.path("stem", f"M{x:.1f} {_TOP:.1f}V{_BOTTOM:.1f}"), svg.ring(x, y, 5.5), class_="optimum"
        )

    def _describe(self) -> str:
        told = f"{shown(float(self.values[self._row]))} {self.quantity.unit} at the recommended {self.best} adapters"
        if self.interval:
            low, high = (shown(float(end[self._row])) for end in self.interval)
            told += f", 90 % interval {low} to {high}"
        first, last = (f"{shown(float(self.values[i]))} at {self.curve.adapters[i]}" for i in (0, -1))
        return f"{told}; {first} and {last}"
