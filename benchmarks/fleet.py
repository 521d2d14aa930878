"""Placing fleets: how few servers, how close to the bound, and what simpler ways of placing take.

python benchmarks/fleet.py ../shared/tenants/tenants.csv --sizes 32,128,512 --json results.json

Instances: adapters with the mean rates and burstiness of real tenants (a table with columns mean_rate_per_s and cv),
drawn anew from those that one server can hold, with ranks drawn; and adapters of three rates and two or three ranks, as
in published experiments. Every placement, of `place` and of each baseline, is played by the event twin with seeds that
no placement has seen.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from lora_capacity_cli.runtime import prepare

from lora_capacity.errors import InfeasibleError
from lora_capacity.fleet import Fleet, Placement, place
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.oracle import Oracle, scenarios_of
from lora_capacity.fleet.plays import Plays, Server, load_of
from lora_capacity.run import simulate
from lora_capacity.run.steady import with_classes
from lora_capacity.search.margin import judged_columns

CALIBRATION = "llama-3.1-8b-instruct-h100-64gb"
LENGTHS = {
    "input_tokens": {"mean": 223, "std": 248, "min": 4, "max": 1024},
    "output_tokens": {"mean": 197, "std": 207, "min": 4, "max": 1024},
}
RATES = {"low": [0.1, 0.05, 0.025], "medium": [0.4, 0.1, 0.025], "high": [1.6, 0.4, 0.1]}
RANKS = {"8,16": [8, 16], "8,16,32": [8, 16, 32]}
TESTED = [8, 16, 32, *range(64, 577, 32)]
MOST_RATE, MOST_CV = 8.0, 3.0
SEEDS = range(9000, 9004)


@dataclass
class Fixed(Server):
    """A server with a number of slots of its own."""

    max_loras: int = 0

    def slots(self, items: Items) -> int:
        """Return its slots."""
        return self.max_loras or super().slots(items)


def main() -> None:
    """Place every instance in every way, print a line for each and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tenants", type=Path, help="table of tenants")
    parser.add_argument("--sizes", default="32,128,512", help="numbers of adapters")
    parser.add_argument("--kinds", default="tenants,low,medium,high", help="kinds of instances")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    prepare()
    rows = []
    for kind in arguments.kinds.split(","):
        for size in map(int, arguments.sizes.split(",")):
            for ranks in RANKS:
                rows += compare(f"{kind} {size} ranks {ranks}", instance(arguments.tenants, kind, size, RANKS[ranks]))
    if arguments.json:
        document = {"environment": environment("jax", "numpy", "scipy"), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def instance(tenants: Path, kind: str, size: int, ranks: Sequence[int]) -> Fleet:
    """Return a fleet of so many adapters."""
    rng = np.random.default_rng(size)
    cvs = np.ones(size)
    if kind == "tenants":
        with tenants.open(encoding="utf-8") as file:
            known = [(float(row["mean_rate_per_s"]), float(row["cv"])) for row in csv.DictReader(file)]
        table = np.array([(rate, min(max(cv, 1.0), MOST_CV)) for rate, cv in known if 1e-3 < rate <= MOST_RATE])
        rates, cvs = table[rng.integers(len(table), size=size)].T
    else:
        rates = rng.choice(RATES[kind], size)
    drawn = rng.choice(ranks, size)
    adapters = [
        {"adapter": f"a{i}", "rank": int(drawn[i]), "rate_per_s": float(rates[i]), "cv": float(cvs[i])}
        for i in range(size)
    ]
    return Fleet.from_mapping({"adapters": adapters, "pools": [{"calibration": CALIBRATION}], "requests": LENGTHS})


def compare(name: str, fleet: Fleet) -> list[dict[str, Any]]:
    """Place a fleet in every way and play what comes out."""
    items = Items.of_fleet(fleet, np.ones(len(fleet.names), np.int64))
    rows = []
    try:
        start = time.perf_counter()
        found = place(fleet)
        rows.append(row(name, "place", fleet, items, as_servers(fleet, found), time.perf_counter() - start))
        rows[-1] |= {"bound": found.lower_bound, "bound_kind": found.lower_bound_kind}
    except InfeasibleError as error:
        print(f"{name}: {error}")
        return []
    for baseline in (random, round_robin, fill_to_backbone, greedy):
        start = time.perf_counter()
        servers = baseline(fleet, items, max(len(found.servers) - 1, 1))
        rows.append(row(name, baseline.__name__, fleet, items, servers, time.perf_counter() - start))
    for each in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in each.items()}, flush=True)
    return rows


def row(name: str, how: str, fleet: Fleet, items: Items, servers: list[Server], seconds: float) -> dict[str, Any]:
    """Return the figures of a placement, played with fresh seeds."""
    played = Plays(fleet, items).columns(servers, [1.0], SEEDS)
    holds = Oracle(fleet).needed.reached({name: np.nan_to_num(column) for name, column in played.items()}) >= 1.0
    rate = np.array([items.rate_per_s[server.items].sum() for server in servers])
    attainment = np.nan_to_num(played["attainment"]).mean(axis=(1, 2))
    return {
        "instance": name,
        "how": how,
        "servers": len(servers),
        "attainment": float(attainment @ rate / rate.sum()),
        "plays_that_hold": float(holds.mean()),
        "seconds": seconds,
    }


def as_servers(fleet: Fleet, found: Placement) -> list[Server]:
    """Return the servers of a placement of whole adapters."""
    index = {name: place for place, name in enumerate(fleet.names)}
    assert all(share == 1.0 for server in found.servers for _, share in server.adapters)
    return [
        Fixed(0, 0, [index[name] for name, _ in server.adapters], max_loras=server.config.max_loras)
        for server in found.servers
    ]


def random(fleet: Fleet, items: Items, servers: int) -> list[Server]:
    """Deal adapters at random to one server fewer than `place` takes."""
    at = np.random.default_rng(0).integers(servers, size=len(items))
    return [Fixed(0, 0, np.flatnonzero(at == server).tolist()) for server in range(servers) if (at == server).any()]


def round_robin(fleet: Fleet, items: Items, servers: int) -> list[Server]:
    """Deal adapters in turn to one server fewer than `place` takes."""
    return [Fixed(0, 0, list(range(server, len(items), servers))) for server in range(servers)]


def fill_to_backbone(fleet: Fleet, items: Items, servers: int) -> list[Server]:
    """Fill servers one after the other up to the throughput of the model without adapters."""
    oracle, loads = Oracle(fleet), np.arange(1.0, 60.0, 0.25)
    one = load_of(fleet, items, [Server(0, 0, [0])]).take(np.zeros(loads.size, np.int64))
    rates = np.broadcast_to(loads[:, np.newaxis], one.count.shape)
    alone = type(one)(one.count, np.asarray(rates), one.rank, loads)
    most = loads[oracle.keeps(0, alone, 0)].max(initial=loads[0])
    filled: list[Server] = [Fixed(0, 0, [])]
    for item in range(len(items)):
        if items.rate_per_s[[*filled[-1].items, item]].sum() > most and filled[-1].items:
            filled.append(Fixed(0, 0, []))
        filled[-1].items.append(item)
    return filled


def greedy(fleet: Fleet, items: Items, servers: int) -> list[Server]:
    """Fill servers one after the other, ranks from high to low and rates zig-zag, tested at fixed sizes only.

    As described for the adapter caching problem across GPUs (arXiv 2602.24044): at each size of a list the best slots
    of the same list are looked for; a size that fails leaves the server with the last that held.
    """
    order: list[int] = []
    for rank in np.unique(items.rank)[::-1]:
        own = np.flatnonzero(items.rank == rank)
        own = own[np.argsort(-items.rate_per_s[own], kind="stable")]
        ends = np.empty_like(own)
        ends[::2], ends[1::2] = own[: (own.size + 1) // 2], own[(own.size + 1) // 2 :][::-1]
        order += ends.tolist()
    filled: list[Server] = []
    while order:
        sizes = [size for size in TESTED if size < len(order)] + [len(order)]
        best = Fixed(0, 0, order[: min(TESTED[0], len(order))])
        for size in sizes:
            tried = [Fixed(0, 0, order[:size], max_loras=slots) for slots in {*[t for t in TESTED if t < size], size}]
            held = [server for server, holds in zip(tried, keeps_up(fleet, items, tried), strict=True) if holds]
            if not held:
                break
            best = max(held, key=lambda server: server.max_loras)
        filled.append(best)
        order = order[len(best.items) :]
    return filled


def keeps_up(fleet: Fleet, items: Items, servers: Sequence[Fixed]) -> list[bool]:
    """Whether servers keep their bounds by the steady twin."""
    load = load_of(fleet, items, servers)
    slots = np.array([server.max_loras for server in servers])
    scenarios = with_classes(scenarios_of(fleet, fleet.pools[0], load, slots), min(16, load.count.shape[1]))
    columns = judged_columns(scenarios, simulate(fleet.pools[0].calibration, scenarios, fleet.traffic))
    return [bool(each) for each in np.nan_to_num(Oracle(fleet).needed.reached(columns)) >= 1.0]


Baseline = Callable[[Fleet, Items, int], list[Server]]

if __name__ == "__main__":
    main()
