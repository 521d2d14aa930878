"""The report as one HTML page: everything it needs is inside it."""

import json
import math
import string
from typing import TYPE_CHECKING

import numpy as np

from lora_capacity.reports import figures
from lora_capacity.reports.bars import change_figure, service_figure
from lora_capacity.reports.curves import QUANTITIES, places
from lora_capacity.reports.heatmap import BOUNDS, METRICS, bound_map, codes, heat_map, legend_of
from lora_capacity.reports.markup import Markup, escape, figure, joined, node, tabled
from lora_capacity.reports.provenance import rests_on
from lora_capacity.reports.style import figure_css, palette_css, resource
from lora_capacity.reports.tables import change_table, class_table, curve_table, map_table, runner_up_table
from lora_capacity.words import REFUSALS, bottleneck, duration, gibibytes, percent, plural, shown, spoken

if TYPE_CHECKING:
    from lora_capacity.reports.report import Report

_REMEDIES = {
    "none": "No queue stands for long: only more adapters bring more throughput.",
    "slots": "More adapters want to run than there are slots. More slots, or fewer adapters, help.",
    "sequences": "As many requests run as max_num_seqs allows. A larger max_num_seqs helps, at the price of latency.",
    "kv_cache": "The KV cache is full. Fewer slots, a lower max_lora_rank or more GPU memory make room.",
    "token_budget": "Every step carries max_num_batched_tokens. A larger budget helps.",
}


def page(report: "Report", title: str, note: str) -> str:
    """Return the report as one HTML document.

    Args:
        report: What to tell.
        title: Its heading, for the window and the top line.
        note: Where and when it was made.
    """
    content = "\n".join(
        part(report) for part in (_answer, _around, _along, _bounds, _service_and_changes, _runners_up, rests_on)
    )
    template = string.Template(resource("page.html"))
    kicker = " · ".join(part for part in (title, note) if part)
    footer = f"Made by lora-capacity from predictions of its steady twin. {note}".strip()
    return template.substitute(
        title=escape(title),
        kicker=escape(kicker),
        footer=escape(footer),
        css=_css(),
        content=content,
        data=_data(report),
        script=resource("page.js"),
    )


def _css() -> str:
    dark = palette_css(":root:not([data-theme=light])", dark=True)
    return "".join(
        (
            palette_css(":root"),
            f"@media screen and (prefers-color-scheme: dark){{{dark}}}",
            f"@media screen{{{palette_css(':root[data-theme=dark]', dark=True)}}}",
            ":root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}",
            resource("page.css"),
            figure_css(),
        )
    )


def _answer(report: "Report") -> Markup:
    found, best = report.found, report.found.best
    held = f", for want of {bottleneck(best.limit_beyond)}" if best.limit_beyond else ""
    lead = (
        f"One server of {found.model} ({report.calibration.gpu.name}, vLLM {report.calibration.vllm_version}) is "
        f"predicted to complete {percent(best.throughput_tokens_per_s / best.offered_tokens_per_s)} of this load. It "
        f"starves at {shown(best.critical_load)} times the load{held}."
    )
    return node(
        "section",
        node(
            "h1",
            "Serve ",
            node("b", plural(best.max_cpu_loras, "adapter")),
            " with ",
            node("b", plural(best.max_loras, "slot")),
        ),
        node("p", lead, class_="lead"),
        _key_figures(report),
        node(
            "div",
            node("pre", found.server.serve_command(found.model), tabindex="0", aria_label="Command to run"),
            node("button", "Copy", type="button", class_="js"),
            class_="command",
        ),
        *(node("p", node("b", "Warning: "), warning, class_="warn") for warning in found.warnings),
        class_="answer",
        style="margin-top:0",
    )


def _key_figures(report: "Report") -> Markup:
    best, curve = report.found.best, report.curve
    at = int(np.searchsorted(curve.adapters, best.max_cpu_loras))

    def between(key: str) -> str:
        ends = [float(each[key][at]) for each in (curve.low, curve.high)]
        tell = shown if key == "throughput_tokens_per_s" else duration
        return f"90 %: {tell(ends[0])} to {tell(ends[1])}" if all(map(math.isfinite, ends)) else ""

    told = (
        ("Throughput", f"{shown(best.throughput_tokens_per_s)} tokens/s", between("throughput_tokens_per_s")),
        ("Offered load", f"{shown(best.offered_tokens_per_s)} tokens/s", _load(report)),
        ("Inter-token latency", duration(best.itl_s), between("itl_s")),
        ("Time to first token", duration(best.ttft_s), between("ttft_s")),
        ("Chance of starving", percent(best.starving_probability), f"accepted: {percent(report.found.risk)}"),
        ("KV cache in use", percent(best.kv_usage), f"of {shown(best.kv_cache_tokens)} tokens"),
        ("In the batch", f"{shown(best.mean_running)} requests", f"{shown(best.mean_waiting)} more wait, on average"),
        ("Memory to spare", gibibytes(report.found.memory.spare_bytes), "at the tightest moment of the start"),
    )
    return node(
        "dl",
        *(
            node("div", node("dt", name), node("dd", *_number(value), node("small", more)))
            for name, value, more in told
        ),
        class_="key-figures",
    )


def _number(told: str) -> tuple[str, ...]:
    """Return a number and its unit, which stands back behind it."""
    number, _, unit = told.partition(" ")
    return (number, " ", node("span", unit)) if unit else (number,)


def _load(report: "Report") -> str:
    per_request = report.workload.mean_input_tokens + report.workload.mean_output_tokens
    return f"{shown(report.found.best.offered_tokens_per_s / per_request)} requests/s"


def _around(report: "Report") -> Markup:
    land, metric = report.landscape, METRICS[0]
    wide = heat_map(land, metric, "wide", *figures.WIDE)
    narrow = heat_map(land, metric, "narrow", *figures.NARROW)
    hint = "Point at the map, or focus it and use the arrow keys, to read a configuration."
    choice = node(
        "fieldset",
        node("legend", "Colour shows"),
        *(
            node(
                "label",
                node("input", type="radio", name="metric", value=str(i), checked="" if i == 0 else None),
                each.name,
            )
            for i, each in enumerate(METRICS)
        ),
        class_="metrics js",
    )
    return node(
        "section",
        node("h2", "Where the server keeps up, and where it starves"),
        node("p", _regions_told(report)),
        choice,
        node(
            "div",
            figure(
                joined(_map(wide, "wide"), _map(narrow, "narrow")),
                "Hatched: starved; loosely hatched: too likely to starve. The line surrounds what keeps up. The ring "
                "is the recommendation.",
                node("span", f" {hint}", class_="js"),
            ),
            _readout(report),
            class_="explorer",
        ),
        tabled("Throughput as a table", map_table(land)),
    )


def _map(drawing: str, width: str) -> Markup:
    label = "Map of configurations; arrow keys move from one to the next"
    return node("div", Markup(drawing), class_=f"map {width}", tabindex="0", role="group", aria_label=label)


def _regions_told(report: "Report") -> str:
    found = report.found
    return (
        f"Every cell is one server. Beyond the line it falls {percent(found.threshold)} or more below the load, or "
        f"is more than {percent(found.risk)} likely to, given how far off the calibration may be."
    )


def _readout(report: "Report") -> Markup:
    land = report.landscape
    column, row = land.best
    rows = [
        part
        for each in METRICS
        for part in (
            node("dt", each.name),
            node("dd", each.tell(float(land.values[each.key][row, column])), data_metric=each.key),
        )
    ]
    return node(
        "div",
        node("h3", f"{land.adapters[column]} adapters, {land.slots[row]} slots"),
        node("p", _verdict_words(report, row, column), class_="verdict"),
        node("dl", *rows),
        class_="readout",
        aria_live="polite",
    )


def _verdict_words(report: "Report", row: int, column: int) -> str:
    land = report.landscape
    verdict, bound = land.verdict[row, column], land.bound[row, column]
    if verdict == "impossible":
        return ""
    words = "recommended" if (column, row) == land.best else spoken(verdict)
    return words if bound in ("none", verdict) else f"{words}; bound by {spoken(bound)}"


def _along(report: "Report") -> Markup:
    best = report.found.best
    drawn = figures.panels(report)
    return node(
        "section",
        node("h2", f"More or fewer adapters, with {plural(best.max_loras, 'slot')}"),
        node(
            "p",
            "Bands are 90 % intervals: the server may be faster or slower than the calibration says by as much as that "
            "was off on measured servers it was not fitted on.",
        ),
        node("div", *(figure(each, "") for each in drawn.values()), class_="pairs"),
        tabled("The curves as a table", curve_table(report.curve)),
    )


def _bounds(report: "Report") -> Markup:
    land = report.landscape
    drawn = int(np.sum(land.verdict != "impossible"))
    items = []
    for bound in BOUNDS:
        count = int(np.sum(land.bound == bound))
        if count:
            name = _sentence(spoken(bound))
            share = f", {max(round(100 * count / drawn), 1)} % of the map. "
            swatch = "b-dead" if bound in ("no_kv_cache", "oom") else f"b-{bound}"
            items.append(
                node(
                    "li",
                    node("b", name),
                    share,
                    _REMEDIES.get(bound) or _sentence(REFUSALS[bound]) + ".",
                    style=f"--swatch:var(--{swatch})",
                )
            )
    return node(
        "section",
        node("h2", "What holds each configuration back"),
        node("div", figure(bound_map(land, *figures.BOUNDS), ""), node("ul", *items, class_="bounds"), class_="pairs"),
    )


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _service_and_changes(report: "Report") -> Markup:
    critical = report.found.best.critical_load
    service = node(
        "section",
        node("h2", "Who is served"),
        node("p", "Adapters by request rate and rank. Full marks: at this load; hollow: where the server starves."),
        figure(service_figure(report.classes, report.found.threshold), ""),
        tabled("Service as a table", class_table(report.classes)),
    )
    changes = node(
        "section",
        node("h2", "What small changes would do"),
        node(
            "p",
            f"It starves at {shown(critical)} times this load. Each change alone, predicted anew; a point is 1 % of "
            "the load.",
        ),
        figure(change_figure(report.changes, critical), ""),
        tabled("The changes as a table", change_table(report.changes)),
    )
    return node("div", service, changes, class_="pairs")


def _runners_up(report: "Report") -> Markup:
    return node(
        "section",
        node("h2", "Runners-up"),
        node("p", "The best choices with other numbers of slots."),
        runner_up_table(report.found),
    )


def _data(report: "Report") -> str:
    """Return what the script needs; values are told here, once, so that the script only looks them up."""
    land, curve = report.landscape, report.curve
    cells = [(r, c) for r in range(land.slots.size) for c in range(land.adapters.size)]
    widths = (figures.WIDE[0], figures.NARROW[0])
    content = {
        "adapters": [f"{count:,}" for count in land.adapters.tolist()],
        "slots": [f"{count:,}" for count in land.slots.tolist()],
        "best": land.best[1] * land.adapters.size + land.best[0],
        "verdicts": [_verdict_words(report, r, c) for r, c in cells],
        "metrics": [
            {
                "key": metric.key,
                "title": f"{metric.name}, {metric.unit}",
                "codes": "".join(
                    "." if code < 0 else np.base_repr(code, 36).lower() for code in codes(metric, land).ravel().tolist()
                ),
                "text": [metric.tell(float(land.values[metric.key][r, c])) for r, c in cells],
                "ticks": [legend_of(metric, land, width) for width in widths],
            }
            for metric in METRICS
        ],
        "curve": {
            "adapters": [f"{count:,}" for count in curve.adapters.tolist()],
            "panels": {
                quantity.key: {
                    "places": places(curve, quantity),
                    "text": [metric.tell(float(value)) for value in curve.values[quantity.key]],
                }
                for quantity in QUANTITIES
                for metric in METRICS
                if metric.key == quantity.key
            },
        },
    }
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
