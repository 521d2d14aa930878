"""Catalogue of processors: what a server's memory and arithmetic reach, where no measurement tells."""

import difflib
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_capacity.errors import InputError
from lora_capacity.hardware.gpu import Gpu
from lora_capacity.tables import Column, read_table
from lora_capacity.units import BYTES_PER_GIB

_TABLE = Path(__file__).with_name("gpus.csv")
_RATES = {  # columns of the table by type of number
    "bfloat16": "bfloat16_tflops",
    "float16": "float16_tflops",
    "fp8": "fp8_tflops",
    "int8": "int8_tops",
    "fp4": "fp4_tflops",
}
_COLUMNS = {
    "name": Column("text"),
    "aliases": Column("text"),
    "memory_gib": Column(),
    "bandwidth_gb_per_s": Column(),
    **{column: Column(blank=True) for column in _RATES.values()},
    "compute_capability": Column("text", blank=True),
    "multiprocessors": Column(blank=True),
    "boost_mhz": Column(blank=True),
    "interconnect": Column("text"),
    "link_gb_per_s": Column(),
    "source": Column("text"),
}
_NEAREST = 3
"""Names that are told of a GPU that is not known."""

_MAKERS = re.compile(r"nvidia|geforce|tesla|quadro|amd|instinct|intel|graphics")


@dataclass(frozen=True)
class Processor:
    """What one GPU, or the processors of one CPU server, can do.

    Attributes:
        name: What it is called.
        memory_bytes: Memory that the driver reports as its total, bytes; None where that differs too much to tell.
        bandwidth_bytes_per_s: Bytes read from memory per second.
        flop_per_s: Floating-point or integer operations per second by type of number, without sparsity.
        link_bytes_per_s: Bytes per second to and from other GPUs of the server, both ways together; None without link.
        source: Where the numbers are from.
        aliases: Other names of it, as drivers and shops have them.
        compute_capability: CUDA's version of its instructions, major and minor; None of other makers' GPUs.
        multiprocessors: Streaming multiprocessors, or compute units; None where that is not published.
        clock_hz: Highest clock that the maker states, cycles per second.
        interconnect: What links it to other GPUs.
    """

    name: str
    memory_bytes: int | None
    bandwidth_bytes_per_s: float
    flop_per_s: Mapping[str, float]
    link_bytes_per_s: float | None
    source: str
    aliases: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    clock_hz: float | None = None
    interconnect: str = ""

    @property
    def gpu(self) -> Gpu:
        """The GPU that memory is planned for.

        Raises:
            ValueError: If its memory is not known.
        """
        if self.memory_bytes is None:
            raise ValueError(f"{self.name} has no memory of its own")
        return Gpu(self.name, self.memory_bytes)


DATA_CENTRE_GPU = Processor(
    name="data-centre GPU",
    memory_bytes=None,
    bandwidth_bytes_per_s=2.0e12,
    flop_per_s={"bfloat16": 3.5e14},
    link_bytes_per_s=None,
    source="order of magnitude that serving reaches on a large GPU: about a third of an H100's peak in matrix products",
)
"""Any large GPU, as far as serving reaches: what priors of coefficients are derived from."""

CPU_SERVER = Processor(
    name="CPU server",
    memory_bytes=None,
    bandwidth_bytes_per_s=2.0e10,
    flop_per_s={},
    link_bytes_per_s=None,
    source="order of magnitude of two memory channels",
)
"""Any CPU server: CPUs differ so much that their own step times set the scale of all else."""


@functools.cache
def catalogue() -> Mapping[str, Processor]:
    """Return the GPUs that the catalogue knows, by name."""
    table = read_table(_TABLE, _COLUMNS)
    rows = (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))
    return MappingProxyType({row["name"]: _processor(row) for row in rows})


def find_gpu(name: str) -> Processor:
    """Return the GPU of a name or alias; case, blanks, dashes and the maker's name do not matter.

    Args:
        name: As in the catalogue (``L4``), of a driver (``NVIDIA A100-SXM4-80GB``) or a shop (``GeForce RTX 4090``).

    Raises:
        InputError: If the catalogue does not know it; the nearest names are told.
    """
    known = {_key(each): found for found in catalogue().values() for each in (found.name, *found.aliases)}
    found = known.get(_key(name))
    if found is None:
        key = _key(name)
        alike = [each for each in known if key and each.startswith(key)]
        alike += difflib.get_close_matches(key, known, n=2 * _NEAREST, cutoff=0.5)
        nearest = list(dict.fromkeys(known[each].name for each in alike))[:_NEAREST]
        remedy = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(catalogue())}"
        raise InputError("gpu", name, "the name of a GPU in the catalogue", remedy)
    return found


def same_gpu(one: str, other: str) -> bool:
    """Return whether two names are of one GPU: alike but for case, blanks, dashes and the maker, or aliases."""
    if _key(one) == _key(other):
        return True
    try:
        return find_gpu(one) == find_gpu(other)
    except InputError:  # one that the catalogue does not know
        return False


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name.lower()))


def _processor(row: Mapping[str, Any]) -> Processor:
    """Return what a row of the table tells, in this library's units."""
    capability = row["compute_capability"]
    return Processor(
        name=row["name"],
        memory_bytes=int(row["memory_gib"] * BYTES_PER_GIB),
        bandwidth_bytes_per_s=float(row["bandwidth_gb_per_s"] * 1e9),
        flop_per_s={kind: float(row[column] * 1e12) for kind, column in _RATES.items() if not math.isnan(row[column])},
        link_bytes_per_s=float(row["link_gb_per_s"] * 1e9),
        source=row["source"],
        aliases=tuple(row["aliases"].split(";")),
        compute_capability=(int(capability.split(".")[0]), int(capability.split(".")[1])) if capability else None,
        multiprocessors=None if math.isnan(row["multiprocessors"]) else int(row["multiprocessors"]),
        clock_hz=None if math.isnan(row["boost_mhz"]) else float(row["boost_mhz"] * 1e6),
        interconnect=row["interconnect"],
    )
