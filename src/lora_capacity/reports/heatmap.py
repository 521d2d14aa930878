"""Maps over adapters and slots: a number in colour, with regions drawn over it, and what binds where."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_capacity.reports import svg
from lora_capacity.reports.colours import STEPS
from lora_capacity.reports.plan_grid import Landscape
from lora_capacity.units import MS_PER_S
from lora_capacity.words import duration, percent, shown, spoken


@dataclass(frozen=True)
class Metric:
    """A number that the map can show.

    Attributes:
        key: Name of its column.
        name: What it is called.
        unit: Unit of the legend.
        scale: Factor from the column to the legend.
        log: Whether colours follow its logarithm.
        full: Largest value of the colours, None for the largest there is.
    """

    key: str
    name: str
    unit: str
    scale: float = 1.0
    log: bool = False
    full: float | None = None

    def tell(self, value: float) -> str:
        """Return a value in words."""
        if self.unit == "%":
            return percent(value)
        if self.key.endswith("_s") and self.unit in ("ms", "s"):
            return duration(value)
        return f"{shown(value)} {self.unit}" if not math.isnan(value) else shown(value)


METRICS = (
    Metric("throughput_tokens_per_s", "Throughput", "tokens/s"),
    Metric("service", "Share served", "%", scale=100.0, full=1.0),
    Metric("itl_s", "Inter-token latency", "ms", scale=MS_PER_S),
    Metric("ttft_s", "Time to first token", "s", log=True),
    Metric("starving_probability", "Chance of starving", "%", scale=100.0, full=1.0),
    Metric("kv_usage", "KV cache in use", "%", scale=100.0, full=1.0),
)

REGIONS = ("impossible", "oom", "no_kv_cache", "starved", "risky", "too_slow", "acceptable")
"""Verdicts, in the order in which their names are placed on a map while there is room."""

BOUNDS = ("none", "slots", "sequences", "kv_cache", "token_budget", "no_kv_cache", "oom")
"""Bottlenecks, by the labels of `Landscape.bound`, in the order in which they are told."""

_HATCHED = ("starved", "risky", "too_slow", "no_kv_cache", "oom")


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
    def of(cls, land: Landscape, width: float, height: float, top: float) -> "Frame":
        """Lay a landscape out: adapters linear to the right, slots logarithmic upwards."""
        columns = _edges_between(land.adapters.astype(np.float64)).tolist()
        rows = np.exp(_edges_between(np.log(land.slots.astype(np.float64)))).tolist()
        across = svg.Scale(columns[0], columns[-1], 40.0, width - 12.0)
        up = svg.Scale(rows[0], rows[-1], height - 44.0, top, log=True)
        return cls([across(x) for x in columns], [up(y) for y in rows], across, up, width, height)


def codes(metric: Metric, land: Landscape) -> NDArray[np.int64]:
    """Return the colour of every cell, 0 to 31, -1 where there is no number, ``[rows, columns]``."""
    values = np.asarray(land.values[metric.key], np.float64)
    low, high = span(metric, land)
    if metric.log:
        values, low, high = np.log(np.maximum(values, 1e-12)), math.log(low), math.log(high)
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    index = np.floor(np.clip(np.nan_to_num(share, nan=0.0), 0.0, 1.0) * STEPS).clip(max=STEPS - 1)
    return np.where(np.isnan(values), -1, index.astype(np.int64))


def span(metric: Metric, land: Landscape) -> tuple[float, float]:
    """Return the values of the lowest and the highest colour."""
    values = np.asarray(land.values[metric.key], np.float64)
    finite = values[np.isfinite(values)]
    if metric.full is not None:
        return 0.0, metric.full
    if not finite.size:
        return 0.0, 1.0
    if metric.log:
        return float(max(finite.min(), 1e-3)), float(max(finite.max(), 2e-3))
    return 0.0, float(finite.max())


def heat_map(land: Landscape, metric: Metric, name: str, width: float, height: float) -> str:
    """Return the map of one number, with regions and the recommendation drawn over it.

    Args:
        land: The predictions.
        metric: What the colours show.
        name: Prefix of the drawing's identifiers.
        width: Of the drawing.
        height: Of the drawing.
    """
    top = 46.0
    frame = Frame.of(land, width, height, top)
    fill = codes(metric, land)
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
            data_i=r * land.adapters.size + c,
        )
        for r in range(land.slots.size)
        for c in range(land.adapters.size)
        if land.verdict[r, c] != "impossible"
    )
    return svg.drawing(
        width,
        height,
        f"{metric.name} by adapters and slots",
        describe(land),
        svg.element("defs", *(_pattern(name, region) for region in _HATCHED)),
        _legend(metric, land, frame, name),
        svg.element("g", cells, class_="cells", shape_rendering="crispEdges"),
        _regions(land, frame, name),
        _axes(frame),
        svg.element("rect", class_="cursor", x=0, y=0, width=0, height=0),
        _optimum(land, frame),
        _labels(land.verdict, REGIONS, frame, [_optimum_box(land, frame)]),
    )


def bound_map(land: Landscape, width: float, height: float) -> str:
    """Return the map of what holds each configuration back."""
    frame = Frame.of(land, width, height, 26.0)
    areas = "".join(
        svg.element(
            "path", svg.element("title", spoken(bound)), class_=f"b-{bound}", d=svg.filled(mask, frame.xs, frame.ys)
        )
        for bound in BOUNDS
        if (mask := land.bound == bound).any()
    )
    return svg.drawing(
        width,
        height,
        "What holds each configuration back",
        describe_bounds(land),
        svg.element("g", areas, shape_rendering="crispEdges"),
        svg.element("path", class_="edge thin", d="".join(_edges(land.bound == each, frame) for each in BOUNDS)),
        _axes(frame),
        _optimum(land, frame),
        _labels(land.bound, (*BOUNDS, "impossible"), frame, [_optimum_box(land, frame)]),
    )


def describe(land: Landscape) -> str:
    """Return the map in a sentence, for those who do not see it."""
    column, row = land.best
    counts = {verdict: int(np.sum(land.verdict == verdict)) for verdict in REGIONS if verdict != "impossible"}
    told = ", ".join(f"{count} {spoken(verdict)}" for verdict, count in counts.items() if count)
    return (
        f"Adapters from {land.adapters[0]} to {land.adapters[-1]}, slots from {land.slots[0]} to {land.slots[-1]}; "
        f"recommended are {land.adapters[column]} adapters with {land.slots[row]} slots. Of the configurations drawn, "
        f"{told}"
    )


def describe_bounds(land: Landscape) -> str:
    """Return the map of bounds in a sentence."""
    counts = {bound: int(np.sum(land.bound == bound)) for bound in BOUNDS}
    return "Configurations by bottleneck: " + ", ".join(
        f"{spoken(each)} {count}" for each, count in counts.items() if count
    )


def _pattern(name: str, region: str) -> str:
    angle, gap = {"starved": (45, 7), "risky": (45, 14), "too_slow": (90, 7), "no_kv_cache": (-45, 5), "oom": (0, 4)}[
        region
    ]
    return svg.hatch(f"{name}-{region}", angle, gap, f"hatch {region}")


def _regions(land: Landscape, frame: Frame, name: str) -> str:
    parts = []
    for region in _HATCHED:
        mask = land.verdict == region
        if mask.any():
            cover = svg.filled(mask, frame.xs, frame.ys)
            parts.append(svg.element("path", class_=f"cover {region}", d=cover, fill=f"url(#{name}-{region})"))
    good = np.isin(land.verdict, ("acceptable",))
    parts.append(svg.element("path", class_="edge", d=svg.outline(good, frame.xs, frame.ys)))
    starts = np.isin(land.verdict, ("no_kv_cache", "oom"))
    parts.append(svg.element("path", class_="edge thin", d=svg.outline(starts, frame.xs, frame.ys)))
    return svg.element("g", *parts, class_="regions")


def _edges(mask: NDArray[np.bool_], frame: Frame) -> str:
    return svg.outline(mask, frame.xs, frame.ys) if mask.any() else ""


def _axes(frame: Frame) -> str:
    wide = frame.width > 480
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


def _legend(metric: Metric, land: Landscape, frame: Frame, name: str) -> str:
    size = 6.0 if frame.width > 480 else 4.0
    right = frame.xs[-1]
    left = right - size * STEPS
    low, high = (value * metric.scale for value in span(metric, land))
    scale = svg.Scale(low, high, left, right, log=metric.log)
    bar = "".join(
        svg.element("rect", class_=f"c{step}", x=left + step * size, y=18.0, width=size, height=8.0)
        for step in range(STEPS)
    )
    return svg.element(
        "g",
        svg.text(f"{metric.name}, {metric.unit}", right, 11.0, class_="axis legend-name", text_anchor="end"),
        svg.element("g", bar, shape_rendering="crispEdges"),
        svg.element("g", legend_ticks(scale), class_="legend-ticks"),
        class_="legend",
    )


def legend_ticks(scale: svg.Scale) -> str:
    """Return the numbers below a bar of colours."""
    ticks = scale.ticks(round(abs(scale.end - scale.start) / 42.0))
    return "".join(svg.text(shown(value), scale(value), 38.0, class_="num", text_anchor="middle") for value in ticks)


def legend_of(metric: Metric, land: Landscape, width: float) -> str:
    """Return the numbers that `heat_map` of this width has below its bar."""
    size = 6.0 if width > 480 else 4.0
    low, high = (value * metric.scale for value in span(metric, land))
    return legend_ticks(svg.Scale(low, high, width - 12.0 - size * STEPS, width - 12.0, log=metric.log))


def _optimum_place(land: Landscape, frame: Frame) -> svg.Point:
    column, row = land.best
    return 0.5 * (frame.xs[column] + frame.xs[column + 1]), 0.5 * (frame.ys[row] + frame.ys[row + 1])


def _optimum_words(land: Landscape) -> str:
    return f"A {land.adapters[land.best[0]]}, S {land.slots[land.best[1]]}"


def _optimum_label(land: Landscape, frame: Frame) -> tuple[float, float, str]:
    """Place of the label and its anchor: to the left of the mark, to the right where there is no room."""
    x, y = _optimum_place(land, frame)
    room = x - frame.xs[0] > svg.width_of(_optimum_words(land), 13.0) + 20.0
    return (x - 13.0, y + 4.5, "end") if room else (x + 13.0, y + 4.5, "start")


def _optimum(land: Landscape, frame: Frame) -> str:
    x, y = _optimum_place(land, frame)
    label_x, label_y, anchor = _optimum_label(land, frame)
    return svg.element(
        "g",
        svg.element("circle", class_="ring-back", cx=x, cy=y, r=7.0),
        svg.element("circle", class_="ring", cx=x, cy=y, r=7.0),
        svg.element("circle", class_="dot", cx=x, cy=y, r=2.2),
        svg.text(_optimum_words(land), label_x, label_y, class_="label best", text_anchor=anchor),
        class_="optimum",
    )


def _optimum_box(land: Landscape, frame: Frame) -> tuple[float, float, float, float]:
    x, y, anchor = _optimum_label(land, frame)
    length = svg.width_of(_optimum_words(land), 14.0)
    left = x - length if anchor == "end" else x - 26.0
    return left - 6.0, y - 20.0, left + length + 32.0, y + 14.0


def _labels(
    kinds: NDArray[Any], labels: Sequence[str], frame: Frame, taken: Sequence[tuple[float, float, float, float]]
) -> str:
    """Return the name of each region, where there is room for it."""
    parts = []
    for kind in labels:
        mask = kinds == kind
        for lines in _breaks(spoken(kind)) if mask.any() else ():
            size = max(map(svg.width_of, lines)) + 8.0, 15.0 * len(lines) + 4.0
            place = svg.room_for(mask, frame.xs, frame.ys, *size, taken)
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


def _edges_between(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of cells around ascending centres."""
    half = 0.5 * np.diff(centres) if centres.size > 1 else np.array([0.5])
    inner = centres[:-1] + half[: centres.size - 1]
    return np.concatenate([centres[:1] - half[:1], inner, centres[-1:] + half[-1:]])
