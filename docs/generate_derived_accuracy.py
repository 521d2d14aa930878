"""Write what the pages tell of the accuracy of derived calibrations, and of what a few runs teach them.

``python docs/generate_derived_accuracy.py RUNS.csv SPEEDS.csv MODELS.csv`` asks ``lora-capacity validate --transfer``
and ``--speeds``, keeps their scores in ``docs/data/derived_accuracy.json`` and writes the pages from them and from
``docs/data/learning.json``, which ``benchmarks/learning.py`` wrote; without the tables it only writes the pages.
"""

import json
import subprocess
import sys
from typing import Any

from generated import DOCS, fill, read_data, row, table, write_data

from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone

FIGURE = DOCS / "assets" / "figures" / "learning.svg"
ABOUT = "Errors of throughput and inter-token latency against the number of runs: most is learned from the first"
COLOURS = ("var(--c28)", "var(--c11)")
LEFT, PANEL, GAP, HEIGHT, TOP, BOTTOM = 30.0, 310.0, 50.0, 310.0, 56.0, 46.0
SMALL_REGRET = 0.03
FEWEST_SPEEDS = 4
"""Speeds of a kind of GPU from which on its scores are shown: those of fewer would be single measurements."""
_TITLES = {"median_error": "median error", "within_15": "within 15 %", "within_35": "within 35 %",
           "in_interval": "in the interval"}  # fmt: skip
_KINDS = {"all": "", "load_told": ", requests in flight told", "load_not_told": ", requests in flight not told"}
_MEASURES = {"throughput_smape": "throughput", "itl_smape": "inter-token latency"}


def measure(runs: str, speeds: str, models: str) -> dict[str, Any]:
    """Ask the commands, and leave out every measured value."""
    scores = ask(runs, "--transfer")
    about = ["--speeds", speeds, "--models", models]
    optima = [
        {"model": each["model"], "regret": each["regret"], "starved": each["chosen"]["starved"]}
        for each in scores["optima"]
    ]
    kept = {name: scores[name] for name in ("models", "starved", "startup", "transfer")}
    return {
        "transfer": kept | {"optima": optima},
        "speeds": told_of_many(ask(*about)),
        "speeds_gpu_held_out": told_of_many(ask(*about, "--leave-out", "gpu")),
    }


def ask(*words: str) -> dict[str, Any]:
    """Return what ``lora-capacity validate`` answers."""
    command = [sys.executable, "-m", "lora_capacity_cli", "validate", *words, "--format", "json"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def told_of_many(answer: dict[str, Any]) -> dict[str, Any]:
    """Return scores over several speeds, and how many there were of which kind."""
    summary = answer["summary"]
    many = {name: scores for name, scores in summary.items() if scores["rows"] >= FEWEST_SPEEDS}
    kinds = sum(name.startswith("gpu ") for name in summary)
    return {"speeds": len(answer["rows"]), "gpus": kinds, "with_lora": summary["lora"]["rows"], "scores": many}


def transfer(data: dict[str, Any]) -> str:
    """Render how a model is predicted by what was measured of others."""
    found = data["transfer"]
    lines = table(
        "model", "corrected by", "runs", "throughput, SMAPE %", "ITL, SMAPE %", "intervals of nine of ten hold"
    )
    for scores in found["models"]:
        told = found["transfer"][scores["model"]]
        errors = (f"{scores[name]:.1f}" for name in _MEASURES)
        others = ", ".join(f"`{name}`" for name in told["corrected_by"])
        lines.append(row(scores["model"], others, scores["runs"], *errors, f"{100 * told['in_interval']:.0f} %"))
    return "\n".join([*lines, "", decisions(found)])


def decisions(found: dict[str, Any]) -> str:
    """Say how often transferred calibrations tell right what matters to a recommendation."""
    counts, starts, optima = found["starved"], found["startup"], found["optima"]
    small = sum(each["regret"] <= SMALL_REGRET for each in optima)
    worst = 100 * max(each["regret"] for each in optima)
    starved = sum(each["starved"] for each in optima)
    right, every = counts["tp"] + counts["tn"], sum(counts.values())
    return (
        f"Starved or not is told right of {right} of {every} runs, whether a server starts of {starts['agree']} of "
        f"{sum(starts.values())}. Of {len(optima)} choices of A and S {small} give up at most "
        f"{100 * SMALL_REGRET:.0f} % of the best measured throughput, the worst {worst:.0f} %; {starved} starve."
    )


def sure(data: dict[str, Any]) -> str:
    """Render in sentences how far derived calibrations were off."""
    found, told = data["transfer"], data["speeds_gpu_held_out"]["scores"]["all"]
    models = found["models"]
    throughput, itl = (" and ".join(f"{each[name]:.1f}" for each in models) for name in _MEASURES)
    holds = " and ".join(f"{100 * found['transfer'][each['model']]['in_interval']:.0f}" for each in models)
    within, median, inside = (100 * told[name] for name in ("within_35", "median_error", "in_interval"))
    lines = [
        f"- **Another model on the same GPU**, an H100, each of {len(models)} derived without its own measurements:",
        f"  SMAPE of throughput {throughput} %, of inter-token latency {itl} %. Intervals that should hold nine of ten",
        f"  runs hold {holds} %. {decisions(found)}",
        "- **Another kind of GPU**, each held out in turn: the time per token of a base model is off by",
        f"  {median:.1f} % in the median, {within:.0f} % of {told['rows']} published speeds are within 35 %, and",
        f"  intervals that should hold nine of ten hold {inside:.0f} %.",
    ]
    return "\n".join(lines)


def speeds(data: dict[str, Any]) -> str:
    """Render how the speeds of servers on other GPUs are predicted."""
    known, held_out = data["speeds"], data["speeds_gpu_held_out"]
    lines = table("speeds", "rows", *_TITLES.values())
    for kind, words in _KINDS.items():
        lines.append(_speeds(f"bundled efficiencies{words}", known["scores"][kind]))
    for kind, words in _KINDS.items():
        lines.append(_speeds(f"the GPU's kind held out{words}", held_out["scores"][kind]))
    for name, scores in held_out["scores"].items():
        if name.startswith("gpu "):
            lines.append(_speeds(f"{name.removeprefix('gpu ')}, held out", scores))
    answered = held_out["scores"]["all"]["rows"]
    lines += [
        "",
        f"Of {known['speeds']} rows {answered} tell a time, and name model, GPU and number of GPUs so that they can be "
        f"answered; they are of {held_out['gpus']} kinds of GPUs, {held_out['with_lora']} of servers with adapters.",
    ]
    return "\n".join(lines)


def _speeds(words: str, scores: dict[str, Any]) -> str:
    shares = [f"{100 * scores[name]:.0f} %" for name in _TITLES]
    return row(words, scores["rows"], *shares)


def learning(data: dict[str, Any]) -> str:
    """Render the table beside the curve."""
    lines = [f"![{ABOUT}](../assets/figures/learning.svg)", ""]
    titles = [f"{model.partition('-')[0]}: {what} %" for model in data["models"] for what in ("throughput", "ITL")]
    lines += table("runs", *titles)
    models = data["models"].values()
    lines.append(row("none: derived", *(_errors(model["derived"]) for model in models)))
    for at, drawn in enumerate(each["drawn"] for each in next(iter(models))["corrected"]):
        cells = (
            f"{model['corrected'][at][name]['median']:.1f}, {model['corrected'][at][name]['nine_of_ten']:.1f}"
            for model in models
            for name in _MEASURES
        )
        lines.append(row(drawn, *cells))
    lines.append(row("profiled, the workload held out", *(_errors(model["held_out"]) for model in models)))
    lines += [
        "",
        f"SMAPE on all runs of the model that were not drawn: median over {data['draws']} draws, and what nine of ten "
        "draws stay below. In the figure lines are medians, shades reach to nine of ten, and dashes are the profiled "
        "calibration. `benchmarks/learning.py` makes it.",
    ]
    return "\n".join(lines)


def _errors(scores: dict[str, float]) -> str:
    return " | ".join(f"{scores[name]:.1f}" for name in _MEASURES)


def figure(data: dict[str, Any]) -> str:
    """Draw the errors against the number of runs, a panel for each measure and a colour for each model."""
    models = data["models"].values()
    counts = [0, *(each["drawn"] for each in next(iter(models))["corrected"])]
    parts = []
    for place, (name, words) in enumerate(_MEASURES.items()):
        left = LEFT + place * (PANEL + GAP)
        highest = max(each[name]["nine_of_ten"] for model in models for each in model["corrected"])
        highest = max(highest, *(model["derived"][name] for model in models))
        up = svg.Scale(0.0, 1.08 * highest, HEIGHT - BOTTOM, TOP)
        across = svg.Scale(0.0, len(counts) - 1.0, left + 6.0, left + PANEL)
        parts.append(svg.text(f"SMAPE of {words}, %", left - LEFT, TOP - 12.0, class_="axis strong"))
        parts.append(svg.axis_y(up, left, 5, left + PANEL))
        for at, count in enumerate(counts):
            x = across(float(at))
            parts.append(svg.text(str(count), x, HEIGHT - BOTTOM + 17.0, class_="num", text_anchor="middle"))
        middle = left + 0.5 * PANEL
        parts.append(svg.text("runs of the model", middle, HEIGHT - 8.0, class_="axis", text_anchor="middle"))
        parts += [_curve(model, name, across, up, colour) for model, colour in zip(models, COLOURS, strict=True)]
    for at, (name, colour) in enumerate(zip(data["models"], COLOURS, strict=True)):
        x = LEFT + at * (PANEL + GAP)
        parts.append(svg.line([(x, 10.0), (x + 22.0, 10.0)], class_="curve", style=f"stroke:{colour}"))
        parts.append(svg.text(name, x + 28.0, 14.0, class_="row"))
    return svg.drawing(LEFT + 2 * PANEL + GAP + 10.0, HEIGHT, "Learning from few runs", ABOUT, *parts)


def _curve(model: dict[str, Any], name: str, across: svg.Scale, up: svg.Scale, colour: str) -> str:
    """Return one model's median with the band above it, and the error of its own calibration."""
    before = (across(0.0), up(model["derived"][name]))
    medians, worse = (
        [before, *((across(at + 1.0), up(each[name][word])) for at, each in enumerate(model["corrected"]))]
        for word in ("median", "nine_of_ten")
    )
    outline = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in [*medians, *reversed(worse)]) + "Z"
    level = up(model["held_out"][name])
    own = [(across.start, level), (across.end, level)]
    return "".join(
        (
            svg.element("path", d=outline, style=f"fill:{colour};fill-opacity:0.15;stroke:none"),
            svg.line(medians, class_="curve", style=f"stroke:{colour}"),
            svg.line(own, style=f"stroke:{colour};stroke-dasharray:4 3"),
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_data("derived_accuracy", measure(*sys.argv[1:]))
    scores, learned = read_data("derived_accuracy"), read_data("learning")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(stand_alone(figure(learned), dark=True), encoding="utf-8")
    fill("accuracy.md", transfer=transfer(scores), speeds=speeds(scores))
    fill("how-to/derive.md", sure=sure(scores), learning=learning(learned))
