"""What a profile measures: a campaign, read from YAML.

A campaign is a mapping with the keys ``description``, ``server`` (vLLM's flags for every server), ``environment``
(variables likewise), ``repeats``, and lists of grids: ``kv_capacity``, ``decode``, ``prefill``, ``adapters``,
``loading``, ``serving``. In a grid every value may be a list; all combinations are measured. What can be measured on
one server is measured on one server.
"""

import importlib.resources
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from lora_capacity.errors import InputError, check_keys, check_number, nearest_hint
from lora_capacity.workload.files import load_mapping
from lora_capacity_profiling.server import FlagValue

_KEYS = (
    "description",
    "server",
    "environment",
    "repeats",
    "kv_capacity",
    "decode",
    "prefill",
    "adapters",
    "loading",
    "serving",
)
_MAX_POINTS = 10_000

# Of each grid: keys that may be lists, with the smallest value, and keys that take one value.
_GRIDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kv_capacity": (("max_loras", "max_lora_rank"), ()),
    "decode": (("batch_size",), ("output_tokens",)),
    "prefill": (("batch_size", "input_tokens"), ("num_prompts",)),
    "adapters": (("max_loras", "max_lora_rank", "served_adapters", "batch_size"), ("output_tokens",)),
    "loading": (("max_lora_rank", "adapter_rank"), ("adapters", "rounds")),
}
_SERVING = (
    "max_loras",
    "max_cpu_loras",
    "max_lora_rank",
    "ranks",
    "rate_shares",
    "load",
    "input_tokens",
    "output_tokens",
    "horizon_s",
)


@dataclass(frozen=True)
class KvCapacity:
    """Start of a server with so many slots of a rank."""

    max_loras: int
    max_lora_rank: int


@dataclass(frozen=True)
class Decode:
    """A batch that generates, without adapters."""

    batch_size: int
    output_tokens: int


@dataclass(frozen=True)
class Prefill:
    """Prompts answered by one token, ``batch_size`` at a time; without adapters."""

    batch_size: int
    input_tokens: int
    num_prompts: int


@dataclass(frozen=True)
class AdapterBatch:
    """A batch that generates, of so many different adapters."""

    max_loras: int
    max_lora_rank: int
    served_adapters: int
    batch_size: int
    output_tokens: int


@dataclass(frozen=True)
class Loading:
    """Adapters of a rank asked one after the other on a server of one slot."""

    max_lora_rank: int
    adapter_rank: int
    adapters: int
    rounds: int


@dataclass(frozen=True)
class ServingRun:
    """Traffic at a share of what the server can take in the same traffic.

    Attributes:
        max_loras: Slots.
        max_cpu_loras: Adapters served.
        max_lora_rank: Rank of the slots.
        ranks: Ranks dealt in turn to the adapters.
        rate_shares: Relative rates dealt likewise.
        load: Requests per second relative to what a closed loop of ``max_num_seqs`` requests gets answered.
        input_tokens: Law of the prompt lengths, as in a workload file.
        output_tokens: Law of the answer lengths.
        horizon_s: Length of the run in seconds.
    """

    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    ranks: tuple[int, ...]
    rate_shares: tuple[float, ...]
    load: float
    input_tokens: tuple[tuple[str, float], ...]
    output_tokens: tuple[tuple[str, float], ...]
    horizon_s: float


Point = KvCapacity | Decode | Prefill | AdapterBatch | Loading | ServingRun


@dataclass(frozen=True)
class Campaign:
    """Points to measure, and on what servers.

    Attributes:
        name: Its name, or the path of its file.
        description: What it is for.
        server: vLLM's flags of every server, by their names with underscores.
        environment: Variables of every server's environment.
        repeats: How often each latency is measured; its row holds the median.
        points: The points, each once.
    """

    name: str
    description: str
    server: Mapping[str, FlagValue]
    environment: Mapping[str, str]
    repeats: int
    points: tuple[Point, ...]

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], name: str) -> Self:
        """Build a campaign from the content of its file.

        Args:
            content: The content.
            name: What to call it, also in complaints.

        Raises:
            InputError: If a key is unknown or missing, or a value is not allowed.
        """
        check_keys(name, content, _KEYS)
        server, environment = content.get("server", {}), content.get("environment", {})
        if not isinstance(server, Mapping):
            raise InputError(f"{name}: server", server, "a mapping of vLLM's flags")
        if not isinstance(environment, Mapping):
            raise InputError(f"{name}: environment", environment, "a mapping of variables")
        for key in ("max_num_seqs", "max_num_batched_tokens"):
            check_number(f"{name}: server.{key}", server.get(key, "missing"), minimum=1, integer=True)
        points: list[Point] = []
        for section, kind in _KINDS.items():
            for place, grid in enumerate(_grids(name, content, section)):
                points += kind(f"{name}: {section}[{place}]", grid)
        if not points:
            raise InputError(name, "no points", f"at least one of {', '.join(_KINDS)}")
        for point in points:
            _check_fits(name, point, int(server["max_num_seqs"]))
        if len(points) > _MAX_POINTS:
            raise InputError(name, f"{len(points)} points", f"at most {_MAX_POINTS}")
        return cls(
            name=name,
            description=str(content.get("description", "")),
            server={str(key): value for key, value in server.items()},
            environment={str(key): str(value) for key, value in environment.items()},
            repeats=int(check_number(f"{name}: repeats", content.get("repeats", 1), minimum=1, integer=True)),
            points=tuple(dict.fromkeys(points)),
        )


def campaign_names() -> tuple[str, ...]:
    """Names of the campaigns that come with the package, shortest first."""
    return ("quick", "standard", "thorough", "quick-cpu")


def load_campaign(name_or_path: str | Path) -> Campaign:
    """Return a campaign of the package by name, or read a file.

    Raises:
        InputError: If it is neither, or the file holds no campaign.
    """
    name, names = str(name_or_path), campaign_names()
    if name in names:
        resource = importlib.resources.files("lora_capacity_profiling") / "campaigns" / f"{name}.yaml"
        return Campaign.from_mapping(yaml.safe_load(resource.read_text(encoding="utf-8")), name)
    if not (name.endswith((".yaml", ".yml", ".json")) or Path(name).exists()):
        raise InputError("campaign", name, f"a YAML file, or one of {', '.join(names)}", nearest_hint(name, names))
    return Campaign.from_mapping(load_mapping(Path(name)), name)


def _grids(name: str, content: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    given = content.get(section) or []
    grids = given if isinstance(given, list) else [given]
    for place, grid in enumerate(grids):
        if not isinstance(grid, Mapping):
            raise InputError(f"{name}: {section}[{place}]", grid, "a mapping, or a list of mappings")
    return grids


def _combinations(cls: Callable[..., Point], section: str) -> Callable[[str, Mapping[str, Any]], list[Point]]:
    """Return what makes the points of a grid: every combination of its lists."""
    varying, fixed = _GRIDS[section]

    def points(field: str, grid: Mapping[str, Any]) -> list[Point]:
        check_keys(field, grid, (*varying, *fixed))
        lists = [_counts(field, grid, key) for key in varying]
        single = {key: _count(f"{field}.{key}", grid.get(key, "missing")) for key in fixed}
        found = []
        for values in itertools.product(*lists):
            entry = dict(zip(varying, values, strict=True)) | single
            # Grids of several lists hold combinations that make no sense; they are left out.
            if entry.get("served_adapters", 1) > min(entry.get("max_loras", 1), entry.get("batch_size", 1)):
                continue
            if entry.get("adapter_rank", 1) > entry.get("max_lora_rank", 1):
                continue
            found.append(cls(**entry))
        if not found:
            raise InputError(field, dict(grid), "at least one combination with adapters <= slots, batch and rank")
        return found

    return points


def _serving(field: str, grid: Mapping[str, Any]) -> list[Point]:
    check_keys(field, grid, _SERVING)
    laws = {}
    for key in ("input_tokens", "output_tokens"):
        law = grid.get(key)
        if not isinstance(law, Mapping):
            raise InputError(f"{field}.{key}", law, "a law of lengths such as {mean: 100, std: 50, min: 4, max: 400}")
        laws[key] = tuple(sorted((str(name), float(check_number(f"{field}.{key}", law[name]))) for name in law))
    shares = tuple(_numbers(field, grid, "rate_shares"))
    horizon_s = check_number(f"{field}.horizon_s", grid.get("horizon_s", "missing"), minimum=0, exclusive=True)
    ranks = tuple(_counts(field, grid, "ranks"))
    found: list[Point] = []
    for slots, adapters, rank, load in itertools.product(
        _counts(field, grid, "max_loras"),
        _counts(field, grid, "max_cpu_loras"),
        _counts(field, grid, "max_lora_rank"),
        _numbers(field, grid, "load"),
    ):
        if slots <= adapters and max(ranks) <= rank:
            found.append(ServingRun(slots, adapters, rank, ranks, shares, load, **laws, horizon_s=horizon_s))
    if not found:
        raise InputError(
            field, dict(grid), "at least one combination with slots <= adapters and ranks <= max_lora_rank"
        )
    return found


_KINDS: Mapping[str, Callable[[str, Mapping[str, Any]], list[Point]]] = {
    "kv_capacity": _combinations(KvCapacity, "kv_capacity"),
    "decode": _combinations(Decode, "decode"),
    "prefill": _combinations(Prefill, "prefill"),
    "adapters": _combinations(AdapterBatch, "adapters"),
    "loading": _combinations(Loading, "loading"),
    "serving": _serving,
}


def _check_fits(name: str, point: Point, max_num_seqs: int) -> None:
    batch = getattr(point, "batch_size", 1)
    if batch > max_num_seqs:
        raise InputError(f"{name}: batch_size", batch, f"at most max_num_seqs, {max_num_seqs}")


def _count(field: str, value: object) -> int:
    return int(check_number(field, value, minimum=1, integer=True))


def _counts(field: str, grid: Mapping[str, Any], key: str) -> list[int]:
    return [_count(f"{field}.{key}", value) for value in _listed(field, grid, key)]


def _numbers(field: str, grid: Mapping[str, Any], key: str) -> list[float]:
    return [
        float(check_number(f"{field}.{key}", value, minimum=0, exclusive=True)) for value in _listed(field, grid, key)
    ]


def _listed(field: str, grid: Mapping[str, Any], key: str) -> list[Any]:
    value = grid.get(key, "missing")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"{field}.{key}", value, "a number or a list of numbers")
    return values
