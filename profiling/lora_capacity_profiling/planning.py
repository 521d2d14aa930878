"""Which servers a campaign needs, and what is measured on each."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_capacity.engines import FlagValue
from lora_capacity_profiling.campaign import Campaign
from lora_capacity_profiling.points import SPEEDS, Point


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


def plan_servers(campaign: Campaign) -> list[ServerPlan]:
    """Return the fewest servers on which all points of a campaign can be measured, the one without LoRA first."""
    servers: dict[tuple[int, int, int], list[Point]] = {}
    # Points that also say how many adapters host memory holds come first: the others can join them.
    for point in sorted(campaign.points, key=lambda each: each.server[2] is None):
        slots, rank, cpu = point.server
        if cpu is None:
            cpu = next((key[2] for key in servers if key[:2] == (slots, rank)), slots)
        servers.setdefault((slots, rank, cpu), []).append(point)
    alike = Counter(key[:2] for key in servers)
    plans = []
    for (slots, rank, cpu), points in sorted(servers.items()):
        name = f"slots{slots}-rank{rank}" if slots else "no-lora"
        name = f"{name}-host{cpu}" if alike[slots, rank] > 1 else name
        most: Counter[int] = Counter()
        for point in points:
            most |= point.adapters_by_rank
        plans.append(ServerPlan(name, slots, rank, cpu, dict(sorted(most.items())), tuple(points)))
    return plans


def estimate_s(campaign: Campaign, points: Iterable[Point], device: str, *, starts: bool = True) -> float:
    """Return a guess of how long points of one server take, its start included, seconds.

    Args:
        campaign: Their campaign.
        points: The points.
        device: ``gpu`` or ``cpu``.
        starts: Whether the server is still to be started.
    """
    return SPEEDS[device].start_s * starts + sum(campaign.estimate_s(point, device) for point in points)
