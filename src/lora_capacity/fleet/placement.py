"""Placement: which adapters on which server, what is predicted and played of each, and how far it is from the bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_capacity.display import Display, Displayed
from lora_capacity.engines import ServerConfig
from lora_capacity.words import percent, plural, shown, spoken

_PREDICTED = (
    *("throughput_tokens_per_s", "offered_tokens_per_s", "attainment", "ttft_s", "tpot_s", "itl_s"),
    *("client_ttft_s", "client_tpot_s", "mean_running", "mean_waiting", "active_adapters", "kv_usage", "loads_per_s"),
)
"""Figures of the steady twin that are told of a server."""

_SETTINGS = ("max_loras", "max_cpu_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class PlacedServer:
    """One server of a placement.

    Attributes:
        name: How files and routes call it.
        pool: Name of its pool.
        model: What it is told to load.
        adapters: Its adapters, and the share of the requests of each that it takes.
        rate_per_s: Requests per second that it is asked for.
        config: Its settings under vLLM's names.
        prediction: What the steady twin says of it, by the names of `Results`, with ``limit``, its bottleneck.
        played: What the event twin saw: ``attainment`` and ``service`` (throughput over offered load), means over the
            seeds; ``worst_attainment`` of one seed; ``seeds``.
    """

    name: str
    pool: str
    model: str
    adapters: Sequence[tuple[str, float]]
    rate_per_s: float
    config: ServerConfig
    prediction: Mapping[str, Any]
    played: Mapping[str, Any]

    @property
    def serve_command(self) -> str:
        """The ``vllm serve`` line that starts it."""
        return self.config.serve_command(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of plain values, see `Placement.to_dict`."""
        return {
            "name": self.name,
            "pool": self.pool,
            "adapters": [{"adapter": name, "share": share} for name, share in self.adapters],
            **{name: getattr(self.config, name) for name in _SETTINGS},
            "requests_per_s": self.rate_per_s,
            "prediction": dict(self.prediction),
            "played": dict(self.played),
            "serve_command": self.serve_command,
        }


@dataclass(frozen=True)
class Standby:
    """A server that holds no adapters until another fails.

    Attributes:
        pool: Name of its pool.
        takes_over: Names of the servers any one of which it takes over, with that server's settings and adapters.
    """

    pool: str
    takes_over: Sequence[str]


@dataclass(frozen=True, repr=False)
class Placement(Displayed):
    """Which adapters go onto which server.

    Attributes:
        servers: The servers.
        standby: Servers that stand by, one of each pool in use, where the fleet has to survive the loss of a server.
        unplaced: Adapters that no server takes, with the objective ``most-served``.
        objective: What was looked for.
        gpus: GPUs of all servers, those that stand by included.
        cost_per_hour: Their price; None where a pool has none.
        lower_bound: GPUs, or with ``cheapest`` the price per hour, that no placement goes below in the terms of the
            twins; see ``lower_bound_kind``; None with ``most-served``.
        lower_bound_kind: ``exact``: all servers that could be were looked at; ``heuristic``: those that pricing found,
            so that a better placement may be missed.
        moves: Adapters that leave a server that has them now; None where the fleet tells none that run.
        seconds: How long it took.
        warnings: What the user should know, one sentence each.
    """

    servers: Sequence[PlacedServer]
    standby: Sequence[Standby]
    unplaced: Sequence[str]
    objective: str
    gpus: int
    cost_per_hour: float | None
    lower_bound: float | None
    lower_bound_kind: str
    moves: int | None
    seconds: float
    warnings: Sequence[str]

    @property
    def gap(self) -> float | None:
        """What the placement costs more than the bound, as a share of it; None where there is no bound."""
        if not self.lower_bound:
            return None
        cost = self.cost_per_hour if self.objective == "cheapest" else float(self.gpus)
        return None if cost is None else cost / self.lower_bound - 1.0

    @property
    def routes(self) -> dict[str, list[dict[str, Any]]]:
        """The servers of every adapter and the share of its requests that each takes."""
        routes: dict[str, list[dict[str, Any]]] = {}
        for server in self.servers:
            for name, share in server.adapters:
                routes.setdefault(name, []).append({"server": server.name, "share": share})
        return routes

    def _display(self) -> Display:
        bound = "not known" if self.lower_bound is None else f"{shown(self.lower_bound)} ({self.lower_bound_kind})"
        facts = {
            "lower bound": bound,
            "cost per hour": shown(self.cost_per_hour),
            "stand by": ", ".join(each.pool for each in self.standby),
            "not placed": ", ".join(self.unplaced),
        }
        rows = [
            {
                "server": server.name,
                "pool": server.pool,
                "adapters": len(server.adapters),
                "max_loras": server.config.max_loras,
                "requests/s": server.rate_per_s,
                "in bounds": percent(server.played["attainment"]),
                "bottleneck": spoken(server.prediction["limit"]),
            }
            for server in self.servers
        ]
        return Display(
            f"{plural(len(self.servers), 'server')}, {plural(self.gpus, 'GPU')}; objective {self.objective}",
            {name: fact for name, fact in facts.items() if fact},
            rows,
            warnings=self.warnings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as ``place --format json`` prints it.

        ``{"objective", "servers": [{"name", "pool", "adapters": [{"adapter", "share"}], "max_loras", "max_cpu_loras",
        "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "requests_per_s", "prediction": {of `Results`},
        "played": {"attainment", "service", "worst_attainment", "seeds"}, "serve_command"}], "standby": [{"pool",
        "takes_over": [names]}], "unplaced": [names], "gpus", "cost_per_hour", "lower_bound", "lower_bound_kind", "gap",
        "moves", "seconds", "warnings": [sentences]}``; what is not known is None.
        """
        return {
            "objective": self.objective,
            "servers": [server.to_dict() for server in self.servers],
            "standby": [{"pool": each.pool, "takes_over": list(each.takes_over)} for each in self.standby],
            "unplaced": list(self.unplaced),
            "gpus": self.gpus,
            "cost_per_hour": self.cost_per_hour,
            "lower_bound": self.lower_bound,
            "lower_bound_kind": self.lower_bound_kind,
            "gap": self.gap,
            "moves": self.moves,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def told(columns: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Return what is told of one server's prediction."""
    return {name: float(columns[name][row]) for name in _PREDICTED} | {"limit": str(columns["limit"][row])}
