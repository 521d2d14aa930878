"""Write the Accuracy page from what the commands report.

``python docs/generate_accuracy.py RUNS.csv`` validates the bundled calibrations on measured runs, keeps the figures in
``docs/data/accuracy.json`` and writes the page's tables from them; without RUNS.csv it only writes the tables.
"""

import itertools
import json
import subprocess
import sys
from typing import Any

import numpy as np
from generated import DOCS, fill, folded, read_data, row, sources, table, workload_words, write_data
from numpy.typing import NDArray

from lora_capacity.calibration import load_calibration
from lora_capacity.measurements import Runs, is_starved, read_runs, smape
from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone
from lora_capacity.validation import Predictions, predict_runs

FIGURE = DOCS / "assets" / "figures" / "accuracy.svg"
BUNDLED = DOCS.parent / "src" / "lora_capacity" / "calibration" / "bundled"
PREDICTED = (
    "Predicted against measured throughput and inter-token latency, a mark for each run; every workload held out, "
    "dashed: 10 % off"
)  # drawn by generate_predicted.py
ABOUT = "Errors of each workload, held out from the fit; dashed: mean errors of the published twin"
FITS = (
    ("held_back_by_scenario", "scenario held out"),
    ("fitted", "fitted on all runs"),
    ("microbenchmarks_alone", "fitted on no run, microbenchmarks alone"),
)
FEW_SLOTS, MANY_SLOTS = 20, 64
CHANCES = (0.01, 0.25, 0.5, 0.75, 0.99)
PUBLISHED = read_data("published")["twin"]


def measure(path: str) -> dict[str, Any]:
    """Ask the command and the library, and leave out every measured value."""
    command = [sys.executable, "-m", "lora_capacity_cli", "validate", path, "--format", "json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for optimum in report["optima"]:
        del optimum["measured"]["throughput"], optimum["chosen"]["measured_throughput"]
    files = sorted(BUNDLED.glob("*.json"))
    calibrations = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    runs = read_runs(path)
    bundled = {
        each["model"]["name"]: load_calibration(str(file)) for each, file in zip(calibrations, files, strict=True)
    }
    predicted = predict_runs(runs, bundled)
    return {
        "yardstick": yardstick(runs, predicted),
        "validate": report,
        "regimes": regimes(runs, predicted),
        "reliability": reliability(runs, predicted),
        "fits": {calibration["model"]["name"]: calibration["accuracy"] for calibration in calibrations},
    }


def yardstick(runs: Runs, predicted: Predictions) -> dict[str, Any]:
    """Return what the runs cover."""
    overload = predicted.offered_tokens_per_s / runs.throughput_tokens_per_s
    return {
        "runs": len(runs),
        "started": int(runs.started.sum()),
        "models": len(set(runs.model)),
        "workloads": len(set(runs.scenario)),
        "max_loras": [int(runs.max_loras.min()), int(runs.max_loras.max())],
        "max_cpu_loras": [int(runs.max_cpu_loras.min()), int(runs.max_cpu_loras.max())],
        "most_overload": float(np.nanmax(overload[runs.started])),
    }


def regimes(runs: Runs, predicted: Predictions) -> list[dict[str, Any]]:
    """Return errors of the bundled calibrations by how a server did; of single runs only the largest error."""
    starved = is_starved(runs.throughput_tokens_per_s, predicted.offered_tokens_per_s)
    enough = runs.max_loras >= runs.max_cpu_loras
    few, many = runs.max_loras < FEW_SLOTS, runs.max_loras >= MANY_SLOTS
    parts = {
        "keep up, a slot for every adapter": ~starved & enough,
        "keep up, fewer slots than adapters": ~starved & ~enough,
        "starve, a slot for every adapter": starved & enough,
        f"starve, fewer slots than adapters: fewer than {FEW_SLOTS}": starved & ~enough & few,
        f"starve, fewer slots than adapters: {FEW_SLOTS} to {MANY_SLOTS - 1}": starved & ~enough & ~few & ~many,
        f"starve, fewer slots than adapters: {MANY_SLOTS} or more": starved & ~enough & many,
    }
    return [{"runs_that": name} | errors(runs, predicted, runs.started & rows) for name, rows in parts.items()]


def reliability(runs: Runs, predicted: Predictions) -> list[dict[str, float]]:
    """Return how many runs starved beside the chance of it that was told, in groups of alike chances."""
    told = predicted.starving_probability
    starved = is_starved(runs.throughput_tokens_per_s, predicted.offered_tokens_per_s)
    known = runs.started & ~np.isnan(told)
    groups = [
        (low, high, known & (told > low) & (told <= high)) for low, high in itertools.pairwise((-1.0, *CHANCES, 1.0))
    ]
    return [
        {
            "low": max(low, 0.0),
            "high": high,
            "runs": int(rows.sum()),
            "told": float(told[rows].mean()),
            "starved": int(starved[rows].sum()),
        }
        for low, high, rows in groups
    ]


def errors(runs: Runs, predicted: Predictions, rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Return errors in percent over some runs."""
    names = ("throughput_tokens_per_s", "itl_s", "ttft_s")
    pairs = {name: (getattr(predicted, name)[rows], getattr(runs, name)[rows]) for name in names}
    throughput, itl, _ = (100.0 * (ours / theirs - 1.0) for ours, theirs in pairs.values())
    found = {name.partition("_")[0]: smape(*pair) for name, pair in pairs.items()}
    return {
        "runs": int(rows.sum()),
        "throughput_smape": found["throughput"],
        "throughput_largest": float(np.abs(throughput).max()),
        "throughput_too_high": float(100.0 * (throughput > 0.0).mean()),
        "itl_smape": found["itl"],
        "itl_mean": float(itl.mean()),
        "ttft_smape": found["ttft"],
    }


def about(data: dict[str, Any]) -> str:
    """Say what the runs cover."""
    what = data["yardstick"]
    slots, adapters = (f"{low} to {high}" for low, high in (what["max_loras"], what["max_cpu_loras"]))
    return (
        f"They are {what['runs']} servers, of which {what['started']} started and ran: {what['models']} models, "
        f"{what['workloads']} workloads, {slots} slots, {adapters} adapters, from idle to {what['most_overload']:.0f} "
        "times overloaded."
    )


def tables(data: dict[str, Any]) -> str:
    """Render the picture, what matters most, and the long tables to be opened."""
    report, fits = data["validate"], data["fits"]
    starved, startup = report["starved"], report["startup"]
    held_out = {model: fit["held_back_by_scenario"] for model, fit in fits.items()}
    lines = [f"![{PREDICTED}](assets/figures/predicted.svg)", "", "## At a glance", ""]
    lines += table("held out", "runs", "throughput, SMAPE %", "ITL, SMAPE %", "starved or not, right %")
    for model, e in held_out.items():
        right = f"{100 * e['starved_right']:.1f}"
        lines.append(row(model, e["runs"], f"{e['throughput_smape']:.2f}", f"{e['itl_smape']:.2f}", right))
    best = [optimum["regret"] for optimum in report["optima"]]
    starves = sum(optimum["chosen"]["starved"] for optimum in report["optima"])
    lines += [
        "",
        f"Whether a server starts is right for {startup['agree']} of {startup['agree'] + startup['disagree']}. Of "
        f"{len(best)} choices of A and S {sum(regret < 0.01 for regret in best)} lose less than 1 % of the best "
        f"measured throughput, the worst {100 * max(best):.0f} %; {starves} starve.",
        "",
    ]
    by_fit = table("model", "coefficients", "runs", "throughput, SMAPE %", "ITL, SMAPE %", "starved or not, right %")
    for model, fit in fits.items():
        for key, words in FITS:
            e = fit[key]
            right = f"{100 * e['starved_right']:.1f}"
            by_fit.append(row(model, words, e["runs"], f"{e['throughput_smape']:.2f}", f"{e['itl_smape']:.2f}", right))
        theirs = PUBLISHED["errors"][model]
        by_fit.append(row(model, PUBLISHED["name"], "", theirs["throughput_smape"], theirs["itl_smape"], ""))
    lines += folded("By model and fit, with the published twin", [*by_fit, "", *sources(PUBLISHED)])
    by_workload = table("workload", *(f"{model}: {what}" for model in fits for what in ("throughput %", "ITL %")))
    scenarios = {model: e["scenarios"] for model, e in held_out.items()}
    for scenario in next(iter(scenarios.values())):
        cells = (scenarios[model][scenario][what] for model in fits for what in ("throughput_smape", "itl_smape"))
        by_workload.append(row(workload_words(scenario), *(f"{cell:.2f}" for cell in cells)))
    drawn = f"![{ABOUT}](assets/figures/accuracy.svg)"
    lines += folded("By workload, each held out in turn", [drawn, "", *by_workload])
    lines += folded("By regime, bundled calibrations", by_regime(data["regimes"]))
    lines += folded("Chance of starving: predicted and measured", chances(data["reliability"]))
    outcomes = table("question", "right", "wrong")
    wrong = f"{starved['fp']} false alarms, {starved['fn']} missed"
    outcomes.append(row("starved or not, of runs that started", starved["tp"] + starved["tn"], wrong))
    outcomes.append(row("starts, no KV cache, or out of memory", startup["agree"], startup["disagree"]))
    for model, fit in fits.items():
        kv = fit["kv_capacity"]
        mean, largest = f"mean error {100 * kv['mean_error']:.3f} %", f"largest {100 * kv['max_error']:.2f} %"
        outcomes.append(row(f"KV capacity of {kv['rows']} servers, {model}", mean, largest))
    lines += folded("Starvation, start-up and KV cache", outcomes)
    return "\n".join([*lines, *folded("Choices of A and S", choices(report["optima"]))]).rstrip()


def by_regime(parts: list[dict[str, Any]]) -> list[str]:
    """Render where it is off."""
    shown = (
        ("throughput_smape", "throughput, SMAPE %", ".2f"),
        ("throughput_largest", "largest error of a run, %", ".1f"),
        ("throughput_too_high", "runs said too high, %", ".0f"),
        ("itl_smape", "ITL, SMAPE %", ".2f"),
        ("itl_mean", "ITL, mean error, %", "+.1f"),
        ("ttft_smape", "TTFT, SMAPE %", ".0f"),
    )
    lines = table("servers that", "runs", *(title for _, title, _ in shown))
    return lines + [row(e["runs_that"], e["runs"], *(format(e[key], form) for key, _, form in shown)) for e in parts]


def chances(groups: list[dict[str, float]]) -> list[str]:
    """Render the reliability of the chance of starving, P(overload) in answers."""
    lines = table("predicted chance", "runs", "of them predicted to starve, on average", "starved")
    for each in groups:
        span = f"{100 * each['low']:g} to {100 * each['high']:g} %"
        lines.append(row(span, each["runs"], f"{each['runs'] * each['told']:.1f}", each["starved"]))
    return [*lines, "", "Bundled calibrations; the two columns on the right agree where chances are told right."]


def choices(optima: list[dict[str, Any]]) -> list[str]:
    """Render the best measured configurations beside those that the twin would take."""
    lines = table("model", "workload", "best measured A / S", "chosen A / S", "starved", "regret %")
    for optimum in optima:
        best, chosen = (f"{o['max_cpu_loras']} / {o['max_loras']}" for o in (optimum["measured"], optimum["chosen"]))
        starves = "yes" if optimum["chosen"]["starved"] else "no"
        workload = workload_words(optimum["scenario"])
        lines.append(row(optimum["model"], workload, best, chosen, starves, f"{100 * optimum['regret']:.1f}"))
    return lines


def figure(fits: dict[str, Any]) -> str:
    """Draw the held-out errors of each workload beside the published twin's."""
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
            parts.append(svg.text(workload_words(scenario), left - 10.0, y + 15.0, class_="num", text_anchor="end"))
            parts.append(svg.element("circle", class_="hollow", cx=itl, cy=y + 11.0, r=4.0))
            parts.append(svg.element("circle", class_="dot", cx=throughput, cy=y + 11.0, r=4.0))
            y += height
        for what, words in (("throughput_smape", "throughput"), ("itl_smape", "latency")):
            x = across(PUBLISHED["errors"][model][what])
            parts.append(svg.line([(x, block + 18.0), (x, y)], class_="beside"))
            # Written to the left of its line: the rightmost has no room beside it.
            parts.append(svg.text(f"published: {words}", x + 3.0, block + 13.0, class_="note", text_anchor="end"))
    return svg.drawing(width, bottom + 48.0, "Errors by workload", ABOUT, *parts)


def main(arguments: list[str]) -> None:
    """Measure if asked to, and write the page."""
    if arguments:
        write_data("accuracy", measure(arguments[0]))
    data = read_data("accuracy")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(stand_alone(figure(data["fits"]), dark=True), encoding="utf-8")
    fill("accuracy.md", yardstick=about(data), accuracy=tables(data))


if __name__ == "__main__":
    main(sys.argv[1:])
