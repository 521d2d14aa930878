"""Coefficients as data: what each one costs, its unit, source and prior.

A coefficient is a field of `StepCosts`, `LoadCosts` or `FrontEndCosts`; all else that a reader, a fit or a file needs
to know of it stands there too, so that a term is added in one place. Priors are lognormal and decide only what
measurements leave open, such as the rank's share when all adapters had one rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol

from lora_capacity.models import ModelShape

_UNITS = {"_s": "s", "_factor": "1"}
"""Unit by the end of a coefficient's name."""


class Prior(NamedTuple):
    """Where a coefficient is believed to lie before it is fitted.

    Attributes:
        centre: Median.
        spread: Standard deviation of the logarithm.
    """

    centre: float
    spread: float


class PriorBasis(Protocol):
    """What priors are derived from: shapes, hardware, and a profile's own step times by straight lines."""

    @property
    def model(self) -> ModelShape:
        """Layer shapes."""

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes read from memory per second."""

    @property
    def flop_per_s(self) -> float:
        """Floating-point operations per second in matrix products."""

    @property
    def base_s(self) -> float:
        """A step without tokens in a server without adapters."""

    @property
    def token_s(self) -> float:
        """Each token of such a step."""

    @property
    def lora_s(self) -> float:
        """What a step without tokens takes longer in a server with adapters."""

    @property
    def lora_token_s(self) -> float:
        """What each token takes longer in a server with adapters."""

    @property
    def max_lora_rank(self) -> float:
        """Usual rank that slots were reserved for."""

    @property
    def host_to_gpu_load_s(self) -> float:
        """Usual time of a load into a slot."""

    @property
    def tells_prefill(self) -> bool:
        """Whether prompts of different lengths were timed."""


MakePrior = Callable[[PriorBasis], Prior]


@dataclass(frozen=True)
class Coefficient:
    """One coefficient of the cost model.

    Attributes:
        name: Its name, in code and in calibration files.
        group: ``step``, ``loads`` or ``front_end``: what it is a cost of.
        meaning: What it is the cost of, in words.
        source: Where the form of its term, or its prior, is from; empty where that is plain.
        priors: Prior by device; a device that is not there does without the coefficient, or measures it directly.
        usual: Those of them that are the same for every model and processor.
    """

    name: str
    group: str
    meaning: str
    source: str
    priors: Mapping[str, MakePrior]
    usual: Mapping[str, Prior]

    @property
    def unit(self) -> str:
        """Unit of the coefficient."""
        return unit_of(self.name)


def coefficient(
    meaning: str,
    *,
    source: str = "",
    gpu: MakePrior | Prior | None = None,
    cpu: MakePrior | Prior | None = None,
    optional: bool = False,
) -> Any:
    """Return a dataclass field that is a coefficient.

    Args:
        meaning: What it is the cost of.
        source: Where the form of its term, or its prior, is from.
        gpu: Prior on a GPU, or how it follows from a profile; None: a GPU does without it.
        cpu: The same of a CPU.
        optional: Whether a calibration may leave it out; it is then 0.
    """
    given = {"gpu": gpu, "cpu": cpu}
    priors = {device: _maker(prior) for device, prior in given.items() if prior is not None}
    usual = {device: prior for device, prior in given.items() if isinstance(prior, Prior)}
    metadata = {"meaning": meaning, "source": source, "priors": priors, "usual": usual}
    return field(metadata=metadata, default=0.0) if optional else field(metadata=metadata)


def coefficients_of(cls: Any, group: str) -> tuple[Coefficient, ...]:
    """Return the coefficients that are the fields of a dataclass."""
    return tuple(
        Coefficient(entry.name, group, **{key: entry.metadata[key] for key in ("meaning", "source", "priors", "usual")})
        for entry in fields(cls)
    )


def unit_of(name: str) -> str:
    """Return the unit of a coefficient, which the end of its name tells."""
    return next(unit for ending, unit in _UNITS.items() if name.endswith(ending))


def _maker(prior: MakePrior | Prior) -> MakePrior:
    return (lambda _: prior) if isinstance(prior, Prior) else prior
