"""``lora-capacity simulate``: one configuration in detail."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity.words import FAILURES, REFUSALS
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    CalibrationChoice,
    adapter_options,
    calibration_options,
    emit_option,
    engine_options,
    examples,
    format_option,
    goodput_options,
    recording_options,
    refuse_given,
    server_options,
    workload_argument,
)
from lora_capacity_cli.output import (
    duration,
    gibibytes,
    percent,
    print_command,
    print_facts,
    print_json,
    print_table,
    print_warnings,
    say,
    shown,
    spoken,
)
from lora_capacity_cli.runtime import prepare, progress_bar, read_workload

if TYPE_CHECKING:
    from lora_capacity.scenarios import EventDetails, Results, WindowDetails
    from lora_capacity.workload import Workload

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
_MEMORY = {
    "weight_bytes": "weights",
    "slot_bytes": "adapter slots",
    "activation_bytes": "activations",
    "other_bytes": "other",
    "cuda_graph_bytes": "CUDA graphs",
    "kv_cache_bytes": "KV cache",
    "headroom_no_kv_cache_bytes": "spare: KV cache beyond one request of max_model_len",
    "headroom_oom_bytes": "spare: free at the peak of the start",
}
_OF_THE_PREDICTION = ("goodput", "attainment", "engine", "seed", "warmup_s", "samples", "drain", "output_format")
"""Options that say what is predicted and how it is told, not what server is started."""

_SHOWN = 12
"""Most adapters, or kinds of them, that are told one by one."""

_TIMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}
_SHARES = {"compute": "in steps", "load": "loading adapters", "idle": "idle"}


@command(
    epilog=examples(
        "lora-capacity simulate examples/many_idle.yaml --adapters 128 --max-loras 32",
        "lora-capacity simulate examples/many_idle.yaml --adapters 512 --max-cpu-loras 128 --max-loras 32",
        "lora-capacity simulate examples/few_busy.yaml --adapters 24 --max-loras 8 --engine event --seed 1",
    )
)
@workload_argument
@recording_options
@calibration_options
@goodput_options
@adapter_options()
@functools.partial(engine_options, reference=True)
@click.option(
    "--warmup-s", type=float, default=0.0, show_default=True, help="Event twin: seconds at the start that are left out."
)
@click.option(
    "--samples",
    type=int,
    default=0,
    show_default=True,
    help="Event twin: intervals of the time series in the JSON document.",
)
@click.option(
    "--drain",
    is_flag=True,
    help="Event twin: simulate until all requests that arrived within the horizon have finished; latencies and "
    "attainment then include all of them.",
)
@server_options(grids=False)
@emit_option
@format_option
def simulate(
    workload: Path,
    recording: dict[str, Any],
    calibration: CalibrationChoice,
    bounds: dict[str, Any],
    adapters: int,
    max_loras: int,
    tiers: dict[str, Any],
    engine: str,
    seed: int,
    warmup_s: float,
    samples: int,
    drain: bool,
    settings: dict[str, Any],
    emit: str | None,
    output_format: str,
) -> None:
    """Predict one configuration in detail.

    WORKLOAD is a YAML or JSON file, or a table of recorded requests (CSV, JSONL, Parquet, .gz).
    """
    if emit is not None:
        refuse_given(_OF_THE_PREDICTION, "--emit", "it is for the prediction, and none is made")
    prepare()
    from lora_capacity.engines import emitted, environment
    from lora_capacity.errors import InfeasibleError
    from lora_capacity.run import simulate as run
    from lora_capacity.scenarios import build_scenarios, extrapolations, table
    from lora_capacity.status import Status

    asked = read_workload(workload, bounds, recording)
    known = calibration.load()
    scenarios = build_scenarios(asked, known, adapters=[adapters], max_loras=[max_loras], **settings, **tiers)
    resolved = {"max_cpu_loras": tiers.get("max_cpu_loras", max(adapters, max_loras))}
    resolved |= {name: int(getattr(scenarios, name)[0]) for name in _SETTINGS[1:]}
    server = known.server(**settings | resolved)
    if emit is not None:
        status = Status(int(scenarios.status[0])).label
        if status in REFUSALS:
            raise InfeasibleError(FAILURES[status])
        say(emitted(server, known.model.served_as, emit))
        return
    how: dict[str, Any] = {"engine": engine, "seed": seed, "warmup_s": warmup_s, "samples": samples, "drain": drain}
    with progress_bar(f"{engine} twin") as progress:
        results = run(known, scenarios, asked, **how, progress=progress)
    row = {name: column.tolist()[0] for name, column in table(scenarios, results).items()}
    events = {} if results.events is None else {"events": _events(row, asked, adapters, seed, results.events)}
    for name in ("adapters", *resolved):
        row.pop(name, None)
    windows = {} if results.windows is None else {"windows": _windows(results.windows)}
    client = {name: row.pop(f"client_{name}") for name in ("ttft_s", "tpot_s", "itl_s")}
    plan = known.plan_memory(server)
    failure = [FAILURES[row["status"]]] if row["status"] in FAILURES else []
    document = {
        "calibration": known.name,
        "model": known.model.name,
        "engine": engine,
        "adapters": adapters,
        **resolved,
        "loaded_at_start": "loaded_at_start" in tiers,
        "goodput": asked.goodput.to_ms(),
        "attainment": asked.goodput.attainment,
        "keeps_bounds": row["attainment"] >= asked.goodput.attainment,
        "prediction": row,
        "client": client,
        "classes": _classes(asked, adapters, results),
        **events,
        **windows,
        "memory": {name: float(getattr(plan, name)[0]) for name in _MEMORY},
        "warnings": [*asked.assumptions, *extrapolations(asked, known, server, adapters), *failure],
        "serve_command": None if row["status"] in REFUSALS else server.serve_command(known.model.served_as),
        "serve_environment": environment(server),
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)


def _classes(workload: "Workload", adapters: int, results: "Results") -> list[dict[str, Any]]:
    """Return the service of adapters of each rate and rank."""
    if not adapters:
        return []
    classes = workload.classes([adapters])
    columns = (classes.rate_per_s, classes.rank, classes.count[0], results.class_service[0])
    names = ("rate_per_s", "rank", "adapters", "service")
    return [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _events(
    row: dict[str, Any], workload: "Workload", adapters: int, seed: int, events: "EventDetails"
) -> dict[str, Any]:
    """Take what only engine steps tell out of a row of the table; the adapters that were served worst come first."""
    del row["worst_service"], row["worst_wait_s"]
    quantiles = {
        f"{time}_quantiles_s": {name: row.pop(f"{time}_{name}_s") for name in ("p50", "p95", "p99")} for time in _TIMES
    }
    counts = ("unanswered", "max_running", "max_adapters", "max_kv_usage", "steps", "preemptions", "disk_loads")
    return {
        "seed": seed,
        **quantiles,
        "quantile_requests": {time: row.pop(f"{time}_requests") for time in _TIMES},
        "lower_bounds_from": {time: row.pop(f"{time}_lower_bound_from") for time in ("ttft", "e2e")},
        **{name: row.pop(name) for name in counts},
        "time_shares": {name: row.pop(f"{name}_share") for name in ("compute", "scheduling", "load", "idle")},
        "worst_served": _worst_served(workload, adapters, events) if adapters and row["status"] not in FAILURES else [],
        "series": {name: values[0].tolist() for name, values in vars(events.series).items() if values.size},
    }


def _windows(told: "WindowDetails") -> dict[str, Any]:
    """Return what is told of each window of traffic over time, and which is the worst."""
    names = (*(entry.name for entry in dataclasses.fields(told)), "wait_s")
    columns = (getattr(told, name)[0].tolist() for name in names)
    each = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"worst": each[told.worst[0]], "each": each}


def _worst_served(workload: "Workload", adapters: int, events: "EventDetails") -> list[dict[str, Any]]:
    classes = workload.classes([adapters])
    columns = (
        *(column.repeat(classes.count[0]) for column in (classes.rate_per_s, classes.rank)),
        *(column[0] for column in (events.adapter_arrived, events.adapter_completed, events.adapter_worst_wait_s)),
    )
    names = ("rate_per_s", "rank", "arrived", "completed", "worst_wait_s")
    # Columns of the events are padded to a number of adapters that many configurations share.
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=False)]
    asked_for = [row for row in rows if row["arrived"] > 0]
    return sorted(asked_for, key=lambda row: row["completed"] / row["arrived"])[:_SHOWN]


def _tiers(document: dict[str, Any]) -> str:
    adapters, room, slots = (document[name] for name in ("adapters", "max_cpu_loras", "max_loras"))
    if not slots:
        return "Without LoRA"
    held = f"{room:,} in host memory, " if room < adapters else ""
    return f"{adapters:,} adapters, {held}{slots:,} slots"


def _print(document: dict[str, Any]) -> None:
    row, client, memory = document["prediction"], document["client"], document["memory"]
    bounds = ", ".join(f"{key.upper()} {duration(ms / MS_PER_S)}" for key, ms in document["goodput"].items())
    served = "starved" if row["starved"] else spoken(row["status"])
    print_facts(
        f"{_tiers(document)}: {document['model']}: {served}",
        {
            "bottleneck": spoken(row["limit"]),
            "throughput": f"{shown(row['throughput_tokens_per_s'])} of {shown(row['offered_tokens_per_s'])} tokens/s "
            f"offered (input + output), {percent(row['service'])}",
            "attainment": f"{percent(row['attainment'])} within {bounds} ({percent(document['attainment'])} asked)",
            "TTFT": f"{duration(row['ttft_s'])}; {duration(client['ttft_s'])} at the client (means)",
            "ITL": f"{duration(row['itl_s'])}; {duration(client['itl_s'])} at the client (means)",
            "step time": duration(row["step_time_s"]),
            "requests": f"{shown(row['mean_running'])} running, {shown(row['mean_waiting'])} waiting (means)",
            "active adapters": f"{shown(row['active_adapters'])} (mean)",
            "adapter loads": f"{shown(row['loads_per_s'])} per s",
            "KV cache": f"{percent(row['kv_usage'])} of {shown(row['kv_cache_tokens'])} tokens in use",
        },
    )
    print_facts("GPU memory", {text: gibibytes(memory[name]) for name, text in _MEMORY.items()})
    if "events" in document:
        _print_events(document["events"])
    if "windows" in document:
        _print_windows(document["windows"])
    _print_classes(document["classes"])
    print_warnings(document["warnings"])
    if document["serve_command"]:
        print_command(document["serve_command"])


def _print_events(events: dict[str, Any]) -> None:
    shares = events["time_shares"]
    bounded = {None: "", "": ""} | {name: f" (lower bounds from {name} on)" for name in ("p50", "p95", "p99")}
    quantiles = {
        f"{text} p50, p95, p99": ", ".join(map(duration, events[f"{time}_quantiles_s"].values()))
        + bounded[events["lower_bounds_from"].get(time)]
        for time, text in _TIMES.items()
    }
    print_facts(
        f"Event twin, seed {events['seed']}",
        {
            **quantiles,
            "no first token by the end": f"{shown(events['unanswered'])} requests",
            "peak": f"{shown(events['max_running'])} requests running, {shown(events['max_adapters'])} active "
            f"adapters, {percent(events['max_kv_usage'])} of the KV cache",
            "engine steps": shown(events["steps"]),
            "preemptions": shown(events["preemptions"]),
            "loads from disk": shown(events["disk_loads"]),
            "engine time": ", ".join(f"{percent(shares[name])} {text}" for name, text in _SHARES.items()),
        },
    )
    heads = ("requests/s", "rank", "requests", "completed", "longest wait s")
    print_table(
        "Worst served adapters", [dict(zip(heads, each.values(), strict=True)) for each in events["worst_served"]]
    )


def _print_windows(windows: dict[str, Any]) -> None:
    worst, each = windows["worst"], windows["each"]
    seconds = sum(window["end_s"] - window["start_s"] for window in each)
    mean = sum(window["requests_per_s"] * (window["end_s"] - window["start_s"]) for window in each) / seconds
    print_facts(
        f"Traffic over time: worst of {len(each):,} windows",
        {
            "from, to": f"{worst['start_s']:,.0f} s, {worst['end_s']:,.0f} s",
            "requests": f"{shown(worst['requests_per_s'])} per s, {shown(mean)} on average",
            "running, waiting": f"{shown(worst['mean_running'])}, {shown(worst['mean_waiting'])}",
            "wait in the queue (mean)": duration(worst["wait_s"]),
            "KV cache in use": percent(worst["kv_usage"]),
        },
    )


def _print_classes(classes: list[dict[str, Any]]) -> None:
    """Print the adapters by rate and rank, the worst served first and not too many of them."""
    worst = sorted(classes, key=lambda each: (math.isnan(each["service"]), each["service"]))[:_SHOWN]
    more = f", worst served of {len(classes)} classes" if len(classes) > _SHOWN else ""
    rows = [
        {"requests/s": each["rate_per_s"], "rank": each["rank"], "adapters": each["adapters"]}
        | {"served %": each["service"] * 100.0}
        for each in worst
    ]
    print_table(f"Adapters by rate and rank{more}", rows)
