"""How far the steady twin is from the event twin on random workloads, drawn from a low-discrepancy sequence.

python benchmarks/steady_against_event.py --json results.json
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import environment
from numpy.typing import NDArray
from scipy.stats import qmc

from lora_capacity.calibration import Calibration, bundled_names, load_calibration
from lora_capacity.costs import step_time_s
from lora_capacity.run import simulate
from lora_capacity.run.batches import Observation
from lora_capacity.run.events import Source, run_events
from lora_capacity.run.requests import pack_first
from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import Bottleneck, Results, Scenarios, build_scenarios
from lora_capacity.scenarios.scenarios import LatencyBounds
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import Workload

CLASSES = 4
"""Different rates and ranks in a workload, at most."""

KEEPS_UP = 0.99
"""Share of the requests that a server that keeps up completes."""

GOALS = {"service": (0.02, 0.95), "ttft": (1.5, 0.90), "ttft_p95": (2.0, 0.90)}
"""How near the twins are to be: points of the share served, factors of the times; and on what share of workloads."""

QUANTILE = 0.95

WORST = 10


@dataclass(frozen=True)
class Case:
    """A workload on a server."""

    calibration: Calibration
    workload: Workload
    adapters: int
    scenarios: Scenarios
    told: dict[str, Any]


def main() -> None:
    """Predict every workload with both twins, print how far they are apart, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=int, default=320)
    parser.add_argument(
        "--seeds", type=int, default=3, help="times that the event twin plays each, with other requests"
    )
    parser.add_argument("--horizon-s", type=float, default=1800.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    cases = draw_cases(arguments.workloads, arguments.horizon_s)
    rows = compare(cases, play(cases, arguments.seeds))
    figures = {
        "environment": environment("jax", "numpy", "scipy"),
        "seeds": arguments.seeds,
        "horizon_s": arguments.horizon_s,
        **summarise(rows),
    }
    print_figures(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def draw_cases(count: int, horizon_s: float) -> list[Case]:
    """Return the first workloads of the sequence whose servers start."""
    calibrations = [load_calibration(name) for name in bundled_names()]
    points = qmc.Sobol(16, scramble=True, rng=13).random_base2(int(np.ceil(np.log2(2 * count))))
    cases: list[Case] = []
    for point in points:
        case = _case(calibrations, point, horizon_s)
        if case is not None:
            cases.append(case)
        if len(cases) == count:
            break
    return cases


def _log(u: float, low: float, high: float) -> float:
    return float(low * (high / low) ** u)


def _case(calibrations: list[Calibration], point: NDArray[np.float64], horizon_s: float) -> Case | None:
    """Return the workload of a point of the unit cube, None if its server does not start.

    Utilization is of the full batch with all slots in use.
    """
    u = iter(point.tolist())
    calibration = calibrations[int(next(u) * len(calibrations))]
    adapters = round(_log(next(u), 4, 400))
    kinds, ratio = 1 + int(next(u) * CLASSES), _log(next(u), 1.0, 6.0)
    rank = (8, 16, 32)[int(next(u) * 3)]
    ranks = [rank] if next(u) < 0.7 else [8, rank]
    lengths = {"input": _log(next(u), 40, 1500), "output": _log(next(u), 30, 500)}
    spread = 0.3 + 0.9 * next(u)
    server = {
        "max_num_seqs": (32, 64, 128, 256, 512)[int(next(u) * 5)],
        "max_num_batched_tokens": (1024, 2048, 8192)[int(next(u) * 3)],
        "gpu_memory_utilization": 0.8 + 0.12 * next(u),
    }
    base_share = max(0.8 * next(u) - 0.4, 0.0)
    cv = next(u)
    cv = 1.0 if cv < 0.5 else _log(2 * cv - 1, 0.6, 3.0)
    utilization, slots = 0.2 + next(u), _log(next(u), 0.5, 2.5)

    def workload(per_s: float) -> Workload:
        rates = ratio ** np.linspace(0, -1, kinds) if kinds > 1 else np.ones(1)
        rates *= per_s * (1 - base_share) / (rates[np.arange(adapters) % kinds].sum())
        return Workload.from_mapping(
            {
                "adapters": {"mix": {"rates_per_s": rates.tolist(), "ranks": ranks}},
                "base_model": {"rate_per_s": per_s * base_share},
                "requests": {
                    f"{name}_tokens": {"mean": mean, "std": spread * mean, "min": 2, "max": round(6 * mean) + 16}
                    for name, mean in lengths.items()
                },
                "arrivals": {"process": "gamma", "cv": cv} if cv != 1.0 else {"process": "poisson"},
                "horizon_s": horizon_s,
            }
        )

    max_loras, asked = min(adapters, 8), workload(1.0)
    for _ in range(3):  # slots follow from the load, what the batch completes from the slots
        scenarios = build_scenarios(asked, calibration, adapters, max_loras, **server)
        if not scenarios.starts[0]:
            return None
        per_s, step_s = _full_batch(calibration, scenarios)
        asked = workload(utilization * per_s)
        rates, _ = asked.adapters.deal(adapters)
        active = -np.expm1(-rates * lengths["output"] * (0.3 + 0.7 * min(utilization, 1.0)) * step_s).sum()
        max_loras = int(np.clip(round(active * slots), 1, adapters))
    scenarios = build_scenarios(asked, calibration, adapters, max_loras, **server)
    if not scenarios.starts[0]:
        return None
    told = {
        **{"model": calibration.model.name, "adapters": adapters, "max_loras": max_loras, "utilization": utilization},
        **{"requests_per_s": utilization * per_s, "rate_ratio": ratio, "kinds": kinds, "max_lora_rank": max(ranks)},
        **{f"{name}_tokens": mean for name, mean in lengths.items()},
        **{"length_cv": spread, "base_share": base_share, "arrival_cv": cv, **server},
    }
    return Case(calibration, asked, adapters, scenarios, told)


def _full_batch(calibration: Calibration, scenarios: Scenarios) -> tuple[float, float]:
    """Return the requests per second that a full batch completes, and its step time."""
    inputs, outputs = float(scenarios.mean_input_tokens[0]), float(scenarios.mean_output_tokens[0])
    per_sequence = 1.0 + inputs / outputs
    running = min(
        float(scenarios.kv_cache_tokens[0] / scenarios.kv_tokens_per_request[0]),
        float(scenarios.max_num_batched_tokens[0]) / per_sequence,
        float(scenarios.max_num_seqs[0]),
    )
    slots = float(scenarios.max_loras[0])
    step_s = step_time_s(
        calibration.costs,
        **{"tokens": running * per_sequence, "prefill_tokens": running * (per_sequence - 1.0)},
        **{"kv_tokens": running * scenarios.kv_tokens_per_request[0], "adapters": min(slots, running)},
        **{"skipped": 0.0, "queued": 0.0, "loaded": 100.0, "max_loras": slots},
        max_lora_rank=scenarios.max_lora_rank[0],
    )
    return running / (outputs * float(step_s)), float(step_s)


def play(cases: list[Case], seeds: int) -> dict[str, NDArray[np.float64]]:
    """Return what the event twin says, means over the seeds, ``[cases]``: share completed, times to first token."""
    told = {name: np.zeros((len(cases), seeds)) for name in ("service", "ttft_s", "ttft_p95_s", "preemptions")}
    for calibration in {case.calibration.name: case.calibration for case in cases}.values():
        rows = [i for i, case in enumerate(cases) if case.calibration is calibration]
        pairs = [(i, seed) for i in rows for seed in range(seeds)]
        sampled = [cases[i].workload.sample_requests(cases[i].adapters, seed) for i, seed in pairs]
        scenarios = _together([with_classes(cases[i].scenarios, 2 * CLASSES) for i, _ in pairs])
        classes = []
        for i, _ in pairs:
            rates, ranks = cases[i].workload.adapters.deal(cases[i].adapters)
            _, own = np.unique(np.stack([rates, ranks], axis=1), axis=0, return_inverse=True)
            classes.append(own.reshape(-1))

        def draw(part: Any, indices: Any, most: Any, sampled: Any = sampled, classes: Any = classes) -> Any:
            requests, own = ([each[i] for i in indices] for each in (sampled, classes))
            return pack_first(part, requests, own, most.tolist(), seed=0, indices=indices)

        stays = _stack([ResidenceTime.of_lengths(cases[i].workload.output_tokens) for i, _ in pairs], axis=1)
        longest = max(int(requests.output_tokens.max()) for requests in sampled)
        found = run_events(calibration, scenarios, Source(draw, 0, stays, longest), Observation(), None, None)
        arrived = np.array([len(requests) for requests in sampled])
        completed = np.asarray(found.completed_per_s) * np.asarray(scenarios.horizon_s)
        quantiles = np.asarray(found.events.ttft_quantiles_s)
        columns = {
            "service": completed / arrived,
            "ttft_s": np.asarray(found.ttft_s),
            "ttft_p95_s": quantiles[:, 1],
            "preemptions": np.asarray(found.events.preemptions) / arrived,
        }
        for name, values in columns.items():
            told[name][rows] = values.reshape(len(rows), seeds)
    return told


def _together(parts: list[Scenarios]) -> Scenarios:
    together: Scenarios = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return together


def _stack(parts: list[Any], axis: int) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=axis), *parts)


def predict(cases: list[Case], ttft_s: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return what the steady twin says of each, its attainment of half and twice a time to first token included."""
    told: list[dict[str, Any]] = [{}] * len(cases)
    for calibration in {case.calibration.name: case.calibration for case in cases}.values():
        rows = [i for i, case in enumerate(cases) if case.calibration is calibration]
        scenarios = _together([with_classes(cases[i].scenarios, 2 * CLASSES) for i in rows])
        stays = _stack([ResidenceTime.of_lengths(cases[i].workload.output_tokens) for i in rows], axis=1)
        found: Results = simulate(calibration, scenarios, stays)
        later_s = np.asarray(found.client.ttft_s) - np.asarray(found.answered_ttft_s)
        factor = GOALS["ttft_p95"][0]
        attained = []
        for bound_s in (ttft_s[rows] / factor, ttft_s[rows] * factor):
            unbounded = np.full(len(rows), np.inf)
            bounds = LatencyBounds((bound_s + later_s).astype(np.float32), unbounded, unbounded)
            bounded = dataclasses.replace(scenarios, bounds=bounds)
            attained.append(np.asarray(simulate(calibration, bounded, stays).attainment))
        for place, i in enumerate(rows):
            told[i] = {
                "service": float(found.service[place]),
                "ttft_s": float(found.ttft_s[place]),
                "attained": [float(each[place]) for each in attained],
                "limit": Bottleneck(int(found.limit[place])).label,
            }
    return told


def compare(cases: list[Case], played: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Return what both twins say of each workload, and why they differ as far as it can be told."""
    rows = []
    predicted = predict(cases, played["ttft_p95_s"].mean(axis=1))
    for case, steady, *event in zip(
        cases, predicted, *(played[name].mean(axis=1) for name in ("service", "ttft_s", "ttft_p95_s")), strict=True
    ):
        service, ttft_s, ttft_p95_s = (float(value) for value in event)
        row = case.told | {
            "event": {"service": service, "ttft_s": ttft_s, "ttft_p95_s": ttft_p95_s},
            "steady": steady,
            "keeps_up": service >= KEEPS_UP,
            "service_points": abs(steady["service"] - service),
            "ttft_factor": _factor(steady["ttft_s"], ttft_s),
            "ttft_p95_near": steady["attained"][0] <= QUANTILE <= steady["attained"][1] + 1.0 - KEEPS_UP,
        }
        rows.append(row | {"why": _why(row)})
    return rows


def _factor(one: float, other: float) -> float:
    return float(np.exp(abs(np.log(one / other))))


def _why(row: dict[str, Any]) -> str:
    """Return the first that holds of what the steady twin is known to miss."""
    contended = row["max_loras"] < row["adapters"]
    per_adapter = row["requests_per_s"] * (1 - row["base_share"]) / row["adapters"]
    reasons = {
        "busy adapters that hold their slots for good": contended and per_adapter * row["output_tokens"] > 100.0,
        "bursts": row["arrival_cv"] > 1.5,
        "slots near their limit": contended and row["steady"]["limit"] in ("none", "slots"),
        "overload": row["steady"]["limit"] != "none",
    }
    return next((name for name, holds in reasons.items() if holds), "prompts among others")


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares within their goals, and the workloads that are furthest from them."""
    keeping = [row for row in rows if row["keeps_up"]]
    near = {
        "service": np.mean([row["service_points"] <= GOALS["service"][0] for row in rows]),
        "ttft": np.mean([row["ttft_factor"] <= GOALS["ttft"][0] for row in keeping]),
        "ttft_p95": np.mean([row["ttft_p95_near"] for row in keeping]),
    }
    worst_service = sorted(rows, key=lambda row: -row["service_points"])[:WORST]
    worst_ttft = sorted(keeping, key=lambda row: -row["ttft_factor"])[:WORST]
    return {
        "workloads": len(rows),
        "keep_up": len(keeping),
        "near": {
            name: {"within": GOALS[name][0], "share": float(share), "goal": GOALS[name][1]}
            for name, share in near.items()
        },
        "median_ttft_factor": float(np.median([row["ttft_factor"] for row in keeping])),
        "worst": {"service": worst_service, "ttft": worst_ttft},
    }


def print_figures(figures: dict[str, Any]) -> None:
    """Print the shares and the worst workloads."""
    seeds, horizon_s = figures["seeds"], figures["horizon_s"]
    print(f"{figures['workloads']} workloads of {horizon_s:g} s, {seeds} seeds; {figures['keep_up']} keep up")
    for name, each in figures["near"].items():
        print(f"{name}: within {each['within']:g} on {each['share']:.1%}, goal {each['goal']:.0%}")
    for name, rows in figures["worst"].items():
        print(f"furthest in {name}:")
        for row in rows:
            event, steady = row["event"], row["steady"]
            print(
                f"  A={row['adapters']} S={row['max_loras']} load {row['utilization']:.2f} cv {row['arrival_cv']:.1f}: "
                f"service {event['service']:.3f}, steady {steady['service']:.3f}; "
                f"TTFT {event['ttft_s']:.3g} s, steady {steady['ttft_s']:.3g} s ({row['why']})"
            )


if __name__ == "__main__":
    main()
