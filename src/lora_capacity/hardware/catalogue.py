"""Catalogue of processors: what a server's memory and arithmetic reach, where no measurement tells."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_capacity.hardware.gpu import Gpu


@dataclass(frozen=True)
class Processor:
    """What one GPU, or the processors of one CPU server, can do.

    Attributes:
        name: What it is called.
        memory_bytes: Memory that the driver reports as its total, bytes; None where that differs too much to tell.
        bandwidth_bytes_per_s: Bytes read from memory per second.
        flop_per_s: Floating-point operations per second by type of number.
        link_bytes_per_s: Bytes per second to and from other GPUs of the server, both ways together; None without link.
        source: Where the numbers are from.
    """

    name: str
    memory_bytes: int | None
    bandwidth_bytes_per_s: float
    flop_per_s: Mapping[str, float]
    link_bytes_per_s: float | None
    source: str

    @property
    def gpu(self) -> Gpu:
        """The GPU that memory is planned for.

        Raises:
            ValueError: If its memory is not known.
        """
        if self.memory_bytes is None:
            raise ValueError(f"{self.name} has no memory of its own")
        return Gpu(self.name, self.memory_bytes)


H100_64GB = Processor(
    name="H100-64GB",
    memory_bytes=68_107_443_896,
    bandwidth_bytes_per_s=2.0e12,
    flop_per_s={"bfloat16": 9.89e14, "float16": 9.89e14, "fp8": 1.979e15},
    link_bytes_per_s=9.0e11,
    source="memory: 63.43 GiB by the logs of the published runs (arXiv 2508.08343); arithmetic and link: NVIDIA's H100 "
    "SXM data sheet, without sparsity; bandwidth: of the order that the published decode steps need, as no data sheet "
    "has this variant",
)

H100_80GB = Processor(
    name="H100-80GB",
    memory_bytes=80 * 10**9,
    bandwidth_bytes_per_s=3.35e12,
    flop_per_s={"bfloat16": 9.89e14, "float16": 9.89e14, "fp8": 1.979e15},
    link_bytes_per_s=9.0e11,
    source="NVIDIA's H100 SXM data sheet, without sparsity; drivers report some more memory than 80 GB",
)

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

CATALOGUE: Mapping[str, Processor] = {each.name: each for each in (H100_64GB, H100_80GB)}
"""GPUs by name."""
