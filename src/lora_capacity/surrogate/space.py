"""The space of workloads and servers that labels are made for: read from YAML, sampled evenly."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from lora_capacity.errors import InputError, check_keys, check_number
from lora_capacity.surrogate.questions import FloatArray, Questions
from lora_capacity.units import BYTES_PER_GIB, S_PER_HOUR
from lora_capacity.workload.files import load_mapping

Range = tuple[float, float]

_RANGES = {
    "rates_per_s": 0.0,
    "input_tokens": 1.0,
    "output_tokens": 1.0,
    "output_spread": 0.0,
    "kv_share": 0.0,
    "base_tokens_per_s": 0.0,
    "gpu_memory_utilization": 0.0,
}
_CHOICES = ("ranks", "gpu_memory_gib", "max_num_seqs", "max_num_batched_tokens")
_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Space:
    """Ranges and choices; the default covers the workloads of arXiv 2508.08343 and goes beyond them.

    Attributes:
        adapters_in_turn: Rates and ranks dealt in turn to the adapters, each drawn by itself.
        rates_per_s: Request rate of an adapter; even in the logarithm.
        ranks: Ranks to draw from.
        input_tokens: Mean prompt length; even in the logarithm.
        output_tokens: Mean answer length; even in the logarithm.
        output_spread: Standard deviation of the answer length over its mean.
        kv_share: Tokens that a running request holds, over what independent prompt and answer lengths would make it
            hold: below 1 where long prompts get short answers.
        base_tokens_per_s: Traffic without an adapter; half of the workloads have none, the others up to the maximum.
        gpu_memory_gib: Memories of the GPU to draw from.
        gpu_memory_utilization: Share of it that the server plans with.
        max_num_seqs: Values to draw from; at most ``max_num_batched_tokens``.
        max_num_batched_tokens: Values to draw from.
        max_pending: Unanswered requests that clients hold; None: unbounded.
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
        return cls.from_mapping(load_mapping(Path(path)))

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

    def sample(self, count: int, seed: int = 0) -> Questions:
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
        turn = self.adapters_in_turn
        sequence = qmc.Sobol(2 * turn + 9, seed=np.random.default_rng(seed))
        unit = sequence.random_base2(max(int(count - 1).bit_length(), 1))[:count].T
        rates = _log_even(self.rates_per_s, unit[:turn]).T
        input_tokens, output_tokens = (
            _log_even(bounds, unit[2 * turn + place])
            for place, bounds in enumerate((self.input_tokens, self.output_tokens))
        )
        spread = _even(self.output_spread, unit[2 * turn + 2])
        budget = _pick(self.max_num_batched_tokens, unit[2 * turn + 7])
        held = input_tokens + 0.5 * output_tokens * (1.0 + spread**2)
        base_tokens_per_s = _even(self.base_tokens_per_s, np.maximum(2.0 * unit[2 * turn + 4] - 1.0, 0.0))
        has_base = (unit[2 * turn + 4] > 0.5) | (self.base_tokens_per_s[0] > 0)
        return Questions(
            rates_per_s=-np.sort(-rates, axis=1),
            ranks=_pick(self.ranks, unit[turn : 2 * turn]).T,
            most_adapters=np.full(count, np.inf),
            base_rate_per_s=np.where(has_base, base_tokens_per_s / (input_tokens + output_tokens), 0.0),
            mean_input_tokens=input_tokens,
            mean_output_tokens=output_tokens,
            output_spread=spread,
            kv_tokens_per_request=held * _even(self.kv_share, unit[2 * turn + 3]) + 0.5 * _BLOCK_TOKENS,
            gpu_memory_bytes=np.rint(_pick(self.gpu_memory_gib, unit[2 * turn + 5]) * BYTES_PER_GIB),
            gpu_memory_utilization=_even(self.gpu_memory_utilization, unit[2 * turn + 6]),
            max_num_seqs=np.minimum(_pick(self.max_num_seqs, unit[2 * turn + 8]), budget),
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


def _even(bounds: Range, unit: NDArray[Any]) -> FloatArray:
    return np.asarray(bounds[0] + (bounds[1] - bounds[0]) * unit)


def _log_even(bounds: Range, unit: NDArray[Any]) -> FloatArray:
    return np.asarray(bounds[0] * (bounds[1] / bounds[0]) ** unit)


def _pick(values: tuple[float, ...], unit: NDArray[Any]) -> FloatArray:
    return np.asarray(np.array(values, np.float64)[np.minimum((unit * len(values)).astype(int), len(values) - 1)])
