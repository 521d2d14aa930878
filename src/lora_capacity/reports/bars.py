"""Rows with marks: where memory goes, the service of adapters of each rate, and what small changes would do."""

import math

from lora_capacity.reports import svg
from lora_capacity.reports.data import ClassService, MemoryShare
from lora_capacity.reports.sensitivity import Change
from lora_capacity.units import BYTES_PER_GIB
from lora_capacity.words import gibibytes, percent, plural, shown

WIDTH = 460.0
"""Width of the drawing in CSS pixels, two of which stand side by side on the page."""

_TOP, _ROW, _BELOW = 22.0, 24.0, 42.0
"""Room above the rows, height of a row, and room for the numbers and the title of the axis below."""

_LABELS = 212.0
"""Place where the longest name of a class ends."""


def class_words(each: ClassService) -> str:
    """Return which adapters these are."""
    return f"{plural(each.adapters, 'adapter')} at {shown(each.rate_per_s)}/s, {rank_words(each)}"


def rank_words(each: ClassService) -> str:
    """Return the ranks of a class: the one that all have, or from which to which."""
    ranks = [rank for rank, _ in each.ranks]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def memory_figure(memory: MemoryShare) -> str:
    """Return where the memory of a GPU goes, each part beginning where the one above it ends."""
    parts = memory.parts
    bottom = _TOP + _ROW * len(parts)
    across = svg.Scale(0.0, memory.total_bytes / BYTES_PER_GIB, 0.4 * WIDTH, WIDTH - 14.0)
    limit, share = across(memory.limit_bytes / BYTES_PER_GIB), memory.limit_bytes / memory.total_bytes
    drawn = [
        svg.axis_x(across, bottom, "GiB of one GPU", 6, _TOP),
        svg.path("limit", f"M{limit:.1f} {_TOP - 2.0:.1f}V{bottom:.1f}"),
        svg.text(f"vLLM may use {percent(share)}", limit - 4.0, _TOP - 8.0, class_="note", text_anchor="end"),
    ]
    end = 0.0
    for i, (words, size) in enumerate(parts.items()):
        y, start = _TOP + _ROW * (i + 0.5), end
        end = start + max(size, 0.0) / BYTES_PER_GIB
        left, right, told = across(start), across(end), gibibytes(size)
        # Beside the bar where there is room, else before it.
        x, anchor = (right + 5.0, "start") if right + svg.width_of(told, 11.0) + 8.0 < WIDTH else (left - 5.0, "end")
        drawn += [
            svg.text(words, across.start - 10.0, y + 4.0, class_="row", text_anchor="end"),
            svg.rect("bar better", left, y - 6.0, max(right - left, 0.6), 12.0, rx=1.5),
            svg.text(told, x, y + 4.0, class_="num label", text_anchor=anchor),
        ]
    told = ", ".join(f"{words} {gibibytes(size)}" for words, size in parts.items())
    return svg.drawing(WIDTH, bottom + _BELOW, "Memory of a GPU", f"Of {gibibytes(memory.total_bytes)}: {told}", *drawn)


def service_figure(classes: tuple[ClassService, ...], threshold: float) -> str:
    """Return the share of requests served of adapters of each rate and rank, now and at the load at which it fails."""
    shares = [share for each in classes for share in (each.service, each.service_beyond) if math.isfinite(share)]
    # From the next lower tenth, at most 80 %, so that small differences show.
    low = min(max(math.floor(10.0 * (min(shares, default=0.0) - 0.02)) / 10.0, 0.0), 0.8)
    across = svg.Scale(100.0 * low, 100.0, _LABELS, WIDTH - 14.0)
    bottom = _TOP + _ROW * len(classes)
    parts = [svg.axis_x(across, bottom, "share of requests served, %", 5, _TOP)]
    if 1.0 - threshold >= low:
        needed = across(100.0 * (1.0 - threshold))
        parts.append(svg.rect("wash", _LABELS, _TOP, needed - _LABELS, bottom - _TOP))
        parts.append(svg.text("starved", needed - 5.0, _TOP - 6.0, class_="note", text_anchor="end"))
    for i, each in enumerate(classes):
        y = _TOP + _ROW * (i + 0.5)
        parts.append(svg.text(class_words(each), _LABELS - 10.0, y + 4.0, class_="row", text_anchor="end"))
        if not math.isfinite(each.service):
            continue
        here, beyond = across(100.0 * each.service), across(100.0 * each.service_beyond)
        told = f"{class_words(each)}: {percent(each.service)}, at saturation {percent(each.service_beyond)}"
        marks = svg.path("link", f"M{beyond:.1f} {y:.1f}H{here:.1f}") + svg.circle("hollow", beyond, y, 4.0)
        parts.append(svg.element("g", svg.element("title", told), marks, svg.circle("dot", here, y, 4.5)))
    worst = min(classes, key=lambda each: each.service, default=None)
    told_worst = f"Worst served: {class_words(worst)}, {percent(worst.service)}" if worst else "No adapters"
    return svg.drawing(WIDTH, bottom + _BELOW, "Share served by adapter", told_worst, *parts)


def change_figure(changes: tuple[Change, ...], critical_load: float) -> str:
    """Return what each change does to the load at which the server fails."""
    told = sorted((each for each in changes if math.isfinite(each.margin)), key=lambda each: each.margin)
    bottom = _TOP + _ROW * len(told)
    left, right = WIDTH * 0.49, WIDTH - 14.0
    margins = [100.0 * each.margin for each in told] or [0.0]
    low, high = min(*margins, 0.0), max(margins)
    pad = 0.28 * max(high - low, 1.0)  # room for the numbers beside the bars
    across = svg.Scale(low - pad, max(high, 0.0) + pad, left, right)
    zero = across(0.0)
    parts = [
        svg.axis_x(across, bottom, "change of the headroom, points", 5, _TOP),
        svg.path("zero", f"M{zero:.1f} {_TOP:.0f}V{bottom:.1f}"),
    ]
    for i, each in enumerate(told):
        y, x = _TOP + _ROW * (i + 0.5), across(100.0 * each.margin)
        kind, outside, anchor = ("worse", -6.0, "end") if each.margin < 0 else ("better", 6.0, "start")
        parts += [
            svg.text(each.words, left - 10.0, y + 4.0, class_="row", text_anchor="end"),
            svg.rect(f"bar {kind}", min(x, zero), y - 6.0, max(abs(x - zero), 0.6), 12.0, rx=1.5),
            svg.text(points(each.margin), x + outside, y + 4.0, class_="num", text_anchor=anchor),
        ]
    title = f"Points of headroom; saturates at {shown(critical_load)}× this load"
    return svg.drawing(WIDTH, bottom + _BELOW, "What small changes would do", title, *parts)


def points(share: float) -> str:
    """Return a difference of margins in points, with its sign."""
    value = 100.0 * share
    if not math.isfinite(value):
        return "does not start"
    return "0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")
