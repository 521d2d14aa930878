"""``lora-capacity simulate``: one configuration in detail."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.words import FAILURES, REFUSALS
from lora_capacity_cli.options import (
    calibration_option,
    engine_options,
    examples,
    format_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import (
    duration,
    gibibytes,
    percent,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    shown,
    spoken,
)
from lora_capacity_cli.runtime import prepare

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.engines import ServerConfig
    from lora_capacity.scenarios import EventDetails, Results
    from lora_capacity.workload import Workload

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
_MEMORY = {
    "weight_bytes": "weights",
    "slot_bytes": "adapter slots",
    "activation_bytes": "activations",
    "other_bytes": "other",
    "cuda_graph_bytes": "CUDA graphs",
    "kv_cache_bytes": "KV cache",
    "headroom_no_kv_cache_bytes": "KV cache beyond one request of max_model_len",
    "headroom_oom_bytes": "free at the tightest moment of the start",
}
_SHOWN = 12
_QUANTILES = {
    "ttft_quantiles_s": "time to first token",
    "tpot_quantiles_s": "time per further token",
    "e2e_quantiles_s": "time to last token",
}


@click.command(
    epilog=examples(
        "lora-capacity simulate examples/many_idle.yaml --adapters 128 --max-loras 32",
        "lora-capacity simulate examples/few_busy.yaml --adapters 24 --max-loras 8 --engine event --seed 1",
    )
)
@workload_argument
@calibration_option
@click.option("--adapters", type=int, required=True, metavar="A", help="Adapters served (max_cpu_loras).")
@click.option("--max-loras", type=int, required=True, metavar="S", help="Slots.")
@engine_options
@click.option(
    "--warmup-s", type=float, default=0.0, show_default=True, help="Event engine: time at the beginning left out."
)
@click.option(
    "--samples", type=int, default=0, show_default=True, help="Event engine: parts of the time told apart in the JSON."
)
@server_options(grids=False)
@format_option
def simulate(
    workload: Path,
    calibration: str,
    adapters: int,
    max_loras: int,
    engine: str,
    seed: int,
    warmup_s: float,
    samples: int,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Predict one configuration in detail.

    WORKLOAD is a YAML or JSON file of adapters and traffic.
    """
    prepare()
    from lora_capacity.calibration import load_calibration
    from lora_capacity.engines import ServerConfig
    from lora_capacity.run import play_workload
    from lora_capacity.run.steady import simulate as run
    from lora_capacity.scenarios import build_scenarios, table
    from lora_capacity.twins.steady import StayLaw
    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    known = load_calibration(calibration)
    scenarios = build_scenarios(asked, known, adapters=[adapters], max_loras=[max_loras], **settings)
    if engine == "event":
        results = play_workload(known, scenarios, asked, seed=seed, warmup_s=warmup_s, samples=samples)
    else:
        results = run(known, scenarios, StayLaw.of_lengths(asked.output_tokens))
    events = {} if results.events is None else {"events": _events(asked, adapters, seed, results.events)}
    shared = dataclasses.replace(results, events=None)
    row = {name: column.tolist()[0] for name, column in table(scenarios, shared).items()}
    resolved = {name: row.pop(name) for name in _SETTINGS}
    server = ServerConfig.with_defaults(known.behaviour, known.gpu, known.model, **settings | resolved)
    document = {
        "calibration": known.name,
        "model": known.model.name,
        "engine": engine,
        **resolved,
        "prediction": row,
        "classes": _classes(asked, adapters, results),
        **events,
        "memory": _memory(known, server),
        "warnings": _warnings(known, resolved, row["status"]),
        "serve_command": None if row["status"] in REFUSALS else server.serve_command(known.model.name),
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)


def _classes(workload: "Workload", adapters: int, results: "Results") -> list[dict[str, Any]]:
    """Return what becomes of adapters of each rate and rank."""
    classes = workload.classes([adapters])
    columns = {
        "rate_per_s": classes.rate_per_s,
        "rank": classes.rank,
        "adapters": classes.count[0],
        "service": results.class_service[0],
    }
    return [
        dict(zip(columns, values, strict=True))
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


def _events(workload: "Workload", adapters: int, seed: int, events: "EventDetails") -> dict[str, Any]:
    """Return what only the event twin tells; the adapters whose requests were completed least come first."""
    started = bool(events.max_kv_usage[0] >= 0)  # NaN where there is nothing to tell
    classes = workload.classes([adapters])
    rates, ranks = (column.repeat(classes.count[0]).tolist() for column in (classes.rate_per_s, classes.rank))
    columns = (events.adapter_arrived, events.adapter_completed, events.adapter_worst_wait_s)
    counts = (column[0].tolist() for column in columns)
    served = [
        {"rate_per_s": rate, "rank": rank, "arrived": arrived, "completed": completed, "worst_wait_s": wait_s}
        for rate, rank, arrived, completed, wait_s in zip(rates, ranks, *counts, strict=False)
        if started and arrived > 0
    ]
    shares = {
        "compute": events.compute_share,
        "scheduling": events.scheduling_share,
        "load": events.load_share,
        "idle": events.idle_share,
    }
    series = vars(events.series)
    return {
        "seed": seed,
        **{
            name: dict(zip(("p50", "p95", "p99"), getattr(events, name)[0].tolist(), strict=True))
            for name in _QUANTILES
        },
        "max_running": int(events.max_running[0]),
        "max_adapters": int(events.max_adapters[0]),
        "max_kv_usage": float(events.max_kv_usage[0]),
        "steps": int(events.steps[0]),
        "preemptions": int(events.preemptions[0]),
        "disk_loads": int(events.disk_loads[0]),
        "time_shares": {name: float(share[0]) for name, share in shares.items()},
        "worst_served": sorted(served, key=lambda each: each["completed"] / each["arrived"])[:_SHOWN],
        "series": {name: values[0].tolist() for name, values in series.items() if values.size},
    }


def _memory(calibration: "Calibration", server: "ServerConfig") -> dict[str, float]:
    plan = calibration.plan_memory(server)
    return {name: float(getattr(plan, name)[0]) for name in _MEMORY}


def _warnings(calibration: "Calibration", settings: dict[str, int], status: str) -> list[str]:
    found = calibration.extrapolations(adapters=settings["max_cpu_loras"], **settings)
    return found + ([FAILURES[status]] if status in FAILURES else [])


def _print(document: dict[str, Any]) -> None:
    row, memory = document["prediction"], document["memory"]
    starved = "starved: " if row["starved"] else ""
    print_facts(
        f"{document['max_cpu_loras']:,} adapters, {document['max_loras']:,} slots on {document['model']}",
        {
            "status": spoken(row["status"]),
            "throughput": f"{shown(row['throughput_tokens_per_s'])} tokens/s",
            "offered load": f"{shown(row['offered_tokens_per_s'])} tokens/s, {starved}{percent(row['service'])} served",
            "inter-token latency": duration(row["itl_s"]),
            "time to first token": duration(row["ttft_s"]),
            "step time": duration(row["step_time_s"]),
            "requests running, waiting": f"{shown(row['mean_running'])}, {shown(row['mean_waiting'])}",
            "adapters in a batch": shown(row["active_adapters"]),
            "adapter loads": f"{shown(row['loads_per_s'])} per s",
            "KV cache in use": f"{percent(row['kv_usage'])} of {shown(row['kv_cache_tokens'])} tokens",
            "bound": spoken(row["limit"]),
        },
    )
    print_facts("GPU memory", {text: gibibytes(memory[name]) for name, text in _MEMORY.items()})
    if "events" in document:
        _print_events(document["events"])
    _print_classes(document["classes"])
    print_warnings(document["warnings"])
    if document["serve_command"]:
        click.echo(document["serve_command"])


def _print_events(events: dict[str, Any]) -> None:
    shares = events["time_shares"]
    print_facts(
        f"Event by event, seed {events['seed']}",
        {
            **{
                f"{text}, 50, 95, 99 %": ", ".join(map(duration, events[name].values()))
                for name, text in _QUANTILES.items()
            },
            "most running, adapters": f"{shown(events['max_running'])}, {shown(events['max_adapters'])}",
            "fullest KV cache": percent(events["max_kv_usage"]),
            "engine steps": shown(events["steps"]),
            "preemptions": shown(events["preemptions"]),
            "adapters read from disk": shown(events["disk_loads"]),
            "time": ", ".join(
                f"{percent(shares[name])} {text}"
                for name, text in (("compute", "in steps"), ("load", "loading adapters"), ("idle", "idle"))
            ),
        },
    )
    rows = [
        {"rate per s": each["rate_per_s"], "rank": each["rank"], "requests": each["arrived"]}
        | {"completed": each["completed"], "longest wait s": each["worst_wait_s"]}
        for each in events["worst_served"]
    ]
    print_table("Worst served adapters", rows)


def _print_classes(classes: list[dict[str, Any]]) -> None:
    """Print the adapters by rate and rank, the worst served first and not too many of them."""
    worst = sorted(classes, key=lambda each: (math.isnan(each["service"]), each["service"]))[:_SHOWN]
    more = f", the worst served of {len(classes)} kinds" if len(classes) > _SHOWN else ""
    rows = [
        {"rate per s": each["rate_per_s"], "rank": each["rank"], "adapters": each["adapters"]}
        | {"served %": each["service"] * 100.0}
        for each in worst
    ]
    print_table(f"Adapters by rate and rank{more}", rows)
