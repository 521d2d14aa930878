"""``lora-capacity place``: the adapters of a fleet onto as few servers as keep their bounds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity_cli.files import write_file, writing
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import (
    FILE,
    examples,
    format_option,
    goodput_options,
    ray_option,
    seed_option,
    seeds_option,
)
from lora_capacity_cli.output import percent, print_facts, print_json, print_table, print_warnings, shown, spoken
from lora_capacity_cli.runtime import bounds_over, prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.fleet import PlacedServer, Placement


@command(
    epilog=examples(
        "lora-capacity place examples/fleet.yaml",
        "lora-capacity place examples/fleet.yaml --goodput ttft:1000 --goodput tpot:80 --format json",
        "lora-capacity place examples/fleet.yaml --emit servers",
    )
)
@click.argument("fleet", type=FILE)
@goodput_options
@seed_option
@seeds_option(4)
@click.option(
    "--emit",
    "folder",
    type=FILE,
    metavar="FOLDER",
    help="Also write launch files to a folder: a `vllm serve --config` file per server, launch.sh, Kubernetes "
    "deployments.yaml, and routes.json (which server has which adapter).",
)
@ray_option
@format_option
def place(
    fleet: Path,
    bounds: dict[str, Any],
    seed: int,
    seeds: int,
    folder: Path | None,
    ray: str | None,
    output_format: str,
) -> None:
    """Place the adapters of a fleet on as few servers as keep the latency bounds.

    FLEET is a YAML or JSON file. Its keys are those of a workload (requests, arrivals, goodput, attainment, horizon_s,
    max_pending), and:

    \b
    adapters   a list of {adapter, rank, rate_per_s}, or list: FILE.csv with
               these columns. Optional: cv (burstiness), replicas (maximum
               servers that may share it), together and apart (groups that
               share a server, or that must not)
    pools      the kinds of servers, a list of {calibration} or {model, gpu}.
               Optional: name, most_servers, price_per_hour, and vLLM
               settings
    objective  fewest-gpus (default), cheapest, balanced (equal headroom on
               the fewest GPUs) or most-served (highest goodput of a given
               number of servers)
    headroom   load that every server must hold, as a multiple of its own
               (default 1)
    survive    1: one standby server for each pool in use
    current    JSON output of an earlier run: the placement in use now
    max_moves  maximum adapters that may leave their current server

    The answer lists each server's adapters and settings, the prediction for it, what the event twin measured, and a
    lower bound on the cost of any placement.
    """  # noqa: D301 - click's mark of lines that stay as they are is the character itself
    prepare(ray=ray)
    from lora_capacity.fleet import Fleet, exported
    from lora_capacity.fleet import place as placed

    asked = Fleet.from_file(fleet)
    asked = asked.with_traffic(goodput=bounds_over(asked.traffic.goodput, bounds))
    if folder is not None:
        with writing("--emit", folder):
            folder.mkdir(parents=True, exist_ok=True)
    with _stages() as stage:
        found = placed(asked, seed=seed, seeds=seeds, stage=stage)
    if folder is not None:
        for name, content in exported(found).items():
            write_file("--emit", folder / name, content)
    if output_format == "json":
        print_json(found.to_dict())
    else:
        _print_placement(found)


@contextlib.contextmanager
def _stages() -> Iterator[Any]:
    """Show the stage that is under way on stderr, where that is a terminal."""
    with contextlib.ExitStack() as stack:
        shown_now: dict[str, Any] = {}

        def stage(what: str, done: int, total: int) -> None:
            if what not in shown_now:
                stack.close()
                shown_now.clear()
                shown_now[what] = stack.enter_context(progress_bar(what))
            shown_now[what](done, total)

        yield stage


def _print_placement(found: "Placement") -> None:
    cost = "no prices given" if found.cost_per_hour is None else f"{shown(found.cost_per_hour)} per hour"
    gap = "" if found.gap is None else f"; this placement is {percent(found.gap)} above"
    facts = {
        "cost": cost,
        "lower bound": f"{shown(found.lower_bound)} ({found.lower_bound_kind}){gap}",
        "requests/s": shown(sum(server.rate_per_s for server in found.servers)),
        "standby": ", ".join(each.pool for each in found.standby),
        "not placed": ", ".join(found.unplaced),
        "moves": "" if found.moves is None else str(found.moves),
        "seconds": shown(found.seconds),
    }
    if found.lower_bound is None:
        facts["lower bound"] = ""
    print_facts(
        f"{len(found.servers)} servers, {found.gpus} GPUs", {name: fact for name, fact in facts.items() if fact}
    )
    print_table("Servers", [_row(server) for server in found.servers])
    print_warnings(found.warnings)


def _row(server: "PlacedServer") -> dict[str, Any]:
    return {
        "server": server.name,
        "pool": server.pool,
        "adapters": len(server.adapters),
        "S": server.config.max_loras,
        "rank": server.config.max_lora_rank,
        "requests/s": server.rate_per_s,
        "ITL ms": server.prediction["itl_s"] * MS_PER_S,
        "KV %": server.prediction["kv_usage"] * 100.0,
        "within bounds %": server.played["attainment"] * 100.0,
        "worst adapter %": server.played["worst_attainment"] * 100.0,
        "bottleneck": spoken(server.prediction["limit"]),
    }
