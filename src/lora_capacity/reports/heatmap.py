"""Maps over adapters and slots: a number in colour, with regions drawn over it, and bottlenecks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from lora_capacity.reports import svg
from lora_capacity.reports.colours import STEPS
from lora_capacity.reports.plan_grid import PlanGrid
from lora_capacity.reports.quantities import Quantity, bound_of
from lora_capacity.search import Recommendation
from lora_capacity.words import REFUSALS, shown, spoken

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""

REGIONS = ("impossible", "oom", "no_kv_cache", "starved", "falls_behind", "misses_bounds", "risky", "acceptable")
"""Verdicts, in the order in which their names are placed on a map while there is room."""

BOTTLENECKS = ("none", "slots", "sequences", "kv_cache", "token_budget", "no_kv_cache", "oom")
"""Bottlenecks, by the labels of `PlanGrid.bottleneck`, in the order in which they are told."""

_HATCHES = {
    "starved": (45, 7),
    "falls_behind": (45, 7),
    "misses_bounds": (90, 7),
    "risky": (45, 14),
    "no_kv_cache": (-45, 5),
    "oom": (0, 4),
}
"""Angle in degrees and distance of the lines over each verdict, told apart in black and white too."""

_LEFT, _RIGHT, _BOTTOM = 40.0, 12.0, 44.0
"""Margins: room for numbers to the left, and for numbers and title of the axis below."""

_MAP_TOP = 46.0
"""Room above the cells of a map with a legend."""

_NARROW = 480.0
"""Up to this width a map has fewer numbers and a shorter legend: phones are narrower."""


@dataclass(frozen=True)
class Frame:
    """Where the cells of a map lie.

    Attributes:
        xs: Places of the columns' edges, ascending.
        ys: Places of the rows' edges, descending: more slots are higher up.
        across: Scale of the adapters.
        up: Scale of the slots.
        width: Of the whole drawing.
        height: Of the whole drawing.
    """

    xs: list[float]
    ys: list[float]
    across: svg.Scale
    up: svg.Scale
    width: float
    height: float

    @classmethod
    def of(cls, grid: PlanGrid, width: float, height: float, top: float) -> Self:
        """Lay a grid out: adapters linear to the right, slots logarithmic upwards."""
        columns = _edges_between(grid.adapters.astype(np.float64)).tolist()
        rows = np.exp(_edges_between(np.log(grid.slots.astype(np.float64)))).tolist()
        across = svg.Scale(columns[0], columns[-1], _LEFT, width - _RIGHT)
        up = svg.Scale(rows[0], rows[-1], height - _BOTTOM, top, log=True)
        return cls([across(x) for x in columns], [up(y) for y in rows], across, up, width, height)

    def filled(self, mask: Bool[np.ndarray, "rows columns"]) -> str:
        """Return the path that covers cells."""
        return svg.filled(mask, self.xs, self.ys)

    def outline(self, mask: Bool[np.ndarray, "rows columns"]) -> str:
        """Return the path around cells."""
        return svg.outline(mask, self.xs, self.ys)

    def axes(self) -> str:
        """Return the axes of adapters and slots."""
        least = max(self.up.low, 1.0)  # there are no slots below the first, whose cells reach lower
        up = svg.Scale(least, self.up.high, self.up(least), self.up.end, log=True)
        across = svg.axis_x(self.across, self.ys[0], "adapters A, max_cpu_loras →", 10 if self.width > _NARROW else 5)
        title = svg.text("slots S, max_loras ↑", 0.0, self.ys[-1] - 8.0, class_="axis")
        return across + svg.axis_y(up, self.xs[0], 9) + title


def heat_map(grid: PlanGrid, quantity: Quantity, name: str, width: float, height: float) -> str:
    """Return the map of one number, with regions and the recommendation drawn over it.

    Args:
        grid: The predictions.
        quantity: What the colours show.
        name: Prefix of the drawing's identifiers.
        width: Of the drawing.
        height: Of the drawing.
    """
    frame = Frame.of(grid, width, height, _MAP_TOP)
    colour = quantity.codes(grid.values[quantity.key])
    optimum, taken = _optimum(grid, frame)
    # Widths follow from rounded edges, lest hairs of the page show between cells.
    xs, ys = np.round(frame.xs, 1).tolist(), np.round(frame.ys, 1).tolist()
    cells = []
    for i, (r, c) in enumerate(np.ndindex(grid.verdict.shape)):
        if grid.verdict[r, c] != "impossible":
            kind = f"c{colour[r, c]}" if colour[r, c] >= 0 else "none"
            cells.append(svg.rect(kind, xs[c], ys[r + 1], xs[c + 1] - xs[c], ys[r] - ys[r + 1], data_i=i))
    return svg.drawing(
        width,
        height,
        f"{quantity.name} by adapters and slots",
        describe(grid),
        svg.element("defs", *(svg.hatch(f"{name}-{each}", *how, f"hatch {each}") for each, how in _HATCHES.items())),
        _legend(quantity, grid, frame),
        svg.element("g", *cells, class_="cells", shape_rendering="crispEdges"),
        _regions(grid, frame, name),
        svg.path("limit bound", ""),
        svg.text("", _legend_scale(quantity, grid, width).start - 10.0, 26.0, class_="note bound", text_anchor="end"),
        frame.axes(),
        svg.rect("cursor", 0, 0, 0, 0),
        optimum,
        _labels(grid.verdict, REGIONS, frame, taken),
    )


def map_bounds(
    quantity: Quantity, grid: PlanGrid, found: Recommendation, sizes: Sequence[tuple[float, float]]
) -> list[str]:
    """Return what the bound on a quantity is called, and the path around what keeps it on maps of these sizes."""
    bound = bound_of(quantity, found)
    if bound is None:
        return ["", *("" for _ in sizes)]
    kept = bound.kept(grid.values[quantity.key])
    return [bound.words, *(Frame.of(grid, *size, _MAP_TOP).outline(kept) for size in sizes)]


def swatches(grid: PlanGrid) -> list[tuple[str, str]]:
    """Return a small drawing of each hatching that there is on a map, and what it means."""
    found = []
    for verdict, how in _HATCHES.items():
        if (grid.verdict == verdict).any():
            pattern = svg.element("defs", svg.hatch(f"swatch-{verdict}", *how, f"hatch {verdict}"))
            box = svg.rect(f"cover {verdict}", 0.5, 0.5, 27.0, 15.0, fill=f"url(#swatch-{verdict})")
            under = svg.rect("c12" if verdict not in REFUSALS else "none", 0.5, 0.5, 27.0, 15.0)
            frame = svg.rect("edge thin", 0.5, 0.5, 27.0, 15.0)
            drawn = svg.element("svg", pattern, under, box, frame, viewBox="0 0 28 16", aria_hidden="true")
            found.append((drawn, spoken(verdict)))
    return found


def bottleneck_map(grid: PlanGrid, width: float, height: float) -> str:
    """Return the map of bottlenecks."""
    frame = Frame.of(grid, width, height, 26.0)
    optimum, taken = _optimum(grid, frame)
    masks = {each: mask for each in BOTTLENECKS if (mask := grid.bottleneck == each).any()}
    areas = [
        svg.path(f"b-{each}", frame.filled(mask), svg.element("title", spoken(each))) for each, mask in masks.items()
    ]
    return svg.drawing(
        width,
        height,
        "Bottlenecks by adapters and slots",
        f"Configurations by bottleneck: {_counted(grid.bottleneck, BOTTLENECKS, '{1} {0}')}",
        svg.element("g", *areas, shape_rendering="crispEdges"),
        svg.path("edge thin", "".join(map(frame.outline, masks.values()))),
        frame.axes(),
        optimum,
        _labels(grid.bottleneck, (*BOTTLENECKS, "impossible"), frame, taken),
    )


def describe(grid: PlanGrid) -> str:
    """Return the map in a sentence, for those who do not see it."""
    column, row = grid.best
    return (
        f"Adapters from {grid.adapters[0]} to {grid.adapters[-1]}, slots from {grid.slots[0]} to {grid.slots[-1]}; "
        f"recommended are {grid.adapters[column]} adapters with {grid.slots[row]} slots. Of the configurations drawn, "
        f"{_counted(grid.verdict, REGIONS[1:], '{0} {1}')}"
    )


def _counted(kinds: NDArray[Any], labels: Sequence[str], form: str) -> str:
    """Return how many cells are of each kind that there is: count and label, in some form."""
    counts = {label: int(np.sum(kinds == label)) for label in labels}
    return ", ".join(form.format(count, spoken(label)) for label, count in counts.items() if count)


def _regions(grid: PlanGrid, frame: Frame, name: str) -> str:
    masks = {each: mask for each in _HATCHES if (mask := grid.verdict == each).any()}
    covers = [
        svg.path(f"cover {each}", frame.filled(mask), fill=f"url(#{name}-{each})") for each, mask in masks.items()
    ]
    good = svg.path("edge", frame.outline(grid.verdict == "acceptable"))
    starts = svg.path("edge thin", frame.outline(np.isin(grid.verdict, ("no_kv_cache", "oom"))))
    return svg.element("g", *covers, good, starts, class_="regions")


def _legend(quantity: Quantity, grid: PlanGrid, frame: Frame) -> str:
    scale = _legend_scale(quantity, grid, frame.width)
    size = (scale.end - scale.start) / STEPS
    bar = [svg.rect(f"c{step}", scale.start + step * size, 18.0, size, 8.0) for step in range(STEPS)]
    return svg.element(
        "g",
        svg.text(f"{quantity.name}, {quantity.unit}", scale.end, 11.0, class_="axis legend-name", text_anchor="end"),
        svg.element("g", *bar, shape_rendering="crispEdges"),
        svg.element("g", legend_ticks(quantity, grid, frame.width), class_="legend-ticks"),
        class_="legend",
    )


def _legend_scale(quantity: Quantity, grid: PlanGrid, width: float) -> svg.Scale:
    right = width - _RIGHT
    low, high = (value * quantity.scale for value in quantity.span(grid.values[quantity.key]))
    return svg.Scale(low, high, right - (6.0 if width > _NARROW else 4.0) * STEPS, right, log=quantity.log)


def legend_ticks(quantity: Quantity, grid: PlanGrid, width: float) -> str:
    """Return the numbers below the bar of colours of a map of this width."""
    scale = _legend_scale(quantity, grid, width)
    ticks = scale.ticks(round(abs(scale.end - scale.start) / 42.0))
    return "".join(svg.text(shown(value), scale(value), 38.0, class_="num", text_anchor="middle") for value in ticks)


def _optimum(grid: PlanGrid, frame: Frame) -> tuple[str, Box]:
    """Return the mark and label of the recommendation, and the box that they take."""
    column, row = grid.best
    x, y = 0.5 * (frame.xs[column] + frame.xs[column + 1]), 0.5 * (frame.ys[row] + frame.ys[row + 1])
    words = f"A {grid.adapters[column]}, S {grid.slots[row]}"
    # To the left of the mark, to the right where there is no room.
    beside, anchor = (-15.0, "end") if x - frame.xs[0] > svg.width_of(words, 13.0) + 20.0 else (15.0, "start")
    label = svg.text(words, x + beside, y + 4.5, class_="label best", text_anchor=anchor)
    drawn = svg.element("g", svg.ring(x, y, 7.0), svg.circle("dot", x, y, 2.2), label, class_="optimum")
    length = svg.width_of(words, 14.0)
    left = x - 13.0 - (length if anchor == "end" else 0.0)
    return drawn, (left - 6.0, y - 15.5, left + length + 32.0, y + 18.5)


def _labels(kinds: NDArray[Any], labels: Sequence[str], frame: Frame, taken: Box) -> str:
    """Return the name of each region, where there is room for it."""
    parts = []
    for kind in labels:
        mask = kinds == kind
        for lines in _breaks(spoken(kind)) if mask.any() else ():
            size = max(map(svg.width_of, lines)) + 8.0, 15.0 * len(lines) + 4.0
            place = svg.room_for(mask, frame.xs, frame.ys, *size, [taken])
            if place is not None:
                x, y = place
                first = y + 4.0 - 7.5 * (len(lines) - 1)
                parts += [
                    svg.text(each, x, first + 15.0 * i, class_=f"label in-{kind}", text_anchor="middle")
                    for i, each in enumerate(lines)
                ]
                break
    return svg.element("g", *parts, class_="labels") if parts else ""


def _breaks(label: str) -> list[list[str]]:
    """Return the label in one line, in two and in three, as far as its words go."""
    words = label.split(" ")
    lengths = [-(-len(words) // count) for count in (1, 2, 3) if count <= len(words)]
    return [[" ".join(words[i : i + length]) for i in range(0, len(words), length)] for length in lengths]


def _edges_between(centres: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " edges"]:
    """Return the edges of cells around ascending centres."""
    half = 0.5 * np.diff(centres) if centres.size > 1 else np.array([0.5])
    inner = centres[:-1] + half[: centres.size - 1]
    return np.concatenate([centres[:1] - half[:1], inner, centres[-1:] + half[-1:]])
