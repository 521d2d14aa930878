"""Every figure of a report, as drawings for the page and as documents that stand alone."""

import re

from lora_capacity.reports.bars import change_figure, memory_figure, service_figure
from lora_capacity.reports.curves import Panel, adapter_panels, load_panels
from lora_capacity.reports.data import ReportData
from lora_capacity.reports.heatmap import bottleneck_map, heat_map
from lora_capacity.reports.quantities import MAPPED
from lora_capacity.reports.style import figure_css, palette_css
from lora_capacity.words import plural

_VIEWBOX = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
_MARGIN = 14.0
"""Room between a drawing and the edge of a ground of its own."""

WIDE, NARROW, BOTTLENECKS = (660.0, 450.0), (350.0, 360.0), (420.0, 380.0)
"""Width and height of the map on a desk, of the map on a phone, and of the map of bottlenecks beside a text."""


def panels(report: ReportData) -> dict[str, Panel]:
    """Return every quantity against the number of adapters and against the load, by the panel's key."""
    every = [*adapter_panels(report.curve, report.found), *load_panels(report.load, report.found)]
    return {each.key: each for each in every}


def drawn_panels(report: ReportData) -> dict[str, str]:
    """Return the drawings of all panels, by key."""
    best = report.found.best
    common = {
        "adapters": f"with {plural(best.max_loras, 'slot')}",
        "load": f"with {plural(best.max_cpu_loras, 'adapter')} and {plural(best.max_loras, 'slot')}",
    }
    return {key: each.draw(common[each.group]) for key, each in panels(report).items()}


def all_figures(report: ReportData) -> dict[str, str]:
    """Return every figure as an SVG document in light colours, by name."""
    drawings = {f"map-{each.key}": heat_map(report.grid, each, each.key, *WIDE) for each in MAPPED}
    found = report.found
    drawings |= drawn_panels(report)
    drawings["bounds"] = bottleneck_map(report.grid, *BOTTLENECKS)
    drawings["memory"] = memory_figure(report.memory)
    drawings["service"] = service_figure(report.classes, found.threshold)
    drawings["changes"] = change_figure(report.changes, found.best.critical_load)
    return {name: stand_alone(drawn) for name, drawn in drawings.items()}


def stand_alone(drawing: str, *, dark: bool = False) -> str:
    """Return a drawing as a document of its own, with the colours that it refers to.

    Args:
        drawing: The drawing.
        dark: Whether it is dark where the reader has it so, on a ground of its own; else light, for papers.
    """
    colours = palette_css("svg")
    if dark:
        colours += f"@media (prefers-color-scheme:dark){{{palette_css('svg', dark=True)}}}svg{{background:var(--page)}}"
        drawing = _VIEWBOX.sub(_with_margin, drawing, count=1)
    style = f"<style>{colours}{figure_css()}</style>"
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = opened.index(">") + 1
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{opened[:start]}{style}{opened[start:]}\n'


def _with_margin(found: re.Match[str]) -> str:
    width, height = (float(size) + 2.0 * _MARGIN for size in found.groups())
    return f'viewBox="{-_MARGIN:g} {-_MARGIN:g} {width:g} {height:g}"'
