"""Places the adapters of a fleet: how few servers, which adapters on each, and a bound below."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InfeasibleError, check_number
from lora_capacity.fleet.alone import check_groups, pieces
from lora_capacity.fleet.assign import Tags, assign
from lora_capacity.fleet.columns import Columns
from lora_capacity.fleet.correction import learn
from lora_capacity.fleet.current import moves, named_after, running
from lora_capacity.fleet.fleet import Fleet, FleetLike
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.master import Question, relax, whole
from lora_capacity.fleet.oracle import Oracle, predicted
from lora_capacity.fleet.placement import PlacedServer, Placement, Standby, told
from lora_capacity.fleet.plays import Plays, Server, load_of
from lora_capacity.fleet.pricing import generate
from lora_capacity.fleet.repair import Workshop
from lora_capacity.run.steady import check_progress

FloatArray = NDArray[np.float64]

Stage = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done of how much."""

_PRICINGS, _LATER_PRICINGS = 6, 12
"""Rounds of pricing before the event twin corrects the steady one, and after, when good servers are known."""

_CLOSINGS = 3
"""Servers that are closed at most: whole numbers leave few half empty."""


def place(fleet: FleetLike, *, seed: int = 0, seeds: int = 4, stage: Stage | None = None) -> Placement:
    """Place adapters on as few servers as keep their bounds.

    Adapters fall into classes of about equal rate and rank, and a server is a number of adapters of each class. The
    steady twin tells which servers keep their bounds; linear programming prices them (column generation), and the event
    twin plays some to correct the steady one. Whole numbers of the best servers cover all adapters; each server
    then gets its own adapters, is played with several seeds, and is changed until it holds with all of them.

    Args:
        fleet: The adapters, the pools of servers and what to look for; or the path or the content of a fleet file.
        seed: First seed of the requests that servers are played with, >= 0.
        seeds: How many.
        stage: Called as the work goes on.

    Returns:
        The placement; every server of it has held in every play.

    Raises:
        InputError: If a number is not allowed, or an adapter needs more replicas than it may have.
        InfeasibleError: If an adapter or a group fits onto no server, or the servers or the moves do not suffice.
    """
    started_s = time.monotonic()
    first = int(check_number("seed", seed, minimum=0, integer=True))
    count = int(check_number("seeds", seeds, minimum=1, integer=True))
    say = stage or (lambda what, done, total: None)
    fleet = Fleet.of(fleet)
    check_progress(stage, "stage")
    oracle = Oracle(fleet)
    items = Items.of_fleet(fleet, pieces(fleet, oracle))
    check_groups(fleet, oracle, items)
    tags = Tags(fleet, items)
    workshop = Workshop(oracle, items, tags, Plays(fleet, items), most_of(fleet), range(first, first + count))
    columns, question = Columns(oracle, items), question_of(fleet, items)
    generate(columns, question, _PRICINGS, lambda done, total: say("servers that could be", done, total))
    say("corrections", 0, 1)
    for pool, mode in learn(oracle, items, tags, workshop.plays, columns, relax(question, columns.found).use):
        columns.drop(pool, mode)
    bound = generate(columns, question, _LATER_PRICINGS, lambda done, total: say("servers that could be", done, total))
    say("plays", 0, 1)
    servers, waiting = _settled(workshop, columns, question, bound)
    say("plays", 1, 1)
    placement = _answer(workshop, servers, waiting, bound, columns.exact)
    return dataclasses.replace(placement, seconds=time.monotonic() - started_s)


def most_of(fleet: Fleet) -> FloatArray:
    """Return how many servers of each pool may hold adapters: with ``survive`` one of each stands by, ``[pools]``."""
    return np.array(
        [np.inf if pool.most_servers is None else pool.most_servers - fleet.survive for pool in fleet.pools]
    )


def question_of(fleet: Fleet, items: Items) -> Question:
    """Return what is covered at what prices, in the terms of the objective."""
    if fleet.objective == "most-served":
        return Question.covering_most(items.count, items.class_means()["rate_per_s"], most_of(fleet))
    price = [pool.price_per_hour if fleet.objective == "cheapest" else pool.gpus for pool in fleet.pools]
    return Question.covering_all(items.count, np.array(price, np.float64), most_of(fleet))


def _settled(workshop: Workshop, columns: Columns, question: Question, bound: float) -> tuple[list[Server], list[int]]:
    """Return servers that hold when played, and the items that are on none."""
    fleet, items = workshop.oracle.fleet, workshop.items
    partly = fleet.objective == "most-served"
    kept = None
    if fleet.current is not None:
        kept = _from_current(workshop)
        if fleet.max_moves is not None and moves(fleet, items, kept[0]) > fleet.max_moves:
            needed = moves(fleet, items, kept[0])
            raise InfeasibleError(
                f"max_moves {fleet.max_moves} do not suffice: {needed} adapters have to move for all servers to keep "
                "their bounds; raise max_moves, or lower headroom"
            )
    servers, waiting = assign(items, workshop.tags, columns.found, whole(question, columns.found)[0])
    _, waiting = workshop.insert(servers, waiting, fresh=not partly)
    workshop.balance(servers)
    waiting += workshop.repair(servers)
    servers = workshop.close(servers, 0 if partly else _CLOSINGS)
    if len(fleet.pools) == 1 and not waiting and not partly:
        fewer = range(max(math.ceil(bound - 1e-6), 1), len(servers))
        servers = next((each for each in map(workshop.dealt, fewer) if each is not None), servers)
    if fleet.objective == "balanced":
        evened = [server.copy() for server in servers]
        workshop.balance(evened)
        servers = evened if all(workshop.hold(evened)) else servers
    if fleet.current is not None and kept is not None:
        named_after(fleet, items, servers)
        allowed = fleet.max_moves is None or moves(fleet, items, servers) <= fleet.max_moves
        fewer_now = (len(waiting), _cost(question, servers)) < (len(kept[1]), _cost(question, kept[0]))
        servers, waiting = (servers, waiting) if allowed and fewer_now else kept
    if waiting and not partly:
        raise InfeasibleError(_short(fleet, items, waiting, servers))
    return servers, waiting


def _from_current(workshop: Workshop) -> tuple[list[Server], list[int]]:
    """Return the servers that run now, changed as little as makes them hold, and the items that are on none."""
    servers, waiting = running(workshop.oracle.fleet, workshop.items)
    workshop.widen(servers)
    _, waiting = workshop.insert(servers, waiting, fresh=True)
    return servers, waiting + workshop.repair(servers)


def _cost(question: Question, servers: Sequence[Server]) -> float:
    return float(question.price[[server.pool for server in servers]].sum())


def _short(fleet: Fleet, items: Items, waiting: list[int], servers: list[Server]) -> str:
    """Say what the servers that there are do not hold."""
    names = [fleet.names[items.members[item][0][0]] for item in waiting]
    rate = items.rate_per_s[waiting].sum()
    return (
        f"{len(servers)} servers, all that the pools have, do not hold {len(names)} adapters ({', '.join(names[:3])}"
        f"{', …' if len(names) > 3 else ''}: {rate:.3g} requests/s); raise most_servers or lower headroom"
    )


def _answer(workshop: Workshop, servers: list[Server], waiting: list[int], bound: float, exact: bool) -> Placement:
    fleet, items = workshop.oracle.fleet, workshop.items
    placed = describe(workshop, servers)
    standby = [
        Standby(pool.name, [server.name for server in placed if server.pool == pool.name])
        for pool in fleet.pools
        if fleet.survive and any(server.pool == pool.name for server in placed)
    ]
    by_name = {pool.name: pool for pool in fleet.pools}
    used = [by_name[name] for name in [*(each.pool for each in placed), *(each.pool for each in standby)]]
    told_prices = [pool.price_per_hour for pool in used if pool.price_per_hour is not None]
    gpus, cost = sum(pool.gpus for pool in used), sum(told_prices) if len(told_prices) == len(used) else None
    spent = cost if fleet.objective == "cheapest" and cost is not None else float(gpus)
    # Whoever survives the loss of a server has, without it, servers enough for all.
    price = question_of(fleet, items).price
    lower = bound if fleet.objective == "cheapest" else float(math.ceil(bound - 1e-6))
    lower += fleet.survive * float(price.min())
    names = [fleet.names[adapter] for item in waiting for adapter, _ in items.members[item]]
    return Placement(
        servers=placed,
        standby=standby,
        unplaced=sorted(set(names)),
        objective=fleet.objective,
        gpus=gpus,
        cost_per_hour=cost,
        lower_bound=None if fleet.objective == "most-served" else min(lower, spent),
        lower_bound_kind="exact" if exact else "heuristic",
        moves=None if fleet.current is None else moves(fleet, items, servers),
        seconds=0.0,
        warnings=(),
    )


def describe(workshop: Workshop, servers: list[Server]) -> list[PlacedServer]:
    """Return what is told of servers, played at the load that they are asked for."""
    fleet, items = workshop.oracle.fleet, workshop.items
    played = workshop.plays.columns(servers, [1.0], workshop.seeds)
    load = load_of(fleet, items, servers)
    found, names = [], _names(servers)
    for row, server in enumerate(servers):
        pool = fleet.pools[server.pool]
        own = load.take(slice(row, row + 1))
        adapters, max_loras = server.adapters(items), server.slots(items)
        prediction = predicted(pool, fleet, own, np.array([max_loras]))
        rank = pool.calibration.smallest_max_lora_rank(int(own.largest_rank[0]))
        config = pool.calibration.server(
            max_loras=max_loras, max_cpu_loras=len(adapters), max_lora_rank=rank, **pool.settings
        )
        found.append(
            PlacedServer(
                name=names[row],
                pool=pool.name,
                model=pool.calibration.model.served_as,
                adapters=[(fleet.names[adapter], share) for adapter, share in adapters],
                rate_per_s=float(own.total_per_s[0]),
                config=config,
                prediction=told(prediction, 0),
                played={
                    "attainment": float(played["attainment"][row].mean()),
                    "service": float(played["service"][row].mean()),
                    "worst_attainment": float(played["attainment"][row].min()),
                    "seeds": list(workshop.seeds),
                },
            )
        )
    return found


def _names(servers: Sequence[Server]) -> list[str]:
    """Return names of servers: those that they have, others numbered."""
    taken = {server.name for server in servers}
    free = (name for number in range(2 * len(servers)) if (name := f"server-{number}") not in taken)
    return [server.name or next(free) for server in servers]
