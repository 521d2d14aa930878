"""``lora-capacity observe``: a serving run from a server's metrics, or the memory that it logged at its start."""

import datetime
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity.units import MS_PER_S
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import duration, percent, print_facts, print_json, print_warnings, say, shown
from lora_capacity_cli.servers import stages

if TYPE_CHECKING:
    from lora_capacity_profiling.observing import Observation, Observed

    from lora_capacity.workload import Workload

_DEFAULT_WINDOW_S = 600.0
"""Twenty times the half minute that a long request takes: few are cut off at the ends."""
_SHOWN = (
    "duration_s",
    "arrivals",
    "completed",
    "mean_input_tokens",
    "mean_output_tokens",
    "input_throughput",
    "output_throughput",
    "mean_itl_ms",
    "mean_ttft_ms",
    "mean_running",
    "mean_waiting",
    "mean_skipped",
    "mean_kv_usage",
    "preemptions",
    "cached_share",
)
_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
"""Seconds of the units that a window may be given in."""


class Time(click.ParamType):
    """A time: ``90``, ``90s``, ``10m`` or ``1h``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h)?", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not allowed; allowed: a time > 0 such as 90s, 10m or 1h", param, ctx)
        return float(match[1]) * _UNITS_S[match[2] or ""]


@command(
    epilog=examples(
        "lora-capacity observe http://127.0.0.1:8000 --workload my_workload.yaml --model my-model --adapters 24 "
        "--max-lora-rank 16 --max-num-seqs 256 --max-num-batched-tokens 2048 --window 10m -o runs.csv",
        "lora-capacity observe at-1200.txt at-1210.txt --window 10m --max-loras 8 ... -o runs.csv",
        "lora-capacity observe --startup-log vllm.log --gpu L4 -o startups.csv",
    )
)
@click.argument("sources", nargs=-1, metavar="URL|DUMP...")
@click.option(
    "--startup-log",
    type=FILE,
    metavar="LOG",
    help="Read the start of a server from its log, as a row for `validate --startup` and `fit`.",
)
@click.option("--workload", type=FILE, help="Workload file: rates and ranks of the adapters, request lengths.")
@click.option("--model", metavar="NAME", help="Name of the model, as in its calibration or profile.")
@click.option(
    "--model-name",
    metavar="NAME",
    help="Name of the model in the metrics, if there are several. [default: --model]",
)
@click.option(
    "--engine-index",
    type=click.IntRange(min=0),
    metavar="N",
    help="Engine to observe, if the server has several. [default: the only one]",
)
@click.option("--gpu", default="", metavar="NAME", help="Name of the GPU.")
@click.option("--adapters", type=click.IntRange(min=1), metavar="A", help="Adapters served.")
@click.option("--max-loras", type=click.IntRange(min=1), metavar="S", help="Slots. [default: from the metrics]")
@click.option("--max-lora-rank", type=click.IntRange(min=1), help="Largest rank that a slot holds.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), help="Maximum concurrent sequences.")
@click.option("--max-num-batched-tokens", type=click.IntRange(min=1), help="Token budget of a step.")
@click.option("--max-model-len", type=click.IntRange(min=1), help="Maximum tokens of a request. [default: the model's]")
@click.option(
    "--window",
    "window_s",
    type=Time(),
    metavar="TIME",
    help="How long to observe, such as 10m. For dumps: time from the first to the last, or from the server's start to "
    "a single one. [default: 10m; for dumps, from the files' times]",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="TABLE.csv",
    help="Table to append the run, or the start, to.",
)
@format_option
@click.pass_context
def observe(
    context: click.Context,
    sources: tuple[str, ...],
    startup_log: Path | None,
    workload: Path | None,
    window_s: float | None,
    output: Path,
    output_format: str,
    adapters: int | None,
    max_loras: int | None,
    model_name: str | None,
    engine_index: int | None,
    **settings: Any,
) -> None:
    """Record a serving run from the metrics of a server in production, for `fit --runs` and `validate`.

    /metrics of the server (URL) is read every ten seconds; no requests are sent. Or give DUMPs: saved answers of
    /metrics, oldest first. A single dump covers the time since the server's start, --window ago.

    Metrics do not say how requests are spread over adapters, nor the limits of the server. Give both: request rates per
    adapter come from the workload and are scaled to the number of requests observed.

    With --startup-log the log of a start is read instead; VLLM_LOGGING_LEVEL=DEBUG logs the most.
    """
    if startup_log is not None:
        others: dict[str, object] = {
            "sources": sources,
            "--workload": workload,
            "--adapters": adapters,
            "--max-loras": max_loras,
        }
        others |= {"--model-name": model_name, "--engine-index": engine_index is not None}
        beside = next((name for name, value in others.items() if value), None)
        if beside is not None:
            raise InputError("--startup-log", str(startup_log), f"without {beside}, which goes with metrics")
        _observe_start(startup_log, settings, output, output_format)
        return
    _require(context)
    assert workload is not None
    assert adapters is not None
    from lora_capacity_profiling.observing import Observed
    from lora_capacity_profiling.runs import append_runs, check_row, run_row
    from lora_capacity_profiling.serving import traffic_columns

    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    traffic = traffic_columns(asked, adapters)
    _check_ranks(asked, adapters, settings["max_lora_rank"])
    append_runs(output, [])
    found, interrupted = _observe(sources, window_s, Observed(settings["model"], max_loras, model_name, engine_index))
    measured = found.measured() | _lengths(asked)
    slots = max_loras or found.max_loras
    if slots is None:
        raise InputError("--max-loras", None, "the server's number of slots", "its metrics do not tell")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"run_id": f"observed/{workload.stem}/{now}", "set": "observed", "scenario": workload.stem, "status": "ok"}
    about |= {name: value for name, value in settings.items() if value is not None}
    row = run_row(traffic | about | {"max_loras": slots}, measured)
    check_row(row)
    append_runs(output, [row])
    document = {
        "runs_file": str(output),
        "max_cpu_loras": adapters,
        "max_loras": slots,
        "measured": {name: measured.get(name) for name in _SHOWN},
        "rates_scaled_by": measured["arrivals"] / measured["duration_s"] / _nominal(asked, adapters),
        "adapters_seen": None if found.adapters_seen is None else len(found.adapters_seen),
        "warnings": found.doubts(adapters),
    }
    if output_format == "json":
        print_json(document)
    else:
        _print(document)
    if interrupted:
        say(f"interrupted: the run is shorter, and is in {output}", err=True)
        raise click.Abort


def _require(context: click.Context) -> None:
    """Ask for what an observation of metrics needs, as click does for required parameters."""
    needed = ("sources", "workload", "model", "adapters", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
    for param in context.command.params:
        if param.name in needed and context.params[param.name] in (None, ()):
            raise click.MissingParameter(ctx=context, param=param)


def _observe_start(log: Path, settings: Mapping[str, Any], output: Path, output_format: str) -> None:
    """Add the start that a log tells of to a table; what is given goes before what the log says."""
    from lora_capacity_profiling.startups import append_startup, startup_row

    from lora_capacity.reading import read_text

    text = read_text(log, "a log of a vLLM server", "replace")
    told = {name: value for name, value in settings.items() if value not in (None, "")}
    row = startup_row(text, log.stem) | told
    if "model_load_gib" not in row and "kv_cache_gib" not in row:
        raise InputError(str(log), "no memory of a start", "the log of a vLLM server from its first line on")
    append_startup(output, row)
    if output_format == "json":
        print_json({"startups_file": str(output), "row": row})
    else:
        print_facts(f"Start added to {output}", {name: str(value) for name, value in row.items()})


def _check_ranks(workload: "Workload", adapters: int, max_lora_rank: int) -> None:
    """Refuse ranks that no server has, before anything is waited for."""
    from lora_capacity.engines import NEWEST, VllmBehaviour

    taken = VllmBehaviour.for_version(NEWEST).max_lora_ranks
    if max_lora_rank not in taken:
        raise InputError("--max-lora-rank", max_lora_rank, f"one of {', '.join(map(str, taken))}")
    _, ranks = workload.adapters.deal(adapters)
    if ranks.max() > max_lora_rank:
        raise InputError("--max-lora-rank", max_lora_rank, f"at least {ranks.max()}, the workload's largest rank")


def _observe(sources: tuple[str, ...], window_s: float | None, observed: "Observed") -> "tuple[Observation, bool]":
    """Return what was observed, and whether an interrupt ended that early."""
    from lora_capacity_profiling.observing import observe_server, read_dumps

    if not sources[0].startswith(("http://", "https://")):
        return read_dumps([Path(source) for source in sources], window_s, observed=observed), False
    if len(sources) > 1:
        raise InputError("sources", sources[1], "one server, or files with answers of /metrics")
    asked_s = window_s or _DEFAULT_WINDOW_S
    with stages([sources[0]], asked_s) as shown:
        tell = shown.begin()
        found = observe_server(
            sources[0], asked_s, lambda spent_s: tell("observing", spent_s, asked_s), observed=observed
        )
    return found, found.interrupted


def _lengths(workload: "Workload") -> dict[str, float]:
    """Return the spread of the lengths, of which metrics tell little: that of the workload."""
    return {
        "std_input_tokens": workload.input_tokens.std,
        "std_output_tokens": workload.output_tokens.std,
        "max_output_tokens": workload.output_tokens.max,
    }


def _nominal(workload: "Workload", adapters: int) -> float:
    rates_per_s, _ = workload.adapters.deal(adapters)
    return float(rates_per_s.sum()) + workload.base_rate_per_s


def _print(document: dict[str, Any]) -> None:
    measured, seen = document["measured"], document["adapters_seen"]
    cached = measured["cached_share"]
    print_facts(
        f"{document['max_cpu_loras']:,} adapters, {document['max_loras']:,} slots, observed for "
        f"{measured['duration_s']:.0f} s; added to {document['runs_file']}",
        {
            "requests": f"{measured['arrivals']:,} arrived, {measured['completed']:,.0f} completed",
            "adapters requested": "unknown" if seen is None else shown(seen),
            "rates": f"{shown(document['rates_scaled_by'])}× the workload's",
            "mean input, output tokens": ", ".join(
                shown(measured[f"mean_{end}_tokens"]) for end in ("input", "output")
            ),
            "throughput": f"{shown(measured['input_throughput'] + measured['output_throughput'])} tokens/s "
            "(input + output)",
            "inter-token latency": duration(measured["mean_itl_ms"] / MS_PER_S),
            "time to first token": duration(measured["mean_ttft_ms"] / MS_PER_S),
            "requests running, waiting": f"{shown(measured['mean_running'])}, {shown(measured['mean_waiting'])}",
            "skipped (no free slot)": "unknown"
            if measured["mean_skipped"] is None
            else shown(measured["mean_skipped"]),
            "prefix cache hits": "–" if math.isnan(cached) else percent(cached),
            "KV cache in use": "–" if measured["mean_kv_usage"] is None else percent(measured["mean_kv_usage"]),
        },
    )
    print_warnings(document["warnings"])
