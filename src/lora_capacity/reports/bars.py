"""Rows with marks: how adapters of each rate and rank fare, and what small changes would do."""

import math

from lora_capacity.reports import svg
from lora_capacity.reports.data import ClassService
from lora_capacity.reports.sensitivity import Change
from lora_capacity.words import percent, plural, shown

WIDTH = 460.0
_ROW = 24.0
_LABELS = 212.0


def class_words(each: ClassService) -> str:
    """Return which adapters these are."""
    return f"{plural(each.adapters, 'adapter')} at {shown(each.rate_per_s)}/s, rank {each.rank:.0f}"


def service_figure(classes: tuple[ClassService, ...], threshold: float) -> str:
    """Return the share of requests served of adapters of each rate and rank, now and at the load that starves."""
    height = 64.0 + _ROW * len(classes)
    lowest = min(
        (value for each in classes for value in (each.service, each.service_beyond) if math.isfinite(value)),
        default=0.0,
    )
    low = min(max(math.floor(10.0 * (lowest - 0.02)) / 10.0, 0.0), 0.8)
    across = svg.Scale(100.0 * low, 100.0, _LABELS, WIDTH - 14.0)
    bottom = 22.0 + _ROW * len(classes)
    needed = across(100.0 * (1.0 - threshold)) if 1.0 - threshold >= low else None
    parts = [svg.axis_x(across, bottom, "share of requests served, %", 5, 22.0)]
    if needed is not None:
        parts.append(
            svg.element("rect", class_="wash", x=_LABELS, y=22.0, width=needed - _LABELS, height=bottom - 22.0)
        )
        parts.append(svg.text("starved", needed - 5.0, 16.0, class_="note", text_anchor="end"))
    for i, each in enumerate(classes):
        y = 22.0 + _ROW * (i + 0.5)
        parts.append(svg.text(class_words(each), _LABELS - 10.0, y + 4.0, class_="row", text_anchor="end"))
        if not math.isfinite(each.service):
            continue
        here, beyond = across(100.0 * each.service), across(100.0 * each.service_beyond)
        told = svg.element(
            "title", f"{class_words(each)}: {percent(each.service)}, starving {percent(each.service_beyond)}"
        )
        link = svg.element("path", class_="link", d=f"M{beyond:.1f} {y:.1f}H{here:.1f}")
        marks = svg.element("circle", class_="hollow", cx=beyond, cy=y, r=4.0) + svg.element(
            "circle", class_="dot", cx=here, cy=y, r=4.5
        )
        parts.append(svg.element("g", told, link, marks))
    worst = min(classes, key=lambda each: each.service, default=None)
    told_worst = f"Worst served: {class_words(worst)}, {percent(worst.service)}" if worst else "No adapters"
    return svg.drawing(WIDTH, height, "Who is served", told_worst, *parts)


def change_figure(changes: tuple[Change, ...], critical_load: float) -> str:
    """Return what each change does to the load at which the server starves."""
    told = [each for each in changes if math.isfinite(each.margin)]
    height = 64.0 + _ROW * len(told)
    bottom = 22.0 + _ROW * len(told)
    left, right = WIDTH * 0.49, WIDTH - 14.0
    low = min((100.0 * each.margin for each in told), default=0.0)
    high = max((100.0 * each.margin for each in told), default=0.0)
    pad = 0.2 * max(high - min(low, 0.0), 1.0)
    across = svg.Scale(min(low, 0.0) - pad, max(high, 0.0) + pad, left, right)
    zero = across(0.0)
    title = f"Points of margin; it starves at {shown(critical_load)} times the load now"
    parts = [svg.axis_x(across, bottom, "change of the margin to starvation, points", 5, 22.0)]
    parts.append(svg.element("path", class_="zero", d=f"M{zero:.1f} 22V{bottom:.1f}"))
    for i, each in enumerate(sorted(told, key=lambda each: each.margin)):
        y = 22.0 + _ROW * (i + 0.5)
        x = across(100.0 * each.margin)
        parts.append(svg.text(each.words, left - 10.0, y + 4.0, class_="row", text_anchor="end"))
        kind = "bar worse" if each.margin < 0 else "bar better"
        parts.append(
            svg.element(
                "rect", class_=kind, x=min(x, zero), y=y - 6.0, width=max(abs(x - zero), 0.6), height=12.0, rx=1.5
            )
        )
        outside = x + 6.0 if each.margin >= 0 else x - 6.0
        anchor = "start" if each.margin >= 0 else "end"
        parts.append(svg.text(points(each.margin), outside, y + 4.0, class_="num", text_anchor=anchor))
    return svg.drawing(WIDTH, height, "What small changes would do", title, *parts)


def points(share: float) -> str:
    """Return a difference of shares in points, with its sign."""
    value = 100.0 * share
    return "0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")
