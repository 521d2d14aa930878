"""Space of workloads and servers that labels are made for: read from YAML, sampled evenly."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from scipy.stats import qmc

from lora_capacity.errors import InputError, check_keys, check_number
from lora_capacity.reading import read_mapping
from lora_capacity.scenarios.workload_batch import WorkloadBatch
from lora_capacity.units import BYTES_PER_GIB, S_PER_HOUR

Range = tuple[float, float]

_RANGES = {  # with the smallest value allowed
    "rates_per_s": 0.0,
    "input_tokens": 1.0,
    "output_tokens": 1.0,
    "output_spread": 0.0,
    "kv_share": 0.0,
    "base_tokens_per_s": 0.0,
    "gpu_memory_utilization": 0.0,
}
_CHOICES = ("ranks", "gpu_memory_gib", "max_num_seqs", "max_num_batched_tokens")
_OTHER_AXES = 9
"""Axes of the space besides rates and ranks."""

BLOCK_TOKENS = 16
"""Tokens of a KV block by vLLM's default (``CacheConfig.block_size``), half of which a request leaves empty."""


@dataclass(frozen=True)
class Space:
    """Ranges and choices of workloads and servers; the default covers those of arXiv 2508.08343 and goes beyond.

    Attributes:
        adapters_in_turn: Rates and ranks assigned round-robin to the adapters, each drawn by itself.
        rates_per_s: Request rate of an adapter; even in the logarithm.
        ranks: Ranks to draw from.
        input_tokens: Mean prompt length; even in the logarithm.
        output_tokens: Mean output length; even in the logarithm.
        output_spread: Standard deviation of the output length over its mean.
        kv_share: Tokens that a running request holds, over what independent prompt and output lengths would make it
            hold: below 1 where long prompts have short outputs.
        base_tokens_per_s: Traffic without an adapter; half of the workloads have none, the others up to the maximum.
        gpu_memory_gib: Memories of the GPU to draw from.
        gpu_memory_utilization: Share of it that the server plans with.
        max_num_seqs: Values to draw from; at most ``max_num_batched_tokens``.
        max_num_batched_tokens: Values to draw from.
        max_pending: Most in-flight requests of all clients; None: unbounded.
        horizon_s: Time observed.

    Raises:
        InputError: If a range or a choice is not allowed.
    """

    adapters_in_turn: int = 3
    rates_per_s: Range = (0.003, 3.5)
    ranks: tuple[float, ...] = (8, 16, 32, 64)
    input_tokens: Range = (60, 800)
    output_tokens: Range = (40, 500)
    output_spread: Range = (0.5, 1.3)
    kv_share: Range = (0.75, 1.0)
    base_tokens_per_s: Range = (0, 3000)
    gpu_memory_gib: tuple[float, ...] = (63.43, 80, 94, 141)
    gpu_memory_utilization: Range = (0.8, 0.95)
    max_num_seqs: tuple[float, ...] = (256, 512, 1024, 2048)
    max_num_batched_tokens: tuple[float, ...] = (2048, 4096, 8192)
    max_pending: float | None = 26000
    horizon_s: float = S_PER_HOUR

    def __post_init__(self) -> None:
        check_number("adapters_in_turn", self.adapters_in_turn, minimum=1, maximum=16, integer=True)
        for name, minimum in _RANGES.items():
            object.__setattr__(self, name, _range(name, getattr(self, name), minimum))
        for name in _CHOICES:
            object.__setattr__(self, name, _choice(name, getattr(self, name)))
        check_number("gpu_memory_utilization", self.gpu_memory_utilization[1], maximum=1)
        if self.max_pending is not None:
            check_number("max_pending", self.max_pending, minimum=1, integer=True)
        check_number("horizon_s", self.horizon_s, minimum=0, exclusive=True)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a space from YAML or JSON; keys that are left out keep their defaults.

        Raises:
            InputError: If the file cannot be read, a key is unknown or a value not allowed.
        """
        return cls.from_mapping(read_mapping(Path(path)))

    @classmethod
    def from_mapping(cls, content: object) -> Self:
        """Build a space from the content of its file: ranges as ``{min: …, max: …}``, choices as lists.

        Raises:
            InputError: As `from_file`.
        """
        if not isinstance(content, Mapping):
            raise InputError("space", type(content).__name__, "a mapping")
        check_keys("", content, [entry.name for entry in dataclasses.fields(cls)])
        given: dict[str, Any] = {
            name: _bounds(name, value) if name in _RANGES else value for name, value in content.items()
        }
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a space's file."""
        content = dataclasses.asdict(self)
        for name in _RANGES:
            low, high = content[name]
            content[name] = {"min": low, "max": high}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}

    def sample(self, count: int, seed: int = 0) -> WorkloadBatch:
        """Return workloads on servers that fill the space evenly.

        The first of them are the same whatever the count. They are points of a scrambled Sobol sequence: of any range
        or choice, and of any two together, every part is met about as often as it is wide.

        Args:
            count: How many, at least 1.
            seed: Whole number >= 0 that decides the scrambling.

        Raises:
            InputError: If a number is not allowed.
        """
        count = int(check_number("workloads", count, minimum=1, maximum=2**20, integer=True))
        seed = int(check_number("seed", seed, minimum=0, integer=True))
        size = self.adapters_in_turn
        sequence = qmc.Sobol(2 * size + _OTHER_AXES, seed=np.random.default_rng(seed))
        unit = sequence.random_base2(max(int(count - 1).bit_length(), 1))[:count].T
        rates, ranks = _log_even(self.rates_per_s, unit[:size]).T, _pick(self.ranks, unit[size : 2 * size]).T
        # The order of the axes decides what a seed draws.
        *lengths, at_spread, at_kv_share, at_base, at_memory, at_share, at_budget, at_seqs = unit[2 * size :]
        input_tokens, output_tokens = map(_log_even, (self.input_tokens, self.output_tokens), lengths)
        spread = _even(self.output_spread, at_spread)
        budget = _pick(self.max_num_batched_tokens, at_budget)
        held = input_tokens + 0.5 * output_tokens * (1.0 + spread**2)
        base_tokens_per_s = _even(self.base_tokens_per_s, np.maximum(2.0 * at_base - 1.0, 0.0))
        has_base = (at_base > 0.5) | (self.base_tokens_per_s[0] > 0)
        return WorkloadBatch(
            rates_per_s=-np.sort(-rates, axis=1),
            ranks=ranks,
            most_adapters=np.full(count, np.inf),
            base_rate_per_s=np.where(has_base, base_tokens_per_s / (input_tokens + output_tokens), 0.0),
            mean_input_tokens=input_tokens,
            mean_output_tokens=output_tokens,
            output_spread=spread,
            kv_tokens_per_request=held * _even(self.kv_share, at_kv_share) + 0.5 * BLOCK_TOKENS,
            gpu_memory_bytes=np.rint(_pick(self.gpu_memory_gib, at_memory) * BYTES_PER_GIB),
            gpu_memory_utilization=_even(self.gpu_memory_utilization, at_share),
            max_num_seqs=np.minimum(_pick(self.max_num_seqs, at_seqs), budget),
            max_num_batched_tokens=budget,
            max_pending=np.full(count, np.inf if self.max_pending is None else self.max_pending),
            horizon_s=np.full(count, self.horizon_s),
        )


def _bounds(name: str, value: object) -> tuple[Any, Any]:
    if not isinstance(value, Mapping) or set(value) != {"min", "max"}:
        raise InputError(name, value, "a range such as {min: 1, max: 2}")
    return value["min"], value["max"]


def _range(name: str, value: tuple[Any, Any], minimum: float) -> Range:
    low = check_number(f"{name}.min", value[0], minimum=minimum, exclusive=name == "rates_per_s")
    return float(low), float(check_number(f"{name}.max", value[1], minimum=low))


def _choice(name: str, value: object) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
        raise InputError(name, value, "a list of numbers > 0")
    whole = name != "gpu_memory_gib"
    return tuple(
        check_number(f"{name}[{i}]", each, minimum=0, exclusive=True, integer=whole) for i, each in enumerate(value)
    )


def _even(bounds: Range, unit: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.asarray(bounds[0] + (bounds[1] - bounds[0]) * unit)


def _log_even(bounds: Range, unit: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.asarray(bounds[0] * (bounds[1] / bounds[0]) ** unit)


def _pick(values: tuple[int | float, ...], unit: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    return np.asarray(np.array(values, np.float64)[np.minimum((unit * len(values)).astype(int), len(values) - 1)])
