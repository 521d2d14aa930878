"""The page on the event twin's accuracy and its figures, from ``docs/data/event_accuracy.json``."""

from typing import Any

from generate_accuracy import choices
from generated import DOCS, fill, measured_on, read_data, row, sources, span, table

from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone

FIGURES = DOCS / "assets" / "figures"

_WIDTH, _HEIGHT, _LEFT, _GAP, _TOP, _BOTTOM = 720.0, 250.0, 52.0, 60.0, 34.0, 204.0


def write_page(data: dict[str, Any]) -> None:
    """Rewrite the generated parts of the page."""
    fill("event-accuracy.md", accuracy=tables(data), clock=clock(read_data("event_clock")))


def tables(data: dict[str, Any]) -> str:
    """Render tables and figures."""
    lines = [
        f"Mean and standard deviation over {data['seeds']} draws of requests, every workload held out in turn.",
        "",
    ]
    lines += ["## By model", ""]
    lines += table(
        "which runs", "how many", "throughput, SMAPE %", "ITL, SMAPE %", "TTFT, SMAPE %", "starved or not, right %"
    )
    parts = [(each["model"], each) for each in data["models"]]
    parts += [("all", data["all"]), ("overloaded, 8 and 16 slots", data["few_slots_overloaded"])]
    lines += [row(name, *cells(each)) for name, each in parts]
    twin, blis = (read_data("published")[name] for name in ("twin", "blis"))
    for model, theirs in twin["errors"].items():
        lines.append(row(f"{model}: {twin['name']}", "", theirs["throughput_smape"], theirs["itl_smape"], "", ""))
    ranges = (span(blis[f"{what}_smape"]) for what in ("throughput", "itl", "ttft"))
    lines.append(row(blis["name"], blis["runs"], *ranges, ""))
    lines += ["", *sources(twin), "", *sources(blis), "", "## By workload", ""]
    lines += table("model", "workload", "runs", "throughput %", "ITL %", "TTFT %", "starved or not, right %")
    for each in data["scenarios"]:
        count, *rest = cells(each)
        lines.append(row(each["model"], f"`{each['scenario']}`", count, *rest))
    lines += ["", "## Starved or not", "", *starvation(data), "", "## The choice of A and S", ""]
    lines += choices(data["optima"])
    lines += ["", "## Running requests and KV cache", ""]
    lines += table(
        "starved", "runs", "running: mean absolute difference %", "mean %", "KV use: mean absolute %", "mean %"
    )
    for each in data["held"]:
        numbers = [f"{each[name][key]:.1f}" for name in ("running", "kv_usage") for key in ("mean_absolute", "mean")]
        lines.append(row(each["starved"], each["runs"], *numbers))
    for scenario in scenarios(data):
        lines += ["", f"`{scenario}`:", "", f"![Running requests of {scenario}](assets/figures/running-{scenario}.svg)"]
    return "\n".join(lines)


def cells(errors: dict[str, Any]) -> list[object]:
    """Return runs and errors."""
    found = [f"{errors[name]['mean']:.2f} ± {errors[name]['std']:.2f}" for name in ("throughput_smape", "itl_smape")]
    ttft, right = errors["ttft_smape"], errors["starved_right"]
    found.append(f"{ttft['mean']:.1f} ± {ttft['std']:.1f}")
    by_mean = f"{right['mean']:.1f} ± {right['std']:.1f}; by their mean {errors['starved_right_by_mean']:.1f}"
    return [errors["runs"], *found, by_mean]


def starvation(data: dict[str, Any]) -> list[str]:
    """Render the runs that are told wrong."""
    told = data["starvation"]
    lines = [
        "A run is one draw of its requests. By the spread over seeds, a twin that knew every mean would still tell "
        f"{told['unavoidable']:.1f} of {data['all']['runs']} runs wrong: {told['right_at_most']:.1f} % right at most. "
        f"Told wrong by the mean over the seeds are {len(told['wrong'])}:",
        "",
    ]
    names = ("model", "workload", "A / S", "measured", "predicted share served", "within two standard deviations")
    lines += table(*names)
    for each in told["wrong"]:
        served = f"{each['predicted_service']:.3f} ± {each['std']:.3f}"
        starved, within = ("yes" if each[key] else "no" for key in ("starved", "within_spread"))
        place = f"{each['max_cpu_loras']} / {each['max_loras']}"
        seen = "starved" if starved == "yes" else "served"
        lines.append(row(each["model"], f"`{each['scenario']}`", place, seen, served, within))
    return lines


def clock(data: dict[str, Any]) -> str:
    """Render what the clock of whole ticks changes."""
    lines = [
        f"`{data['workload']}`, differences from the plain-Python reference. {measured_on(data['environment'])}",
        "",
    ]
    lines += table("A / S", "steps", "throughput", "time to first token", "inter-token latency", "steps differ by")
    for each in data["configurations"]:
        names = ("throughput_tokens_per_s", "ttft_s", "itl_s")
        changes = [f"{100 * each['difference'][name]:+.1g} %" for name in names]
        steps = each["ticks"]["steps"], each["double"]["steps"]
        place = f"{each['adapters']} / {each['max_loras']}"
        lines.append(row(place, f"{steps[1]:,.0f}", *changes, f"{abs(steps[0] - steps[1]):.0f}"))
    return "\n".join(lines)


def write_figures(data: dict[str, Any]) -> None:
    """Draw running requests against adapters, a figure per workload."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for scenario in scenarios(data):
        lines = [each for each in data["running_by_adapters"] if each["scenario"] == scenario]
        width = (_WIDTH - _LEFT - (len(lines) - 1) * _GAP - 12.0) / len(lines)
        panels = [panel(each, _LEFT + i * (width + _GAP), width) for i, each in enumerate(lines)]
        words = "Mean running requests against adapters served, averaged over slot counts: measured and predicted."
        drawn = svg.drawing(_WIDTH, _HEIGHT, f"Running requests, {scenario}", words, *panels)
        (FIGURES / f"running-{scenario}.svg").write_text(stand_alone(drawn, dark=True))


def panel(line: dict[str, Any], left: float, width: float) -> str:
    """Return what one model's servers held."""
    counts = line["adapters"]
    across = svg.Scale(0.0, 1.04 * max(counts), left, left + width)
    up = svg.Scale(0.0, 1.1 * max(*line["measured"], *line["predicted"]), _BOTTOM, _TOP)
    points = [(across(count), up(value)) for count, value in zip(counts, line["measured"], strict=True)]
    predicted = [(across(count), up(value)) for count, value in zip(counts, line["predicted"], strict=True)]
    return "".join(
        [
            svg.axis_x(across, _BOTTOM, "adapters served", 5, _TOP),
            svg.axis_y(up, left, 4, left + width),
            svg.text(line["model"], left, _TOP - 18.0, class_="strong"),
            svg.text("running: ○ measured, line predicted", left, _TOP - 4.0, class_="num"),
            svg.line(predicted, class_="curve"),
            *(svg.element("circle", class_="hollow", cx=x, cy=y, r=3.5) for x, y in points),
        ]
    )


def scenarios(data: dict[str, Any]) -> list[str]:
    """Return the names of the workloads, each once."""
    return list(dict.fromkeys(each["scenario"] for each in data["running_by_adapters"]))
