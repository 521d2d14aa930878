"""Write the page on the event twin's accuracy, and its figures, from what it says of the published runs.

``python docs/generate_event_accuracy.py FOLDER`` fits both models with every scenario held out in turn, plays the runs
of each by the coefficients that it had no part in, over several seeds, and keeps averages in
``docs/data/event_accuracy.json``; without FOLDER, the published tables, it only writes page and figures. Every part
played is kept in ``--work`` until it is thrown away, so that an interrupted run goes on where it was.
"""
# ruff: noqa: T201  tells what is done, since it takes minutes

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from event_accuracy_page import write_figures, write_page
from generated import read_data, write_data
from numpy.typing import NDArray
from scipy.stats import norm

from lora_capacity.calibration import load_calibration
from lora_capacity.fitting import fit_calibration
from lora_capacity.measurements import Runs, TimeMeans, is_starved, read_runs, read_time_means, smape
from lora_capacity.validation import Predictions, predict_runs, score_runs

FEW_SLOTS = 16
THRESHOLD = 0.9
"""Service below which a run is starved."""

FloatArray = NDArray[np.float64]
_MEASURES = ("throughput_tokens_per_s", "itl_s", "ttft_s")
_NAMES = ("throughput_smape", "itl_smape", "ttft_smape")


def main() -> None:
    """Measure if asked to, and write page and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="the published tables")
    parser.add_argument("--seeds", type=int, default=4, help="draws of requests")
    parser.add_argument("--work", type=Path, default=Path("event_accuracy_parts"), help="where played parts are kept")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.work.mkdir(exist_ok=True)
        runs = read_runs(arguments.folder / "serving_runs.csv")
        played = play_held_back(runs, arguments.folder, arguments.seeds, arguments.work)
        held = read_time_means(arguments.folder / "serving_timeseries.parquet", runs)
        write_data("event_accuracy", summary(runs, played, held))
    data = read_data("event_accuracy")
    write_figures(data)
    write_page(data)


def play_held_back(runs: Runs, folder: Path, seeds: int, work: Path) -> list[Predictions]:
    """Return what the twin says of all runs, each by coefficients that its scenario had no part in, seed by seed."""
    parts = [
        (model, scenario) for model in models(runs) for scenario in sorted(set(runs.scenario[runs.model == model]))
    ]
    columns: list[dict[str, Any]] = [{} for _ in range(seeds)]
    for model, scenario in parts:
        rows = np.flatnonzero((runs.model == model) & (runs.scenario == scenario))
        for seed in range(seeds):
            path = work / f"{model}-{scenario}-{seed}.npz"
            if not path.exists():
                calibration = held_back(folder, model, scenario, work)
                found = predict_runs(runs.take(rows), {model: calibration}, "event", seed=seed)
                partly = path.with_suffix(".part.npz")
                np.savez(partly, **{field.name: getattr(found, field.name) for field in fields(Predictions)})
                partly.rename(path)
                print(path.name, flush=True)
            with np.load(path, allow_pickle=True) as part:
                for name, values in part.items():
                    column = columns[seed].setdefault(name, np.empty(len(runs), values.dtype))
                    column[rows] = values
    return [Predictions(**each) for each in columns]


def held_back(folder: Path, model: str, scenario: str, work: Path) -> Any:
    """Return the calibration without a scenario, from a file if it is there."""
    path = work / f"{model}-without-{scenario}.json"
    if not path.exists():
        report = fit_calibration(folder, model=model, runs=folder / "serving_runs.csv")
        for each, calibration in report.without.items():
            calibration.save(work / f"{model}-without-{each}.json")
        print(f"fitted {model}", flush=True)
    return load_calibration(str(path))


def summary(runs: Runs, played: list[Predictions], held: TimeMeans) -> dict[str, Any]:
    """Return averages over runs, and of those their mean and spread over seeds; no single measured value."""
    mean = average(played)
    started = runs.started
    measured = runs.throughput_tokens_per_s
    offered = mean.offered_tokens_per_s
    starved = started & is_starved(measured, offered)
    few = starved & (runs.max_loras <= FEW_SLOTS)
    return {
        "seeds": len(played),
        "models": [{"model": model} | errors(runs, played, started & (runs.model == model)) for model in models(runs)],
        "all": errors(runs, played, started),
        "few_slots_overloaded": errors(runs, played, few),
        "scenarios": [
            {"model": model, "scenario": scenario}
            | errors(runs, played, started & (runs.model == model) & (runs.scenario == scenario))
            for model in models(runs)
            for scenario in sorted(set(runs.scenario[runs.model == model]))
        ],
        "starvation": starvation(runs, played),
        "optima": [without_measurements(each) for each in score_runs(runs, mean, "event")["optima"]],
        "held": [
            {"runs": int(rows.sum()), "starved": word}
            | {name: differences(getattr(mean, theirs)[rows], ours[rows]) for name, theirs, ours in held_columns(held)}
            for word, rows in (("no", started & ~starved), ("yes", starved))
        ],
        "running_by_adapters": by_adapters(runs, mean, held),
    }


def average(played: list[Predictions]) -> Predictions:
    """Return the mean over seeds; what no seed changes is the first's."""
    columns = {field.name: getattr(played[0], field.name) for field in fields(Predictions)}
    drawn = (*_MEASURES, "mean_running", "kv_usage")
    return Predictions(**columns | {name: np.mean([getattr(each, name) for each in played], axis=0) for name in drawn})


def errors(runs: Runs, played: list[Predictions], rows: NDArray[np.bool_]) -> dict[str, Any]:
    """Return errors of single seeds, in percent, as mean and standard deviation over seeds; and of their mean."""
    found: dict[str, Any] = {"runs": int(rows.sum())}
    for name, measure in zip(_NAMES, _MEASURES, strict=True):
        found[name] = spread([smape(getattr(each, measure)[rows], getattr(runs, measure)[rows]) for each in played])
    found["starved_right"] = spread([100.0 * right(runs, each)[rows].mean() for each in played])
    found["starved_right_by_mean"] = float(100.0 * right(runs, average(played))[rows].mean())
    return found


def right(runs: Runs, predicted: Predictions) -> NDArray[np.bool_]:
    """Whether a run is told to starve as it did, ``[runs]``."""
    offered = predicted.offered_tokens_per_s
    told, seen = (is_starved(each.throughput_tokens_per_s, offered) for each in (predicted, runs))
    return np.asarray(told == seen)


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def starvation(runs: Runs, played: list[Predictions]) -> dict[str, Any]:
    """Return which runs are told wrong by the mean over seeds, and how many a right twin would tell wrong.

    A run is one draw of its requests, so it falls on the other side of the threshold than its mean does with a chance
    that the spread over seeds tells. The sum of these chances is what no twin could do better.
    """
    mean = average(played)
    service = np.stack([each.throughput_tokens_per_s / each.offered_tokens_per_s for each in played])
    centre, deviation = service.mean(axis=0), service.std(axis=0, ddof=1)
    started = runs.started
    away = np.abs(centre - THRESHOLD) / np.maximum(deviation, 1e-6)
    wrong = np.flatnonzero(started & ~right(runs, mean))
    seen = runs.throughput_tokens_per_s / mean.offered_tokens_per_s
    apart = np.abs(seen - centre) / np.maximum(deviation, 1e-6)
    return {
        "unavoidable": float(norm.sf(away[started]).sum()),
        "right_at_most": float(100.0 - 100.0 * norm.sf(away[started]).mean()),
        "wrong": [
            {
                "model": str(runs.model[row]),
                "scenario": str(runs.scenario[row]),
                "max_cpu_loras": int(runs.max_cpu_loras[row]),
                "max_loras": int(runs.max_loras[row]),
                "predicted_service": float(centre[row]),
                "std": float(deviation[row]),
                "starved": bool(seen[row] <= THRESHOLD),
                "within_spread": bool(apart[row] <= 2.0),
            }
            for row in wrong
        ],
    }


def held_columns(held: TimeMeans) -> tuple[tuple[str, str, FloatArray], ...]:
    """Return names of ours, names of predictions, and what was measured."""
    return ("running", "mean_running", held.running), ("kv_usage", "kv_usage", held.kv_usage)


def differences(predicted: FloatArray, measured: FloatArray) -> dict[str, float]:
    """Return mean absolute and mean difference relative to what was measured, in percent."""
    relative = 100.0 * (predicted / measured - 1.0)
    return {"mean_absolute": float(np.abs(relative).mean()), "mean": float(relative.mean())}


def by_adapters(runs: Runs, mean: Predictions, held: TimeMeans) -> list[dict[str, Any]]:
    """Return measured and predicted running requests by number of adapters, on average over two slot counts or more."""
    lines = []
    for model in models(runs):
        for scenario in sorted(set(runs.scenario[runs.model == model])):
            of_line = runs.started & (runs.model == model) & (runs.scenario == scenario)
            counts, times = np.unique(runs.max_cpu_loras[of_line], return_counts=True)
            counts = counts[times > 1]
            groups = [of_line & (runs.max_cpu_loras == count) for count in counts]
            lines.append(
                {"model": model, "scenario": scenario, "adapters": counts.tolist()}
                | {"measured": [float(held.running[rows].mean()) for rows in groups]}
                | {"predicted": [float(mean.mean_running[rows].mean()) for rows in groups]}
            )
    return lines


def without_measurements(optimum: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the scores without measured values."""
    del optimum["measured"]["throughput"], optimum["chosen"]["measured_throughput"]
    return optimum


def models(runs: Runs) -> list[str]:
    """Return the names of the models, in order of appearance."""
    return list(dict.fromkeys(runs.model.tolist()))


if __name__ == "__main__":
    main()
