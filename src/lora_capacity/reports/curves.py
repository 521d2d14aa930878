"""Predictions against the number of adapters or against the load, as panels with bounds, intervals and points."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lora_capacity.reports import svg
from lora_capacity.reports.load_curve import LoadCurve
from lora_capacity.reports.plan_grid import Curve
from lora_capacity.reports.quantities import CURVES, LOADED, Bound, Quantity, bound_of
from lora_capacity.search import Recommendation
from lora_capacity.search.objective import Columns
from lora_capacity.words import shown, spoken

WIDTH, HEIGHT = 420.0, 260.0
"""Size of a panel in CSS pixels, two of which stand side by side on the page."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, WIDTH - 12.0, 30.0, HEIGHT - 44.0
"""Edges of the axes: room for numbers to the left, the title above, numbers and title of the axis below."""

FAILS = ("starved", "falls_behind", "misses_bounds")
"""Verdicts of what fails."""


@dataclass(frozen=True)
class Points:
    """What the event twin says, ``[points]``: the mean over its seeds, and the least and the most of them.

    Attributes:
        at: Places along the axis.
        mean: Means, in units of the column.
        low: Least.
        high: Most.
    """

    at: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]


@dataclass(frozen=True)
class Panel:
    """One quantity against something.

    Attributes:
        group: What it is drawn against, ``adapters`` or ``load``; panels of a group are read together.
        quantity: What to draw.
        title: Of the axis below.
        at: Places along that axis, ascending, ``[points]``.
        values: Columns of predictions, ``[points]``.
        verdict: Labels of `judge`, ``[points]``.
        best: Place of the recommendation.
        low: Lower ends of intervals, by column; none of a quantity without.
        high: Upper ends.
        points: What the event twin says.
        bound: What the quantity should keep.
    """

    group: str
    quantity: Quantity
    title: str
    at: NDArray[np.float64]
    values: Columns
    verdict: NDArray[np.object_]
    best: float
    low: Columns = field(default_factory=dict)
    high: Columns = field(default_factory=dict)
    points: Points | None = None
    bound: Bound | None = None

    @property
    def key(self) -> str:
        """Name of the panel among all."""
        return f"{self.group}-{self.quantity.key}"

    @cached_property
    def across(self) -> svg.Scale:
        """Places along the axis below."""
        return svg.Scale(float(self.at[0]), float(self.at[-1]), _LEFT, _RIGHT)

    @cached_property
    def up(self) -> svg.Scale:
        """Places of values: room for all that is drawn, from 0 unless logarithmic."""
        marks = (
            [] if self.points is None else [self.quantity.on_axis(end) for end in (self.points.low, self.points.high)]
        )
        level = [] if self._level is None else [np.array([self._level])]
        every = np.concatenate([self._line, *self._interval, *self._beside, *marks, *level])
        finite = every[np.isfinite(every)] if np.isfinite(every).any() else np.array([0.0, 1.0])
        if self.quantity.log:
            low, high = float(finite.min()), float(finite.max())
            return svg.Scale(low / 1.2, max(high, low * 10.0) * 1.2, _BOTTOM, _TOP, log=True)
        return svg.Scale(0.0, max(float(finite.max()) * 1.06, 1e-9), _BOTTOM, _TOP)

    @cached_property
    def xs(self) -> list[float]:
        """Places of the predictions along the axis."""
        return [self.across(float(value)) for value in self.at]

    @cached_property
    def _line(self) -> Float[np.ndarray, " points"]:
        return self.quantity.on_axis(self.values[self.quantity.key])

    @cached_property
    def _interval(self) -> list[Float[np.ndarray, " points"]]:
        key = self.quantity.key
        return [self.quantity.on_axis(end[key]) for end in (self.low, self.high) if key in end]

    @cached_property
    def _beside(self) -> list[Float[np.ndarray, " points"]]:
        return [self.quantity.on_axis(self.values[column]) for column, _ in self.quantity.beside]

    @property
    def _level(self) -> float | None:
        return None if self.bound is None else self.bound.value * self.quantity.scale

    def _heights(self, values: Float[np.ndarray, " points"]) -> list[float]:
        return [self.up(float(value)) if np.isfinite(value) else float("nan") for value in values]

    def places(self) -> list[list[float]]:
        """Return x and y of the points, for what follows a pointer; y is -1 where nothing is drawn."""
        points = zip(self.xs, self._heights(self._line), strict=True)
        return [[round(x, 1), round(y, 1) if np.isfinite(y) else -1.0] for x, y in points]

    def draw(self, with_what: str) -> str:
        """Return the drawing.

        Args:
            with_what: What all points have in common, for the description.
        """
        name = f"{self.quantity.name} against {self.title}, {with_what}"
        parts = (
            self._failing(),
            svg.axis_y(self.up, _LEFT, 5, _RIGHT),
            svg.axis_x(self.across, _BOTTOM, self.title, 6),
            self._band(),
            *(svg.line(zip(self.xs, ys, strict=True), class_="beside") for ys in map(self._heights, self._beside)),
            self._limit(),
            svg.line(zip(self.xs, self._heights(self._line), strict=True), class_="curve"),
            self._mark(),
            self._marks(),
            self._notes(),
            svg.text(f"{self.quantity.name}, {self.quantity.unit}", 0.0, 13.0, class_="axis strong"),
            svg.element("g", svg.path("hair", ""), svg.element("circle", r=3.5, class_="dot"), class_="hover"),
        )
        told = {"class_": "fig panel", "data_key": self.key, "data_group": self.group}
        return svg.drawing(WIDTH, HEIGHT, name, self._describe(), *parts, **told)

    @cached_property
    def _fails(self) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.verdict.astype(str), FAILS))

    @cached_property
    def _failing_from(self) -> tuple[float, float] | None:
        """Left and right of what fails, None if nothing does."""
        if not self._fails.size:
            return None
        first, last = int(self._fails[0]), int(self._fails[-1])
        return 0.5 * (self.xs[max(first - 1, 0)] + self.xs[first]), self.xs[last]

    def _failing(self) -> str:
        if self._failing_from is None:
            return ""
        left, right = self._failing_from
        return svg.rect("wash", left, _TOP, right - left, _BOTTOM - _TOP)

    def _band(self) -> str:
        if not self._interval:
            return ""
        known = np.flatnonzero(np.isfinite(self._interval).all(axis=0))
        low, high = (self._heights(end[known]) for end in self._interval)
        return svg.band("band", [self.xs[i] for i in known], low, high)

    def _limit(self) -> str:
        return "" if self._level is None else svg.path("limit", f"M{_LEFT} {self.up(self._level):.1f}H{_RIGHT}")

    def _notes(self) -> str:
        """Return the names of lines, bound and region, each near what it names and off all that is drawn."""
        main, beside = self._heights(self._line), [*map(self._heights, self._beside)]
        lines = [[*zip(self.xs, ys, strict=True)] for ys in (main, *map(self._heights, self._interval), *beside)]
        wanted = []
        for (_, words), ys in zip(self.quantity.beside, beside, strict=True):
            # Where it is farthest from the predictions.
            gaps = np.nan_to_num(np.abs(np.subtract(ys, main)), nan=-1.0)
            at = int(np.argmax(gaps))
            wanted.append((words, (self.xs[at], ys[at] + (8.0 if ys[at] > main[at] else -8.0)), (_LEFT, _RIGHT)))
        if self.bound is not None and self._level is not None:
            y = self.up(self._level)
            lines.append([(_LEFT, y), (_RIGHT, y)])
            wanted.append((self.bound.words, (_LEFT + 60.0, y - 8.0), (_LEFT, _RIGHT)))
        if self._failing_from is not None:
            words = spoken(str(self.verdict[self._fails[-1]]))
            middle = 0.5 * sum(self._failing_from), 0.4 * _TOP + 0.6 * _BOTTOM
            wanted.append((words, middle, self._failing_from))
        marks = [(self.across(self.best), y) for y in np.arange(_TOP, _BOTTOM, 8.0).tolist()]
        if self.points is not None:
            heights = self._heights(self.quantity.on_axis(self.points.mean))
            marks += zip(map(self.across, self.points.at.tolist()), heights, strict=True)
        return svg.notes(wanted, lines, marks, (_LEFT + 2.0, _TOP, _RIGHT, _BOTTOM - 2.0))

    @property
    def _row(self) -> int:
        return int(np.argmin(np.abs(self.at - self.best)))

    def _mark(self) -> str:
        x, y = self.across(self.best), self._heights(self._line)[self._row]
        stem = svg.path("stem", f"M{x:.1f} {_TOP:.1f}V{_BOTTOM:.1f}")
        return svg.element("g", stem, svg.ring(x, y, 5.5) if np.isfinite(y) else "", class_="optimum")

    def _marks(self) -> str:
        if self.points is None:
            return ""
        told = self.points
        columns = (self.quantity.on_axis(each) for each in (told.mean, told.low, told.high))
        drawn = ""
        for x, mean, low, high in zip(map(self.across, told.at.tolist()), *map(self._heights, columns), strict=True):
            if np.isfinite(mean):
                drawn += svg.path("whisker", f"M{x:.1f} {low:.1f}V{high:.1f}") + svg.circle("hollow", x, mean, 3.5)
        return svg.element("g", drawn, class_="points")

    def _describe(self) -> str:
        line = self._line
        told = f"{shown(float(line[self._row]))} {self.quantity.unit} at the recommendation"
        if self._interval:
            low, high = (shown(float(end[self._row])) for end in self._interval)
            told += f", 90 % interval {low} to {high}"
        first, last = (f"{shown(float(line[i]))} at {shown(float(self.at[i]))}" for i in (0, -1))
        bound = "" if self.bound is None else f"; {self.bound.words}"
        return f"{told}; {first} and {last}{bound}"


def adapter_panels(curve: Curve, found: Recommendation) -> list[Panel]:
    """Return quantities against the number of adapters, with intervals."""
    return [
        Panel(
            "adapters",
            each,
            "adapters A",
            curve.adapters.astype(np.float64),
            curve.values,
            curve.verdict,
            float(found.best.max_cpu_loras),
            low=curve.low,
            high=curve.high,
            bound=bound_of(each, found),
        )
        for each in CURVES
    ]


def load_panels(curve: LoadCurve, found: Recommendation) -> list[Panel]:
    """Return quantities of the recommended server against the load, with the event twin's points if it was played."""
    return [
        Panel(
            "load",
            each,
            "times this load",
            curve.load,
            curve.values,
            curve.verdict,
            1.0,
            points=_points(curve, each.key),
            bound=bound_of(each, found),
        )
        for each in LOADED
    ]


def _points(curve: LoadCurve, key: str) -> Points | None:
    if curve.played is None or key not in curve.played:
        return None
    column = np.asarray(curve.played[key], np.float64)
    return Points(curve.played_load, column.mean(axis=1), column.min(axis=1), column.max(axis=1))
