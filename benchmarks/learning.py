"""What a few serving runs teach a derived calibration: errors before and after, against the number of runs.

python benchmarks/learning.py RUNS.csv --json results.json      (--draws 2: a quick look)

Each model of the table is predicted by a calibration derived from its shape and from the calibrations of the other
models, as `validate --transfer` does. Then runs of the model are drawn at random, `fit --prior` corrects the derived
calibration by them, and the runs that were not drawn are predicted anew. RUNS.csv holds runs of the models that the
bundled calibrations are of. It takes some ten minutes, most of them compiling.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from numpy.typing import NDArray

from lora_capacity.calibration import Calibration, bundled_names, load_calibration
from lora_capacity.fitting import update_calibration
from lora_capacity.fitting.transfer import transferred
from lora_capacity.measurements import Runs, read_runs, smape
from lora_capacity.validation import predict_runs

COUNTS = (1, 3, 5, 10, 20, 40)
DRAWS = 20
MEASURES = {"throughput_smape": "throughput_tokens_per_s", "itl_smape": "itl_s"}
QUANTILES = {"median": 0.5, "nine_of_ten": 0.9}


def main() -> None:
    """Draw, correct, predict, print a table and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="table of serving runs")
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of each number of runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    runs = read_runs(arguments.runs)
    profiled = {each.model.name: each for each in map(load_calibration, bundled_names())}
    derived = transferred(runs, profiled)
    found: dict[str, Any] = {"environment": environment("jax"), "draws": arguments.draws, "models": {}}
    for model, calibration in derived.items():
        rows = runs.take(np.flatnonzero((runs.model == model) & runs.started & (runs.completed > 0)))
        found["models"][model] = learned(rows, calibration, profiled[model], arguments.draws)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def learned(runs: Runs, derived: Calibration, profiled: Calibration, draws: int) -> dict[str, Any]:
    """Return the errors on a model's runs, in percent: derived, corrected by so many runs, and profiled.

    Args:
        runs: The model's runs that completed a request.
        derived: Its calibration, derived from others.
        profiled: Its own calibration.
        draws: Sets of runs of each size.
    """
    every = np.ones(len(runs), dtype=bool)
    found: dict[str, Any] = {
        "runs": len(runs),
        "derived": errors(runs, derived, every),
        "profiled": errors(runs, profiled, every),
        "held_out": {name: profiled.accuracy["held_back_by_scenario"][name] for name in MEASURES},
        "corrected": [],
    }
    print(json.dumps({name: found[name] for name in ("derived", "profiled", "held_out")}), flush=True)
    for count in COUNTS:
        generator = np.random.default_rng(count)
        told, seconds = [], []
        for _ in range(draws):
            drawn = np.sort(generator.choice(len(runs), count, replace=False))
            start = time.perf_counter()
            corrected = update_calibration(derived, runs.take(drawn))
            seconds.append(time.perf_counter() - start)
            others = every.copy()
            others[drawn] = False
            told.append(errors(runs, corrected, others) | {"capacity_error": corrected.capacity_error})
        row: dict[str, Any] = {"drawn": count, "seconds": float(np.median(seconds))}
        row["capacity_error"] = float(np.median([each["capacity_error"] for each in told]))
        for name in MEASURES:
            values = [each[name] for each in told]
            row[name] = {word: float(np.quantile(values, share)) for word, share in QUANTILES.items()}
        found["corrected"].append(row)
        print(json.dumps(row), flush=True)
    return found


def errors(runs: Runs, calibration: Calibration, rows: NDArray[np.bool_]) -> dict[str, float]:
    """Return the errors of a calibration on some of a model's runs, in percent."""
    predicted = predict_runs(runs, {calibration.model.name: calibration})
    return {
        name: smape(getattr(predicted, measure)[rows], getattr(runs, measure)[rows])
        for name, measure in MEASURES.items()
    }


if __name__ == "__main__":
    main()
