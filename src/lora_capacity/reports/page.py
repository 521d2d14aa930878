"""The report as one HTML page: everything it needs is inside it."""

import json
import math
from typing import Any

import jinja2
import numpy as np

from lora_capacity.reports import figures, tables
from lora_capacity.reports.bars import change_figure, memory_figure, points, rank_words, service_figure
from lora_capacity.reports.data import ReportData
from lora_capacity.reports.heatmap import BOTTLENECKS, bottleneck_map, heat_map, legend_ticks, map_bounds, swatches
from lora_capacity.reports.plan_grid import PlanGrid
from lora_capacity.reports.quantities import MAPPED
from lora_capacity.reports.style import page_css, resource
from lora_capacity.text import printable_lines
from lora_capacity.units import MS_PER_S
from lora_capacity.words import REFUSALS, bottleneck, duration, gibibytes, percent, plural, shown, spoken

_REMEDIES = {
    "none": "No queue builds up: only more adapters bring more throughput.",
    "slots": "More active adapters than slots. Use more slots or fewer adapters.",
    "sequences": "As many requests run as max_num_seqs allows. A larger max_num_seqs helps, but raises latency.",
    "kv_cache": "The KV cache is full. Use fewer slots, a lower max_lora_rank or more GPU memory.",
    "token_budget": "Every step is full (max_num_batched_tokens). A larger token budget helps.",
    **{label: f"{sentence[0].upper()}{sentence[1:]}." for label, sentence in REFUSALS.items()},
}
"""What to do about each bottleneck."""

_WORST, _MOST = 12, 300
"""Adapters that are shown at once, and that are listed by name in all."""

_FILTERS = {
    **{each.__name__: each for each in (bottleneck, duration, gibibytes, percent, plural, points, shown, spoken)},
    "rank": rank_words,
    "lengths": tables.length_words,
    "provenance": tables.provenance_words,
    "signed": tables.signed,
}
"""Words for what the page tells."""


def page(report: ReportData, title: str, note: str) -> str:
    """Return the report as one HTML document.

    Args:
        report: What to tell.
        title: Its heading, for the window and the top line.
        note: Where and when it was made.
    """
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(resource),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable_lines(value) if type(value) is str else value,  # not what is markup already
    )
    templates.filters |= _FILTERS
    found, grid, calibration = report.found, report.grid, report.calibration
    column, row = grid.best
    panels = figures.drawn_panels(report)
    return templates.get_template("page.html").render(
        vars(report),
        title=title,
        note=note,
        css=page_css(),
        script=resource("page.js"),
        data=_data(report),
        best=found.best,
        command=found.serve_command,
        tokens_per_request=report.workload.mean_input_tokens + report.workload.mean_output_tokens,
        between=lambda key: _between(report, key),
        metrics=MAPPED,
        maps={
            "wide": heat_map(grid, MAPPED[0], "wide", *figures.WIDE),
            "narrow": heat_map(grid, MAPPED[0], "narrow", *figures.NARROW),
        },
        swatches=swatches(grid),
        verdict=_verdict(grid, row, column),
        readout=[(metric, metric.tell(float(grid.values[metric.key][row, column]))) for metric in MAPPED],
        panels={
            group: [drawn for key, drawn in panels.items() if key.startswith(group)] for group in ("adapters", "load")
        },
        drawings={
            "bottlenecks": bottleneck_map(grid, *figures.BOTTLENECKS),
            "memory": memory_figure(report.memory),
            "service": service_figure(report.classes, found.threshold),
            "changes": change_figure(report.changes, found.best.critical_load),
        },
        remedies=_remedies(grid),
        map_table=tables.map_table(grid),
        curve_rows=tables.curve_rows(report.curve),
        check_rows=tables.check_rows(report.load, found),
        quantile_rows=tables.quantile_rows(report.load, found),
        worst=report.adapters[:_WORST],
        others=report.adapters[_WORST:_MOST],
        left_out=max(len(report.adapters) - _MOST, 0),
        load_names=["times this load", *(each.name for each in tables.LOAD_COLUMNS)],
        load_rows=tables.load_rows(report.load),
        coefficients=calibration.to_json()["coefficients"],
        adapters=tables.adapter_words(report.workload),
        ranges="; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in calibration.fitted_ranges.items()),
        errors=tables.error_words(calibration),
        MS_PER_S=MS_PER_S,
    )


def _between(report: ReportData, key: str) -> str:
    """Return the interval of a quantity at the recommendation, empty if there is none.

    It is the steady twin's, whose ends lie as far from what is told, in proportion, as from its own prediction.
    """
    curve, found = report.curve, report.found
    at = int(np.searchsorted(curve.adapters, found.best.max_cpu_loras))
    factor = getattr(found.told, key) / float(curve.values[key][at])
    ends = [factor * float(each[key][at]) for each in (curve.low, curve.high)]
    tell = shown if key == "throughput_tokens_per_s" else duration
    return f"90 %: {tell(ends[0])} to {tell(ends[1])}" if all(map(math.isfinite, ends)) else ""


def _verdict(grid: PlanGrid, row: int, column: int) -> str:
    verdict, bound = grid.verdict[row, column], grid.bottleneck[row, column]
    if verdict == "impossible":
        return ""
    words = "recommended" if (column, row) == grid.best else spoken(verdict)
    return words if bound in ("none", verdict) else f"{words}; bottleneck: {spoken(bound)}"


def _remedies(grid: PlanGrid) -> list[tuple[str, str, int, str]]:
    """Return colour, name, share of the map in percent and remedy of each bottleneck that there is."""
    drawn = int(np.sum(grid.verdict != "impossible"))
    counts = {label: int(np.sum(grid.bottleneck == label)) for label in BOTTLENECKS}
    return [
        (
            "b-dead" if label in REFUSALS else f"b-{label}",
            spoken(label)[0].upper() + spoken(label)[1:],
            max(round(100 * count / drawn), 1),
            _REMEDIES[label],
        )
        for label, count in counts.items()
        if count
    ]


def _data(report: ReportData) -> str:
    """Return what the script needs as JSON; values are told here, once, so that the script only looks them up."""
    grid = report.grid
    cells = [(r, c) for r in range(grid.slots.size) for c in range(grid.adapters.size)]
    content: dict[str, Any] = {
        "adapters": [f"{count:,}" for count in grid.adapters.tolist()],
        "slots": [f"{count:,}" for count in grid.slots.tolist()],
        "best": grid.best[1] * grid.adapters.size + grid.best[0],
        "verdicts": [_verdict(grid, *cell) for cell in cells],
        "metrics": [
            {
                "key": metric.key,
                "title": f"{metric.name}, {metric.unit}",
                "codes": "".join(
                    "." if code < 0 else np.base_repr(code, 36).lower()
                    for code in metric.codes(grid.values[metric.key]).ravel().tolist()
                ),
                "text": [metric.tell(float(grid.values[metric.key][cell])) for cell in cells],
                "bound": map_bounds(metric, grid, report.found, (figures.WIDE, figures.NARROW)),
                "ticks": [legend_ticks(metric, grid, width) for width, _ in (figures.WIDE, figures.NARROW)],
            }
            for metric in MAPPED
        ],
        "panels": {
            key: {
                "places": each.places(),
                "at": [f"A {at:,.0f}" if each.group == "adapters" else f"{at:.2f}×" for at in each.at.tolist()],
                "text": [each.quantity.tell(float(value)) for value in each.values[each.quantity.key]],
            }
            for key, each in figures.panels(report).items()
        },
    }
    # "</" would end the script element that this stands in.
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
