"""``lora-capacity simulate``: one configuration in detail."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity_cli.options import calibration_option, examples, format_option, server_options, workload_argument
from lora_capacity_cli.output import (
    gibibytes,
    milliseconds,
    percent,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    shown,
)
from lora_capacity_cli.runtime import prepare

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.server import ServerConfig
    from lora_capacity.twin import Results, Scenarios

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")


@click.command(
    epilog=examples(
        "lora-capacity simulate examples/many_idle.yaml --adapters 128 --max-loras 32",
    )
)
@workload_argument
@calibration_option
@click.option("--adapters", type=int, required=True, metavar="A", help="Adapters served (max_cpu_loras).")
@click.option("--max-loras", type=int, required=True, metavar="S", help="Slots.")
@click.option(
    "--engine", type=click.Choice(["steady"]), default="steady", show_default=True, help="Which twin predicts."
)
@server_options(grids=False)
@format_option
def simulate(
    workload: Path,
    calibration: str,
    adapters: int,
    max_loras: int,
    engine: str,
    settings: dict[str, Any],
    output_format: str,
) -> None:
    """Predict one configuration in detail.

    WORKLOAD is a YAML or JSON file of adapters and traffic.
    """
    prepare()
    from lora_capacity.calibration import load_calibration
    from lora_capacity.server import ServerConfig
    from lora_capacity.sweep import simulate as run
    from lora_capacity.sweep import table
    from lora_capacity.twin import StayLaw, build_scenarios
    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    known = load_calibration(calibration)
    scenarios = build_scenarios(asked, known, adapters=[adapters], max_loras=[max_loras], **settings)
    results = run(known, scenarios, StayLaw.of_lengths(asked.output_tokens))
    row = {name: column[0].item() for name, column in table(scenarios, results).items()}
    resolved = {name: row.pop(name) for name in _SETTINGS}
    server = ServerConfig.with_defaults(known.behaviour, known.gpu, known.model, **settings | resolved)
    document = {
        "calibration": known.name,
        "model": known.model.name,
        "engine": engine,
        **resolved,
        "prediction": row,
        "classes": _classes(scenarios, results),
        "memory": _memory(known, server),
        "warnings": _warnings(known, resolved, row["status"]),
        "serve_command": server.serve_command(known.model.name),
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)


def _classes(scenarios: "Scenarios", results: "Results") -> list[dict[str, Any]]:
    """Return what becomes of adapters of each rate and rank; padding is left out."""
    columns = {
        "rate_per_s": scenarios.class_rate_per_s,
        "rank": scenarios.class_rank,
        "adapters": scenarios.class_count,
        "service": results.class_service,
    }
    rows = [
        dict(zip(columns, values, strict=True))
        for values in zip(*(c[0].tolist() for c in columns.values()), strict=True)
    ]
    return [row | {"rank": int(row["rank"]), "adapters": int(row["adapters"])} for row in rows if row["adapters"] > 0]


def _memory(calibration: "Calibration", server: "ServerConfig") -> dict[str, float]:
    from lora_capacity.memory import plan_memory

    plan = plan_memory(
        calibration.model,
        calibration.gpu,
        calibration.memory,
        behaviour=calibration.behaviour,
        max_loras=server.max_loras,
        max_lora_rank=server.max_lora_rank,
        max_num_seqs=server.max_num_seqs,
        max_num_batched_tokens=server.max_num_batched_tokens,
        gpu_memory_utilization=server.gpu_memory_utilization,
        max_model_len=server.max_model_len,
        target_modules=server.reserved_modules,
        block_size=server.block_size,
    )
    purposes = (
        "weight",
        "slot",
        "activation",
        "other",
        "cuda_graph",
        "kv_cache",
        "headroom_no_kv_cache",
        "headroom_oom",
    )
    return {f"{purpose}_bytes": float(getattr(plan, f"{purpose}_bytes")[0]) for purpose in purposes}


def _warnings(calibration: "Calibration", settings: dict[str, int], status: str) -> list[str]:
    given = {"adapters": settings["max_cpu_loras"]} | settings
    found = [
        f"{name} {given[name]} lies outside {low:g} to {high:g}, which the calibration was fitted over"
        for name, (low, high) in calibration.fitted_ranges.items()
        if name in given and not low <= given[name] <= high
    ]
    refused = {
        "oom": "the server runs out of GPU memory while it starts",
        "no_kv_cache": "the server does not start: its KV cache is smaller than one request of max_model_len",
    }
    return found + [refused[status]] * (status in refused)


def _print(document: dict[str, Any]) -> None:
    row, memory = document["prediction"], document["memory"]
    starved = "starved: " if row["starved"] else ""
    print_facts(
        f"{document['max_cpu_loras']:,} adapters, {document['max_loras']:,} slots on {document['model']}",
        {
            "status": row["status"].replace("_", " "),
            "throughput": f"{shown(row['throughput_tokens_per_s'])} tokens/s",
            "offered load": f"{shown(row['offered_tokens_per_s'])} tokens/s, {starved}{percent(row['service'])} served",
            "inter-token latency": milliseconds(row["itl_s"]),
            "time to first token": milliseconds(row["ttft_s"]),
            "step time": milliseconds(row["step_time_s"]),
            "requests running, waiting": f"{shown(row['mean_running'])}, {shown(row['mean_waiting'])}",
            "adapters in a batch": shown(row["active_adapters"]),
            "adapter loads": f"{shown(row['loads_per_s'])} per s",
            "KV cache in use": f"{percent(row['kv_usage'])} of {shown(row['kv_cache_tokens'])} tokens",
            "bound": "nothing" if row["limit"] == "none" else row["limit"].replace("_", " "),
        },
    )
    print_facts(
        "GPU memory", {name.removesuffix("_bytes").replace("_", " "): gibibytes(memory[name]) for name in memory}
    )
    classes = [
        {"rate per s": each["rate_per_s"], "rank": each["rank"], "adapters": each["adapters"]}
        | {"served %": each["service"] * 100.0}
        for each in document["classes"]
    ]
    print_table("Adapters by rate and rank", classes)
    print_warnings(document["warnings"])
    click.echo(document["serve_command"])
