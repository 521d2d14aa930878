"""Whether recommendations hold, and whether they are timid: workloads of many kinds, each answer played anew.

python benchmarks/recommendations.py --json results.json      (--quick: four of the workloads, shorter)

It takes about an hour on two cores. Workloads that stand in the results already are not asked again.

Every workload is asked for its highest goodput, and the answer is played by the event twin with eight seeds that the
search has not seen. A play is kept if its attainment is at most a point below what was asked for and 97 % of the
requests are served. An answer is timid if a tenth more adapters are kept with all eight seeds, with some number of
slots of a coarse grid, and the batch limits of the answer or twice as many requests. What the answer keeps in hand for
the calibration's error counts against it there; whether those adapters would leave as much in hand is told apart.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import REPOSITORY, environment

from lora_capacity import InfeasibleError, Recommendation, Workload, load_calibration, recommend, simulate
from lora_capacity.calibration import Calibration
from lora_capacity.run.steady import enable_compilation_cache
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search.margin import judged_columns, load_factors
from lora_capacity.search.objective import KEPT_UP

LLAMA, QWEN = "llama-3.1-8b-instruct-h100-64gb", "qwen-2.5-7b-instruct-h100-64gb"
SEEDS = range(101, 109)
LESS_ATTAINMENT, SERVED, MORE = 0.01, 0.97, 1.1
SLOT_RATIO = 1.3
QUICK, QUICK_HORIZON_S = ("idle", "forty slots short", "bursty", "zipf list"), 600.0

CHAT = ({"mean": 220, "std": 250, "min": 4, "max": 1024}, {"mean": 200, "std": 210, "min": 4, "max": 1024})
LONG_PROMPTS = ({"mean": 1800, "std": 1200, "min": 50, "max": 6000}, {"mean": 150, "std": 120, "min": 4, "max": 800})
LONG_ANSWERS = ({"mean": 200, "std": 150, "min": 4, "max": 800}, {"mean": 650, "std": 500, "min": 10, "max": 2500})
SIX_HUNDRED = ({"mean": 220, "std": 250, "min": 4, "max": 1024}, {"mean": 600, "std": 400, "min": 4, "max": 2048})
SHORT = ({"mean": 400, "std": 200, "min": 20, "max": 1500}, {"mean": 20, "std": 15, "min": 1, "max": 80})
SUPPORT = ({"mean": 900, "std": 700, "min": 20, "max": 6000}, {"mean": 200, "std": 180, "min": 4, "max": 1500})
SECOND = {"ttft": 1000}
EXAMPLES = REPOSITORY / "examples"


def mix(rates: list[float], ranks: list[int], lengths: tuple[Any, Any] = CHAT, **more: Any) -> dict[str, Any]:
    """Return a workload of adapters dealt round-robin."""
    requests = dict(zip(("input_tokens", "output_tokens"), lengths, strict=True))
    return {"adapters": {"mix": {"rates_per_s": rates, "ranks": ranks}}, "requests": requests, **more}


def zipf(
    count: int, total_per_s: float, ranks: list[int], lengths: tuple[Any, Any] = CHAT, **more: Any
) -> dict[str, Any]:
    """Return a workload of many adapters whose rates fall off as in a Zipf law."""
    rates = 1.0 / np.arange(1, count + 1)
    return mix(np.round(total_per_s * rates / rates.sum(), 6).tolist(), (ranks * count)[:count], lengths, **more)


WORKLOADS: dict[str, tuple[str, dict[str, Any] | Path]] = {
    "idle": (LLAMA, mix([0.02, 0.01], [16])),
    "hardly asked for": (LLAMA, mix([0.0125, 0.006, 0.003], [16])),
    "busy": (LLAMA, mix([1.6, 1.0, 0.8, 0.6], [16])),
    "very busy": (QWEN, mix([3.0, 2.0], [8])),
    "forty slots short": (LLAMA, mix([0.083, 0.05, 0.02, 0.01], [16], SUPPORT, goodput={"ttft": 500})),
    "bursty": (LLAMA, mix([0.12, 0.06, 0.03], [8], arrivals={"process": "gamma", "cv": 2.5})),
    "very bursty": (QWEN, mix([0.2], [16], arrivals={"process": "gamma", "cv": 4.0})),
    "regular": (LLAMA, mix([0.2, 0.1], [16], arrivals={"process": "gamma", "cv": 0.5})),
    "base model beside": (LLAMA, mix([0.1, 0.05], [16], base_model={"rate_per_s": 6.0})),
    "base model above all": (QWEN, mix([0.02], [32], base_model={"rate_per_s": 15.0})),
    "rank 64": (LLAMA, mix([0.2, 0.1], [64])),
    "rank 128, few": (QWEN, mix([0.8, 0.4], [128])),
    "long prompts": (LLAMA, mix([0.05, 0.02], [16], LONG_PROMPTS)),
    "long prompts, first token": (QWEN, mix([0.1, 0.03], [16], LONG_PROMPTS, goodput={"ttft": 800})),
    "long answers": (LLAMA, mix([0.03, 0.015], [16], LONG_ANSWERS)),
    "long answers, steady": (QWEN, mix([0.05], [8], LONG_ANSWERS, goodput={"ttft": 2000, "tpot": 40})),
    "classification": (LLAMA, mix([0.5, 0.2], [8], SHORT, goodput={"ttft": 300})),
    "zipf list": (LLAMA, zipf(200, 30.0, [8, 16, 16, 32])),
    "zipf, bursty": (QWEN, zipf(400, 45.0, [16], arrivals={"process": "gamma", "cv": 2.0})),
    "mixed ranks": (LLAMA, mix([0.4, 0.05, 0.0125], [8, 16, 64])),
    "tight first token": (LLAMA, mix([0.3, 0.1], [16], goodput={"ttft": 250})),
    "tight per token": (LLAMA, mix([0.3, 0.1], [16], goodput={"ttft": 2000, "tpot": 30})),
    "whole answer": (QWEN, mix([0.3, 0.1], [16], goodput={"e2el": 20000}, attainment=0.9)),
    "nearly all": (LLAMA, mix([0.3, 0.1], [16], goodput={"ttft": 1000}, attainment=0.99)),
    "idle, half a second": (LLAMA, mix([0.02, 0.01], [16], goodput={"ttft": 500})),
    "hardly asked for, 0.7 s": (LLAMA, mix([0.0125, 0.003], [16], goodput={"ttft": 700})),
    "base model beside, 1 s": (LLAMA, mix([0.1, 0.05, 0.02], [16], base_model={"rate_per_s": 6.0}, goodput=SECOND)),
    "long prompts, 1.5 s": (LLAMA, mix([0.05, 0.02], [16], LONG_PROMPTS, goodput={"ttft": 1500})),
    "600 tokens out": (LLAMA, mix([0.05, 0.025], [16], SIX_HUNDRED, goodput=SECOND)),
    "of the Start page": (LLAMA, mix([0.4, 0.05, 0.0125], [8, 16, 16], goodput=SECOND, max_pending=26000)),
    "examples/few_busy.yaml": (LLAMA, EXAMPLES / "few_busy.yaml"),
    "examples/many_idle.yaml": (LLAMA, EXAMPLES / "many_idle.yaml"),
    "examples/mixed_ranks.yaml": (LLAMA, EXAMPLES / "mixed_ranks.yaml"),
}
"""Calibration, and the content of a workload file or where one lies."""


def main() -> None:
    """Ask, play, print a table and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a few workloads, ten minutes each")
    parser.add_argument("--cache", type=Path, help="keep what is compiled in this folder")
    arguments = parser.parse_args()
    if arguments.cache:
        enable_compilation_cache(arguments.cache)
    names = QUICK if arguments.quick else tuple(WORKLOADS)
    rows = []
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["workloads"]
    for name in [each for each in names if each not in {row["workload"] for row in rows}]:
        calibration, content = WORKLOADS[name]
        workload = Workload.from_file(content) if isinstance(content, Path) else Workload.from_mapping(content)
        if arguments.quick:
            workload = dataclasses.replace(workload, horizon_s=QUICK_HORIZON_S)
        rows.append(tried(name, workload, load_calibration(calibration)))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            found = {"environment": environment("jax"), "workloads": rows, "summary": summed_up(rows)}
            arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summed_up(rows)))


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of plays kept, and of workloads of which the answer is not timid."""
    answered = [row for row in rows if row["adapters"]]
    return {
        "workloads": len(rows),
        "answered": len(answered),
        "plays": len(SEEDS) * len(answered),
        "plays_kept": sum(row["kept"] for row in answered) / (len(SEEDS) * max(len(answered), 1)),
        "not_timid": sum(not row["timid"] for row in answered) / max(len(answered), 1),
        "not_timid_with_margin": sum(not row["timid_with_margin"] for row in answered) / max(len(answered), 1),
        "seconds": sum(row["seconds"] for row in rows),
    }


def tried(name: str, workload: Workload, calibration: Calibration) -> dict[str, Any]:
    """Return what is recommended, how its plays fare, and whether more would hold."""
    start, cpu = time.perf_counter(), time.process_time()
    try:
        found = recommend(workload, calibration)
    except InfeasibleError as error:
        return {"workload": name, "adapters": None, "why": str(error), "seconds": time.perf_counter() - start}
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    best = found.best
    limits = {"max_num_seqs": best.max_num_seqs, "max_num_batched_tokens": best.max_num_batched_tokens}
    attainment, served, ttft_s = play(
        workload, calibration, best.max_cpu_loras, [best.max_loras], list(SEEDS), **limits
    )
    kept = keeps(workload, attainment, served)[0]
    return {
        "workload": name,
        "adapters": best.max_cpu_loras,
        "max_loras": best.max_loras,
        **limits,
        "headroom": found.told.critical_load,
        "asked": workload.goodput.attainment,
        "kept": int(kept.sum()),
        "worst_attainment": float(attainment.min()),
        "worst_served": float(served.min()),
        "bounds_ms": workload.goodput.to_ms(),
        "ttft_s": [float(ttft_s.min()), float(ttft_s.max())],
        **timid(workload, calibration, found),
        **took,
    }


def timid(workload: Workload, calibration: Calibration, found: Recommendation) -> dict[str, Any]:
    """Return a configuration of a tenth more adapters that is kept with all seeds, and whether it is under the margin.

    ``timid`` is empty if there is none; ``timid_with_margin`` whether it is kept at the load of the answer's margin
    too, on average over the seeds.
    """
    best, available = found.best, workload.adapters.max_count
    more = int(np.ceil(MORE * best.max_cpu_loras))
    if available is not None and more > available:
        return {"timid": "", "timid_with_margin": False}
    beyond = np.array([np.hypot(calibration.capacity_error, best.extrapolation_error)])
    margin = float(load_factors(beyond, found.risk, 2)[0, 1])
    count = 2 + int(np.log(more) / np.log(SLOT_RATIO))
    slots = np.unique(np.append(np.rint(np.geomspace(1, more, count)), min(best.max_loras, more)).astype(int)).tolist()
    told = ""
    for seqs in (best.max_num_seqs, 2 * best.max_num_seqs):
        limits = {"max_num_seqs": seqs, "max_num_batched_tokens": max(best.max_num_batched_tokens, seqs)}
        first = keeps(workload, *play(workload, calibration, more, slots, list(SEEDS)[:1], **limits)[:2])
        left = [each for each, kept in zip(slots, first.all(axis=1), strict=True) if kept]
        if not left:
            continue
        every = keeps(workload, *play(workload, calibration, more, left, list(SEEDS), **limits)[:2]).all(axis=1)
        left = [each for each, kept in zip(left, every, strict=True) if kept]
        if not left:
            continue
        told = told or f"{more} / {left[0]}, {seqs} requests"
        farther = play(workload, calibration, more, left, list(SEEDS), margin, **limits)
        attainment, served = (column.mean(axis=1) for column in farther[:2])
        safe = (attainment >= workload.goodput.attainment) & (served >= KEPT_UP)
        if safe.any():
            return {"timid": f"{more} / {left[int(safe.argmax())]}, {seqs} requests", "timid_with_margin": True}
    return {"timid": told, "timid_with_margin": False}


def play(
    workload: Workload,
    calibration: Calibration,
    adapters: int,
    slots: list[int],
    seeds: list[int],
    load: float = 1.0,
    **limits: int,
) -> tuple[Any, ...]:
    """Return attainment, share served and mean time to first token, ``[slots, seeds]``."""
    scenarios = build_scenarios(workload, calibration, adapters, np.repeat(slots, len(seeds)), **limits)
    results = simulate(calibration, scenarios, workload, engine="event", seed=seeds * len(slots), load=load)
    columns = judged_columns(scenarios.scaled(np.full(scenarios.status.shape, load)), results)
    shape = (len(slots), len(seeds))
    return tuple(columns[name].reshape(shape) for name in ("attainment", "served", "ttft_s"))


def keeps(workload: Workload, attainment: Any, served: Any) -> Any:
    """Whether plays are kept."""
    return (attainment >= workload.goodput.attainment - LESS_ATTAINMENT) & (served >= SERVED)


if __name__ == "__main__":
    main()
