"""``lora-capacity verify``: a prediction tried on the real server."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError, LoraCapacityError
from lora_capacity_cli.comparison import compare, print_comparison
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, format_option, refuse_given
from lora_capacity_cli.output import print_json, say
from lora_capacity_cli.runtime import prepare, read_workload
from lora_capacity_cli.search import SEARCH_ONLY, recommend, search_options
from lora_capacity_cli.servers import HOW_STARTED, stages, start_options

if TYPE_CHECKING:
    from lora_capacity_profiling.trial import Measured, Trial

    from lora_capacity.calibration import Calibration
    from lora_capacity.engines import ServerConfig
    from lora_capacity.workload import Workload

DISAGREES = 3
"""Exit code where predicted and measured do not agree."""

_START_S = 60.0
"""About how long a server takes to start, for telling the time left; the first one corrects it."""


@command(
    epilog=examples(
        "lora-capacity verify my_workload.yaml --calibration calibration.json --profile my_profile --neighbours",
        "lora-capacity verify my_workload.yaml --calibration calibration.json --url http://127.0.0.1:8000",
    )
)
@functools.partial(search_options, derives=False)
@start_options
@click.option("--url", help="Running server to measure, instead of --model.")
@click.option("--neighbours", is_flag=True, help="Also measure one more adapter, one more slot and one fewer slot.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="How long each configuration is measured.",
)
@click.option(
    "--warm-up",
    "warm_up_s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds of traffic before the measurement.",
)
@click.option(
    "--predict-with",
    "twin",
    type=click.Choice(["event", "steady"]),
    default="event",
    show_default=True,
    help="Twin to compare with; event simulates exactly the requests that are sent.",
)
@click.option(
    "--traffic-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the requests sent."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="Largest relative error of throughput that counts as agreement.",
)
@click.option(
    "--itl-tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.2,
    show_default=True,
    help="The same for inter-token latency.",
)
@click.option(
    "--folder",
    type=FILE,
    default=Path("verify"),
    show_default=True,
    metavar="DIR",
    help="Folder for server logs, adapters and runs.",
)
@click.option(
    "--runs",
    "runs_file",
    type=FILE,
    metavar="FILE.csv",
    help="Table to append the runs to. [default: serving_runs.csv in --folder]",
)
@format_option
@click.pass_context
def verify(
    ctx: click.Context,
    question: dict[str, Any],
    start: dict[str, Any],
    profiled: dict[str, Any],
    url: str | None,
    neighbours: bool,
    folder: Path,
    runs_file: Path | None,
    output_format: str,
    **how: Any,
) -> None:
    """Run the recommended configuration on a real server and compare with the prediction.

    WORKLOAD is a YAML or JSON file. The configuration is searched as in `optimize`, or given by --adapters and
    --max-loras (every combination is measured). For each one vLLM is started with random adapters, warmed up, and sent
    the workload's requests for --seconds. With --url a running server is measured instead.

    Exit code 0: prediction and measurement agree; 3: they do not; 1: no feasible configuration; 2: bad input, or the
    server failed; 130: interrupted. They agree if throughput and inter-token latency are within --tolerance and
    --itl-tolerance, or if a server that was predicted not to start does not.
    """
    if (url is None) == (start["model"] is None):
        raise InputError("--url", url, "one of --url, --model and --profile", "say which server to try")
    if url is not None:
        refuse_given(HOW_STARTED, "--url", "it is for servers that are started")
        if runs_file is not None:
            refuse_given(("folder",), "--url and --runs", "it is for servers that are started, and for their runs")
    axes = ("max_num_seqs", "max_num_batched_tokens")
    settings = {name: (value,) if name in axes else value for name, value in profiled.items()}
    question["settings"] = settings | question["settings"]
    prepare(on_cpu=True)
    from lora_capacity_profiling.deployment import Deployment
    from lora_capacity_profiling.runs import append_runs
    from lora_capacity_profiling.serving import metrics_interval_s
    from lora_capacity_profiling.trial import Trial

    from lora_capacity.validation import predict_outcomes

    table = runs_file or folder / "serving_runs.csv"
    workload, calibration, servers = _points(question, url, neighbours)
    workload = _for_a_while(workload, how["seconds"])
    site = Deployment(shape=calibration.model, folder=folder, **start) if url is None else url
    append_runs(table, [])  # before anything takes minutes
    predicted = predict_outcomes(
        workload,
        calibration,
        servers,
        how["twin"],
        seed=how["traffic_seed"],
        metrics_interval_s=metrics_interval_s(workload),
    )
    about = {"set": "verify", "scenario": question["workload"].stem, "model": calibration.model.name}
    about["gpu"] = calibration.gpu.name
    vocab_size = calibration.model.vocab_size
    trial = Trial(workload, site, about, table, how["warm_up_s"], how["traffic_seed"], vocab_size)
    with _measured(trial, servers) as measured:
        document = {
            "calibration": calibration.name,
            "model": calibration.model.name,
            "seconds": workload.horizon_s,
            "engine": how["twin"],
            "seed": how["traffic_seed"],
            **{name: how[name] for name in ("warm_up_s", "tolerance", "itl_tolerance")},
            "goodput": workload.goodput.to_ms(),
            "attainment": workload.goodput.attainment,
            "runs_file": str(table),
            "configurations": len(servers),
            **compare(calibration, servers, predicted, measured, (how["tolerance"], how["itl_tolerance"])),
        }
        if output_format == "json":
            print_json(document)
        elif measured:
            print_comparison(document)
    if not document["agrees"]:
        ctx.exit(DISAGREES)


@contextlib.contextmanager
def _measured(trial: "Trial", servers: "list[ServerConfig]") -> "Iterator[list[Measured]]":
    """Try one configuration after the other; what ends that early is raised again after the block has told the rest."""
    start_s = 0.0 if isinstance(trial.site, str) else _START_S
    titles = [f"A {server.max_cpu_loras} S {server.max_loras}" for server in servers]
    found: list[Measured] = []
    failure: BaseException | None = None
    try:
        with stages(titles, start_s + trial.warm_up_s + trial.workload.horizon_s) as shown:
            for server in servers:
                found.append(trial.measure(server, shown.begin()))
    except (LoraCapacityError, KeyboardInterrupt) as error:
        failure = error
    yield found
    if isinstance(failure, KeyboardInterrupt):
        say(f"interrupted: {len(found)} of {len(servers)} runs are in {trial.table}", err=True)
        raise click.Abort
    if failure is not None:
        raise failure


def _points(
    question: dict[str, Any], url: str | None, neighbours: bool
) -> "tuple[Workload, Calibration, list[ServerConfig]]":
    """Return workload, calibration and the configurations to try, the recommended one first."""
    if url is not None:
        if neighbours:
            raise InputError("--neighbours", True, "servers started here (--model)", "a running one has its settings")
        question = question | _settings_of(url, question)
    adapters, slots = question["adapters"], question["max_loras"]
    if adapters is None or slots is None:
        workload, calibration, found = recommend(question)
        best = [found.best, *(each.candidate for each in found.neighbours if neighbours)]
        names = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
        chosen = [{name: getattr(candidate, name) for name in names} for candidate in best]
        return workload, calibration, [_server(workload, calibration, question, each) for each in chosen]
    if neighbours:
        raise InputError("--neighbours", True, "a search: not both --adapters and --max-loras", "give more values")
    refuse_given(SEARCH_ONLY, "--url" if url else "both --adapters and --max-loras", "it is for a search")
    from lora_capacity.run.steady import grid

    workload = read_workload(question["workload"], question["bounds"], question["recording"]).at_peak()
    calibration = question["calibration"].load()
    columns = grid(adapters, slots)
    pairs = zip(columns["adapters"].tolist(), columns["max_loras"].tolist(), strict=True)
    given = [{"max_cpu_loras": count, "max_loras": slot} for count, slot in pairs]
    return workload, calibration, [_server(workload, calibration, question, each) for each in given]


def _settings_of(url: str, question: dict[str, Any]) -> dict[str, Any]:
    """Return how many adapters and slots a running server has, as far as they are not given or can be asked for."""
    from lora_capacity_profiling.metrics import Snapshot
    from lora_capacity_profiling.server import Server

    server = Server.attach(url)
    adapters = question["adapters"] or (len(server.adapters),)
    slots, told = question["max_loras"], Snapshot.of(server.endpoint).max_loras
    if adapters == (0,):
        raise InputError("--url", url, "a server with adapters", "start it with --enable-lora and --lora-modules")
    if slots is None and told is None:
        raise InputError("--max-loras", None, "the server's number of slots", "it does not tell before it is asked")
    if slots is not None and told is not None and slots != (told,):
        raise InputError("--max-loras", slots[0], f"{told}, which the server has", "leave it out")
    slots = slots or (told,)
    for name, values in (("--adapters", adapters), ("--max-loras", slots)):
        if len(values) != 1:
            raise InputError(name, f"{len(values)} values", "one value, the running server's")
    return {"adapters": adapters, "max_loras": slots}


def _server(
    workload: "Workload", calibration: "Calibration", question: dict[str, Any], chosen: dict[str, Any]
) -> "ServerConfig":

    settings = {name: _single(name, value, chosen) for name, value in question["settings"].items()}
    needed = int(workload.adapters.max_rank([chosen["max_cpu_loras"]])[0])
    settings.setdefault("max_lora_rank", calibration.smallest_max_lora_rank(needed))
    return calibration.server(**settings | chosen)


def _single(name: str, value: Any, chosen: dict[str, Any]) -> Any:
    """Return the value of a setting that a search could choose from several."""
    if name not in ("max_num_seqs", "max_num_batched_tokens"):
        return value
    if len(value) > 1 and name not in chosen:
        raise InputError(f"--{name.replace('_', '-')}", f"{len(value)} values", "one value, without a search")
    return value[0]


def _for_a_while(workload: "Workload", seconds: float) -> "Workload":
    """Return the workload observed for so long; a trace that is shorter for as long as it is."""
    if workload.trace is not None:
        seconds = min(seconds, workload.horizon_s)
    return dataclasses.replace(workload, horizon_s=seconds)
