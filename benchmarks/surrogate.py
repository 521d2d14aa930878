"""How fast labels and predictions are, and how good the bundled surrogates: against scikit-learn, labels, real runs.

python benchmarks/surrogate.py --labels LABELS.parquet [LABELS.parquet ...] --runs serving_runs.csv --json results.json
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor

from lora_capacity import Runs, load_calibration, load_surrogate, read_runs
from lora_capacity.calibration import Calibration
from lora_capacity.measurements import smape
from lora_capacity.scenarios import WorkloadBatch
from lora_capacity.search import assess
from lora_capacity.surrogate import (
    Dataset,
    NeuralSurrogate,
    Space,
    Surrogate,
    SurrogateInputs,
    describe,
    label,
    train_neural,
    with_slots,
)
from lora_capacity.surrogate.simulation import residence_times, simulate_workloads
from lora_capacity.surrogate.targets import OPTIMUM, adapters_of
from lora_capacity.twins.steady import ResidenceTime

MODELS = {
    "llama-3.1-8b-instruct": "llama-3.1-8b-instruct-h100-64gb",
    "qwen-2.5-7b-instruct": "qwen-2.5-7b-instruct-h100-64gb",
}
BATCH, GRID = 10_000, 20
PUBLISHED_RUN_S = (8.0, 215.0)
"""What the published pipeline's twin takes for one configuration (arXiv 2508.08343)."""

MAX_PENDING, LEVEL = 26_000, 0.9
LOADS, NUDGE = (0.6, 0.85, 1.0, 1.2, 1.5), 0.03


def main() -> None:
    """Run everything asked for, print the figures and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=Path, nargs="*", default=[], help="label files to tell the times of")
    parser.add_argument("--time-labels", type=int, default=0, help="workloads to label now, for the time")
    parser.add_argument("--gradients", type=Path, help="labels to train the differentiable surrogate on")
    parser.add_argument("--runs", type=Path, help="measured runs, for the real optima")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    surrogates = {name: load_surrogate(name) for name in MODELS.values()}
    figures: dict[str, Any] = {
        "environment": environment("numpy", "scikit-learn", "jax"),
        "scores": {name: {"best": each.best, **each.scores} for name, each in surrogates.items()},
        "prediction": prediction(next(iter(surrogates.values()))),
        "labels": [label_times(Dataset.read(path).about) for path in arguments.labels],
    }
    if arguments.time_labels:
        figures["labels"].append(timed_labels(arguments.time_labels))
    if arguments.gradients:
        figures["gradients"] = gradients(Dataset.read(arguments.gradients))
    if arguments.runs:
        runs = read_runs(arguments.runs)
        figures["optima"] = [row for model, name in MODELS.items() for row in optima(runs, model, surrogates[name])]
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def report(figures: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"{'held-back labels':44} {'A %':>7} {'S %':>7} {'tokens/s %':>10} {'starved F1':>10}")
    for name, scores in figures["scores"].items():
        for kind in ("tree", "rounded", "boosting", "best"):
            told = list(scores[kind].values())
            print(f"{name[:33]:33} {kind:10} {told[0]:7.2f} {told[1]:7.2f} {told[2]:10.2f} {told[3]:10.3f}")
    took = figures["prediction"]
    print(
        f"\n{took['trees']} trees: {took['one_us']:.1f} µs for one, {took['batch_us_each']:.2f} µs each of "
        f"{took['batch']:,}; of the processor's time {took['one_cpu_us']:.1f} and {took['batch_cpu_us_each']:.2f} µs"
    )
    print(f"scikit-learn: {took['scikit_learn_one_us']:.1f} µs, {took['scikit_learn_batch_us_each']:.2f} µs")
    for each in figures["labels"]:
        print(f"{each['workloads']} labels in {each['total_s']:.0f} s: {each['seconds']}")
        low, high = each["published_pipeline_days"]
        print(f"the published pipeline: {low:.0f} to {high:.0f} days")
    for each in figures.get("gradients", {}).get("at", []):
        print(f"gradients at {each['load']} of the load sustained: {each['requests']}, {each['slots']}")
    for each in figures.get("optima", []):
        print(
            f"{each['model'][:6]} {each['scenario']:42} best {each['measured']} chosen {each['chosen']} regret "
            f"{100 * each['regret']:.2f} %{' starved' if each['starved'] else ''}; checked {each['checked_by_twin']} "
            f"{100 * each['checked_regret']:.2f} %; interval {each['interval_holds']}"
        )


def shortest(
    call: Callable[[], object], repeats: int, number: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Shortest time of a call in seconds."""
    times = []
    for _ in range(repeats):
        began = clock()
        for _ in range(number):
            call()
        times.append((clock() - began) / number)
    return min(times)


def prediction(surrogate: Surrogate) -> dict[str, Any]:
    """Microseconds per workload for adapters, slots and throughput together; scikit-learn's own beside it."""
    calibration = load_calibration(surrogate.calibration)
    described = describe(calibration, Space().sample(1024, seed=11))
    values, boosting = described.values, {target: surrogate.of(target, "boosting") for target in OPTIMUM}
    many = np.resize(values, (BATCH, values.shape[1]))

    def predict(rows: Any) -> list[Any]:
        return [each.predict(rows) for each in boosting.values()]

    theirs = [
        HistGradientBoostingRegressor(max_iter=len(boosting[target].value), max_depth=4, early_stopping=False).fit(
            values, wanted
        )
        for target, wanted in zip(OPTIMUM, predict(values), strict=True)
    ]
    return {
        "environment": environment("numpy", "scikit-learn", "jax"),
        "trees": sum(len(each.value) for each in boosting.values()),
        "one_us": 1e6 * shortest(lambda: predict(values[:1]), 60, 100),
        "batch": BATCH,
        "batch_us_each": 1e6 * shortest(lambda: predict(many), 200) / BATCH,
        # Of the processor's time, whatever else keeps the machine busy.
        "one_cpu_us": 1e6 * shortest(lambda: predict(values[:1]), 60, 100, time.process_time),
        "batch_cpu_us_each": 1e6 * shortest(lambda: predict(many), 60, 1, time.process_time) / BATCH,
        "scikit_learn_one_us": 1e6 * shortest(lambda: [each.predict(values[:1]) for each in theirs], 20, 5),
        "scikit_learn_batch_us_each": 1e6 * shortest(lambda: [each.predict(many) for each in theirs], 20) / BATCH,
        "features_one_us": 1e6 * shortest(lambda: describe(calibration, Space().sample(1, seed=1)), 10),
    }


def label_times(about: Any) -> dict[str, Any]:
    """Seconds by part, and what the published pipeline would take for the same grid."""
    configurations = about["workloads"] * GRID * GRID
    return {name: about[name] for name in ("calibration", "workloads", "played", "seconds", "plays")} | {
        "total_s": sum(about["seconds"].values()),
        "grid_configurations": configurations,
        "published_pipeline_days": [configurations * each / 86400.0 for each in PUBLISHED_RUN_S],
    }


def timed_labels(workloads: int) -> dict[str, Any]:
    """Label now, with what the command does by default."""
    calibration = load_calibration(next(iter(MODELS.values())))
    with tempfile.TemporaryDirectory() as folder:
        labels = label(
            calibration, Space(), workloads, played=min(64, workloads), checkpoint_dir=Path(folder) / "parts"
        )
    return label_times(labels.about)


def gradients(labels: Dataset) -> dict[str, Any]:
    """Derivatives of log throughput by the differentiable surrogate, and by differences of the steady twin.

    Of the best servers of every tenth workload, at loads from well below to well above what they sustain.
    """
    calibration = load_calibration(labels.about["calibration"])
    began = time.perf_counter()
    smooth = train_neural(calibration, labels)
    trained_s = time.perf_counter() - began
    labels = labels.take(np.flatnonzero(labels.optima.max_loras > 0)[::10])
    rows = [_gradients_at(load, smooth, calibration, labels) for load in LOADS]
    return {"calibration": calibration.name, "trained_s": trained_s, "scores": dict(smooth.scores), "at": rows}


def _gradients_at(load: float, smooth: NeuralSurrogate, calibration: Calibration, labels: Dataset) -> dict[str, Any]:
    questions, slots = labels.workloads, labels.optima.max_loras
    sent = load * labels.optima.sustained_per_s - questions.base_rate_per_s
    adapters = np.maximum(sent / questions.rates_per_s.mean(axis=1), slots + 1.0)
    inputs = SurrogateInputs.of(calibration, questions, adapters, slots)

    def log_throughput(nudge: Any, name: str) -> Any:
        changed = dataclasses.replace(inputs, **{name: getattr(inputs, name) * jnp.exp(nudge)})
        return jnp.log(smooth.predict(calibration.costs, changed).throughput_tokens_per_s).sum()

    def twin(asked: WorkloadBatch, given: Any) -> Any:
        return np.log(simulate_workloads(calibration, asked, adapters, given).throughput_tokens_per_s.astype(float))

    def ours(name: str) -> Any:
        return np.asarray(jax.grad(log_throughput)(jnp.zeros(slots.shape), name))

    up, down = (
        twin(dataclasses.replace(questions, rates_per_s=questions.rates_per_s * np.exp(side * NUDGE)), slots)
        for side in (1, -1)
    )
    step = np.maximum(slots // 10, 1)
    more, fewer = slots + step, np.maximum(slots - step, 1)
    pairs = {
        "requests": (ours("rates_per_s"), (up - down) / (2 * NUDGE)),
        "slots": (ours("max_loras"), (twin(questions, more) - twin(questions, fewer)) / np.log(more / fewer)),
    }
    return {"load": load} | {
        name: {
            "surrogate": float(np.nanmedian(a)),
            "twin": float(np.nanmedian(b)),
            "median_difference": float(np.nanmedian(np.abs(a - b))),
        }
        for name, (a, b) in pairs.items()
    }


def optima(runs: Runs, model: str, surrogate: Surrogate) -> list[dict[str, Any]]:
    """Real optima: what the surrogate would take among the configurations measured, and what that loses."""
    calibration = load_calibration(surrogate.calibration)
    chosen = (runs.set == "optimum") & (runs.model == model)
    return [
        {"model": model, "scenario": scenario}
        | _optimum(runs, np.flatnonzero(chosen & (runs.scenario == scenario)), calibration, surrogate)
        for scenario in dict.fromkeys(runs.scenario[chosen].tolist())
    ]


def _optimum(runs: Runs, rows: Any, calibration: Calibration, surrogate: Surrogate) -> dict[str, Any]:
    started, adapters, slots = runs.started[rows], runs.max_cpu_loras[rows], runs.max_loras[rows]
    throughput = np.where(started, np.nan_to_num(runs.throughput_tokens_per_s[rows]), 0.0)
    tokens = (runs.mean_input_tokens + runs.mean_output_tokens)[rows]
    starved = ~started | (throughput <= 0.9 * runs.arrival_rate_per_s(MAX_PENDING)[rows] * tokens)
    best = _measured_best(adapters, slots, throughput, starved)
    question = _question(runs, rows[started], calibration)
    described = describe(calibration, question)
    logs = {name: float(surrogate.of(name).predict(described.values)[0]) for name in OPTIMUM}
    full = float(described.full_per_s[0])
    predicted = int(adapters_of(question, np.array([full * np.exp(logs["adapters"])]))[0]), round(np.exp(logs["slots"]))
    given = with_slots(described.values, slots[np.newaxis])[0]
    sustained = full * np.exp(surrogate.of("starved").predict(given))
    told = question.offered_per_s(adapters[np.newaxis])[0] > sustained
    possible = np.flatnonzero(~told & (slots <= described.most_slots[0]))
    last = possible[adapters[possible] == adapters[possible].max()]
    # Its slots are the fewest that do: where just as many were not measured, the next more.
    last = last[np.argsort(slots[last])]
    alone = last[min(np.searchsorted(slots[last], predicted[1]), last.size - 1)]
    near = last[np.abs(np.log(slots[last] / slots[alone])) <= np.log(2.0)]
    checked = _by_twin(calibration, question, adapters, slots, near)
    width = np.hypot(surrogate.width("adapters", LEVEL), norm.ppf(0.5 + 0.5 * LEVEL) * calibration.capacity_error)
    held = [adapters_of(question, np.array([full * np.exp(logs["adapters"] + side * width)]))[0] for side in (-1, 1)]
    more = adapters[slots == slots[best]]
    beyond = more[more > adapters[best]].min(initial=np.iinfo(np.int64).max)
    return {
        "measured": [int(adapters[best]), int(slots[best])],
        "predicted": list(predicted),
        "chosen": [int(adapters[alone]), int(slots[alone])],
        "regret": float(1.0 - throughput[alone] / throughput[best]),
        "starved": bool(starved[alone]),
        "checked_by_twin": [int(adapters[checked]), int(slots[checked])],
        "checked_regret": float(1.0 - throughput[checked] / throughput[best]),
        "checked_starved": bool(starved[checked]),
        "smape_adapters": smape([adapters[alone]], [adapters[best]]),
        "smape_slots": smape([slots[alone]], [slots[best]]),
        "within_1_percent": int(np.sum(~starved & (throughput >= 0.99 * throughput[best]))),
        "configurations": int(rows.size),
        "verdicts_right": float(np.mean(told[started] == starved[started])),
        # The real optimum lies between the last number of adapters that did not starve and the first that did.
        "interval_holds": bool(held[0] <= beyond and held[1] >= adapters[best]),
    }


def _measured_best(adapters: Any, slots: Any, throughput: Any, starved: Any) -> int:
    """Of each slot count the last A before the first starved one, of those the highest throughput."""
    last = []
    for each in np.unique(slots):
        upwards = np.flatnonzero(slots == each)
        upwards = upwards[np.argsort(adapters[upwards], kind="stable")]
        last += upwards[: int(np.argmax(np.append(starved[upwards], True)))][-1:].tolist()
    return max(last, key=lambda row: throughput[row])


def _question(runs: Runs, rows: Any, calibration: Calibration) -> WorkloadBatch:
    """The workload of a scenario; its name tells rates and ranks."""
    lengths = calibration.runs
    assert lengths is not None
    words = str(runs.scenario[rows[0]]).removeprefix("rate_").split("_size_")
    rates, ranks = ([float(word) for word in part.split("-")] for part in words)
    output = float(runs.mean_output_tokens[rows].mean()) * lengths.output_share
    numbers = {
        "most_adapters": np.inf,
        "base_rate_per_s": 0.0,
        "mean_input_tokens": float(runs.mean_input_tokens[rows].mean()),
        "mean_output_tokens": output,
        "output_spread": lengths.output_std_tokens / output,
        "kv_tokens_per_request": lengths.kv_tokens_per_request,
        "gpu_memory_bytes": calibration.gpu.memory_bytes,
        "gpu_memory_utilization": 0.9,
        "max_num_seqs": runs.max_num_seqs[rows[0]],
        "max_num_batched_tokens": runs.max_num_batched_tokens[rows[0]],
        "max_pending": MAX_PENDING,
        "horizon_s": float(runs.duration_s[rows].mean()),
    }
    columns = {name: np.array([value], np.float64) for name, value in numbers.items()}
    return WorkloadBatch(rates_per_s=np.array([rates]), ranks=np.array([ranks]), **columns)


def _by_twin(calibration: Calibration, question: WorkloadBatch, adapters: Any, slots: Any, rows: Any) -> int:
    """Of a few configurations the one that the steady twin finds best: unlikely to starve first, then throughput."""
    asked = question.take(np.zeros(rows.size, np.int64))
    times = residence_times(question.output_spread)
    law = ResidenceTime(*(np.asarray(leaf)[:, 0] for leaf in (times.finished, times.remaining, times.weight)))
    found = assess(calibration, asked.scenarios(calibration, adapters[rows], slots[rows]), law)
    order = np.lexsort((-found["throughput_tokens_per_s"], found["starved"]))
    return int(rows[order[0]])


if __name__ == "__main__":
    main()
