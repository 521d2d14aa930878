"""Write the Accuracy page from what the commands report.

``python docs/generate_accuracy.py RUNS.csv`` validates the bundled calibrations on measured runs, keeps the figures in
``docs/data/accuracy.json`` and writes the page's tables from them; without RUNS.csv it only writes the tables.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone

DOCS = Path(__file__).parent
DATA = DOCS / "data" / "accuracy.json"
PAGE = DOCS / "accuracy.md"
FIGURE = DOCS / "assets" / "figures" / "accuracy.svg"
ABOUT = "Errors of each workload, held back from the fit, with the published twin's mean errors as dashed lines"
BEGIN, END = "<!-- generated: accuracy -->", "<!-- end generated -->"

# Source: arXiv 2508.08343, on the twin set of the same runs.
PUBLISHED = {"llama-3.1-8b-instruct": (4.2, 9.7), "qwen-2.5-7b-instruct": (5.1, 9.0)}
FITS = (
    ("held_back_by_scenario", "scenario held back"),
    ("fitted", "fitted on all runs"),
    ("microbenchmarks_alone", "fitted on no run, microbenchmarks alone"),
)


def measure(runs: str) -> dict[str, Any]:
    """Ask the commands, and leave out every measured value."""

    def answer(*words: str) -> Any:
        command = [sys.executable, "-m", "lora_capacity_cli", *words, "--format", "json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    report = answer("validate", runs, "--engine", "steady")
    for optimum in report["optima"]:
        del optimum["measured"]["throughput"], optimum["chosen"]["measured_throughput"]
    folder = DOCS.parent / "src" / "lora_capacity" / "calibration" / "bundled"
    calibrations = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {
        "validate": report,
        "event": answer("validate", runs, "--engine", "event")["models"],
        "fits": {calibration["model"]["name"]: calibration["accuracy"] for calibration in calibrations},
    }


def tables(data: dict[str, Any]) -> str:
    """Render the page's generated part."""
    report, fits = data["validate"], data["fits"]
    lines = ["## By model", ""]
    lines += table("model", "coefficients", "runs", "throughput, SMAPE %", "ITL, SMAPE %", "starved or not, right %")
    for model, fit in fits.items():
        for key, words in FITS:
            e = fit[key]
            right = f"{100 * e['starved_right']:.1f}"
            lines.append(row(model, words, e["runs"], f"{e['throughput_smape']:.2f}", f"{e['itl_smape']:.2f}", right))
        for played in (each for each in data.get("event", ()) if each["model"] == model):
            errors = (f"{played[what]:.2f}" for what in ("throughput_smape", "itl_smape"))
            lines.append(row(model, "event twin, one seed, fitted on all runs", played["runs"], *errors, ""))
        throughput, itl = PUBLISHED[model]
        lines.append(row(model, "the published twin, runs of its `twin` set", "", throughput, itl, ""))
    lines += ["", "## By workload, each held back in turn", "", f"![{ABOUT}](assets/figures/accuracy.svg)", ""]
    lines += table("workload", *(f"{model}: {what}" for model in fits for what in ("throughput %", "ITL %")))
    held_back = {model: fit["held_back_by_scenario"]["scenarios"] for model, fit in fits.items()}
    for scenario in next(iter(held_back.values())):
        errors = [held_back[model][scenario] for model in fits]
        cells = (f"{e[what]:.2f}" for e in errors for what in ("throughput_smape", "itl_smape"))
        lines.append(row(f"`{scenario}`", *cells))
    starved, startup = report["starved"], report["startup"]
    lines += ["", "## Starvation, start-up and KV cache", ""]
    lines += table("question", "right", "wrong")
    wrong = f"{starved['fp']} said to starve that did not, {starved['fn']} the other way"
    lines.append(row("starved or not, of runs that started", starved["tp"] + starved["tn"], wrong))
    lines.append(row("starts, no KV cache, or out of memory", startup["agree"], startup["disagree"]))
    for model, fit in fits.items():
        kv = fit["kv_capacity"]
        mean, largest = f"mean error {100 * kv['mean_error']:.3f} %", f"largest {100 * kv['max_error']:.2f} %"
        lines.append(row(f"KV capacity of {kv['rows']} servers, {model}", mean, largest))
    lines += ["", "## The choice of A and S", ""]
    lines += table("model", "workload", "best measured A / S", "chosen A / S", "starved", "regret %")
    for optimum in report["optima"]:
        best, chosen = (f"{o['max_cpu_loras']} / {o['max_loras']}" for o in (optimum["measured"], optimum["chosen"]))
        starves = "yes" if optimum["chosen"]["starved"] else "no"
        workload = f"`{optimum['scenario']}`"
        lines.append(row(optimum["model"], workload, best, chosen, starves, f"{100 * optimum['regret']:.1f}"))
    return "\n".join(lines)


def figure(fits: dict[str, Any]) -> str:
    """Draw the held-back errors of each workload beside the published twin's."""
    width, left, top, height = 720.0, 300.0, 36.0, 22.0
    models = list(fits)
    scenarios = list(next(iter(fits.values()))["held_back_by_scenario"]["scenarios"])
    rows = [(model, scenario) for model in models for scenario in scenarios]
    bottom = top + height * (len(rows) + len(models))
    across = svg.Scale(0.0, 10.5, left, width - 16.0)
    parts = [svg.axis_x(across, bottom, "SMAPE, %: throughput (full), inter-token latency (hollow)", 6, top)]
    y = top
    for model in models:
        block = y
        parts.append(svg.text(model, 0.0, y + 15.0, class_="axis strong"))
        y += height
        for scenario in scenarios:
            errors = fits[model]["held_back_by_scenario"]["scenarios"][scenario]
            itl, throughput = across(errors["itl_smape"]), across(errors["throughput_smape"])
            parts.append(svg.text(scenario.replace("_", " "), left - 10.0, y + 15.0, class_="num", text_anchor="end"))
            parts.append(svg.element("circle", class_="hollow", cx=itl, cy=y + 11.0, r=4.0))
            parts.append(svg.element("circle", class_="dot", cx=throughput, cy=y + 11.0, r=4.0))
            y += height
        for error, words in zip(PUBLISHED[model], ("throughput", "latency"), strict=True):
            x = across(error)
            parts.append(svg.line([(x, block + 18.0), (x, y)], class_="beside"))
            parts.append(svg.text(f"published: {words}", x, block + 13.0, class_="note", text_anchor="middle"))
    return svg.drawing(width, bottom + 48.0, "Errors by workload", ABOUT, *parts)


def table(*names: str) -> list[str]:
    """Head of a table."""
    return [row(*names), row(*["---"] * len(names))]


def row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main(arguments: list[str]) -> None:
    """Measure if asked to, and write the page."""
    if arguments:
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps(measure(arguments[0]), indent=1) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(stand_alone(figure(json.loads(DATA.read_text())["fits"])), encoding="utf-8")
    PAGE.write_text(f"{before}{BEGIN}\n{tables(json.loads(DATA.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
