"""Draw predictions against measurements, for the Accuracy page: ``python docs/generate_predicted.py PROFILE_DIR``.

PROFILE_DIR holds the tables of a profile and its ``serving_runs.csv``. Of each model every workload is predicted by a
calibration fitted to the other workloads. Measured values stay where they are: the page gets points, not numbers.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from generated import DOCS
from numpy.typing import NDArray

from lora_capacity.fitting import fit_calibration
from lora_capacity.measurements import read_runs, smape
from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone
from lora_capacity.validation import predict_runs

FIGURE = DOCS / "assets" / "figures" / "predicted.svg"
WIDTH, HEIGHT, GAP = 340.0, 330.0, 60.0
LEFT, TOP, BOTTOM = 50.0, 48.0, HEIGHT - 44.0
NEAR = 0.1  # relative distance of the dashed lines from the diagonal
MARKS = ("dot", "hollow")


class Pairs(NamedTuple):
    """What was measured and predicted of a model's runs, each ``[runs]``."""

    model: str
    throughput: tuple[NDArray[np.float64], NDArray[np.float64]]
    itl_ms: tuple[NDArray[np.float64], NDArray[np.float64]]


def held_out(profile: Path, model: str) -> Pairs:
    """Fit a model with each workload held out in turn, and predict that."""
    table = profile / "serving_runs.csv"
    report, runs = fit_calibration(profile, model=model, runs=table), read_runs(table)
    pairs: list[list[NDArray[np.float64]]] = []
    for scenario, calibration in report.without.items():
        rows = np.flatnonzero((runs.model == model) & (runs.scenario == scenario) & runs.started)
        own = runs.take(rows)
        told = predict_runs(own, {model: calibration})
        pairs.append([own.throughput_tokens_per_s, told.throughput_tokens_per_s, 1e3 * own.itl_s, 1e3 * told.itl_s])
    measured, predicted, measured_ms, predicted_ms = map(np.concatenate, zip(*pairs, strict=True))
    return Pairs(model, (measured, predicted), (measured_ms, predicted_ms))


def panel(left: float, title: str, every: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> str:
    """Draw one quantity, a mark for each run."""
    both = np.concatenate([np.concatenate(pair) for pair in every.values()])
    low, high = both.min() / 1.1, both.max() * 1.1
    across = svg.Scale(low, high, left + LEFT, left + WIDTH, log=True)
    up = svg.Scale(low, high, BOTTOM, TOP, log=True)
    parts = [
        svg.axis_y(up, across.start, 6, across.end),
        svg.axis_x(across, BOTTOM, f"measured {title}", 6, TOP),
        svg.text(f"predicted {title}", left, 13.0, class_="axis strong"),
        svg.line([(across.start, BOTTOM), (across.end, TOP)], class_="hair"),
    ]
    for factor in (1.0 + NEAR, 1.0 / (1.0 + NEAR)):
        ends = (low, high / factor) if factor > 1.0 else (low / factor, high)
        parts.append(svg.line([(across(end), up(end * factor)) for end in ends], class_="beside"))
    for mark, (model, (measured, predicted)) in zip(MARKS, every.items(), strict=True):
        places = zip(map(across, measured.tolist()), map(up, predicted.tolist()), strict=True)
        drawn = [svg.circle(mark, round(x, 1), round(y, 1), 2.2) for x, y in places]
        parts.append(svg.element("g", svg.element("title", model), *drawn, opacity=0.75))
    return "".join(parts)


def figure(pairs: list[Pairs]) -> str:
    """Draw throughput and inter-token latency side by side."""
    total, legend = 2.0 * WIDTH + GAP, []
    for i, (mark, each) in enumerate(zip(MARKS, pairs, strict=True)):
        x = LEFT + 250.0 * i
        legend += [svg.circle(mark, x, 30.0, 3.5), svg.text(each.model, x + 9.0, 34.0, class_="row")]
    legend.append(svg.text(f"dashed: ± {NEAR:.0%}".replace("%", " %"), total, 34.0, class_="note", text_anchor="end"))
    told = "; ".join(
        f"{each.model}: {len(each.throughput[0])} runs, SMAPE {smape(*each.throughput[::-1]):.1f} and "
        f"{smape(*each.itl_ms[::-1]):.1f} %"
        for each in pairs
    )
    return svg.drawing(
        total,
        HEIGHT,
        "Predicted against measured throughput and inter-token latency, every workload held out",
        told,
        panel(0.0, "throughput, tokens/s", {each.model: each.throughput for each in pairs}),
        panel(WIDTH + GAP, "ITL, ms", {each.model: each.itl_ms for each in pairs}),
        *legend,
    )


def main(profile: str) -> None:
    """Fit, predict and draw."""
    folder = Path(profile)
    models = sorted(set(read_runs(folder / "serving_runs.csv").model))
    drawn = figure([held_out(folder, model) for model in models])
    FIGURE.write_text(stand_alone(drawn, dark=True), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
