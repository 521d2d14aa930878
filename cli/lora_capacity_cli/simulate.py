"""``lora-capacity simulate``: one configuration in detail."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity_cli.options import calibration_option, examples, format_option, server_options, workload_argument
from lora_capacity_cli.output import (
    bound_words,
    duration,
    gibibytes,
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
    from lora_capacity.twin import Results
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
_REFUSED = {
    "oom": "the server runs out of GPU memory while it starts",
    "no_kv_cache": "the server does not start: its KV cache is smaller than one request of max_model_len",
}
_SHOWN_CLASSES = 12


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
    row = {name: column.tolist()[0] for name, column in table(scenarios, results).items()}
    resolved = {name: row.pop(name) for name in _SETTINGS}
    server = ServerConfig.with_defaults(known.behaviour, known.gpu, known.model, **settings | resolved)
    document = {
        "calibration": known.name,
        "model": known.model.name,
        "engine": engine,
        **resolved,
        "prediction": row,
        "classes": _classes(asked, adapters, results),
        "memory": _memory(known, server),
        "warnings": _warnings(known, resolved, row["status"]),
        "serve_command": None if row["status"] in _REFUSED else server.serve_command(known.model.name),
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
    return {name: float(getattr(plan, name)[0]) for name in _MEMORY}


def _warnings(calibration: "Calibration", settings: dict[str, int], status: str) -> list[str]:
    given = {"adapters": settings["max_cpu_loras"]} | settings
    found = [
        f"{name} {given[name]} lies outside {low:g} to {high:g}, which the calibration was fitted over"
        for name, (low, high) in calibration.fitted_ranges.items()
        if name in given and not low <= given[name] <= high
    ]
    return found + ([_REFUSED[status]] if status in _REFUSED else [])


def _print(document: dict[str, Any]) -> None:
    row, memory = document["prediction"], document["memory"]
    starved = "starved: " if row["starved"] else ""
    print_facts(
        f"{document['max_cpu_loras']:,} adapters, {document['max_loras']:,} slots on {document['model']}",
        {
            "status": row["status"].replace("_", " "),
            "throughput": f"{shown(row['throughput_tokens_per_s'])} tokens/s",
            "offered load": f"{shown(row['offered_tokens_per_s'])} tokens/s, {starved}{percent(row['service'])} served",
            "inter-token latency": duration(row["itl_s"]),
            "time to first token": duration(row["ttft_s"]),
            "step time": duration(row["step_time_s"]),
            "requests running, waiting": f"{shown(row['mean_running'])}, {shown(row['mean_waiting'])}",
            "adapters in a batch": shown(row["active_adapters"]),
            "adapter loads": f"{shown(row['loads_per_s'])} per s",
            "KV cache in use": f"{percent(row['kv_usage'])} of {shown(row['kv_cache_tokens'])} tokens",
            "bound": bound_words(row["limit"]),
        },
    )
    print_facts("GPU memory", {text: gibibytes(memory[name]) for name, text in _MEMORY.items()})
    _print_classes(document["classes"])
    print_warnings(document["warnings"])
    if document["serve_command"]:
        click.echo(document["serve_command"])


def _print_classes(classes: list[dict[str, Any]]) -> None:
    """Print the adapters by rate and rank, the worst served first and not too many of them."""
    worst = sorted(classes, key=lambda each: each["service"])[:_SHOWN_CLASSES]
    more = f", the worst served of {len(classes)} kinds" if len(classes) > _SHOWN_CLASSES else ""
    rows = [
        {"rate per s": each["rate_per_s"], "rank": each["rank"], "adapters": each["adapters"]}
        | {"served %": each["service"] * 100.0}
        for each in worst
    ]
    print_table(f"Adapters by rate and rank{more}", rows)
