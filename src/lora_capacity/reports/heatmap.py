"""Maps over adapters and slots: a number in colour, with regions drawn over it, and bottlenecks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from lora_capacity.reports import svg
from lora_capacity.reports.colours import STEPS
from lora_capacity.reports.plan_grid import PlanGrid
from lora_capacity.reports.quantities import Quantity
from lora_capacity.words import shown, spoken

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""

REGIONS = ("impossible", "oom", "no_kv_cache", "starved", "risky", "too_slow", "acceptable")
"""Verdicts, in the order in which their names are placed on a map while there is room."""

BOTTLENECKS = ("none", "slots", "sequences", "kv_cache", "token_budget", "no_kv_cache", "oom")
"""Bottlenecks, by the labels of `PlanGrid.bottleneck`, in the order in which they are told."""

_HATCHES = {"starved": (45, 7), "risky": (45, 14), "too_slow": (90, 7), "no_kv_cache": (-45, 5), "oom": (0, 4)}
"""Angle in degrees and distance of the lines over each verdict, told apart in black and white too."""

_LEFT, _RIGHT, _BOTTOM = 40.0, 12.0, 44.0
"""Margins: room for numbers to the left, and for numbers and title of the axis below."""

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


def codes(quantity: Quantity, grid: PlanGrid) -> Int[np.ndarray, "rows columns"]:
    """Return the colour of every cell, 0 to 31, -1 where there is no number."""
    values = np.asarray(grid.values[quantity.key], np.float64)
    low, high = span(quantity, grid)
    if quantity.log:
        values, low, high = np.log(np.maximum(values, 1e-12)), math.log(low), math.log(high)
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    index = np.floor(np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * STEPS).clip(max=STEPS - 1)
    return np.where(np.isnan(values), -1, index.astype(np.int64))


def span(quantity: Quantity, grid: PlanGrid) -> tuple[float, float]:
    """Return the values of the lowest and the highest colour."""
    values = np.asarray(grid.values[quantity.key], np.float64)
    finite = values[np.isfinite(values)]
    if quantity.most is not None:
        return 0.0, quantity.most
    if not finite.size:
        return 0.0, 1.0
    if quantity.log:
        return float(max(finite.min(), 1e-3)), float(max(finite.max(), 2e-3))
    return 0.0, float(finite.max())


def heat_map(grid: PlanGrid, quantity: Quantity, name: str, width: float, height: float) -> str:
    """Return the map of one number, with regions and the recommendation drawn over it.

    Args:
        grid: The predictions.
        quantity: What the colours show.
        name: Prefix of the drawing's identifiers.
        width: Of the drawing.
        height: Of the drawing.
    """
    top = 46.0
    frame = Frame.of(grid, width, height, top)
    fill = codes(quantity, grid)
    optimum, taken = _optimum(grid, frame)
    # Widths follow from rounded edges, lest hairs of the page show between cells.
    xs, ys = np.round(frame.xs, 1).tolist(), np.round(frame.ys, 1).tolist()
    cells = "".join(
        svg.element(
            "rect",
            class_=f"c{fill[r, c]}" if fill[r, c] >= 0 else "none",
            x=xs[c],
            y=ys[r + 1],
            width=xs[c + 1] - xs[c],
            height=ys[r] - ys[r + 1],
            data_i=r * grid.adapters.size + c,
        )
        for r in range(grid.slots.size)
        for c in range(grid.adapters.size)
        if grid.verdict[r, c] != "impossible"
    )
    return svg.drawing(
        width,
        height,
        f"{quantity.name} by adapters and slots",
        describe(grid),
        svg.element("defs", *(_pattern(name, region) for region in _HATCHES)),
        _legend(quantity, grid, frame),
        svg.element("g", cells, class_="cells", shape_rendering="crispEdges"),
        _regions(grid, frame, name),
        _axes(frame),
        svg.element("rect", class_="cursor", x=0, y=0, width=0, height=0),
        optimum,
        _labels(grid.verdict, REGIONS, frame, taken),
    )


def bottleneck_map(grid: PlanGrid, width: float, height: float) -> str:
    """Return the map of bottlenecks."""
    frame = Frame.of(grid, width, height, 26.0)
    optimum, taken = _optimum(grid, frame)
    areas = "".join(
        svg.element(
            "path", svg.element("title", spoken(bound)), class_=f"b-{bound}", d=svg.filled(mask, frame.xs, frame.ys)
        )
        for bound in BOTTLENECKS
        if (mask := grid.bottleneck == bound).any()
    )
    return svg.drawing(
        width,
        height,
        "Bottlenecks by adapters and slots",
        describe_bottlenecks(grid),
        svg.element("g", areas, shape_rendering="crispEdges"),
        svg.element(
            "path", class_="edge thin", d="".join(_edges(grid.bottleneck == each, frame) for each in BOTTLENECKS)
        ),
        _axes(frame),
        optimum,
        _labels(grid.bottleneck, (*BOTTLENECKS, "impossible"), frame, taken),
    )


def describe(grid: PlanGrid) -> str:
    """Return the map in a sentence, for those who do not see it."""
    column, row = grid.best
    counts = {verdict: int(np.sum(grid.verdict == verdict)) for verdict in REGIONS if verdict != "impossible"}
    told = ", ".join(f"{count} {spoken(verdict)}" for verdict, count in counts.items() if count)
    return (
        f"Adapters from {grid.adapters[0]} to {grid.adapters[-1]}, slots from {grid.slots[0]} to {grid.slots[-1]}; "
        f"recommended are {grid.adapters[column]} adapters with {grid.slots[row]} slots. Of the configurations drawn, "
        f"{told}"
    )


def describe_bottlenecks(grid: PlanGrid) -> str:
    """Return the map of bounds in a sentence."""
    counts = {bound: int(np.sum(grid.bottleneck == bound)) for bound in BOTTLENECKS}
    return "Configurations by bottleneck: " + ", ".join(
        f"{spoken(each)} {count}" for each, count in counts.items() if count
    )


def _pattern(name: str, region: str) -> str:
    return svg.hatch(f"{name}-{region}", *_HATCHES[region], f"hatch {region}")


def _regions(grid: PlanGrid, frame: Frame, name: str) -> str:
    parts = []
    for region in _HATCHES:
        mask = grid.verdict == region
        if mask.any():
            cover = svg.filled(mask, frame.xs, frame.ys)
            parts.append(svg.element("path", class_=f"cover {region}", d=cover, fill=f"url(#{name}-{region})"))
    good = np.asarray(grid.verdict == "acceptable")
    parts.append(svg.element("path", class_="edge", d=svg.outline(good, frame.xs, frame.ys)))
    starts = np.isin(grid.verdict, ("no_kv_cache", "oom"))
    parts.append(svg.element("path", class_="edge thin", d=svg.outline(starts, frame.xs, frame.ys)))
    return svg.element("g", *parts, class_="regions")


def _edges(mask: Bool[np.ndarray, "rows columns"], frame: Frame) -> str:
    return svg.outline(mask, frame.xs, frame.ys) if mask.any() else ""


def _axes(frame: Frame) -> str:
    wide = frame.width > _NARROW
    title = svg.text("slots S, max_loras ↑", 0.0, frame.ys[-1] - 8.0, class_="axis")
    return (
        svg.axis_x(frame.across, frame.ys[0], "adapters A, max_cpu_loras →", 10 if wide else 5)
        + svg.axis_y(
            svg.Scale(max(frame.up.low, 1.0), frame.up.high, frame.up(max(frame.up.low, 1.0)), frame.up.end, log=True),
            frame.xs[0],
            9,
        )
        + title
    )


def _legend(quantity: Quantity, grid: PlanGrid, frame: Frame) -> str:
    scale = _legend_scale(quantity, grid, frame.width)
    size = (scale.end - scale.start) / STEPS
    bar = "".join(
        svg.element("rect", class_=f"c{step}", x=scale.start + step * size, y=18.0, width=size, height=8.0)
        for step in range(STEPS)
    )
    return svg.element(
        "g",
        svg.text(f"{quantity.name}, {quantity.unit}", scale.end, 11.0, class_="axis legend-name", text_anchor="end"),
        svg.element("g", bar, shape_rendering="crispEdges"),
        svg.element("g", legend_ticks(quantity, grid, frame.width), class_="legend-ticks"),
        class_="legend",
    )


def _legend_scale(quantity: Quantity, grid: PlanGrid, width: float) -> svg.Scale:
    right = width - _RIGHT
    low, high = (value * quantity.scale for value in span(quantity, grid))
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
    beside, anchor = (-13.0, "end") if x - frame.xs[0] > svg.width_of(words, 13.0) + 20.0 else (13.0, "start")
    drawn = svg.element(
        "g",
        svg.element("circle", class_="ring-back", cx=x, cy=y, r=7.0),
        svg.element("circle", class_="ring", cx=x, cy=y, r=7.0),
        svg.element("circle", class_="dot", cx=x, cy=y, r=2.2),
        svg.text(words, x + beside, y + 4.5, class_="label best", text_anchor=anchor),
        class_="optimum",
    )
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
    """Return the label in one line, in two and in three."""
    words = label.split(" ")
    found = [[label]]
    for count in (2, 3):
        if len(words) >= count:
            per_line = -(-len(words) // count)
            found.append([" ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)])
    return found


def _edges_between(centres: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " edges"]:
    """Return the edges of cells around ascending centres."""
    half = 0.5 * np.diff(centres) if centres.size > 1 else np.array([0.5])
    inner = centres[:-1] + half[: centres.size - 1]
    return np.concatenate([centres[:1] - half[:1], inner, centres[-1:] + half[-1:]])
