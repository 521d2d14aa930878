"""``lora-capacity place``: the adapters of a fleet onto as few servers as keep their bounds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.units import MS_PER_S
from lora_capacity_cli.files import write_file, writing
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


@click.command(
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
    help="Also write what starts the servers into a folder, made if absent: a file for `vllm serve --config` each, "
    "launch.sh, Kubernetes deployments.yaml, and routes.json, which adapter is served where.",
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
    """Place the adapters of a fleet onto as few servers as keep their bounds.

    FLEET is a YAML or JSON file. Its keys are those of a workload (requests, arrivals, goodput, attainment, horizon_s,
    max_pending), and:

    \b
    adapters   a list of {adapter, rank, rate_per_s}, or list: FILE.csv with
               these columns; optional of each: cv (burstiness), replicas
               (most servers that may share it), together and apart (names
               of groups that share a server, or that must not)
    pools      a list of {calibration}: the kinds of servers; optional of
               each: name, most_servers, price_per_hour, and settings under
               vLLM's names
    objective  fewest-gpus (default), cheapest, balanced (of the fewest
               GPUs, equal headroom on each) or most-served (as many
               requests per second as the servers hold)
    headroom   times its load that every server must hold (default 1)
    survive    1: a server of each pool in use stands by for any other
    current    an answer in JSON: the placement that runs now
    max_moves  adapters that may leave the server that has them now

    The answer tells each server's adapters and settings, what is predicted of it and what the event twin saw when it
    played it, and a bound that no placement goes below.
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
    cost = "not told" if found.cost_per_hour is None else f"{shown(found.cost_per_hour)} per hour"
    kinds = {"exact": "all servers that could be were looked at", "heuristic": "by the servers that were found"}
    gap = "" if found.gap is None else f"; {percent(found.gap)} above it"
    facts = {
        "cost": cost,
        "lower bound": f"{shown(found.lower_bound)} ({kinds[found.lower_bound_kind]}){gap}",
        "requests/s": shown(sum(server.rate_per_s for server in found.servers)),
        "stand by": ", ".join(each.pool for each in found.standby),
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
        "in bounds %": server.played["attainment"] * 100.0,
        "worst %": server.played["worst_attainment"] * 100.0,
        "bottleneck": spoken(server.prediction["limit"]),
    }
