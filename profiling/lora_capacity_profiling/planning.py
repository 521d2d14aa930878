"""Which servers a campaign needs, what is measured on each, and how long that will take."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_capacity.units import S_PER_HOUR
from lora_capacity_profiling.campaign import (
    AdapterBatch,
    Campaign,
    Decode,
    KvCapacity,
    Loading,
    Point,
    Prefill,
    ServingRun,
)
from lora_capacity_profiling.server import FlagValue

CLOSED_LOOP_WAVES = 4
"""Requests, per request at once, of the closed loop that tells what traffic a server can take."""

# Guesses, only for telling how long a campaign will take: of an H100 with a model of 8 billion parameters, and of two
# cores of a CPU with a model of 4 layers.
_START_S = {"gpu": 110.0, "cpu": 28.0}
_STEP_S = {"gpu": (0.013, 0.0001), "cpu": (0.006, 0.0003)}
_REQUEST_S = {"gpu": 0.001, "cpu": 0.005}
_PROMPT_TOKEN_S = {"gpu": 0.00005, "cpu": 0.00002}
_LOAD_S = {"gpu": 0.08, "cpu": 0.03}


@dataclass(frozen=True)
class ServerPlan:
    """One server to start, and what to measure on it.

    Attributes:
        name: What tells it from the others.
        max_loras: Slots; 0 for a server without LoRA.
        max_lora_rank: Rank of the slots; 0 likewise.
        max_cpu_loras: Adapters in host memory; 0 likewise.
        adapters: Adapters that it serves, by rank.
        points: What to measure on it; a start alone tells its KV cache.
    """

    name: str
    max_loras: int
    max_lora_rank: int
    max_cpu_loras: int
    adapters: Mapping[int, int]
    points: tuple[Point, ...]

    @property
    def adapter_names(self) -> dict[int, tuple[str, ...]]:
        """The server's names of its adapters, by rank."""
        return {rank: tuple(f"r{rank}-{i}" for i in range(count)) for rank, count in self.adapters.items()}

    def flags(self, campaign: Campaign, folders: Mapping[int, str]) -> dict[str, FlagValue]:
        """Return vLLM's flags of this server.

        Args:
            campaign: The campaign, whose flags hold for every server.
            folders: Folder of an adapter by rank.
        """
        flags = dict(campaign.server)
        if self.max_loras:
            modules = [f"{name}={folders[rank]}" for rank, names in self.adapter_names.items() for name in names]
            flags |= {
                "enable_lora": True,
                "max_loras": self.max_loras,
                "max_cpu_loras": self.max_cpu_loras,
                "max_lora_rank": self.max_lora_rank,
            }
            flags |= {"lora_modules": modules} if modules else {}
        return flags


def point_id(point: Point) -> str:
    """Return the name of a point, the same in every campaign that measures it."""
    match point:
        case KvCapacity():
            return f"start/slots{point.max_loras}-rank{point.max_lora_rank}"
        case Decode():
            return f"decode/batch{point.batch_size}"
        case Prefill():
            return f"prefill/batch{point.batch_size}-tokens{point.input_tokens}"
        case AdapterBatch():
            where = f"slots{point.max_loras}-rank{point.max_lora_rank}"
            return f"adapters/{where}/adapters{point.served_adapters}-batch{point.batch_size}"
        case Loading():
            return f"loading/rank{point.max_lora_rank}/adapter{point.adapter_rank}"
        case ServingRun():
            where = f"slots{point.max_loras}-rank{point.max_lora_rank}"
            return f"serving/{where}/adapters{point.max_cpu_loras}-load{point.load:g}"


def plan_servers(campaign: Campaign) -> list[ServerPlan]:
    """Return the fewest servers on which all points of a campaign can be measured, the one without LoRA first."""
    keyed: dict[tuple[int, int, int], list[Point]] = {}
    # Points that also say how many adapters host memory holds come first: the others can join them.
    for point in sorted(campaign.points, key=lambda each: not isinstance(each, ServingRun | Loading)):
        keyed.setdefault(_server_of(point, keyed), []).append(point)
    plans = []
    for (slots, rank, cpu), points in sorted(keyed.items()):
        name = f"slots{slots}-rank{rank}" if slots else "no-lora"
        alike = [key for key in keyed if key[:2] == (slots, rank)]
        name = f"{name}-host{cpu}" if len(alike) > 1 else name
        plans.append(ServerPlan(name, slots, rank, cpu, _adapters(points), tuple(points)))
    return plans


def _server_of(point: Point, known: Mapping[tuple[int, int, int], object]) -> tuple[int, int, int]:
    """Return slots, rank and adapters in host memory of a point's server."""
    match point:
        case Decode() | Prefill():
            return 0, 0, 0
        case ServingRun():
            return point.max_loras, point.max_lora_rank, point.max_cpu_loras
        case Loading():
            # Half of the adapters: asked in turn, none is still in host memory when its turn comes.
            return 1, point.max_lora_rank, max(point.adapters // 2, 1)
        case KvCapacity() | AdapterBatch():
            wanted = (point.max_loras, point.max_lora_rank)
            return next((key for key in known if key[:2] == wanted), (*wanted, point.max_loras))


def _adapters(points: Sequence[Point]) -> dict[int, int]:
    """Return how many adapters of which rank some points need at most."""
    most: Counter[int] = Counter()
    for point in points:
        match point:
            case AdapterBatch():
                needed = Counter({point.max_lora_rank: point.served_adapters})
            case Loading():
                needed = Counter({point.adapter_rank: point.adapters})
            case ServingRun():
                needed = Counter(ranks_of(point))
            case _:
                needed = Counter()
        most |= needed
    return dict(sorted(most.items()))


def ranks_of(point: ServingRun) -> list[int]:
    """Return the rank of each adapter of a serving run."""
    return [point.ranks[i % len(point.ranks)] for i in range(point.max_cpu_loras)]


def estimate_start_s(device: str) -> float:
    """Return a guess of how long a server takes to start, seconds."""
    return _START_S[device]


def estimate_point_s(point: Point, campaign: Campaign, device: str) -> float:
    """Return a guess of how long a point takes, seconds.

    Args:
        point: The point.
        campaign: Its campaign.
        device: ``gpu`` or ``cpu``.
    """
    base_s, token_s = _STEP_S[device]
    match point:
        case KvCapacity():
            return 0.0
        case Decode() | AdapterBatch():
            wide = (
                1.0 + (point.max_lora_rank + point.served_adapters) / 40.0 if isinstance(point, AdapterBatch) else 1.0
            )
            step_s = base_s + wide * token_s * point.batch_size
            return campaign.repeats * (point.output_tokens * step_s + point.batch_size * _REQUEST_S[device])
        case Prefill():
            prompt_s = _REQUEST_S[device] + point.input_tokens * _PROMPT_TOKEN_S[device] + base_s / point.batch_size
            return campaign.repeats * point.num_prompts * prompt_s
        case Loading():
            return campaign.repeats * point.adapters * (point.rounds + 1) * _LOAD_S[device]
        case ServingRun():
            sequences = float(str(campaign.server["max_num_seqs"]))
            wave_s = (base_s + 2.0 * token_s * sequences) * dict(point.output_tokens)["mean"]
            return point.horizon_s + CLOSED_LOOP_WAVES * (wave_s + sequences * _REQUEST_S[device])


def estimate_hours(campaign: Campaign, device: str) -> float:
    """Return a guess of how long a whole campaign takes, hours of one GPU (or of the CPUs)."""
    plans = plan_servers(campaign)
    total_s = len(plans) * estimate_start_s(device)
    total_s += sum(estimate_point_s(point, campaign, device) for plan in plans for point in plan.points)
    return total_s / S_PER_HOUR
