"""Places the adapters of a fleet: how few servers, which adapters on each, and a bound below."""

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lora_capacity.errors import InfeasibleError, InputError, check_number
from lora_capacity.fleet.assign import Tags, assign
from lora_capacity.fleet.columns import Columns
from lora_capacity.fleet.correction import learn
from lora_capacity.fleet.fleet import Fleet
from lora_capacity.fleet.items import Items
from lora_capacity.fleet.master import Question, relax, whole
from lora_capacity.fleet.oracle import Load, Oracle, predicted
from lora_capacity.fleet.placement import PlacedServer, Placement, told
from lora_capacity.fleet.plays import Plays, Server, load_of
from lora_capacity.fleet.repair import Workshop

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Stage = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it is done of how much."""

_MOST_PIECES = 64
"""Servers over which one adapter's requests are spread at most: far above what any adapter of a fleet needs."""

_PRICINGS, _LATER_PRICINGS = 6, 12
"""Rounds of pricing before the event twin corrects the steady one, and after, when good servers are known."""

_IMPROVES = 1.0 + 5e-3
"""Cost of the relaxed problem over its bound down to which servers are priced: a fiftieth of a server in four."""

_SMOOTHING = 0.5
"""Share of the values with the best bound so far in those that are priced next: the linear program's own swing from
one round to the next while few servers are known (Wentges 1997)."""

_CLOSINGS = 3
"""Servers that are closed at most: whole numbers leave few half empty."""


def place(fleet: Fleet, *, seed: int = 0, seeds: int = 4, stage: Stage | None = None) -> Placement:
    """Place adapters on as few servers as keep their bounds.

    Adapters fall into classes of about equal rate and rank, and a server is a number of adapters of each class. The
    steady twin tells which servers keep their bounds; linear programming prices them (column generation), and the event
    twin plays some to correct the steady one. Whole numbers of the best servers cover all adapters; each server
    then gets its own adapters, is played with several seeds, and is changed until it holds with all of them.

    Args:
        fleet: The adapters, the pools of servers and what to look for.
        seed: First seed of the requests that servers are played with, >= 0.
        seeds: How many.
        stage: Called as the work goes on.

    Returns:
        The placement; every server of it has held in every play.

    Raises:
        InputError: If a number is not allowed, or an adapter needs more replicas than it may have.
        InfeasibleError: If an adapter fits onto no server, or the servers do not suffice.
    """
    started_s = time.monotonic()
    first = int(check_number("seed", seed, minimum=0, integer=True))
    count = int(check_number("seeds", seeds, minimum=1, integer=True))
    say = stage or (lambda what, done, total: None)
    oracle = Oracle(fleet)
    items = Items.of_fleet(fleet, pieces(fleet, oracle))
    plays, tags = Plays(fleet, items), Tags(fleet, items)
    most = np.array([np.inf if pool.most_servers is None else pool.most_servers for pool in fleet.pools])
    columns = Columns(oracle, items)
    question = Question.covering_all(items.count, prices(fleet), most)
    generate(columns, question, _PRICINGS, lambda done, total: say("servers that could be", done, total))
    say("corrections", 0, 1)
    for pool, mode in learn(oracle, items, tags, plays, columns, relax(question, columns.found).use):
        columns.drop(pool, mode)
    bound = generate(columns, question, _LATER_PRICINGS, lambda done, total: say("servers that could be", done, total))
    use, _ = whole(question, columns.found)
    servers, waiting = assign(items, tags, columns.found, use)
    workshop = Workshop(oracle, items, tags, plays, most, range(first, first + count))
    _, waiting = workshop.insert(servers, waiting, fresh=True)
    say("plays", 0, len(servers))
    workshop.balance(servers)
    waiting += workshop.repair(servers)
    servers = workshop.close(servers, _CLOSINGS)
    if len(fleet.pools) == 1 and not waiting:
        fewer = range(max(math.ceil(bound - 1e-6), 1), len(servers))
        servers = next((each for each in map(workshop.dealt, fewer) if each is not None), servers)
    if waiting:
        raise InfeasibleError(_short(fleet, items, waiting, servers))
    say("plays", len(servers), len(servers))
    return _answer(workshop, servers, bound, columns.exact, started_s)


def pieces(fleet: Fleet, oracle: Oracle) -> IntArray:
    """Return over how many servers each adapter's requests have to be spread, ``[adapters]``.

    Raises:
        InputError: If an adapter may not be spread so far.
        InfeasibleError: If an adapter fits onto no server however few of its requests that takes.
    """
    needed = np.zeros(len(fleet.names), np.int64)
    for parts in range(1, _MOST_PIECES + 1):
        left = np.flatnonzero(needed == 0)
        if not left.size:
            break
        fits = _fit_alone(fleet, oracle, left, parts)
        needed[left[fits]] = parts
    for adapter in np.flatnonzero(needed == 0)[:1].tolist():
        raise InfeasibleError(_fits_nowhere(fleet, adapter))
    for adapter in np.flatnonzero((fleet.replicas > 0) & (needed > fleet.replicas))[:1].tolist():
        allowed = (
            f"at least {needed[adapter]}: {fleet.rates_per_s[adapter]:g} requests/s are more than one server takes"
        )
        raise InputError(f"replicas of {fleet.names[adapter]}", int(fleet.replicas[adapter]), allowed)
    for adapter in np.flatnonzero(needed > 1).tolist():
        if fleet.together[adapter]:
            allowed = "adapters that fit onto one server"
            raise InputError(f"together of {fleet.names[adapter]}", fleet.together[adapter], allowed)
    return needed


def _fit_alone(fleet: Fleet, oracle: Oracle, adapters: IntArray, parts: int) -> NDArray[np.bool_]:
    """Whether a part of each adapter fits alone onto a server of some pool, ``[adapters]``."""
    rates, ranks = fleet.rates_per_s[adapters] / parts, fleet.ranks[adapters].astype(np.float64)
    kinds, of = np.unique(np.stack([rates, ranks, fleet.cvs[adapters]], axis=1), axis=0, return_inverse=True)
    fits = np.zeros(len(kinds), bool)
    for pool, chosen in enumerate(fleet.pools):
        taken = kinds[:, 1] <= chosen.calibration.behaviour.max_lora_ranks[-1]
        if not taken.any():
            continue
        own = kinds[taken]
        one = np.ones((len(own), 1))
        load = Load(one, own[:, :1], own[:, 1:2], own[:, 0] * own[:, 2] ** 2)
        fits[taken] |= oracle.keeps(pool, load, 0)
    return fits[of.reshape(-1)]


def _fits_nowhere(fleet: Fleet, adapter: int) -> str:
    """Say why an adapter fits onto no server, and what would make it."""
    name, rank = fleet.names[adapter], int(fleet.ranks[adapter])
    ranks = max(pool.calibration.behaviour.max_lora_ranks[-1] for pool in fleet.pools)
    what = f"adapter {name} (rank {rank}, {fleet.rates_per_s[adapter]:g} requests/s) fits onto no server of any pool"
    if rank > ranks:
        return f"{what}: the largest max_lora_rank is {ranks}; lower its rank, or add a pool of a newer vLLM"
    one, rate = np.ones((1, 1)), np.array([[fleet.rates_per_s[adapter] / _MOST_PIECES]])
    load = Load(one, rate, np.full((1, 1), float(rank)), rate[:, 0])
    found = predicted(fleet.pools[0], fleet, load, np.array([1]))
    if np.isnan(found["throughput_tokens_per_s"][0]):
        return (
            f"{what}: a server of pool {fleet.pools[0].name} does not start ({found['status'][0]}); raise "
            "gpu_memory_utilization, lower max_model_len, or add a pool with more memory"
        )
    bounds = " ".join(f"{key}:{bound_ms:g}" for key, bound_ms in fleet.traffic.goodput.to_ms().items())
    return (
        f"{what}: even nearly idle, {found['attainment'][0]:.1%} of its requests keep {bounds} ms "
        f"(first tokens after {found['client_ttft_s'][0] * 1e3:.0f} ms, {found['client_tpot_s'][0] * 1e3:.0f} ms a "
        "token); relax the bounds, or add a faster pool"
    )


def prices(fleet: Fleet) -> FloatArray:
    """Return what a server of each pool costs, in the terms of the objective, ``[pools]``."""
    if fleet.objective == "cheapest":
        return np.array([float(pool.price_per_hour or 0.0) for pool in fleet.pools])
    return np.array([float(pool.gpus) for pool in fleet.pools])


def generate(columns: Columns, question: Question, rounds: int, progress: Callable[[int, int], None]) -> float:
    """Look for servers until pricing finds none that improves, and return the bound below what they cost.

    The bound is that of Farley: values at which no server holds more than it costs are values that no cover goes
    below. Where all servers are known it is that of whole numbers.
    """
    if columns.exact or columns.enumerate():
        use, left = whole(question, columns.found)
        return float(question.price[columns.found.pool] @ use) if not left.any() else 0.0
    columns.spread()
    plain = columns.plain_values() if columns.centre is None else [columns.centre]
    values: list[FloatArray] = []
    for done in range(rounds):
        progress(done, rounds)
        relaxed = relax(question, columns.found)
        if done < len(plain):
            values.append(plain[done])
        else:
            values.append(_SMOOTHING * _best(values, question, columns)[1] + (1.0 - _SMOOTHING) * relaxed.value)
        columns.price(values[-1])
        if relaxed.cost <= _IMPROVES * _best(values, question, columns)[0]:
            break
    progress(rounds, rounds)
    bound, columns.centre = _best(values, question, columns)
    return bound


def _best(values: list[FloatArray], question: Question, columns: Columns) -> tuple[float, FloatArray]:
    """Return the best bound that values give by all servers found so far, and these values, scaled to it."""
    worth = columns.found.counts @ np.array(values).T
    most = (worth / question.price[columns.found.pool, np.newaxis]).max(axis=0)
    bounds = np.array(values) @ question.demand / most
    best = int(np.argmax(bounds))
    return float(bounds[best]), values[best] / most[best]


def _short(fleet: Fleet, items: Items, waiting: list[int], servers: list[Server]) -> str:
    """Say what the servers that there are do not hold."""
    names = [fleet.names[items.members[item][0][0]] for item in waiting]
    rate = items.rate_per_s[waiting].sum()
    return (
        f"{len(servers)} servers, all that the pools have, do not hold {len(names)} adapters ({', '.join(names[:3])}"
        f"{', …' if len(names) > 3 else ''}: {rate:.3g} requests/s); raise most_servers or lower headroom"
    )


def _answer(workshop: Workshop, servers: list[Server], bound: float, exact: bool, started_s: float) -> Placement:
    fleet = workshop.oracle.fleet
    placed = describe(workshop, servers)
    gpus = sum(fleet.pools[server.pool].gpus for server in servers)
    price = [fleet.pools[server.pool].price_per_hour for server in servers]
    spent = float(prices(fleet)[[server.pool for server in servers]].sum())
    lower = min(bound if fleet.objective == "cheapest" else math.ceil(bound - 1e-6), spent)
    return Placement(
        servers=placed,
        objective=fleet.objective,
        gpus=gpus,
        cost_per_hour=None if any(each is None for each in price) else float(sum(each or 0.0 for each in price)),
        lower_bound=lower,
        lower_bound_kind="exact" if exact else "heuristic",
        seconds=time.monotonic() - started_s,
        warnings=(),
    )


def describe(workshop: Workshop, servers: list[Server]) -> list[PlacedServer]:
    """Return what is told of servers, played at the load that they are asked for."""
    fleet, items = workshop.oracle.fleet, workshop.items
    played = workshop.plays.columns(servers, [fleet.headroom], workshop.seeds)
    load = load_of(fleet, items, servers)
    found = []
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
                name=f"server-{row}",
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
