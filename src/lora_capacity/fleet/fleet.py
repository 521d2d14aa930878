"""A fleet: the adapters that have to be served, the kinds of servers there are, and what to look for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainValidator, WithJsonSchema

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.display import Display, Displayed
from lora_capacity.errors import InputError, check_keys, check_type
from lora_capacity.reading import read_json, read_mapping
from lora_capacity.schema import ABSENT, Count, Model, Number, Positive, briefly, validated
from lora_capacity.tables import ArrowStream, Column, Interchange, read_table
from lora_capacity.words import plural, shown
from lora_capacity.workload import Workload
from lora_capacity.workload.adapters import MAX_RANK, check_distinct
from lora_capacity.workload.recordings import TableSource, located

OBJECTIVES = ("fewest-gpus", "cheapest", "balanced", "most-served")
"""What to look for: the fewest GPUs; the least cost per hour; of the fewest GPUs, equal headroom on each; or the most
requests per second on the servers that there are."""

_COLUMNS = {
    "adapter": Column("text"),
    "rank": Column("integer", minimum=1),
    "rate_per_s": Column(minimum=0, exclusive=True),
    "cv": Column(required=False, minimum=0, exclusive=True),
    "replicas": Column("integer", required=False, minimum=1),
    "together": Column("text", required=False),
    "apart": Column("text", required=False),
}


class AdapterEntry(Model):
    """One adapter of an ``adapters`` list written into the fleet file."""

    adapter: str
    rank: Annotated[int, Number(minimum=1, maximum=MAX_RANK)]
    rate_per_s: Positive
    cv: Positive = ABSENT
    replicas: Count = ABSENT
    together: str = ""
    apart: str = ""


class AdapterTable(Model):
    """``adapters`` as a table: a CSV file beside the fleet file."""

    list: TableSource


class PoolEntry(Model):
    """One of ``pools``; server settings stand under vLLM's names."""

    name: str = ABSENT
    calibration: Annotated[Any, WithJsonSchema({"type": "string"})] = ABSENT
    model: str = ABSENT
    gpu: str = ABSENT
    tensor_parallel_size: Count = ABSENT
    quantization: str = ABSENT
    vllm_version: str = ABSENT
    most_servers: Count = ABSENT
    price_per_hour: Positive = ABSENT
    max_num_seqs: Count = ABSENT
    max_num_batched_tokens: Count = ABSENT
    max_model_len: Count = ABSENT
    block_size: Count = ABSENT
    gpu_memory_utilization: Annotated[float, Number(0, 1, exclusive=True)] = ABSENT


_DERIVED = ("model", "gpu", "tensor_parallel_size", "quantization", "vllm_version")
"""What a calibration is derived from, in place of ``calibration``."""

_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "gpu_memory_utilization")


def _adapters(content: object) -> object:
    if isinstance(content, ArrowStream | Interchange):
        content = {"list": content}
    if isinstance(content, Mapping):
        return validated(AdapterTable, content)
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise InputError("", briefly(content), "a list of adapters, or list: FILE.csv")
    return [validated(AdapterEntry, each, f"[{place}]") for place, each in enumerate(content)]


class FleetFile(Model):
    """What a fleet file has beside the keys of a workload file; its ``model_json_schema`` is their JSON schema."""

    adapters: Annotated[Any, PlainValidator(_adapters), WithJsonSchema({"type": ["array", "object"]})]
    pools: list[PoolEntry]
    objective: Literal["fewest-gpus", "cheapest", "balanced", "most-served"] = "fewest-gpus"
    headroom: Annotated[float, Number(minimum=0.1, maximum=100)] = 1.0
    survive: Annotated[int, Number(minimum=0, maximum=1)] = 0
    current: str = ABSENT
    max_moves: Annotated[int, Number(minimum=0)] = ABSENT


_OF_WORKLOAD = ("base_model", "requests", "arrivals", "goodput", "attainment", "horizon_s", "max_pending")
"""Keys of a workload file that mean the same in a fleet file, for every server alike."""


@dataclass(frozen=True)
class Pool:
    """Servers of one kind.

    Attributes:
        name: How answers call it; the calibration's name if the file gives none.
        calibration: Model, GPU and coefficients of each server.
        most_servers: How many there are at most; None: as many as needed.
        price_per_hour: Price of a server, in any currency; None where none is told.
        settings: Server settings that are given, by vLLM's names.
    """

    name: str
    calibration: Calibration
    most_servers: int | None = None
    price_per_hour: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs of a server."""
        return self.calibration.deployment.tensor_parallel_size


@dataclass(frozen=True, eq=False, repr=False)
class Fleet(Displayed):
    """Adapters to place, and servers to place them on.

    Attributes:
        names: Names of the adapters, all different, ``[adapters]``.
        rates_per_s: Requests per second of each, > 0, ``[adapters]``.
        ranks: Their ranks, ``[adapters]``.
        cvs: Coefficients of variation of the gaps between their requests, ``[adapters]``.
        replicas: Most servers that may share an adapter's requests, 0 for as many as it needs, ``[adapters]``.
        together: Names of groups whose adapters share a server, empty for none, ``[adapters]``.
        apart: Names of groups of which a server holds one adapter at most, empty for none, ``[adapters]``.
        pools: Kinds of servers.
        traffic: Lengths, arrivals, bounds and horizon of all requests; its adapters do not matter.
        objective: One of `OBJECTIVES`.
        headroom: Times its load that every server must still hold.
        survive: Servers that may fail with all adapters still served, 0 or 1.
        current: Name, pool and adapters of each server that runs now; None to start from nothing.
        max_moves: Most adapters that may leave a server that has them now; None for any number.

    Raises:
        InputError: If there are no adapters or pools, a name occurs twice, or options do not go together.
    """

    names: Sequence[str]
    rates_per_s: NDArray[np.float64]
    ranks: NDArray[np.int64]
    cvs: NDArray[np.float64]
    replicas: NDArray[np.int64]
    together: Sequence[str]
    apart: Sequence[str]
    pools: Sequence[Pool]
    traffic: Workload
    objective: str = "fewest-gpus"
    headroom: float = 1.0
    survive: int = 0
    current: Sequence[tuple[str, str, Sequence[str]]] | None = None
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if not self.pools:
            raise InputError("pools", "an empty list", "at least one pool of servers")
        check_distinct("adapters", self.names)
        if len({pool.name for pool in self.pools}) < len(self.pools):
            names = [pool.name for pool in self.pools]
            raise InputError("pools", next(name for name in names if names.count(name) > 1), "every name once")
        if self.objective == "cheapest":
            for place, pool in enumerate(self.pools):
                if pool.price_per_hour is None:
                    raise InputError(f"pools[{place}].price_per_hour", None, "a price, for objective: cheapest")
        if self.objective == "most-served" and any(pool.most_servers is None for pool in self.pools):
            raise InputError("pools", "no most_servers", "most_servers of every pool, for objective: most-served")
        if self.max_moves is not None and self.current is None:
            raise InputError("max_moves", self.max_moves, "only beside current, the placement that runs now")
        groups = [pair for pair in zip(self.together, self.apart, strict=True) if all(pair)]
        for pair in groups:
            if groups.count(pair) > 1:
                allowed = f"adapters of different groups of apart: two of {pair[1]!r} are in it"
                raise InputError("together", pair[0], allowed)

    @classmethod
    def of(cls, fleet: "FleetLike") -> "Fleet":
        """Return the fleet that something stands for: itself, or the path or the content of a fleet file.

        Raises:
            InputError: If it is none of these, or as for ``from_file``.
        """
        if isinstance(fleet, Fleet):
            return fleet
        if isinstance(fleet, Mapping):
            return cls.from_mapping(fleet)
        allowed = "a Fleet, or the path or the content of a fleet file"
        return cls.from_file(Path(check_type("fleet", fleet, (str, os.PathLike), allowed)))

    def _display(self) -> Display:
        pools = [
            {
                "pool": pool.name,
                "model": pool.calibration.model.name,
                "GPU": pool.calibration.gpu.name,
                "GPUs each": pool.gpus,
                "most servers": pool.most_servers,
                "price per hour": pool.price_per_hour,
            }
            for pool in self.pools
        ]
        rate = f"{shown(float(self.rates_per_s.sum()))} requests/s"
        return Display(f"{plural(len(self.names), 'adapter')}, {rate}; objective {self.objective}", rows=pools)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a fleet file, YAML or (by its name's ending) JSON, with the tables that it names beside it.

        Its keys are ``adapters``, ``pools``, ``objective``, ``headroom``, ``survive``, ``current``, ``max_moves``, and
        those of a workload file: ``requests``, ``arrivals``, ``goodput``, ``attainment``, ``horizon_s``,
        ``max_pending``.

        Args:
            path: The file.

        Raises:
            InputError: If a file, key or value cannot be used; names the first that cannot.
        """
        file = Path(path)
        return cls.from_mapping(read_mapping(file), base_dir=file.parent)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], base_dir: str | Path = ".") -> Self:
        """Build a fleet from the content of a fleet file.

        Args:
            mapping: The content; adapters may be a table in memory, as for `Workload.from_mapping`.
            base_dir: Folder that relative paths of tables start from.

        Raises:
            InputError: As for ``from_file``.
        """
        base_dir = Path(base_dir)
        check_keys("", mapping, (*FleetFile.model_fields, *_OF_WORKLOAD))
        file = validated(FleetFile, {key: value for key, value in mapping.items() if key not in _OF_WORKLOAD})
        traffic = _traffic({key: value for key, value in mapping.items() if key in _OF_WORKLOAD}, base_dir)
        columns = _table(file.adapters, base_dir)
        given_cv = np.asarray(columns["cv"], np.float64)
        return cls(
            names=tuple(columns["adapter"]),
            rates_per_s=np.asarray(columns["rate_per_s"], np.float64),
            ranks=np.asarray(columns["rank"], np.int64),
            cvs=np.where(np.isnan(given_cv), traffic.arrival_cv, given_cv),
            replicas=np.nan_to_num(np.asarray(columns["replicas"], np.float64)).astype(np.int64),
            together=tuple(columns["together"]),
            apart=tuple(columns["apart"]),
            pools=tuple(_pool(entry, place, base_dir) for place, entry in enumerate(file.pools)),
            traffic=traffic,
            objective=file.objective,
            headroom=file.headroom,
            survive=file.survive,
            current=None if file.current is None else read_placement(base_dir / file.current),
            max_moves=file.max_moves,
        )

    def with_traffic(self, **changed: Any) -> Self:
        """Return the fleet with other fields of its traffic, such as ``goodput``."""
        return replace(self, traffic=replace(self.traffic, **changed))


FleetLike = Fleet | Mapping[str, Any] | str | os.PathLike[str]
"""What `place` takes for a fleet."""


def pool_calibration(entry: PoolEntry, base_dir: Path) -> Calibration:
    """Return the calibration of a pool: a bundled one by name, a file beside the fleet file, or one that is derived.

    Raises:
        InputError: If it is none of these, or model or GPU is not known.
    """
    told = {name: getattr(entry, name) for name in _DERIVED if getattr(entry, name) is not None}
    given = entry.calibration
    if given is None and not told:
        raise InputError("model", None, "a calibration, or a model and a GPU to derive one from")
    if isinstance(given, str) and (base_dir / given).is_file():
        given = base_dir / given
    return load_calibration(given, **told)


def _pool(entry: PoolEntry, place: int, base_dir: Path) -> Pool:
    try:
        calibration = pool_calibration(entry, base_dir)
    except InputError as error:
        raise InputError(f"pools[{place}].{error.field}", error.value, error.allowed, error.remedy) from None
    settings = {name: getattr(entry, name) for name in _SETTINGS if getattr(entry, name) is not None}
    calibration.server(**settings)
    name = calibration.name if entry.name is None else entry.name
    return Pool(name, calibration, entry.most_servers, entry.price_per_hour, settings)


_REFUSED = {
    "trace": "lengths: a trace is of one server",
    "shared_prefix_tokens": "prompts that share nothing, in a fleet",
    "cached_share": "prompts that share nothing, in a fleet",
}
"""Keys of ``requests`` that mean nothing for a fleet."""


def _traffic(mapping: Mapping[str, Any], base_dir: Path) -> Workload:
    """Return what a fleet file says of requests; a workload has adapters too, here any, as the fleet has its own."""
    for name, allowed in _REFUSED.items():
        if isinstance(mapping.get("requests"), Mapping) and name in mapping["requests"]:
            raise InputError(f"requests.{name}", briefly(mapping["requests"][name]), allowed)
    if "base_model" in mapping:
        raise InputError("base_model", briefly(mapping["base_model"]), "requests to adapters only, in a fleet")
    if isinstance(mapping.get("arrivals"), Mapping) and "profile" in mapping["arrivals"]:
        raise InputError("arrivals.profile", briefly(mapping["arrivals"]["profile"]), "constant rates, in a fleet")
    return Workload.from_mapping({**mapping, "adapters": {"mix": {"rates_per_s": [1.0], "ranks": [1]}}}, base_dir)


def _table(adapters: AdapterTable | list[AdapterEntry], base_dir: Path) -> dict[str, Any]:
    """Return the columns of the adapters: numbers that are not told are NaN, text is empty."""
    if isinstance(adapters, AdapterTable):
        return {
            name: column.tolist()
            for name, column in read_table(located(base_dir, adapters.list, "adapters"), _COLUMNS).items()
        }
    rows = [entry.model_dump() for entry in adapters]
    return {name: [np.nan if row[name] is None else row[name] for row in rows] for name in _COLUMNS}


def read_placement(path: Path) -> list[tuple[str, str, list[str]]]:
    """Return name, pool and adapters of every server of a placement, as `Placement.to_dict` has it.

    Raises:
        InputError: If the file is no such placement, or the shares of an adapter do not add up to 1.
    """
    content = read_json(path, "a placement, as `place --format json` prints it")
    try:
        servers = [
            (
                str(server.get("name", f"server-{place}")),
                str(server["pool"]),
                [(str(each["adapter"]), float(each["share"])) for each in server["adapters"]],
            )
            for place, server in enumerate(content["servers"])
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        allowed = "servers: [{pool, adapters: [{adapter, share}]}]"
        raise InputError(str(path), "another content", allowed, "`place --format json` prints it") from None
    shares: dict[str, float] = {}
    for _, _, adapters in servers:
        for name, share in adapters:
            shares[name] = shares.get(name, 0.0) + share
    for name, share in shares.items():
        if abs(share - 1.0) > 1e-6:  # shares are printed in full; a few roundings add up to less
            raise InputError(f"{path}: shares of {name}", round(share, 6), "shares that add up to 1")
    return [(name, pool, [adapter for adapter, _ in adapters]) for name, pool, adapters in servers]
