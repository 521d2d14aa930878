"""Drawing: SVG elements as text, scales and their ticks, and where a label fits."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy.ndimage import binary_erosion, distance_transform_edt

from lora_capacity.words import shown

FONT_SIZE = 12.0
"""Size of letters in CSS pixels, which the style sheet of figures sets too."""

_LETTER = 0.54
"""Width of a letter of common sans-serif fonts, in font sizes, mean over English text."""

Point = tuple[float, float]


def element(name: str, /, *content: str, **attributes: Any) -> str:
    """Return an element; attributes in Python's spelling (``stroke_width``, ``class_``), None leaves one out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{''.join(content)}</{name}>" if content else f"<{name}{given}/>"


def text(words: str, x: float, y: float, **attributes: Any) -> str:
    """Return a line of text, escaped."""
    return element("text", html.escape(words), x=x, y=y, **attributes)


def path(kind: str, place: str, *content: str, **attributes: Any) -> str:
    """Return a path of a class."""
    return element("path", *content, class_=kind, d=place, **attributes)


def circle(kind: str, x: float, y: float, radius: float) -> str:
    """Return a circle of a class around a point."""
    return element("circle", class_=kind, cx=x, cy=y, r=radius)


def rect(kind: str, x: float, y: float, width: float, height: float, **attributes: Any) -> str:
    """Return a rectangle of a class by its upper left corner."""
    return element("rect", class_=kind, x=x, y=y, width=width, height=height, **attributes)


def ring(x: float, y: float, radius: float) -> str:
    """Return the mark of a recommendation, to be seen on any colour."""
    return circle("ring-back", x, y, radius) + circle("ring", x, y, radius)


def number(value: float) -> str:
    """Return a number with a proper minus sign."""
    return shown(value).replace("-", "−")


def _plain(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def width_of(words: str, size: float = FONT_SIZE) -> float:
    """Return about how wide a line of text is."""
    return _LETTER * size * len(words)


def drawing(width: float, height: float, name: str, description: str, *content: str, **attributes: Any) -> str:
    """Return a whole drawing with its name and description for screen readers."""
    viewbox = f"0 0 {_plain(width)} {_plain(height)}"
    given = {"class_": "fig", "viewBox": viewbox, "role": "img", "aria_label": f"{name}. {description}"}
    return element("svg", element("title", html.escape(name)), *content, **given | attributes)


@dataclass(frozen=True)
class Scale:
    """A map from values to places along an axis.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Place of the lowest value.
        end: Place of the highest.
        log: Whether equal ratios are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return round values within the scale, about ``count`` of them."""
        return _log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten between two values."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) <= count:
            return found
    return found[:: -(-len(found) // count)]


def axis_x(scale: Scale, y: float, title: str, count: int, top: float | None = None) -> str:
    """Return ticks, numbers and title of an axis below; grid lines up to ``top`` if given."""
    parts = []
    for value in scale.ticks(count):
        x = scale(value)
        if top is not None:
            parts.append(path("grid", f"M{_plain(x)} {_plain(top)}V{_plain(y)}"))
        parts.append(path("tick", f"M{_plain(x)} {_plain(y)}v4"))
        parts.append(text(number(value), x, y + 17.0, class_="num", text_anchor="middle"))
    middle = 0.5 * (scale.start + scale.end)
    return "".join(parts) + text(title, middle, y + 35.0, class_="axis", text_anchor="middle")


def axis_y(scale: Scale, x: float, count: int, right: float | None = None) -> str:
    """Return ticks and numbers of an axis to the left; grid lines to ``right`` if given."""
    parts = []
    for value in scale.ticks(count):
        y = scale(value)
        if right is not None:
            parts.append(path("grid", f"M{_plain(x)} {_plain(y)}H{_plain(right)}"))
        parts.append(text(number(value), x - 7.0, y + 4.0, class_="num", text_anchor="end"))
    return "".join(parts)


def line(points: Iterable[Point], **attributes: Any) -> str:
    """Return a line through points; it breaks where one is not finite."""
    places, pen_up = [], True
    for x, y in points:
        if math.isfinite(y):
            places.append(f"{'M' if pen_up else 'L'}{x:.1f} {y:.1f}")
        pen_up = not math.isfinite(y)
    return element("path", d="".join(places), fill="none", **attributes)


def band(kind: str, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """Return the area between two lines."""
    around = [*zip(xs, high, strict=True), *reversed([*zip(xs, low, strict=True)])]
    return path(kind, f"M{'L'.join(f'{x:.1f} {y:.1f}' for x, y in around)}Z")


def hatch(name: str, angle: float, gap: float, kind: str) -> str:
    """Return a pattern of parallel lines, dark beside light to be seen on any colour; refer to it as ``url(#name)``."""
    lines = path(f"{kind} under", f"M0.5 0V{gap:g}") + path(kind, f"M1.5 0V{gap:g}")
    turned = {"patternUnits": "userSpaceOnUse", "patternTransform": f"rotate({angle:g})"}
    return element("pattern", lines, id=name, width=gap, height=gap, **turned)


def outline(mask: Bool[np.ndarray, "rows columns"], xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return the path around cells that are set.

    Args:
        mask: Cells.
        xs: Places of the columns' edges, ``[columns + 1]``.
        ys: Places of the rows' edges, ``[rows + 1]``.
    """
    padded = np.pad(mask, 1)
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]
    parts = [f"M{xs[c]:.1f} {ys[a]:.1f}V{ys[b]:.1f}" for c in range(upright.shape[1]) for a, b in _runs(upright[:, c])]
    parts += [f"M{xs[a]:.1f} {ys[r]:.1f}H{xs[b]:.1f}" for r in range(level.shape[0]) for a, b in _runs(level[r])]
    return "".join(parts)


def filled(mask: Bool[np.ndarray, "rows columns"], xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return the path that covers cells that are set, row by row."""
    return "".join(
        f"M{xs[a]:.1f} {ys[r]:.1f}H{xs[b]:.1f}V{ys[r + 1]:.1f}H{xs[a]:.1f}Z"
        for r in range(mask.shape[0])
        for a, b in _runs(mask[r])
    )


def _runs(flags: Bool[np.ndarray, " cells"]) -> list[tuple[int, int]]:
    """Return first and end of every run of set flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def room_for(
    mask: Bool[np.ndarray, "rows columns"],
    xs: Sequence[float],
    ys: Sequence[float],
    width: float,
    height: float,
    taken: Sequence[tuple[float, float, float, float]] = (),
) -> Point | None:
    """Return the middle of the place where a label fits best within cells that are set, None if nowhere.

    Args:
        mask: Cells.
        xs: Places of the columns' edges.
        ys: Places of the rows' edges.
        width: Of the label.
        height: Of the label.
        taken: Boxes (left, top, right, bottom) to keep off.
    """
    pixel = 3.0  # finer than any letter, and the search stays quick
    left, top = min(xs), min(ys)
    across = np.arange(left + 0.5 * pixel, max(xs), pixel)
    down = np.arange(top + 0.5 * pixel, max(ys), pixel)
    columns = np.searchsorted(np.asarray(xs), across, side="right") - 1
    ascending = np.asarray(ys)[::-1]
    rows = mask.shape[0] - 1 - (np.searchsorted(ascending, down, side="right") - 1)
    free = mask[np.clip(rows, 0, mask.shape[0] - 1)[:, None], np.clip(columns, 0, mask.shape[1] - 1)[None, :]].copy()
    for a, b, c, d in taken:
        free[(down >= b)[:, None] & (down <= d)[:, None] & (across >= a)[None, :] & (across <= c)[None, :]] = False
    box = np.ones((max(1, round(height / pixel)), max(1, round(width / pixel))), dtype=bool)
    fits = binary_erosion(np.pad(free, 1), box)[1:-1, 1:-1]
    if not fits.any():
        return None
    distance = np.where(fits, distance_transform_edt(np.pad(free, 1), sampling=(width / height, 1.0))[1:-1, 1:-1], -1.0)
    row, column = np.unravel_index(int(np.argmax(distance)), distance.shape)
    return float(across[column]), float(down[row])


def notes(
    wanted: Iterable[tuple[str, Point, tuple[float, float]]],
    lines: Sequence[Sequence[Point]],
    marks: Iterable[Point],
    within: tuple[float, float, float, float],
) -> str:
    """Return short texts, each as near to where it is wanted as it fits off lines, marks and other texts.

    Args:
        wanted: Words, the middle of the place where they are wanted, and left and right of where they may be; what fits
            nowhere is left out.
        lines: Points of each line, ascending in x; it breaks where one is not finite.
        marks: Middles of marks on them.
        within: Left, top, right and bottom.
    """
    left, top, right, bottom = within
    step, height = 4.0, 13.0
    across, down = np.arange(left, right, step), np.arange(top, bottom, step)
    taken = np.zeros((down.size, across.size), dtype=bool)
    for points in lines:
        xs, ys = np.array(points, np.float64).T
        # A steep line takes all heights between two columns; what is not finite takes none.
        here, beyond = np.interp(across, xs, ys), np.interp(across + step, xs, ys)
        low, high = np.minimum(here, beyond), np.maximum(here, beyond)
        taken |= (down[:, None] >= low - step) & (down[:, None] <= high + step)
    for x, y in marks:
        taken |= (np.abs(across[None, :] - x) < 2.0 * step) & (np.abs(down[:, None] - y) < 2.0 * step)
    drawn = []
    for words, (x, y), (first, last) in wanted:
        wide = width_of(words, 11.0) + 4.0
        box = np.ones((round(height / step), max(1, round(wide / step))), dtype=bool)
        fits = binary_erosion(np.pad(~taken, 1), box)[1:-1, 1:-1]
        fits &= (across >= first + 0.5 * wide) & (across <= last - 0.5 * wide)
        if not fits.any():
            continue
        # Upwards a text soon belongs to something else.
        far = (across[None, :] - x) ** 2 + 4.0 * (down[:, None] - y) ** 2
        row, column = np.unravel_index(int(np.argmin(np.where(fits, far, np.inf))), fits.shape)
        drawn.append(text(words, float(across[column]), float(down[row]) + 4.0, class_="note", text_anchor="middle"))
        half = box.shape[1] // 2 + 1
        taken[max(row - 2, 0) : row + 3, max(column - half, 0) : column + half + 1] = True
    return "".join(drawn)
