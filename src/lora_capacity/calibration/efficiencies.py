"""What GPUs and vLLM reach of data sheets: few numbers, shared by all models and GPUs, each with how sure it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from lora_capacity.costs import Prior
from lora_capacity.errors import InputError, check_keys, check_number
from lora_capacity.files import write_whole
from lora_capacity.reading import read_json

BUNDLED_EFFICIENCIES = Path(__file__).parent / "efficiencies.json"
"""What ``lora-capacity fit`` wrote of a table of public speeds."""

FIRST_GUESSES: Mapping[str, tuple[Prior, str]] = {
    "weight_bandwidth_share": (Prior(0.85, 0.10), "share of the bandwidth at which weights are read"),
    "packed_bandwidth_share": (Prior(0.75, 0.20), "the same of 4-bit weights, which are unpacked on the way"),
    "expert_bandwidth_share": (Prior(0.60, 0.30), "the same of the experts of a mixture"),
    "kv_bandwidth_share": (Prior(0.90, 0.20), "the same of keys and values that attention reads"),
    "head_cycles": (Prior(15.0, 0.30), "cycles for a query head of 128 numbers and a token of context"),
    "matmul_share": (Prior(0.40, 0.30), "share of the FLOP/s that prompts reach in matrix products"),
    "unhidden_share": (Prior(0.30, 0.40), "of a decode token's products, what is not hidden behind reading weights"),
    "engine_step_s": (Prior(2.0e-3, 0.40), "engine loop of a step, of versions that schedule between steps"),
    "async_share": (Prior(0.40, 0.40), "what is left of it where a step is scheduled while the last one runs"),
    "layer_s": (Prior(30e-6, 0.40), "launches and small kernels of a decoder layer"),
    "expert_layer_s": (Prior(25e-6, 0.50), "routing to experts, in a layer that has them"),
    "eager_layer_s": (Prior(200e-6, 0.40), "launching a layer's kernels without CUDA graphs"),
    "sequence_s": (Prior(20e-6, 0.50), "sampling and bookkeeping of a sequence"),
    "message_s": (Prior(8e-6, 0.50), "an all-reduce of a few bytes over NVLink"),
    "pcie_message_s": (Prior(40e-6, 0.50), "the same over PCIe"),
    "link_share": (Prior(0.40, 0.50), "share of the link's bandwidth that large all-reduces reach"),
    "lora_kernel_s": (Prior(6e-6, 0.40), "a LoRA kernel without work"),
    "lora_bandwidth_share": (Prior(0.80, 0.30), "share of the bandwidth at which LoRA kernels move activations"),
    "expand_block_cycles": (Prior(250.0, 0.40), "cycles of a multiprocessor for an empty block of the expand kernel"),
    "shrink_block_cycles": (Prior(110.0, 0.40), "the same of the shrink kernel"),
    "adapter_tile_cycles": (Prior(5400.0, 0.50), "cycles for a tile of the expand kernel whose adapter has tokens"),
    "adapter_rank_cycles": (Prior(6000.0, 0.50), "cycles for a unit of rank of a matrix that shrinks, with 64 splits"),
    "adapter_tensor_s": (Prior(10e-6, 0.60), "copying one matrix of an adapter to the GPU"),
    "disk_tensor_s": (Prior(40e-6, 1.00), "reading one matrix of an adapter from disk, whatever its size"),
    "disk_bytes_per_s": (Prior(4e9, 0.80), "reading adapters from disk"),
}
"""Median and spread of the logarithm before any speed is seen, and what each is.

Source: orders of magnitude of data sheets and of the published H100 profiles (arXiv 2508.08343)."""


@dataclass(frozen=True)
class Efficiencies:
    """Efficiencies with their distribution: lognormal, correlated.

    Attributes:
        values: Median by name, one of `FIRST_GUESSES`.
        covariance: Of their logarithms, in the order of `FIRST_GUESSES`, ``[efficiencies, efficiencies]``.
        step_spread: Standard deviation of the logarithm of a step time that they leave unexplained: machines, versions
            and models differ.
        source: What they were fitted to.
    """

    values: Mapping[str, float]
    covariance: Float[np.ndarray, "efficiencies efficiencies"]
    step_spread: float
    source: str

    @property
    def spreads(self) -> list[float]:
        """Standard deviations of their logarithms."""
        spreads: list[float] = np.sqrt(np.diag(self.covariance)).tolist()
        return spreads

    @classmethod
    def first_guess(cls) -> Self:
        """Return what is believed before any speed is seen."""
        spreads = np.array([prior.spread for prior, _ in FIRST_GUESSES.values()])
        values = {name: prior.centre for name, (prior, _) in FIRST_GUESSES.items()}
        return cls(values, np.diag(spreads**2), 0.2, "first guesses")

    @classmethod
    def bundled(cls) -> Self:
        """Return the efficiencies that come with this library."""
        return cls.from_file(BUNDLED_EFFICIENCIES)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If there is no such file, or it holds something else.
        """
        where = f"{path}:"
        content = read_json(path, "a file of efficiencies")
        if not isinstance(content, Mapping):
            raise InputError(str(path), type(content).__name__, "a JSON object")
        check_keys(where, content, [entry.name for entry in fields(cls)])
        names, told = list(FIRST_GUESSES), content.get("values")
        if not isinstance(told, Mapping) or list(told) != names:
            raise InputError(f"{where} values", "other keys", f"the keys {', '.join(names)}, in this order")
        values = {
            name: check_number(f"{where} {name}", value, minimum=0, exclusive=True) for name, value in told.items()
        }
        rows = content.get("covariance")
        if not isinstance(rows, list) or [isinstance(row, list) and len(row) for row in rows] != [len(names)] * len(
            names
        ):
            raise InputError(f"{where} covariance", "another shape", f"{len(names)} lists of {len(names)} numbers")
        covariance = np.array([[check_number(f"{where} covariance", each) for each in row] for row in rows])
        spread = check_number(f"{where} step_spread", content.get("step_spread"), minimum=0)
        return cls(values, covariance, spread, str(content.get("source", "")))

    def save(self, path: str | Path) -> None:
        """Write the file."""
        content: dict[str, Any] = {
            "values": {name: float(f"{value:.4g}") for name, value in self.values.items()},
            "covariance": [[round(float(each), 5) for each in row] for row in self.covariance],
            "step_spread": round(self.step_spread, 4),
            "source": self.source,
        }
        lines = json.dumps(content, indent=1)
        write_whole(Path(path), lines + "\n")
