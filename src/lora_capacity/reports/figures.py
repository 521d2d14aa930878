"""Every figure of a report, as drawings for the page and as documents that stand alone."""

from typing import TYPE_CHECKING

from lora_capacity.reports.bars import change_figure, service_figure
from lora_capacity.reports.curves import QUANTITIES, panel
from lora_capacity.reports.heatmap import METRICS, bound_map, heat_map
from lora_capacity.reports.style import figure_css, palette_css

if TYPE_CHECKING:
    from lora_capacity.reports.report import Report

WIDE = (660.0, 450.0)
NARROW = (350.0, 360.0)
BOUNDS = (420.0, 380.0)


def panels(report: "Report") -> dict[str, str]:
    """Return the drawings of every quantity against the number of adapters, by its column."""
    best, risk = report.found.best, report.found.risk
    return {
        quantity.key: panel(report.curve, quantity, best.max_cpu_loras, best.max_loras, risk) for quantity in QUANTITIES
    }


def all_figures(report: "Report") -> dict[str, str]:
    """Return every figure as an SVG document in light colours, by name."""
    land = report.landscape
    drawings = {f"map-{metric.key}": heat_map(land, metric, metric.key, *WIDE) for metric in METRICS}
    drawings |= {f"adapters-{key}": drawn for key, drawn in panels(report).items()}
    drawings["bounds"] = bound_map(land, *BOUNDS)
    drawings["service"] = service_figure(report.classes, report.found.threshold)
    drawings["changes"] = change_figure(report.changes, report.found.best.critical_load)
    return {name: stand_alone(drawn) for name, drawn in drawings.items()}


def stand_alone(drawing: str) -> str:
    """Return a drawing as a document of its own, with the colours that it refers to."""
    style = f"<style>{palette_css('svg')}{figure_css()}</style>"
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = opened.index(">") + 1
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{opened[:start]}{style}{opened[start:]}\n'
