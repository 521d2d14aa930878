"""Predictions against the number of adapters at the recommended number of slots, with 90 % intervals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_capacity.reports import svg
from lora_capacity.reports.plan_grid import Curve
from lora_capacity.units import MS_PER_S
from lora_capacity.words import shown

WIDTH, HEIGHT = 420.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 30.0, 44.0


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        key: Name of its column.
        name: What it is called.
        unit: Unit of the axis.
        scale: Factor from the column to the axis.
        log: Whether the axis is logarithmic.
        beside: Column drawn beside it, if any, and what that is called.
    """

    key: str
    name: str
    unit: str
    scale: float = 1.0
    log: bool = False
    beside: tuple[str, str] | None = None


QUANTITIES = (
    Quantity("throughput_tokens_per_s", "Throughput", "tokens/s", beside=("offered_tokens_per_s", "offered load")),
    Quantity("itl_s", "Inter-token latency", "ms", scale=MS_PER_S),
    Quantity("ttft_s", "Time to first token", "s", log=True),
    Quantity("starving_probability", "Chance of starving", "%", scale=100.0),
)


def panel(curve: Curve, quantity: Quantity, best: int, slots: int, risk: float) -> str:
    """Return the drawing of one quantity against the number of adapters.

    Args:
        curve: The predictions.
        quantity: What to draw.
        best: Recommended number of adapters.
        slots: Number of slots, for the description.
        risk: Accepted chance of starving, drawn where that is shown.
    """
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    across = svg.Scale(float(curve.adapters[0]), float(curve.adapters[-1]), _LEFT, right)
    xs = [across(float(count)) for count in curve.adapters]
    values = _axis_values(curve.values[quantity.key], quantity)
    up = _scale_up(curve, quantity, bottom)
    parts = [_starved(curve, xs, bottom), svg.axis_y(up, _LEFT, 5, right)]
    parts.append(svg.axis_x(across, bottom, "adapters A", 6))
    if quantity.key in curve.low:
        low, high = (_axis_values(ends[quantity.key], quantity) for ends in (curve.low, curve.high))
        parts.append(_band(xs, low, high, up))
    if quantity.beside is not None:
        parts.append(_beside(curve, quantity, xs, up))
    if quantity.key == "starving_probability":
        y = up(risk * quantity.scale)
        parts.append(svg.line([(_LEFT, y), (right, y)], class_="beside"))
        parts.append(svg.text(f"accepted: {shown(risk * 100)} %", _LEFT + 6.0, y - 6.0, class_="note"))
    places = [up(value) if np.isfinite(value) else float("nan") for value in values]
    parts.append(svg.line(zip(xs, places, strict=True), class_="curve"))
    parts.append(_mark(across(float(best)), up(float(values[np.searchsorted(curve.adapters, best)])), bottom))
    parts.append(svg.text(f"{quantity.name}, {quantity.unit}", 0.0, 13.0, class_="axis strong"))
    parts.append(
        svg.element(
            "g", svg.element("path", class_="hair", d=""), svg.element("circle", r=3.5, class_="dot"), class_="hover"
        )
    )
    return svg.drawing(
        WIDTH,
        HEIGHT,
        f"{quantity.name} against the number of adapters, with {slots} slots",
        _describe(curve, quantity, best),
        *parts,
        class_="fig panel",
        data_key=quantity.key,
    )


def places(curve: Curve, quantity: Quantity) -> list[list[float]]:
    """Return the places of the points in the drawing, for what follows a pointer: x and y, null where not drawn."""
    across = svg.Scale(float(curve.adapters[0]), float(curve.adapters[-1]), _LEFT, WIDTH - _RIGHT)
    up = _scale_up(curve, quantity, HEIGHT - _BOTTOM)
    values = _axis_values(curve.values[quantity.key], quantity)
    return [
        [round(across(float(count)), 1), round(up(float(value)), 1) if np.isfinite(value) else -1.0]
        for count, value in zip(curve.adapters, values, strict=True)
    ]


def _axis_values(column: NDArray[np.float64], quantity: Quantity) -> NDArray[np.float64]:
    values = np.asarray(column, np.float64) * quantity.scale
    return np.maximum(values, 1e-3) if quantity.log else values


def _scale_up(curve: Curve, quantity: Quantity, bottom: float) -> svg.Scale:
    columns = [curve.values[quantity.key]]
    columns += [ends[quantity.key] for ends in (curve.low, curve.high) if quantity.key in ends]
    if quantity.beside is not None:
        columns.append(curve.values[quantity.beside[0]])
    every = np.concatenate([_axis_values(column, quantity) for column in columns])
    finite = every[np.isfinite(every)]
    if not finite.size:
        finite = np.array([0.0, 1.0])
    if quantity.log:
        low, high = float(finite.min()), float(finite.max())
        return svg.Scale(low / 1.2, max(high, low * 10.0) * 1.2, bottom, _TOP, log=True)
    return svg.Scale(0.0, max(float(finite.max()) * 1.06, 1e-9), bottom, _TOP)


def _starved(curve: Curve, xs: list[float], bottom: float) -> str:
    """Return a wash over the numbers of adapters that starve."""
    starved = np.flatnonzero(curve.verdict == "starved")
    if not starved.size:
        return ""
    first, last = int(starved[0]), int(starved[-1])
    left = 0.5 * (xs[first - 1] + xs[first]) if first else xs[0]
    label = svg.text("starved", xs[last] - 6.0, 0.4 * _TOP + 0.6 * bottom, class_="note", text_anchor="end")
    room = xs[last] - left > svg.width_of("starved") + 10.0
    wash = svg.element("rect", class_="wash", x=left, y=_TOP, width=xs[last] - left, height=bottom - _TOP)
    return wash + (label if room else "")


def _band(xs: list[float], low: NDArray[np.float64], high: NDArray[np.float64], up: svg.Scale) -> str:
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    chosen = [xs[i] for i in known]
    return svg.band(chosen, [up(float(low[i])) for i in known], [up(float(high[i])) for i in known], class_="band")


def _beside(curve: Curve, quantity: Quantity, xs: list[float], up: svg.Scale) -> str:
    column, words = quantity.beside or ("", "")
    ys = [up(float(value) * quantity.scale) for value in curve.values[column]]
    middle = len(xs) // 2
    label = svg.text(words, xs[middle] - 6.0, ys[middle] - 6.0, class_="note", text_anchor="end")
    return svg.line(zip(xs, ys, strict=True), class_="beside") + label


def _mark(x: float, y: float, bottom: float) -> str:
    return svg.element(
        "g",
        svg.element("path", class_="stem", d=f"M{x:.1f} {_TOP:.1f}V{bottom:.1f}"),
        svg.element("circle", class_="ring-back", cx=x, cy=y, r=5.5),
        svg.element("circle", class_="ring", cx=x, cy=y, r=5.5),
        class_="optimum",
    )


def _describe(curve: Curve, quantity: Quantity, best: int) -> str:
    values = _axis_values(curve.values[quantity.key], quantity)
    at = float(values[np.searchsorted(curve.adapters, best)])
    told = f"{shown(at)} {quantity.unit} at the recommended {best} adapters"
    if quantity.key in curve.low:
        place = np.searchsorted(curve.adapters, best)
        ends = [float(_axis_values(each[quantity.key], quantity)[place]) for each in (curve.low, curve.high)]
        told += f", 90 % interval {shown(ends[0])} to {shown(ends[1])}"
    first, last = (f"{shown(float(values[i]))} at {curve.adapters[i]}" for i in (0, -1))
    return f"{told}; {first} and {last}"
