"""What a profile measures: a campaign, read from YAML.

A campaign is a mapping with the keys ``description``, ``server`` (vLLM's flags for every server), ``environment``
(variables likewise), ``repeats``, and lists of grids: ``kv_capacity``, ``decode``, ``prefill``, ``adapters``,
``loading``, ``serving``. In a grid every value may be a list; all combinations are measured. What can be measured on
one server is measured on one server.
"""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from lora_capacity.engines import FlagValue
from lora_capacity.errors import InputError, check_number, nearest_hint
from lora_capacity.reading import parse_yaml, read_mapping
from lora_capacity.schema import Count, Model, validated
from lora_capacity_profiling.points import (
    SPEEDS,
    AdapterBatch,
    Decode,
    KvCapacity,
    Loading,
    Point,
    Prefill,
    ServingRun,
)

_GRIDS: Mapping[str, type[Point]] = {
    "kv_capacity": KvCapacity,
    "decode": Decode,
    "prefill": Prefill,
    "adapters": AdapterBatch,
    "loading": Loading,
    "serving": ServingRun,
}
LIMITS = ("max_num_seqs", "max_num_batched_tokens")
"""Flags that every campaign must give: what is measured depends on them."""

_MAX_POINTS = 10_000
"""A hundred times the points of the largest campaign of the package, and weeks of a GPU: a slip of the pen."""


class CampaignFile(Model):
    """A campaign's file; grids, of which each kind may be one or a list, are checked by their points."""

    description: str = ""
    server: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    repeats: Count = 1
    kv_capacity: Any = None
    decode: Any = None
    prefill: Any = None
    adapters: Any = None
    loading: Any = None
    serving: Any = None


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
        file = validated(CampaignFile, content, f"{name}:")
        _check_limits(file.server, f"{name}: server.")
        points: list[Point] = []
        for section, kind in _GRIDS.items():
            given = getattr(file, section) or []
            for place, grid in enumerate(given if isinstance(given, list) else [given]):
                points += kind.of_grid(f"{name}: {section}[{place}]", grid)
        if not points:
            raise InputError(name, "no points", f"at least one of {', '.join(_GRIDS)}")
        if len(points) > _MAX_POINTS:
            raise InputError(name, f"{len(points)} points", f"at most {_MAX_POINTS}")
        campaign = cls(
            name=name,
            description=file.description,
            server=file.server,
            environment={key: str(value) for key, value in file.environment.items()},
            repeats=file.repeats,
            points=tuple(dict.fromkeys(points)),
        )
        return campaign._checked()

    @property
    def max_num_seqs(self) -> int:
        """Most concurrent sequences of every server."""
        return int(str(self.server["max_num_seqs"]))

    def with_flags(self, flags: Mapping[str, FlagValue], where: str) -> Self:
        """Return the campaign with further flags, which take the place of its own.

        Args:
            flags: Values by vLLM's names.
            where: What begins the name of a flag in messages.

        Raises:
            InputError: If a limit of the servers is no whole number, or too small for a point.
        """
        _check_limits({**self.server, **flags}, where)
        return replace(self, server={**self.server, **flags})._checked()

    def estimate_s(self, point: Point, device: str) -> float:
        """Return about how long a point takes, seconds.

        Args:
            point: The point.
            device: ``gpu`` or ``cpu``.
        """
        return (self.repeats if point.REPEATED else 1) * point.once_s(SPEEDS[device], self.max_num_seqs)

    def _checked(self) -> Self:
        for point in self.points:
            batch = getattr(point, "batch_size", 1)
            if batch > self.max_num_seqs:
                raise InputError(f"{self.name}: batch_size", batch, f"at most max_num_seqs, {self.max_num_seqs}")
        return self


def _check_limits(server: Mapping[str, Any], where: str) -> None:
    for name in LIMITS:
        value = server.get(name)
        check_number(f"{where}{name}", value, minimum=1, integer=True)
        if not isinstance(value, int):  # vLLM's command line takes 64 and not 64.0
            raise InputError(f"{where}{name}", value, "a whole number without a decimal point")


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
        return Campaign.from_mapping(parse_yaml(resource.read_text(encoding="utf-8"), name), name)
    if not (name.endswith((".yaml", ".yml", ".json")) or Path(name).exists()):
        raise InputError("campaign", name, f"a YAML file, or one of {', '.join(names)}", nearest_hint(name, names))
    return Campaign.from_mapping(read_mapping(Path(name)), name)
