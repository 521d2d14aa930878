"""The report as one HTML page: everything it needs is inside it."""

import json
import math
from typing import Any

import jinja2
import numpy as np

from lora_capacity.reports import figures, tables
from lora_capacity.reports.bars import change_figure, service_figure
from lora_capacity.reports.data import ReportData
from lora_capacity.reports.heatmap import BOTTLENECKS, bottleneck_map, codes, heat_map, legend_ticks
from lora_capacity.reports.plan_grid import PlanGrid
from lora_capacity.reports.quantities import MAPPED
from lora_capacity.reports.style import page_css, resource
from lora_capacity.words import REFUSALS, bottleneck, duration, gibibytes, percent, plural, shown, spoken

_REMEDIES = {
    "none": "No queue stands for long: only more adapters bring more throughput.",
    "slots": "More adapters want to run than there are slots. More slots, or fewer adapters, help.",
    "sequences": "As many requests run as max_num_seqs allows. A larger max_num_seqs helps, at the price of latency.",
    "kv_cache": "The KV cache is full. Fewer slots, a lower max_lora_rank or more GPU memory make room.",
    "token_budget": "Every step carries max_num_batched_tokens. A larger budget helps.",
    **{label: f"{sentence[0].upper()}{sentence[1:]}." for label, sentence in REFUSALS.items()},
}
"""What to do about each bottleneck."""


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
    )
    templates.filters |= {"percent": percent, "plural": plural, "shown": shown}
    found, grid = report.found, report.grid
    column, row = grid.best
    return templates.get_template("page.html").render(
        title=title,
        note=note,
        css=page_css(),
        script=resource("page.js"),
        data=_data(report),
        found=found,
        best=found.best,
        command=found.server.serve_command(found.model),
        lead=_lead(report),
        key_figures=_key_figures(report),
        metrics=MAPPED,
        maps={
            "wide": heat_map(grid, MAPPED[0], "wide", *figures.WIDE),
            "narrow": heat_map(grid, MAPPED[0], "narrow", *figures.NARROW),
        },
        verdict=_verdict(grid, row, column),
        readout=[(metric, metric.tell(float(grid.values[metric.key][row, column]))) for metric in MAPPED],
        panels=[each.draw(found.best.max_loras, found.risk) for each in figures.panels(report).values()],
        bottlenecks=bottleneck_map(grid, *figures.BOTTLENECKS),
        remedies=_remedies(grid),
        service=service_figure(report.classes, found.threshold),
        changes=change_figure(report.changes, found.best.critical_load),
        tables={
            "map": tables.map_table(grid),
            "curve": tables.curve_table(report.curve),
            "classes": tables.class_table(report.classes),
            "changes": tables.change_table(report.changes),
            "runners_up": tables.runner_up_table(found),
            "coefficients": tables.coefficient_table(report.calibration),
        },
        workload=tables.workload_facts(report.workload),
        calibration=tables.calibration_facts(report.calibration),
    )


def _lead(report: ReportData) -> str:
    found, best = report.found, report.found.best
    beyond = f"; its bottleneck is then {bottleneck(best.limit_beyond)}" if best.limit_beyond else ""
    return (
        f"One server of {found.model} ({report.calibration.gpu.name}, vLLM {report.calibration.vllm_version}) is "
        f"predicted to complete {percent(best.throughput_tokens_per_s / best.offered_tokens_per_s)} of this load. It "
        f"starves at {shown(best.critical_load)} times the load{beyond}."
    )


def _key_figures(report: ReportData) -> list[tuple[str, str, str, str]]:
    """Return name, number, unit and a remark of each."""
    best, curve = report.found.best, report.curve
    at = int(np.searchsorted(curve.adapters, best.max_cpu_loras))

    def between(key: str) -> str:
        ends = [float(each[key][at]) for each in (curve.low, curve.high)]
        tell = shown if key == "throughput_tokens_per_s" else duration
        return f"90 %: {tell(ends[0])} to {tell(ends[1])}" if all(map(math.isfinite, ends)) else ""

    tokens_per_request = report.workload.mean_input_tokens + report.workload.mean_output_tokens
    offered = f"{shown(best.offered_tokens_per_s / tokens_per_request)} requests/s"
    told = (
        ("Throughput", f"{shown(best.throughput_tokens_per_s)} tokens/s", between("throughput_tokens_per_s")),
        ("Offered load", f"{shown(best.offered_tokens_per_s)} tokens/s", offered),
        ("Inter-token latency", duration(best.itl_s), between("itl_s")),
        ("Time to first token", duration(best.ttft_s), between("ttft_s")),
        ("Chance of starving", percent(best.starving_probability), f"accepted: {percent(report.found.risk)}"),
        ("KV cache in use", percent(best.kv_usage), f"of {shown(best.kv_cache_tokens)} tokens"),
        ("In the batch", f"{shown(best.mean_running)} requests", f"{shown(best.mean_waiting)} more wait, on average"),
        ("Memory to spare", gibibytes(report.found.memory.spare_bytes), "at the tightest moment of the start"),
    )
    return [(name, *value.partition(" ")[::2], remark) for name, value, remark in told]


def _verdict(grid: PlanGrid, row: int, column: int) -> str:
    verdict, bound = grid.verdict[row, column], grid.bottleneck[row, column]
    if verdict == "impossible":
        return ""
    words = "recommended" if (column, row) == grid.best else spoken(verdict)
    return words if bound in ("none", verdict) else f"{words}; bound by {spoken(bound)}"


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
    grid, curve = report.grid, report.curve
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
                    "." if code < 0 else np.base_repr(code, 36).lower() for code in codes(metric, grid).ravel().tolist()
                ),
                "text": [metric.tell(float(grid.values[metric.key][cell])) for cell in cells],
                "ticks": [legend_ticks(metric, grid, width) for width, _ in (figures.WIDE, figures.NARROW)],
            }
            for metric in MAPPED
        ],
        "curve": {
            "adapters": [f"{count:,}" for count in curve.adapters.tolist()],
            "panels": {
                key: {
                    "places": each.places(),
                    "text": [each.quantity.tell(float(value)) for value in curve.values[key]],
                }
                for key, each in figures.panels(report).items()
            },
        },
    }
    # "</" would end the script element that this stands in.
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
