"""Priors of a profile's coefficients: `lora_capacity.costs` says how they follow from what stands here."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from lora_capacity.costs import COEFFICIENTS, Prior
from lora_capacity.hardware.catalogue import CPU_SERVER, DATA_CENTRE_GPU, Processor
from lora_capacity.measurements import Profile
from lora_capacity.models import ModelShape


def fitted_names(device: str, *, of_front_end: bool = False) -> tuple[str, ...]:
    """Return the coefficients that are fitted for a device, in order; it has no others but those that are just told.

    Args:
        device: ``gpu`` or ``cpu``.
        of_front_end: Those of the front end, in place of the engine's.
    """
    return tuple(
        each.name for each in COEFFICIENTS if device in each.priors and (each.group == "front_end") == of_front_end
    )


def priors(profile: Profile) -> dict[str, Prior]:
    """Return the prior of every coefficient that is fitted for the profile's device, the front end's too."""
    basis = ProfileBasis(profile)
    return {each.name: each.priors[profile.device](basis) for each in COEFFICIENTS if profile.device in each.priors}


@dataclass(frozen=True)
class ProfileBasis:
    """What a profile tells that priors are derived from: a `lora_capacity.costs.PriorBasis`."""

    profile: Profile

    @property
    def _processor(self) -> Processor:
        return DATA_CENTRE_GPU if self.profile.device == "gpu" else CPU_SERVER

    @cached_property
    def _bare(self) -> tuple[float, float]:
        return _line(self.profile.decode["batch"], self.profile.decode["step_s"])

    @cached_property
    def _lora(self) -> tuple[float, float]:
        return _line(self.profile.adapters["running"], self.profile.adapters["step_s"])

    @property
    def model(self) -> ModelShape:
        """Layer shapes."""
        return self.profile.model

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes read from memory per second."""
        return self._processor.bandwidth_bytes_per_s

    @property
    def flop_per_s(self) -> float:
        """Floating-point operations per second in matrix products."""
        return self._processor.flop_per_s["bfloat16"]

    @property
    def base_s(self) -> float:
        """A step without tokens in a server without adapters."""
        return self._bare[0]

    @property
    def token_s(self) -> float:
        """Each token of such a step."""
        return self._bare[1]

    @property
    def lora_s(self) -> float:
        """What a step without tokens takes longer in a server with adapters."""
        return self._lora[0] - self.base_s

    @property
    def lora_token_s(self) -> float:
        """What each token takes longer in a server with adapters."""
        return self._lora[1] - self.token_s

    @property
    def max_lora_rank(self) -> float:
        """Median rank that slots were reserved for."""
        return float(np.median(self.profile.adapters["max_lora_rank"]))

    @property
    def host_to_gpu_load_s(self) -> float:
        """Median time of a load into a slot."""
        return float(np.median(self.profile.loading["host_to_gpu_load_s"]))

    @property
    def tells_prefill(self) -> bool:
        """Whether prompts of different lengths were timed."""
        return self.profile.tells_prefill


def _line(batch: Float[np.ndarray, " steps"], step_s: Float[np.ndarray, " steps"]) -> tuple[float, float]:
    """Return a step's time without tokens and the time of a token by a straight line.

    Both are positive, as logarithms are taken: at least a tenth of the shortest step, and what adds a thousandth of it
    over the largest batch.
    """
    slope, start = np.polyfit(batch, step_s, 1) if np.unique(batch).size > 1 else (0.0, float(step_s.min()))
    least_s = float(step_s.min())
    return max(float(start), 0.1 * least_s), max(float(slope), 1e-3 * least_s / float(batch.max()))
