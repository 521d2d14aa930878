"""Write the Accuracy page from what the commands report.

``python docs/generate_accuracy.py RUNS.csv`` validates the bundled calibrations on measured runs, keeps the figures in
``docs/data/accuracy.json`` and writes the page's tables from them; without RUNS.csv it only writes the tables.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
DATA = DOCS / "data" / "accuracy.json"
PAGE = DOCS / "accuracy.md"
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
        throughput, itl = PUBLISHED[model]
        lines.append(row(model, "the published twin, runs of its `twin` set", "", throughput, itl, ""))
    lines += ["", "## By workload, each held back in turn", ""]
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
    PAGE.write_text(f"{before}{BEGIN}\n{tables(json.loads(DATA.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
