"""``lora-capacity observe``: a serving run from the metrics of a server that is not to be loaded."""

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError
from lora_capacity.units import MS_PER_S
from lora_capacity_cli.options import FILE, examples, format_option
from lora_capacity_cli.output import duration, percent, print_facts, print_json, print_warnings, shown
from lora_capacity_cli.servers import stages

if TYPE_CHECKING:
    from lora_capacity_profiling.observing import Observation

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
    "mean_kv_usage",
    "preemptions",
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


@click.command(
    epilog=examples(
        "lora-capacity observe http://127.0.0.1:8000 --workload my_workload.yaml --model my-model --adapters 24 \\",
        "    --max-lora-rank 16 --max-num-seqs 256 --max-num-batched-tokens 2048 --window 10m -o runs.csv",
        "lora-capacity observe at-1200.txt at-1210.txt --window 10m --max-loras 8 ... -o runs.csv",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="URL|DUMP...")
@click.option("--workload", type=FILE, required=True, help="Rates and ranks of the adapters, and the lengths.")
@click.option("--model", required=True, metavar="NAME", help="Name of the model, as its calibration or profile has it.")
@click.option("--gpu", default="", metavar="NAME", help="Name of the GPU.")
@click.option("--adapters", type=click.IntRange(min=1), required=True, metavar="A", help="Adapters served.")
@click.option(
    "--max-loras", type=click.IntRange(min=1), metavar="S", help="Slots. [default: what the server says of itself]"
)
@click.option("--max-lora-rank", type=click.IntRange(min=1), required=True, help="Rank that slots are reserved for.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), required=True, help="Most requests in a step.")
@click.option("--max-num-batched-tokens", type=click.IntRange(min=1), required=True, help="Most tokens in a step.")
@click.option("--max-model-len", type=click.IntRange(min=1), help="Longest sequence. [default: the model's own]")
@click.option(
    "--window",
    "window_s",
    type=Time(),
    metavar="TIME",
    help="How long a server is observed, such as 10m; or the time from the first dump to the last. "
    "[default: 10m; of dumps: what the files' times say]",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="RUNS.csv",
    help="Table that the run is added to; made if absent.",
)
@format_option
def observe(
    sources: tuple[str, ...],
    workload: Path,
    window_s: float | None,
    output: Path,
    output_format: str,
    adapters: int,
    max_loras: int | None,
    **settings: Any,
) -> None:
    """Make a serving run of what a server's metrics say, for `fit --runs` and `validate`.

    The server, a URL, is asked for /metrics every ten seconds and gets no request; or give DUMPs, two or more answers
    of /metrics saved earlier, in order of time.

    Metrics count all requests together: completed requests, their lengths, times to first token and between tokens,
    requests running and waiting, KV cache in use. They do not tell which adapters are resident, how often each is
    asked for, or the limits the server was started with. So say what was running: the workload gives the adapters'
    rates, of which only the proportions count, since they are scaled to the requests that came.
    """
    from lora_capacity_profiling.runs import append_runs, run_row
    from lora_capacity_profiling.serving import traffic_columns

    from lora_capacity.workload import Workload

    asked = Workload.from_file(workload)
    traffic = traffic_columns(asked, adapters)
    append_runs(output, [])
    found, interrupted = _observe(sources, window_s)
    if found.max_loras == 0:
        raise InputError("max_lora of the metrics", 0, "a server started with --enable-lora", "this one has LoRA off")
    slots = max_loras or found.max_loras
    if slots is None:
        raise InputError("--max-loras", None, "the server's number of slots", "its metrics do not tell")
    if found.max_loras not in (None, slots):
        raise InputError("--max-loras", slots, f"{found.max_loras}, which the metrics say", "leave it out")
    measured = found.measured() | _lengths(asked)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"run_id": f"observed/{workload.stem}/{now}", "set": "observed", "scenario": workload.stem, "status": "ok"}
    about |= {name: value for name, value in settings.items() if value is not None}
    append_runs(output, [run_row(traffic | about | {"max_loras": slots}, measured)])
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
        click.echo(f"interrupted: the run is shorter, and is in {output}", err=True)
        raise click.Abort


def _observe(sources: tuple[str, ...], window_s: float | None) -> "tuple[Observation, bool]":
    """Return what was observed, and whether an interrupt ended that early."""
    from lora_capacity_profiling.observing import observe_server, read_dumps

    if not sources[0].startswith(("http://", "https://")):
        return read_dumps([Path(source) for source in sources], window_s), False
    if len(sources) > 1:
        raise InputError("sources", sources[1], "one server, or files with answers of /metrics")
    asked_s = window_s or _DEFAULT_WINDOW_S
    with stages([sources[0]], asked_s) as shown:
        tell = shown.begin()
        found = observe_server(sources[0], asked_s, lambda spent_s: tell("observing", spent_s, asked_s))
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
    print_facts(
        f"{document['max_cpu_loras']:,} adapters, {document['max_loras']:,} slots, observed for "
        f"{measured['duration_s']:.0f} s; added to {document['runs_file']}",
        {
            "requests": f"{measured['arrivals']:,} came, {measured['completed']:,.0f} were completed",
            "adapters asked for": "not told" if seen is None else shown(seen),
            "rates": f"those of the workload times {shown(document['rates_scaled_by'])}",
            "mean tokens in, out": " and ".join(shown(measured[f"mean_{end}_tokens"]) for end in ("input", "output")),
            "throughput": f"{shown(measured['input_throughput'] + measured['output_throughput'])} tokens/s",
            "inter-token latency": duration(measured["mean_itl_ms"] / MS_PER_S),
            "time to first token": duration(measured["mean_ttft_ms"] / MS_PER_S),
            "requests running, waiting": f"{shown(measured['mean_running'])}, {shown(measured['mean_waiting'])}",
            "KV cache in use": "–" if measured["mean_kv_usage"] is None else percent(measured["mean_kv_usage"]),
        },
    )
    print_warnings(document["warnings"])
